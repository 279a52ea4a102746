"""A resumed run is the run that was interrupted, bit by bit: from any step, by every way of saving, after a kill."""

from __future__ import annotations

import contextlib
import copy
import functools
import gc
import json
import multiprocessing
import os
import random
import re
import signal
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from peft import PeftModel, get_peft_model, set_peft_model_state_dict
from peft.utils import load_peft_weights
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments, get_scheduler
from transformers.trainer_utils import get_last_checkpoint

from spectral_peft import SCTConfig, SSTConfig
from tests.methods import METHODS, SST, Method
from tests.models import batch, llama, trainable


STEPS = 6
"""With the schedule of SST in the table, a swap every 2 and an SVD every 4, this ends within a round."""


class Run:
    """A model, its optimizer and scheduler in a loop of one's own, with dropout so that random numbers matter."""

    def __init__(self, model: nn.Module, lr: float) -> None:
        self.model, self.losses = model.train(), []
        self.optimizer = torch.optim.AdamW(trainable(model), lr=lr, weight_decay=0.01)
        self.scheduler = get_scheduler("cosine", self.optimizer, num_warmup_steps=2, num_training_steps=STEPS)

    def train_to(self, last: int) -> None:
        for step in range(self.scheduler.last_epoch, last):
            loss = self.model(input_ids=batch(step), labels=batch(step)).loss
            loss.backward()
            self.optimizer.step()
            self.scheduler.step()
            self.optimizer.zero_grad()
            self.losses.append(loss.item())

    def state(self) -> dict[str, Any]:
        return {
            "optimizer": copy.deepcopy(self.optimizer.state_dict()),
            "scheduler": copy.deepcopy(self.scheduler.state_dict()),
            "rng": torch.get_rng_state(),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        torch.set_rng_state(state["rng"])


def new_model(method: Method, **fields: object) -> PeftModel:
    return get_peft_model(llama(), method(dropout=0.1, **fields))


def assert_same(one: Any, other: Any) -> None:
    """Equal bit by bit: tensors, and what they are kept in."""
    assert type(one) is type(other)
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_same(one[key], other[key])
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other)
        for first, second in zip(one, other, strict=True):
            assert_same(first, second)
    elif isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)
    else:
        assert one == other


def by_from_pretrained(method: Method, folder: Path) -> PeftModel:
    return PeftModel.from_pretrained(llama(), folder, is_trainable=True)


def by_set_peft_model_state_dict(method: Method, folder: Path) -> PeftModel:
    model = new_model(method)
    set_peft_model_state_dict(model, load_peft_weights(str(folder)))
    return model


@pytest.mark.parametrize("load", [by_from_pretrained, by_set_peft_model_state_dict])
def test_by_hand_from_every_step(method: Method, load: Callable[..., PeftModel], tmp_path: Path) -> None:
    whole = Run(new_model(method), method.lr)
    states = []
    for step in range(1, STEPS):
        whole.train_to(step)
        whole.model.save_pretrained(tmp_path / str(step))
        states.append(whole.state())
    whole.train_to(STEPS)
    for step, state in enumerate(states, start=1):
        torch.manual_seed(4321)
        resumed = Run(load(method, tmp_path / str(step)), method.lr)
        resumed.load_state(state)
        resumed.train_to(STEPS)
        assert resumed.losses == whole.losses[step:]
        assert_same(resumed.model.state_dict(), whole.model.state_dict())
        assert_same(resumed.optimizer.state_dict(), whole.optimizer.state_dict())


@pytest.fixture
def accelerator() -> Iterator[Callable[[], Accelerator]]:
    yield lambda: Accelerator(cpu=True)
    AcceleratorState._reset_state(reset_partial_state=True)


def test_by_accelerate_from_every_step(method: Method, accelerator: Callable[[], Accelerator], tmp_path: Path) -> None:
    def prepared(accelerator: Accelerator) -> Run:
        run = Run(new_model(method), method.lr)
        run.model, run.optimizer, run.scheduler = accelerator.prepare(run.model, run.optimizer, run.scheduler)
        run.scheduler = run.scheduler.scheduler  # accelerate's has no `last_epoch`
        accelerator._schedulers[-1] = run.scheduler
        return run

    first = accelerator()
    whole = prepared(first)
    for step in range(1, STEPS):
        whole.train_to(step)
        first.save_state(str(tmp_path / str(step)))
    whole.train_to(STEPS)
    for step in range(1, STEPS):
        second = accelerator()
        resumed = prepared(second)
        second.load_state(str(tmp_path / str(step)))
        resumed.train_to(STEPS)
        assert resumed.losses == whole.losses[step:]
        assert_same(resumed.model.state_dict(), whole.model.state_dict())
        assert_same(resumed.optimizer.state_dict(), whole.optimizer.state_dict())


ROWS = [{"input_ids": row, "labels": row} for row in torch.cat([batch(seed) for seed in range(4)]).tolist()]


def trainer(method: Method, folder: Path, save_total_limit: int | None = None, **fields: object) -> Trainer:
    arguments = TrainingArguments(
        str(folder),
        max_steps=STEPS,
        save_total_limit=save_total_limit,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=2,
        learning_rate=method.lr,
        lr_scheduler_type="cosine",
        warmup_steps=2,
        save_steps=1,
        logging_steps=1,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    return Trainer(new_model(method, **fields), arguments, train_dataset=ROWS)


def checkpoint(folder: str | Path, step: int) -> str:
    return str(Path(folder, f"checkpoint-{step}"))


@pytest.fixture(scope="module")
def whole_runs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Method], Trainer]:
    """The uninterrupted run of a method, trained once."""

    @functools.cache
    def whole(method: Method) -> Trainer:
        torch.manual_seed(0)
        run = trainer(method, tmp_path_factory.mktemp(method.name))
        run.train()
        return run

    return whole


def logged(trainer: Trainer) -> list[tuple[float, float, float]]:
    keys = ("loss", "grad_norm", "learning_rate")
    return [tuple(entry[key] for key in keys) for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("step", [1, 2, 4], ids=["within an iteration", "after a swap", "after a round"])
def test_by_trainer(method: Method, step: int, tmp_path: Path, whole_runs: Callable[[Method], Trainer]) -> None:
    """Under gradient accumulation, into a second epoch."""
    whole = whole_runs(method)
    torch.manual_seed(4321)
    resumed = trainer(method, tmp_path)
    resumed.args.save_strategy = "no"
    resumed.train(resume_from_checkpoint=checkpoint(whole.args.output_dir, step))
    assert logged(resumed) == logged(whole)
    assert_same(resumed.model.state_dict(), whole.model.state_dict())
    assert_same(resumed.optimizer.state_dict(), whole.optimizer.state_dict())


# Another schedule

OTHER_SCHEDULES = {
    "steps_per_iteration=3": (SSTConfig, {"steps_per_iteration": 3}),
    "iterations_per_round=4": (SSTConfig, {"iterations_per_round": 4}),
    "warmup_steps=0": (SSTConfig, {"warmup_steps": 0}),
    "sampling='top'": (SSTConfig, {"sampling": "top"}),
    "gradient='default'": (SSTConfig, {"gradient": "default"}),
    "seed=1": (SSTConfig, {"seed": 1}),
    "retract_every=4": (SCTConfig, {"retract_every": 4}),
    "retraction='qr'": (SCTConfig, {"retraction": "qr"}),
    "retract_tolerance=0.1": (SCTConfig, {"retract_tolerance": 0.1}),
    "absorb=True": (SCTConfig, {"absorb": True}),
    "gradient='riemannian'": (SCTConfig, {"gradient": "riemannian"}),
}
BY_CONFIG = {SSTConfig: SST, SCTConfig: next(method for method in METHODS if method.config is SCTConfig)}


def load_into(model: PeftModel, folder: Path) -> None:
    set_peft_model_state_dict(model, load_peft_weights(str(folder)))


@pytest.mark.parametrize("named", OTHER_SCHEDULES)
def test_another_schedule_is_named_before_anything_changes(named: str, tmp_path: Path) -> None:
    config, fields = OTHER_SCHEDULES[named]
    method = BY_CONFIG[config]
    saved = Run(new_model(method), method.lr)
    saved.train_to(3)
    saved.model.save_pretrained(tmp_path)

    model = new_model(method, **fields)
    before = copy.deepcopy(model.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match=rf"another schedule: this adapter has {re.escape(named)}, .* config"):
            load_into(model, tmp_path)
    assert_same(model.state_dict(), before)

    # As a warning alone it loads; what is saved then was trained with the new schedule.
    with pytest.warns(UserWarning, match="another schedule"):
        load_into(model, tmp_path)
    model.save_pretrained(tmp_path)
    model = new_model(method, **fields)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_into(model, tmp_path)


def test_a_retraction_at_every_step_is_another_schedule_too(tmp_path: Path) -> None:
    method = BY_CONFIG[SCTConfig]
    new_model(method, retract_every=4).save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="this adapter has retract_every=1"):
        load_into(new_model(method), tmp_path)


@pytest.mark.filterwarnings("error:The checkpoint was trained")
def test_every_way_of_resuming_compares_the_schedule(accelerator: Callable[[], Accelerator], tmp_path: Path) -> None:
    first = accelerator()
    first.prepare(new_model(SST))
    first.save_state(str(tmp_path / "state"))
    for fields in ({}, {"steps_per_iteration": 3}):
        second = accelerator()
        second.prepare(new_model(SST, **fields))
        with pytest.raises(UserWarning, match="another schedule") if fields else contextlib.nullcontext():
            second.load_state(str(tmp_path / "state"))
    trainer(SST, tmp_path / "out").train()
    with pytest.raises(UserWarning, match="another schedule"):
        trainer(SST, tmp_path / "out", steps_per_iteration=3).train(resume_from_checkpoint=True)


# Killed runs


def last_complete(folder: Path) -> str | None:
    """The newest checkpoint that the Trainer has finished: it writes trainer_state.json last."""

    def is_complete(checkpoint: Path) -> bool:
        try:
            return bool(json.loads((checkpoint / "trainer_state.json").read_text()))
        except (OSError, ValueError):
            return False

    checkpoints = [path for path in folder.glob("checkpoint-*") if is_complete(path)]
    return max(map(str, checkpoints), key=lambda path: int(path.rpartition("-")[2]), default=None)


def test_the_trainer_takes_an_incomplete_checkpoint_for_the_last_one(tmp_path: Path) -> None:
    """And fails to load it. Why the guide looks for the last complete one."""
    trainer(SST, tmp_path).train()
    Path(checkpoint(tmp_path, STEPS), "trainer_state.json").unlink()
    assert get_last_checkpoint(str(tmp_path)) == checkpoint(tmp_path, STEPS)
    with pytest.raises(FileNotFoundError, match=r"trainer_state\.json"):
        trainer(SST, tmp_path).train(resume_from_checkpoint=True)
    assert last_complete(tmp_path) == checkpoint(tmp_path, STEPS - 1)


KILLS = 20


class Announce(TrainerCallback):
    """Says through a pipe that the training begins."""

    def __init__(self, pipe: int) -> None:
        self.pipe = pipe

    def on_train_begin(self, *args: object, **kwargs: object) -> None:
        os.write(self.pipe, b"!")


def to_be_killed(folder: Path) -> Trainer:
    return trainer(SST, folder, target_modules=["q_proj"], save_total_limit=2)


def train_to_the_end(folder: Path, pipe: int) -> None:
    last = last_complete(folder)
    if last != checkpoint(folder, STEPS):  # the Trainer would take a finished run one step further
        run = to_be_killed(folder)
        run.add_callback(Announce(pipe))
        run.train(resume_from_checkpoint=last)


def start(folder: Path) -> int:
    """The id of a new process that trains in `folder`, once it has begun to, or had nothing left to do."""
    ours, theirs = os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            train_to_the_end(folder, theirs)
            code = 0
        except Exception:
            traceback.print_exc()
        finally:
            os._exit(code)
    os.close(theirs)
    os.read(ours, 1)
    os.close(ours)
    return child


def end_of(child: int) -> int:
    """0, the exit status, or minus the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def written(folder: Path) -> set[tuple[str, int]]:
    with contextlib.suppress(FileNotFoundError):  # deleted while we look
        return {(str(file), file.stat().st_mtime_ns) for file in folder.glob("checkpoint-*/*")}
    return set()


def result(folder: Path) -> list[object]:
    last = Path(checkpoint(folder, STEPS))
    log = json.loads((last / "trainer_state.json").read_text())["log_history"]
    return [load_peft_weights(str(last)), torch.load(last / "optimizer.pt"), log]


def kill_and_resume(folder: Path) -> None:
    to_be_killed(folder)  # what the first use of a library costs, its processes need not pay again
    gc.freeze()
    whole = start(folder / "whole")
    began = time.monotonic()
    assert end_of(whole) == 0
    seconds = time.monotonic() - began
    expected = result(folder / "whole")

    moments = random.Random(0)
    kills = torn = finished = 0
    while kills < KILLS or finished == 0:
        current = folder / str(finished)
        child = start(current)
        if kills < KILLS:
            if kills % 2:
                before = written(current)
                deadline = time.monotonic() + seconds
                while time.monotonic() < deadline and written(current) == before:
                    time.sleep(0.0005)
                time.sleep(moments.uniform(0, 0.01))
            else:
                time.sleep(moments.uniform(0, seconds))
            os.kill(child, signal.SIGKILL)  # it waits for us to take its status, if it has ended
        end = end_of(child)
        assert end in (0, -signal.SIGKILL)
        if end:
            kills += 1
            torn += current.exists() and get_last_checkpoint(str(current)) != last_complete(current)
        else:
            assert_same(result(current), expected)
            finished += 1
    assert torn > 0


def test_runs_that_are_killed_and_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGKILL at any moment, or while a checkpoint is written; then the last complete one is resumed, to the end.

    From a process of one thread, which has imported everything and forks those that train.
    """
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    process = multiprocessing.get_context("spawn").Process(target=kill_and_resume, args=(tmp_path,))
    process.start()
    process.join()
    assert process.exitcode == 0
