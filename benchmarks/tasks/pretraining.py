"""Pre-training a small Llama or OPT from nothing on any text file; the perplexity of its held-out end, which is also
what chooses the learning rate.

Every experiment sees the same batches in the same order, from the same weights, and trains embeddings, head and norms
in full. The projections of each layer are what differs: trained as they are, by GaLore (`galore`), or through
the adapter of the experiment. `restart_every` makes ReLoRA* of LoRA: it merges and starts anew with reset optimizer
state, without a full-rank warm-up phase.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel, get_peft_model
from peft.tuners.lora import Linear as LoraLinear
from tokenizers import ByteLevelBPETokenizer
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, OPTConfig, PreTrainedConfig, PreTrainedModel

from benchmarks.data import described, language_reference, read_text
from benchmarks.experiment import DivergenceError, Experiment, ExperimentError
from benchmarks.training import Cost, device, seeded
from spectral_peft import SpectralError
from spectral_peft.training import reset_state


HELD_OUT = 256
"""Rows at the end of the text."""


def run(experiment: Experiment, learning_rate: float, seed: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """One training on the text of --data, plain or .gz, or on Python's language reference, which is short.

    Raises:
        DivergenceError: a factor of a spectral method is not finite.
    """
    settings, cost = experiment.training, Cost()
    train, held_out = split(arguments.data, settings["vocabulary"], settings["length"], arguments.cache)
    model, config = base_model(settings, seed).to(device()), experiment.config()
    with cost.peak_memory():
        with cost.seconds("init"):
            model = (model if config is None else get_peft_model(model, seeded(config, seed))).train()
        optimizer = build_optimizer(model, settings, learning_rate)
        with cost.seconds("train"):
            try:
                curve = steps(model, optimizer, settings, train, held_out, seed)
            except SpectralError as error:  # a spectral method looks for itself
                raise DivergenceError(str(error)) from error
    cost.figures["trainable_parameters"] = sum(p.numel() for group in optimizer.param_groups for p in group["params"])
    if settings["keep_model"]:
        dense = model.merge_and_unload() if isinstance(model, PeftModel) else model
        dense.save_pretrained(kept_model(experiment.name, learning_rate, seed, arguments.cache))
    return result(curve, cost.figures)


def steps(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    settings: Mapping[str, Any],
    train: np.ndarray,
    held_out: Tensor,
    seed: int,
) -> list[dict[str, float]]:
    """All optimizer steps: the perplexity after every tenth of them."""
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule(settings))
    parameters = [value for group in optimizer.param_groups for value in group["params"]]
    count, restart, length = settings["steps"], settings["restart_every"], settings["length"]
    generator, curve = np.random.default_rng(seed), []
    for step in range(1, count + 1):
        starts = generator.integers(0, len(train) - length, settings["batch"])
        rows = np.stack([train[start : start + length] for start in starts]).astype(np.int64)
        batch = torch.from_numpy(rows).to(device())
        model(input_ids=batch, labels=batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        if restart and step % restart == 0 and step < count:
            restart_lora(model, optimizer)
        if step % max(1, count // 10) == 0:
            curve.append({"step": step, "perplexity": perplexity(model, held_out)})
    return curve


def result(curve: list[dict[str, float]], cost: dict[str, Any]) -> dict[str, Any]:
    end = curve[-1]["perplexity"]
    quality = {"perplexity": end, "loss": math.log(end)}
    return {"validation": end, "quality": quality, "forgetting": {}, "curve": curve, "cost": cost}


# Text


def split(text: Path | None, vocabulary: int, length: int, cache: Path) -> tuple[np.ndarray, Tensor]:
    """The numbers to train on, and the rows that are held out.

    Raises:
        ExperimentError: there is no such file, or it is too short.
    """
    data, end = tokens(text, vocabulary, cache), HELD_OUT * length
    if len(data) < 2 * end:
        raise ExperimentError(f"{text} has {len(data):,} tokens; at least {2 * end:,} are needed.")
    return data[:-end], torch.from_numpy(data[-end:].astype(np.int64)).reshape(HELD_OUT, length)


def tokens(text: Path | None, vocabulary: int, cache: Path) -> np.ndarray:
    """The text as numbers, by a byte-level BPE of its own.

    Raises:
        ExperimentError: the numbers of so large a vocabulary do not fit.
    """
    if vocabulary > 2**16:
        raise ExperimentError(f"`vocabulary` should be at most {2**16:,}, got {vocabulary:,}.")
    digest = hashlib.sha256(f"{described(text)} {vocabulary}".encode()).hexdigest()[:12]
    file = cache / f"tokens-{digest}.npy"
    if not file.exists():
        content = read_text(text) if text else language_reference()
        bpe = ByteLevelBPETokenizer()
        lines = content.splitlines(keepends=True)
        bpe.train_from_iterator(lines[:: max(1, len(lines) // 100_000)], vocab_size=vocabulary, show_progress=False)
        blocks = ["".join(lines[i : i + 1000]) for i in range(0, len(lines), 1000)]
        cache.mkdir(parents=True, exist_ok=True)
        unfinished = file.with_suffix(f".{os.getpid()}.npy")  # another sweep may be at it
        np.save(unfinished, np.concatenate([np.array(e.ids, dtype=np.uint16) for e in bpe.encode_batch(blocks)]))
        unfinished.replace(file)
    return np.load(file)


@torch.no_grad()
def perplexity(model: nn.Module, rows: Tensor) -> float:
    model.eval()
    losses = [model(input_ids=part, labels=part).loss for part in rows.to(device()).split(64)]
    model.train()
    return float(torch.stack(losses).mean().double().exp())


# Model


def base_model(settings: Mapping[str, Any], seed: int) -> PreTrainedModel:
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(ARCHITECTURES[settings["architecture"]](settings))


def llama(settings: Mapping[str, Any]) -> LlamaConfig:
    return LlamaConfig(intermediate_size=settings["intermediate_size"], **_sizes(settings))


def opt(settings: Mapping[str, Any]) -> OPTConfig:
    """Without dropout, which the Llama does not have."""
    own = {"ffn_dim": settings["intermediate_size"], "word_embed_proj_dim": settings["hidden_size"], "dropout": 0.0}
    return OPTConfig(**own, **_sizes(settings))


def _sizes(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "hidden_size": settings["hidden_size"],
        "num_hidden_layers": settings["layers"],
        "num_attention_heads": 4,
        "vocab_size": settings["vocabulary"],
        "max_position_embeddings": settings["length"],
        "tie_word_embeddings": False,
    }


ARCHITECTURES: dict[str, Callable[[Mapping[str, Any]], PreTrainedConfig]] = {"llama": llama, "opt": opt}


def kept_model(name: str, learning_rate: float, seed: int, cache: Path) -> Path:
    """Where a run with `keep_model` leaves its trained model, as a dense checkpoint of transformers."""
    return cache / "models" / name / f"lr{learning_rate:g}-seed{seed}"


def kept_models(patterns: str, cache: Path) -> dict[str, Path]:
    """The folders of `kept_model` that fit one of the comma-separated patterns, by experiment and run.

    Raises:
        ExperimentError: no model fits one of them.
    """
    found = {}
    for pattern in patterns.split(","):
        folders = sorted((cache / "models").glob(pattern.strip()))
        if not folders:
            raise ExperimentError(f"{cache / 'models'} holds no {pattern.strip()}: run that with `keep_model`.")
        found.update({f"{folder.parent.name}/{folder.name}": folder for folder in folders})
    return found


def projections(model: nn.Module) -> list[nn.Linear]:
    """What "all-linear" means to PEFT: every linear layer but the output head."""
    head = model.get_output_embeddings()
    return [part for part in model.modules() if isinstance(part, nn.Linear) and part is not head]


def restart_lora(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """ReLoRA*: the product moves into the weight, A is drawn anew, B is 0, their optimizer state too."""
    for layer in model.modules():
        if isinstance(layer, LoraLinear):
            layer.get_base_layer().weight.data += layer.get_delta_weight("default")
            layer.reset_lora_parameters("default", True)
            reset_state(optimizer, [layer.lora_A["default"].weight, layer.lora_B["default"].weight])


# Optimizer


def build_optimizer(model: nn.Module, settings: Mapping[str, Any], learning_rate: float) -> torch.optim.Optimizer:
    if settings["galore"]:
        return galore_optimizer(model, settings, learning_rate)
    groups = parameter_groups(model, settings, learning_rate)
    return torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.0)


def parameter_groups(
    model: nn.Module, settings: Mapping[str, Any], learning_rate: float
) -> list[dict[str, list[nn.Parameter] | float]]:
    """Factors of the projections with `learning_rate`, singular values with theirs, all else with the common one."""
    groups: dict[float, list[nn.Parameter]] = {}
    for name, value in model.named_parameters():
        factor = "lora_" in name or "_update." in name
        if "base_layer.weight" in name or (factor and not value.requires_grad):
            continue
        value.requires_grad_(True)
        rate = learning_rate if factor else settings["dense_learning_rate"]
        rate = settings["value_learning_rate"] if ".dS." in name else rate
        groups.setdefault(rate or learning_rate, []).append(value)
    return [{"params": values, "lr": rate} for rate, values in groups.items()]


def galore_optimizer(model: nn.Module, settings: Mapping[str, Any], learning_rate: float) -> torch.optim.Optimizer:
    """GaLore's own AdamW, whose steps on the projections are those of their gradients in r dimensions.

    Raises:
        ModuleNotFoundError: galore-torch is not installed.
    """
    try:
        from galore_torch import GaLoreAdamW
    except ImportError as error:
        raise ModuleNotFoundError(
            f"Experiments with `galore` need the package galore-torch ({error}): `pip install galore-torch`."
        ) from error
    projected = [layer.weight for layer in projections(model)]
    chosen = {id(weight) for weight in projected}
    rest = [value for value in model.parameters() if id(value) not in chosen]
    groups = [
        {"params": rest, "lr": settings["dense_learning_rate"]},
        {"params": projected, "lr": learning_rate, "proj_type": "std", **settings["galore"]},
    ]
    # 1e-8 is torch's: GaLore's default of 1e-6 would be a difference of the dense parts.
    return GaLoreAdamW(groups, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0, no_deprecation_warning=True)


def schedule(settings: Mapping[str, Any]) -> Callable[[int], float]:
    """Linear warm-up and a cosine to a tenth; after a restart of LoRA another warm-up of 50 steps."""
    steps, warm_up, restart = settings["steps"], settings["warmup_steps"], settings["restart_every"]

    def rate(step: int) -> float:
        again = min(1.0, (step % restart + 1) / 50) if restart and step >= restart else 1.0
        cosine = 0.1 + 0.45 * (1 + math.cos(math.pi * min(1.0, step / steps)))
        return again * min(1.0, (step + 1) / warm_up) * cosine

    return rate
