"""One machine, a Llama of up to 70 billion parameters that exist as factors only: real steps, measured memory.

    python benchmarks/large_model.py --size 70b
    python benchmarks/large_model.py --size 70b --optimizer backward
    python benchmarks/large_model.py --size 70b --optimizer backward-8bit    # with bitsandbytes

Builds transformers' LlamaForCausalLM of the size on the meta device, factors every projection, the embedding and the
head at rank 32, and trains on 128 tokens (bytes of a text) with gradient checkpointing, whose inputs are kept on
disk. Prints the peak of the resident memory as the kernel counts it, and the time of each part of a step.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn
from transformers import LlamaConfig

from spectral_peft import (
    SCT,
    SCTConfig,
    build_factored,
    estimate_memory,
    parameter_groups,
    return_freed_memory,
    save_on_disk,
    step_in_backward,
)


SIZES = {
    "1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32},
    "7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
    "70b": {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64},
}
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "embed_tokens", "lm_head"]


def peak_bytes() -> int:
    """The largest resident memory of this process so far, from the kernel."""
    status = Path("/proc/self/status").read_text()
    return 1024 * next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))


class Clock:
    """Seconds by name, summed up."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started


def build(arguments: argparse.Namespace) -> nn.Module:
    sizes = SIZES[arguments.size]
    model_config = LlamaConfig(
        vocab_size=128256, num_key_value_heads=8, tie_word_embeddings=False, max_position_embeddings=8192, **sizes
    )
    model = build_factored(model_config, SCTConfig(r=arguments.r, target_modules=PROJECTIONS, init="random"))
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model.train()


def run(arguments: argparse.Namespace) -> dict[str, object]:
    return_freed_memory()
    imported = peak_bytes()
    clock, started = Clock(), time.perf_counter()
    model = build(arguments)
    built = time.perf_counter() - started
    estimate = estimate_memory(model, arguments.tokens, in_backward=arguments.optimizer != "adamw", on_disk=True)
    if arguments.optimizer == "backward-8bit":
        estimate = estimate._replace(optimizer=estimate.optimizer // 4)
    rates = {"lr": arguments.lr, "value_lr": 10 * arguments.lr}
    if arguments.optimizer == "backward":
        step_in_backward(model, torch.optim.AdamW, fused=True, **rates)
        optimizer = None
    elif arguments.optimizer == "backward-8bit":
        from bitsandbytes.optim import AdamW8bit

        step_in_backward(model, AdamW8bit, **rates)
        optimizer = None
    else:
        # Not foreach, which allocates another copy of the gradients.
        optimizer = torch.optim.AdamW(parameter_groups(model, **rates), fused=True)
    retract = SCT.after_optimizer_step_of

    def timed(updates: list[SCT]) -> list[nn.Parameter]:
        with clock("retraction, part of the step"):
            return retract(updates)

    SCT.after_optimizer_step_of = timed
    text = arguments.text.read_bytes()[: arguments.tokens]
    ids = torch.tensor([list(text)])
    losses, steps = [], []
    for _ in range(arguments.steps):
        began = time.perf_counter()
        with clock("forward"), save_on_disk():
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        with clock("backward"):
            loss.backward()
        if optimizer is not None:
            with clock("step and retraction"):
                optimizer.step()
            optimizer.zero_grad()
        losses.append(float(loss))
        steps.append(time.perf_counter() - began)
        print(f"loss {losses[-1]:.3f}, {steps[-1]:.1f} s, peak {peak_bytes() / 1e9:.2f} GB", flush=True)
    trained = sum(value.numel() for value in model.parameters() if value.requires_grad)
    return {
        "size": arguments.size,
        "optimizer": arguments.optimizer,
        "trained": trained,
        "built_seconds": built,
        "peak_gb": peak_bytes() / 1e9,
        "estimated_gb": (estimate.total + imported) / 1e9,
        "step_seconds": sorted(steps)[len(steps) // 2],
        "seconds": {name: value / arguments.steps for name, value in clock.seconds.items()},
        "losses": losses,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="1b")
    parser.add_argument("--optimizer", choices=["adamw", "backward", "backward-8bit"], default="adamw")
    parser.add_argument("--text", type=Path, default=Path(__file__).parents[1] / "README.md")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--r", type=int, default=32)
    parser.add_argument("--lr", type=float, default=2e-4)
    print(json.dumps(run(parser.parse_args()), indent=1))


if __name__ == "__main__":
    main()
