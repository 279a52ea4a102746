"""Training with transformers' Trainer and with accelerate: one spectral step per optimizer step, checks, and logs."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from torch.utils.data import DataLoader
from transformers import (
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from spectral_peft import (
    SCTConfig,
    SpectralCallback,
    SpectralConfig,
    SpectralError,
    SSTConfig,
    spectral_statistics,
    spectral_step,
)
from spectral_peft.linalg import effective_rank
from tests.methods import METHODS, SCHEDULED, SST, Method, counted
from tests.models import batch, layers, llama, logits, train_, trainable, updates


STEPS = 3
ROWS = [{"input_ids": row, "labels": row} for seed in range(6) for row in batch(seed).tolist()]

with_and_without = pytest.mark.parametrize("with_callback", [False, True], ids=["plain", "callback"])
with_values = pytest.mark.parametrize("method", [method for method in METHODS if method.has_values], ids=str)


def spectral_steps(model: nn.Module) -> set[int]:
    return {int(update.step) for update in updates(model) if update.scheduled}


def arguments(folder: Path, cls: Any = TrainingArguments, **fields: Any) -> Any:
    given = {"max_steps": STEPS, "learning_rate": 1e-3, "report_to": "none", "save_strategy": "no", "logging_steps": 1}
    return cls(
        str(folder),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        max_grad_norm=0.5,
        disable_tqdm=True,
        **{**given, **fields},
    )


def trainer(model: nn.Module, folder: Path, *, optimizer: Any = None, **fields: Any) -> Trainer:
    return Trainer(model, arguments(folder, **fields), train_dataset=ROWS, optimizers=(optimizer, None))


def assert_trained(model: nn.Module, method: Method, with_callback: bool, trained: Trainer) -> None:
    before = [value.detach().clone() for value in trainable(model)]
    if with_callback:
        trained.add_callback(SpectralCallback(trained))
    trained.train()
    assert trained.state.global_step == STEPS
    assert not any(torch.equal(a, b) for a, b in zip(before, trainable(model), strict=True))
    assert spectral_steps(model) == ({STEPS} if method in SCHEDULED else set())


# One spectral step per optimizer step


@with_and_without
def test_trainer(method: Method, with_callback: bool, tmp_path: Path) -> None:
    model = get_peft_model(llama(), counted(method))
    assert_trained(model, method, with_callback, trainer(model, tmp_path))


def test_the_best_model_is_loaded_at_the_end(method: Method, tmp_path: Path) -> None:
    """The best one has the highest loss here, so that it is not the last one."""
    model = get_peft_model(llama(), counted(method))
    each = {"eval_strategy": "steps", "save_strategy": "steps", "eval_steps": 1, "save_steps": 1}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "loss", "greater_is_better": True}
    run = Trainer(
        model, arguments(tmp_path, learning_rate=1e-2, **each, **best), train_dataset=ROWS, eval_dataset=ROWS
    )
    run.train()
    checkpoint = Path(run.state.best_model_checkpoint)
    assert checkpoint.name == "checkpoint-1"
    assert run.evaluate()["eval_loss"] == pytest.approx(run.state.best_metric, rel=1e-6)
    assert torch.equal(logits(model), logits(PeftModel.from_pretrained(llama(), checkpoint)))


def test_seq2seq_trainer(method: Method, tmp_path: Path) -> None:
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2, "vocab_size": 64}
    base = T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0))
    model = get_peft_model(base, counted(method, target_modules=["q", "v", "wi"], task_type="SEQ_2_SEQ_LM"))
    run = Seq2SeqTrainer(model, arguments(tmp_path, Seq2SeqTrainingArguments), train_dataset=ROWS)
    assert_trained(model, method, True, run)


@pytest.mark.parametrize("method", SCHEDULED, ids=str)
def test_accelerate(method: Method) -> None:
    accelerator = Accelerator(gradient_accumulation_steps=2)
    model = get_peft_model(llama(), counted(method))
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-3)
    data = DataLoader(torch.cat([batch(seed) for seed in range(6)]), batch_size=2)
    model, optimizer, data = accelerator.prepare(model, optimizer, data)
    for ids in data:
        with accelerator.accumulate(model):
            accelerator.backward(model(input_ids=ids, labels=ids).loss)
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    assert spectral_steps(model) == {3}


def test_both_of_two_adapters_that_train_are_stepped_once(tmp_path: Path) -> None:
    model = get_peft_model(llama(), SST(r=4))
    model.add_adapter("second", SST(r=2, pool=6))
    model.base_model.set_adapter(["default", "second"])
    run = trainer(model, tmp_path)
    run.add_callback(SpectralCallback(run))
    run.train()
    steps = [{int(layer.update_of(name).step) for layer in layers(model)} for name in ("default", "second")]
    assert steps == [{STEPS}, {STEPS}]


class Descent:
    """A rule that is no torch optimizer, with the parts of one that a Trainer uses."""

    def __init__(self, parameters: list[nn.Parameter], lr: float) -> None:
        self.param_groups = [{"params": parameters, "lr": lr}]
        self.state = {parameter: {"mean": torch.zeros_like(parameter)} for parameter in parameters}

    @torch.no_grad()
    def step(self) -> None:
        for parameter, state in self.state.items():
            state["mean"].lerp_(parameter.grad, 0.5)
            parameter -= self.param_groups[0]["lr"] * state["mean"]


@pytest.mark.parametrize("method", SCHEDULED, ids=str)
def test_steps_that_no_hook_sees(method: Method) -> None:
    """`spectral_step` around a rule of one's own does what the hooks do around torch's SGD."""
    models = [get_peft_model(llama(), counted(method)) for _ in range(2)]
    sgd = torch.optim.SGD(trainable(models[0]), lr=1e-2)
    for number in range(4):
        for model in models:
            model.zero_grad()
            model(input_ids=batch(number), labels=batch(number)).loss.backward()
        sgd.step()
        with spectral_step(models[1]), torch.no_grad():
            for parameter in trainable(models[1]):
                parameter -= 1e-2 * parameter.grad
    assert spectral_steps(models[1]) == {4}
    for a, b in zip(models[0].state_dict().values(), models[1].state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", SCHEDULED, ids=str)
def test_a_spectral_step_is_not_taken_twice(method: Method) -> None:
    model = get_peft_model(llama(), counted(method))
    optimizer = torch.optim.SGD(trainable(model), lr=1e-3)
    for _ in range(3):
        model(input_ids=batch(), labels=batch()).loss.backward()
        with spectral_step(model, optimizer):
            optimizer.step()
    assert spectral_steps(model) == {3}


@pytest.mark.parametrize("named", [True, False], ids=["named", "not-named"])
def test_a_step_that_a_grad_scaler_skips_within_a_spectral_step_does_not_count(named: bool) -> None:
    """From the first one on, if it is told of the optimizer; if not, once that has stepped."""
    model = get_peft_model(llama(), SST(r=4))
    optimizer, scaler = torch.optim.AdamW(trainable(model), lr=1e-3), torch.amp.GradScaler("cpu")
    counts = []
    for number in range(5):
        loss = model(input_ids=batch(), labels=batch()).loss
        scaler.scale(loss * (float("inf") if number in (0 if named else 1, 3) else 1)).backward()
        with spectral_step(model, optimizer if named else None):
            scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        counts.append(spectral_steps(model))
    assert counts == [{0} if named else {1}, {1}, {2}, {2}, {3}]


def test_a_step_that_failed_is_no_step() -> None:
    model = get_peft_model(llama(), SST(r=4))
    with pytest.raises(RuntimeError, match="out of memory"), spectral_step(model):
        raise RuntimeError("out of memory")
    assert spectral_steps(model) == {0}


def test_the_callback_drives_what_no_hook_sees(tmp_path: Path) -> None:
    model = get_peft_model(llama(), SST(r=4, warmup_steps=0))
    rule = Descent(trainable(model), lr=1e-2)
    rates = torch.optim.lr_scheduler.ConstantLR(torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1e-2))
    run = Trainer(model, arguments(tmp_path, max_steps=4), train_dataset=ROWS, optimizers=(rule, rates))
    run.add_callback(SpectralCallback(run))
    run.train()
    assert spectral_steps(model) == {4}
    assert not any(state["mean"].any() for state in rule.state.values())  # the fourth step ends an iteration
    assert [log["spectral/swaps"] for log in run.state.log_history if "loss" in log] == [0, 1, 1, 2]


class OfTangents(Descent):
    """One that looks at its gradients."""

    @torch.no_grad()
    def step(self) -> None:
        for parameter in self.param_groups[0]["params"]:
            if parameter.ndim == 2:
                tall = parameter.shape[0] > parameter.shape[1]
                X, G = (parameter, parameter.grad) if tall else (parameter.mT, parameter.grad.mT)
                torch.testing.assert_close(X.mT @ G, -G.mT @ X)
        super().step()


def scheduled(name: str, every: int) -> SpectralConfig:
    fields = {"r": 4, "target_modules": ["up_proj", "down_proj"]}
    if name == "SST":
        return SSTConfig(steps_per_iteration=every, warmup_steps=0, **fields)
    return SCTConfig(retract_every=every, **fields)


def warned(name: str, model: nn.Module, folder: Path, recwarn: pytest.WarningsRecorder) -> int:
    recwarn.clear()
    warnings.simplefilter("always")  # the same words may come twice
    run = trainer(model, folder)
    run.add_callback(SpectralCallback(run))
    run.train()
    return sum(f"The schedule of {name} has no turn" in str(warning.message) for warning in recwarn)


@pytest.mark.parametrize("name", ["SST", "SCT"])
def test_a_schedule_longer_than_the_training_is_named(
    name: str, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    for every, expected in ((STEPS, 0), (STEPS + 1, 1)):
        assert warned(name, get_peft_model(llama(), scheduled(name, every)), tmp_path, recwarn) == expected


@pytest.mark.parametrize("name", ["SST", "SCT"])
def test_what_trains_on_has_its_turn_sooner(name: str, tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    model = get_peft_model(llama(), scheduled(name, STEPS + 1))
    assert [warned(name, model, tmp_path, recwarn) for _ in range(2)] == [1, 0]


def test_one_layer_with_a_turn_is_enough(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    model = get_peft_model(llama(), scheduled("SST", STEPS))
    first = next(iter(updates(model)))
    first.schedule = first.schedule._replace(steps_per_iteration=STEPS + 1)
    assert warned("SST", model, tmp_path, recwarn) == 0


def test_the_callback_projects_the_gradients_of_the_step(tmp_path: Path) -> None:
    model = get_peft_model(llama(), SCTConfig(r=4, target_modules="all-linear", gradient="riemannian"))
    rates = torch.optim.lr_scheduler.ConstantLR(torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1e-2))
    rule = OfTangents(trainable(model), lr=1e-2)
    run = Trainer(model, arguments(tmp_path), train_dataset=ROWS, optimizers=(rule, rates))
    run.add_callback(SpectralCallback(run))
    run.train()
    assert run.state.global_step == STEPS


# What the callback refuses


def test_a_model_without_a_spectral_adapter_is_refused(tmp_path: Path) -> None:
    run = trainer(get_peft_model(llama(), LoraConfig(target_modules="all-linear")), tmp_path)
    run.add_callback(SpectralCallback(run))
    with pytest.raises(SpectralError, match=r"has no spectral adapter: add one with `get_peft_model"):
        run.train()


def test_a_frozen_adapter_is_refused(tmp_path: Path) -> None:
    get_peft_model(llama(), SST()).save_pretrained(tmp_path / "adapter")
    model = PeftModel.from_pretrained(llama(), tmp_path / "adapter")
    model.base_model.model.model.norm.weight.requires_grad_(True)
    run = trainer(model, tmp_path)
    run.add_callback(SpectralCallback(run))
    with pytest.raises(SpectralError, match=r"all are frozen.*is_trainable=True"):
        run.train()


def test_an_optimizer_that_was_built_before_the_adapter_is_refused(tmp_path: Path) -> None:
    base = llama()
    optimizer = torch.optim.AdamW(base.parameters(), lr=1e-3)
    run = trainer(get_peft_model(base, SST()), tmp_path, optimizer=optimizer)
    run.add_callback(SpectralCallback(run))
    with pytest.raises(SpectralError, match=r"holds none of the .* built before the adapter was added"):
        run.train()


def test_parameters_that_the_optimizer_lacks_are_named(tmp_path: Path) -> None:
    model = get_peft_model(llama(), SST())
    names = [name for name, value in model.named_parameters() if value.requires_grad]
    optimizer = torch.optim.AdamW(trainable(model)[1:], lr=1e-3)
    run = trainer(model, tmp_path, optimizer=optimizer)
    run.add_callback(SpectralCallback(run))
    with pytest.raises(SpectralError, match=rf"does not hold 1 of the {len(names)} .*: {names[0]}\. Give it"):
        run.train()


# What is logged


class Reports(TrainerCallback):
    """A reporting integration: it stands before the callbacks that a Trainer is given, and keeps what it sees."""

    def __init__(self) -> None:
        self.logs: list[dict[str, float]] = []

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.logs.append(dict(kwargs["logs"]))


def logged(model: nn.Module, folder: Path, spectra_every: int | None = None, **fields: Any) -> list[dict[str, float]]:
    """The logs of the loss, as a reporting integration and as `log_history` have them."""
    run = trainer(model, folder, **fields)
    reports = Reports()
    run.add_callback(reports)
    run.add_callback(SpectralCallback(run, spectra_every=spectra_every))
    run.train()
    history = [log for log in run.state.log_history if "loss" in log]
    seen = [log for log in reports.logs if "loss" in log]
    assert [{**log, "step": None} for log in seen] == [{**log, "step": None} for log in history]
    others = [log for log in reports.logs if "loss" not in log]
    assert others
    assert not any(key.startswith("spectral/") for log in others for key in log)
    return seen


def test_integrations_and_the_history_get_the_figures(method: Method, tmp_path: Path) -> None:
    model = get_peft_model(llama(), counted(method))
    logs = logged(model, tmp_path, logging_steps=2, eval_strategy="no")
    assert len(logs) == 1
    ours = {key for key in logs[0] if key.startswith("spectral/")}
    own = {f"spectral/{name}" for update in updates(model) for name in update.statistics()}
    expected = {*own}
    if method.has_values:
        expected.add("spectral/effective_rank")
    if next(updates(model)).orthonormal:
        expected.add("spectral/orthonormality_error")
    if method in SCHEDULED:
        expected.add("spectral/optimizer_state_reset")
    assert ours == expected
    assert all(type(logs[0][key]) in (int, float) for key in ours)


@with_values
def test_the_figures_are_those_of_the_matrices(method: Method) -> None:
    model = get_peft_model(llama(), counted(method))
    train_(model, method.lr, steps=3)
    figures = spectral_statistics(model, per_layer=True)
    ranks = []
    for layer in layers(model):
        update = layer.update_of("default")
        if method.replaces:
            S = torch.linalg.svdvals(update.matrix())
            names = ("largest_value", "smallest_value")
            assert [figures[f"spectral/{layer.key}/{name}"] for name in names] == [
                pytest.approx(float(value), rel=0.05, abs=1e-3)
                for value in (S[0], S[update.singular_values().numel() - 1])
            ]
        ranks.append(float(effective_rank(update.singular_values().detach())))
        assert figures[f"spectral/{layer.key}/effective_rank"] == pytest.approx(ranks[-1])
    assert figures["spectral/effective_rank"] == pytest.approx(sum(ranks) / len(ranks))


@with_values
def test_the_start_has_the_spectrum_of_the_weight(method: Method) -> None:
    model = get_peft_model(llama(), method(r=4))
    for layer in layers(model):
        S = torch.linalg.svdvals(layer.effective_weight())
        got = layer.update_of("default").singular_values().sort(descending=True).values
        torch.testing.assert_close(got, S[: len(got)], rtol=1e-4, atol=1e-4)


def test_swaps_and_resets(tmp_path: Path) -> None:
    """Three steps, of which the second ends an iteration: all trained numbers lose their state once."""
    logs = logged(get_peft_model(llama(), SST(r=4)), tmp_path)
    assert [log["spectral/swaps"] for log in logs] == [0, 1, 1]
    assert [log["spectral/decompositions"] for log in logs] == [0, 0, 0]
    assert [log["spectral/optimizer_state_reset"] for log in logs] == [0, 1, 0]


def test_what_is_not_reset_lowers_the_share(tmp_path: Path) -> None:
    model = get_peft_model(llama(), SST(r=4, modules_to_save=["lm_head"]))
    ours = sum(value.numel() for update in updates(model) for _, value in update.trained_parameters())
    share = ours / sum(value.numel() for value in trainable(model))
    logs = logged(model, tmp_path)
    assert [log["spectral/optimizer_state_reset"] for log in logs] == [0, pytest.approx(share), 0]


@pytest.mark.parametrize(
    ("fields", "expected"),
    [({}, [1, 2, 3]), ({"retract_every": 2}, [0, 1, 1]), ({"retract_tolerance": 10.0}, [0, 0, 0]),
     ({"retract_every": 2, "absorb": True}, [0, 1, 1])],
    ids=["always", "every-2", "tolerance", "absorb"],
)  # fmt: skip
def test_retractions(fields: dict[str, Any], expected: list[int], tmp_path: Path) -> None:
    logs = logged(get_peft_model(llama(), SCTConfig(r=4, target_modules="all-linear", **fields)), tmp_path)
    assert [log["spectral/retractions"] for log in logs] == expected
    errors = [log["spectral/orthonormality_error"] for log in logs]
    assert all(
        (error < 1e-5) == (now > before) for error, before, now in zip(errors, [0, *expected], expected, strict=False)
    )


def test_spectra_at_intervals(tmp_path: Path) -> None:
    logs = logged(get_peft_model(llama(), SST(r=4)), tmp_path, spectra_every=2, max_steps=5)
    assert [sum(key.endswith("q_proj/largest_value") for key in log) for log in logs] == [0, 2, 0, 2, 0]
    with pytest.raises(ValueError, match="`spectra_every` should be at least 1"):
        SpectralCallback(None, spectra_every=0)


def test_a_training_resumes_with_and_without_the_callback(tmp_path: Path) -> None:
    for number, with_callback in enumerate((True, False, True), start=1):
        model = get_peft_model(llama(), SST(r=4))
        run = trainer(model, tmp_path, max_steps=2 * number, save_strategy="steps", save_steps=2)
        if with_callback:
            run.add_callback(SpectralCallback(run))
        run.train(resume_from_checkpoint=None if number == 1 else str(tmp_path / f"checkpoint-{2 * (number - 1)}"))
        assert spectral_steps(model) == {2 * number}
    assert run.state.log_history[-2]["spectral/swaps"] == 3
