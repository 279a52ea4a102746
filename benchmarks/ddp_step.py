"""What a step of each method costs under DDP with two processes on the CPU, next to PEFT's LoRA of the same rank.

All models live in the same processes and step in turn (LoRA, a method, the next, ... and again), so that what else the
machine does falls on all alike; every second step does not exchange gradients. Prints JSON: the median seconds of both
kinds of steps, and their ratios to those of LoRA. SST runs without its warm-up, which takes 20 of 200 steps.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from peft import LoraConfig, get_peft_model
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaConfig, LlamaForCausalLM

from spectral_peft import PiSSAConfig, SCTConfig, SSTConfig, SVFitConfig


WORLD = 2
WARMUP = 2  # rounds that are not counted


def configs(r: int) -> dict[str, Any]:
    common = {"r": r, "target_modules": "all-linear"}
    return {
        "lora": LoraConfig(**common),
        "svfit": SVFitConfig(**common),
        "pissa": PiSSAConfig(**common),
        "sst, pool of 2 r": SSTConfig(pool=2 * r, warmup_steps=0, **common),
        "sst": SSTConfig(warmup_steps=0, **common),
        "sct": SCTConfig(**common),
    }


def training(config: Any, args: argparse.Namespace) -> tuple[Any, torch.optim.Optimizer]:
    torch.manual_seed(0)
    sizes = {"hidden_size": args.hidden, "intermediate_size": 11 * args.hidden // 4, "num_hidden_layers": args.layers}
    base = LlamaForCausalLM(LlamaConfig(vocab_size=1024, num_attention_heads=4, **sizes))
    model = DistributedDataParallel(get_peft_model(base, config).train())
    return model, torch.optim.AdamW([value for value in model.parameters() if value.requires_grad], lr=1e-3)


def step(model: Any, optimizer: torch.optim.Optimizer, ids: torch.Tensor, *, exchange: bool) -> float:
    dist.barrier()
    start = time.perf_counter()
    with nullcontext() if exchange else model.no_sync():
        model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return time.perf_counter() - start


def work(rank: int, store: str, args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(store, WORLD), rank=rank, world_size=WORLD)
    trainings = {name: training(config, args) for name, config in configs(args.r).items()}
    kinds = ("with exchange", "without")
    times: dict[str, dict[str, list[float]]] = {kind: {name: [] for name in trainings} for kind in kinds}
    for number in range(args.rounds + WARMUP):
        ids = torch.randint(1024, (args.batch_size, args.length))
        for kind in kinds:
            for name, (model, optimizer) in trainings.items():
                seconds = step(model, optimizer, ids, exchange=kind == "with exchange")
                if number >= WARMUP:
                    times[kind][name].append(seconds)
    if rank == 0:
        medians = {kind: {name: statistics.median(own) for name, own in times[kind].items()} for kind in kinds}
        ratios = {kind: {name: round(own[name] / own["lora"], 3) for name in own} for kind, own in medians.items()}
        print(json.dumps({"arguments": vars(args), "seconds": medians, "ratio to lora": ratios}, indent=1))
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=256, help="hidden size of the Llama")
    parser.add_argument("--layers", type=int, default=4, help="its decoder layers")
    parser.add_argument("--r", type=int, default=16, help="rank of every method")
    parser.add_argument("--batch-size", type=int, default=2, help="sequences per process and step")
    parser.add_argument("--length", type=int, default=128, help="tokens per sequence")
    parser.add_argument("--rounds", type=int, default=30, help="steps of each method that are timed")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(work, (str(Path(folder) / "store"), args), nprocs=WORLD)


if __name__ == "__main__":
    main()
