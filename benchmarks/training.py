"""One training loop for every method, and what it costs."""

from __future__ import annotations

import math
import re
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import psutil
import torch
from peft import PeftConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from benchmarks.experiment import DivergenceError, Experiment
from spectral_peft import SpectralError, parameter_groups


CURVE_POINTS = 10


def device() -> torch.device:
    return torch.accelerator.current_accelerator() or torch.device("cpu")


class Cost:
    """What a run took, as it goes into the result."""

    def __init__(self) -> None:
        self.figures: dict[str, Any] = {}

    @contextmanager
    def seconds(self, name: str) -> Iterator[None]:
        """Wall clock, and CPU time, which says more where processes share the cores."""
        wall, cpu = time.perf_counter(), time.process_time()
        yield
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.figures[f"{name}_seconds"] = time.perf_counter() - wall
        self.figures[f"{name}_cpu_seconds"] = time.process_time() - cpu

    @contextmanager
    def peak_memory(self) -> Iterator[None]:
        """The most memory within, beyond what there was before.

        With CUDA that of its allocator, otherwise the resident memory of the process, sampled every 20 ms.
        """
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            yield
            self.figures["peak_memory_bytes"] = torch.cuda.max_memory_allocated() - before
            return
        process, done = psutil.Process(), threading.Event()
        samples = [process.memory_info().rss]

        def sample() -> None:
            while not done.wait(0.02):
                samples.append(process.memory_info().rss)

        sampler = threading.Thread(target=sample, daemon=True)
        sampler.start()
        try:
            yield
        finally:
            done.set()
            sampler.join()
        self.figures["peak_memory_bytes"] = max(samples) - samples[0]


def adapted(base: nn.Module, experiment: Experiment, seed: int) -> nn.Module:
    """`base` with the adapter of the experiment; without one, with what its `trainable` matches set to train.

    The random numbers of the start, and those that a schedule draws, follow the seed.
    """
    torch.manual_seed(seed)
    config = experiment.config(**adalora_shares(experiment))
    if config is None:
        for name, value in base.named_parameters():
            value.requires_grad_(re.fullmatch(experiment.training["trainable"], name) is not None)
        return base
    return get_peft_model(base, seeded(config, seed))


def seeded(config: PeftConfig, seed: int) -> PeftConfig:
    """The config with the seed of the run, if it has one: for its random start, and for what its schedule draws."""
    if "seed" in {field.name for field in fields(config)}:
        config.seed = seed
    return config


def adalora_shares(experiment: Experiment) -> dict[str, int]:
    """AdaLoRA prunes between the first tenth of the training and the last three, which its config has to be told."""
    if experiment.adapter is None or experiment.adapter["peft_type"] != "ADALORA":
        return {}
    steps = experiment.training["max_steps"]
    return {"total_step": steps, "tinit": steps // 10, "tfinal": 3 * steps // 10}


def learning_rates(
    model: nn.Module, learning_rate: float, training: dict[str, Any], **own: float
) -> list[dict[str, Any]]:
    """Groups of parameters for an optimizer: those of the package, and modules by name with rates of their `own`.

    A module that has a rate of its own trains in full, whatever the adapter says of it.
    """
    separate: dict[str, list[nn.Parameter]] = {name: [] for name in own}
    for path, value in model.named_parameters():
        for name in own:
            if name in path.split(".") and "original_module" not in path:
                separate[name].append(value.requires_grad_(True))
    taken = {id(value) for values in separate.values() for value in values}
    groups = parameter_groups(model, learning_rate, value_lr=learning_rate * training["value_rate_ratio"])
    for group in groups:
        group["params"] = [value for value in group["params"] if id(value) not in taken]
    groups += [{"params": separate[name], "lr": rate, "name": name} for name, rate in own.items()]
    return [group for group in groups if group["params"]]


def train(
    model: nn.Module, groups: list[dict[str, Any]], batches: Iterable[dict[str, Tensor]], training: dict[str, Any]
) -> list[dict[str, float]]:
    """`max_steps` of AdamW, with linear warm-up and decay and clipped gradients: the curve of the training loss.

    The model gives the loss of a batch.

    Raises:
        DivergenceError: a loss, or a factor of a spectral method, is not finite.
    """
    steps, parameters = training["max_steps"], [value for group in groups for value in group["params"]]
    optimizer = torch.optim.AdamW(groups, weight_decay=training["weight_decay"])
    warm_up = max(1, round(training["warmup_ratio"] * steps))
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm_up, (steps - step) / max(1, steps - warm_up))
    )
    allocate = adalora_schedule(model)
    curve, losses, started = [], [], time.perf_counter()
    model.train()
    for step, batch in zip(range(1, steps + 1), batches, strict=False):
        try:
            loss = model(**batch).loss
            losses.append(loss.item())
            if not math.isfinite(losses[-1]):
                raise FloatingPointError
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, training["max_grad_norm"])
            optimizer.step()
        except (FloatingPointError, SpectralError) as error:  # a spectral method looks for itself
            raise DivergenceError(f"in step {step} of {steps}") from error
        allocate(step)
        optimizer.zero_grad()
        scheduler.step()
        if len(losses) == max(1, steps // CURVE_POINTS) or step == steps:
            mean = sum(losses) / len(losses)
            curve.append({"step": step, "train_loss": mean, "seconds": time.perf_counter() - started})
            losses = []
    return curve


def adalora_schedule(model: nn.Module) -> Callable[[int], object]:
    """AdaLoRA is the one method here that has to be told of every step."""
    schedule = getattr(model.base_model, "update_and_allocate", None) if isinstance(model, PeftModel) else None
    return schedule or (lambda step: None)


def trainable_parameters(model: nn.Module) -> int:
    return sum(value.numel() for value in model.parameters() if value.requires_grad)


def checkpoint_bytes(model: nn.Module) -> int:
    """The size of adapter_model.safetensors; without an adapter, of all that was trained."""
    if not isinstance(model, PeftModel):
        return sum(value.numel() * value.element_size() for value in model.parameters() if value.requires_grad)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder, save_embedding_layers=False)
        return (Path(folder) / "adapter_model.safetensors").stat().st_size
