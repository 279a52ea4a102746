"""What a step of SST in place of the weights costs, next to full-rank training of the same Llama on the same batch.

    python benchmarks/cost_sst.py --hidden 512 --layers 4 --r 64

Steps of both are taken in turn and compared pair by pair. Swaps and SVDs are timed by themselves and spread over the
steps between them at the default schedule.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from pathlib import Path

import torch
from peft import get_peft_model
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from spectral_peft import SST, SSTConfig, untargeted_modules


def llama(arguments: argparse.Namespace) -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=arguments.hidden,
        intermediate_size=arguments.hidden * 8 // 3 // 16 * 16,
        num_hidden_layers=arguments.layers,
        num_attention_heads=8,
        vocab_size=arguments.vocabulary,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config).train()


def step(model: nn.Module, optimizer: torch.optim.Optimizer, ids: Tensor, clock: str) -> float:
    now = getattr(time, {"wall": "perf_counter", "cpu": "process_time"}[clock])
    started = now()
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return now() - started


def event_seconds(update: SST, clock: str) -> tuple[float, float]:
    """Seconds of one swap, and of one SVD, of one weight; the update is used up."""
    now = getattr(time, {"wall": "perf_counter", "cpu": "process_time"}[clock])
    started = now()
    update._swap(update._next(1))
    swapped = now()
    update._take(update._decomposed())
    return swapped - started, now() - swapped


def factored_bytes(model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Bytes of gradients and optimizer state of the projections."""
    total = 0
    for name, value in model.named_parameters():
        if value.requires_grad and "_proj" in name:
            state = optimizer.state[value].values()
            total += value.numel() * 4 + sum(each.numel() * each.element_size() for each in state if each.ndim)
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = {"hidden": 512, "layers": 4, "r": 64, "vocabulary": 4096, "batch": 8, "length": 256, "rounds": 15}
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="cpu: CPU time of the process")
    parser.add_argument("--json", type=Path, help="file for the numbers")
    arguments = parser.parse_args()

    full = llama(arguments)
    base = copy.deepcopy(full)
    config = SSTConfig(
        r=arguments.r,
        target_modules="all-linear",
        keep_base_weight=False,
        modules_to_save=untargeted_modules(base),
        warmup_steps=0,
    )
    sst = get_peft_model(base, config)
    models = {"full rank": full, "sst": sst}
    optimizers = {
        name: torch.optim.AdamW([value for value in model.parameters() if value.requires_grad], lr=1e-4)
        for name, model in models.items()
    }
    ids = torch.randint(0, arguments.vocabulary, (arguments.batch, arguments.length))
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for number in range(arguments.rounds + 2):
        for name, model in models.items():
            taken = step(model, optimizers[name], ids, arguments.clock)
            if number >= 2:
                seconds[name].append(taken)
    ratios = [one / other for one, other in zip(seconds["sst"], seconds["full rank"], strict=True)]
    memory = {name: factored_bytes(model, optimizers[name]) for name, model in models.items()}
    updates = [module for module in sst.modules() if isinstance(module, SST)]
    events = [event_seconds(update, arguments.clock) for update in updates]
    schedule = updates[0].schedule
    swaps, svds = (sum(each) / schedule.steps_per_iteration for each in zip(*events, strict=True))
    svds /= schedule.iterations_per_round
    median = statistics.median(seconds["sst"])
    result = {
        "settings": {name: str(value) for name, value in vars(arguments).items() if name != "json"},
        "step of full rank, s": statistics.median(seconds["full rank"]),
        "step of SST, s": median,
        "step, ratio": statistics.median(ratios),
        "step, quartiles of the ratio": statistics.quantiles(ratios, n=4)[::2],
        "gradients and optimizer state of the projections, ratio": memory["sst"] / memory["full rank"],
        "swaps, share of the time": swaps / median,
        "SVDs, share of the time": svds / median,
    }
    table = Table("", "measured", title=f"SST next to full rank, {arguments.clock} clock")
    for name, value in result.items():
        if name != "settings":
            table.add_row(name, " to ".join(f"{each:.4g}" for each in (value if isinstance(value, list) else [value])))
    Console().print(table)
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
