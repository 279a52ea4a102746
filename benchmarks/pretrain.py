"""Pre-training a small Llama from nothing: full rank, LoRA, ReLoRA*, SST and SCT on any text file.

    python benchmarks/pretrain.py --text corpus.txt.gz --arm sst --factor-lr 1e-2
    python benchmarks/pretrain.py --text corpus.txt.gz --table      # what has been run so far

Every run writes one JSON file and is skipped if that file is there, so that an interrupted sweep goes on. All arms
see the same batches in the same order and train embeddings, head and norms in full; the seven projections of each
layer are what differs. ReLoRA* merges and starts anew with reset optimizer state, without a full-rank warm-up phase.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import math
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import Linear as LoraLinear
from tokenizers import ByteLevelBPETokenizer
from torch import nn
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM

from spectral_peft import SCTConfig, SSTConfig
from spectral_peft.training import reset_state


def tokens(text: Path, vocabulary: int, cache: Path) -> np.ndarray:
    """The text as numbers, by a byte-level BPE of its own."""
    digest = hashlib.sha256(f"{text.name} {text.stat().st_size} {vocabulary}".encode()).hexdigest()[:12]
    file = cache / f"tokens-{digest}.npy"
    if not file.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with (gzip.open if text.suffix == ".gz" else open)(text, "rt", encoding="utf-8", errors="replace") as stream:
            content = stream.read()
        bpe = ByteLevelBPETokenizer()
        lines = content.splitlines(keepends=True)
        bpe.train_from_iterator(lines[:: max(1, len(lines) // 100_000)], vocab_size=vocabulary, show_progress=False)
        blocks = ["".join(lines[i : i + 1000]) for i in range(0, len(lines), 1000)]
        np.save(file, np.concatenate([np.array(e.ids, dtype=np.uint16) for e in bpe.encode_batch(blocks)]))
    return np.load(file)


def base_model(arguments: argparse.Namespace) -> LlamaForCausalLM:
    torch.manual_seed(arguments.seed)
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=arguments.hidden,
            intermediate_size=arguments.ffn or int(arguments.hidden * 8 / 3) // 4 * 4 + 4,
            num_hidden_layers=arguments.layers,
            num_attention_heads=4,
            vocab_size=arguments.vocabulary,
            max_position_embeddings=arguments.length,
            tie_word_embeddings=False,
        )
    )


def full(model: nn.Module, arguments: argparse.Namespace) -> nn.Module:
    return model


def lora(model: nn.Module, arguments: argparse.Namespace) -> nn.Module:
    r = arguments.r
    return get_peft_model(model, LoraConfig(r=r, lora_alpha=2 * r, target_modules="all-linear"))


def fields(arguments: argparse.Namespace) -> dict[str, object]:
    return {name: json.loads(value) for name, value in (pair.split("=", 1) for pair in arguments.set)}


def sst(model: nn.Module, arguments: argparse.Namespace) -> nn.Module:
    return get_peft_model(model, SSTConfig(r=arguments.r, target_modules="all-linear", **fields(arguments)))


def sct(model: nn.Module, arguments: argparse.Namespace) -> nn.Module:
    chosen = {"init": "random", **fields(arguments)}
    return get_peft_model(model, SCTConfig(r=arguments.r, target_modules="all-linear", **chosen))


ARMS: dict[str, Callable[[nn.Module, argparse.Namespace], nn.Module]] = {
    "full": full, "lora": lora, "relora": lora, "sst": sst, "sct": sct,
}  # fmt: skip


def restart_lora(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """ReLoRA*: the product moves into the weight, A is drawn anew, B is 0, their optimizer state too."""
    for layer in model.modules():
        if isinstance(layer, LoraLinear):
            layer.get_base_layer().weight.data += layer.get_delta_weight("default")
            layer.reset_lora_parameters("default", True)
            reset_state(optimizer, [layer.lora_A["default"].weight, layer.lora_B["default"].weight])


def parameter_groups(model: nn.Module, arguments: argparse.Namespace) -> list[dict[str, object]]:
    """Factors of the seven projections with their own rate, singular values with theirs, all else with the common."""
    groups: dict[float, list[nn.Parameter]] = {}
    for name, value in model.named_parameters():
        factor = "lora_" in name or "_update." in name
        if not factor and ("base_layer" in name and arguments.arm != "full"):
            continue
        if factor and not value.requires_grad:
            continue
        value.requires_grad_(True)
        rate = arguments.lr if not factor else arguments.factor_lr
        groups.setdefault(arguments.value_lr or rate if ".dS." in name else rate, []).append(value)
    return [{"params": values, "lr": rate} for rate, values in groups.items()]


@torch.no_grad()
def perplexity(model: nn.Module, rows: torch.Tensor) -> float:
    model.eval()
    losses = [model(input_ids=part, labels=part).loss for part in rows.split(64)]
    model.train()
    return math.exp(torch.stack(losses).mean())


def run(arguments: argparse.Namespace, file: Path) -> None:
    data = tokens(arguments.text, arguments.vocabulary, arguments.out)
    length, held_out = arguments.length, 256 * arguments.length
    rows = torch.from_numpy(data[-held_out:].astype(np.int64)).reshape(256, length)
    train = data[:-held_out]
    model = ARMS[arguments.arm](base_model(arguments), arguments).train()
    optimizer = torch.optim.AdamW(parameter_groups(model, arguments), betas=(0.9, 0.95), weight_decay=0.0)
    generator, curve, started = np.random.default_rng(arguments.seed), {}, time.perf_counter()
    warm_up, restart = 100, arguments.restart_every

    def rate(step: int) -> float:
        again = min(1.0, (step % restart + 1) / 50) if arguments.arm == "relora" and step >= restart else 1.0
        cosine = 0.1 + 0.45 * (1 + math.cos(math.pi * min(1.0, step / arguments.steps)))
        return again * min(1.0, (step + 1) / warm_up) * cosine

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    for step in tqdm(range(1, arguments.steps + 1), desc=file.stem, mininterval=5, disable=arguments.quiet):
        starts = generator.integers(0, len(train) - length, arguments.batch)
        batch = torch.from_numpy(np.stack([train[s : s + length] for s in starts]).astype(np.int64))
        model(input_ids=batch, labels=batch).loss.backward()
        torch.nn.utils.clip_grad_norm_([p for g in optimizer.param_groups for p in g["params"]], 1.0)
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        if arguments.arm == "relora" and step % restart == 0 and step < arguments.steps:
            restart_lora(model, optimizer)
        if step % max(1, arguments.steps // 10) == 0:
            curve[step] = perplexity(model, rows)
    trained = sum(value.numel() for group in optimizer.param_groups for value in group["params"])
    settings = {name: str(value) for name, value in vars(arguments).items() if name not in ("out", "table", "quiet")}
    result = {"settings": settings, "perplexity": curve, "trained": trained, "seconds": time.perf_counter() - started}
    file.write_text(json.dumps(result, indent=1))


def label(arguments: argparse.Namespace) -> str:
    size = f"h{arguments.hidden}l{arguments.layers}r{arguments.r}n{arguments.steps}s{arguments.seed}"
    size += f"f{arguments.ffn}" if arguments.ffn else ""
    rates = f"{arguments.lr:g}-{arguments.factor_lr:g}" + (f"-{arguments.value_lr:g}" if arguments.value_lr else "")
    restart = f"-every{arguments.restart_every}" if arguments.arm == "relora" else ""
    return "-".join([size, arguments.arm, rates + restart, *sorted(arguments.set)]).replace('"', "")


def table(folder: Path) -> None:
    """All results, best first, with the share of the gap between the best LoRA and the best full-rank run."""
    results: dict[str, list[tuple[float, str]]] = {}
    for file in folder.glob("*.json"):
        size, arm, rest = file.stem.split("-", 2)
        ends = json.loads(file.read_text())["perplexity"]
        results.setdefault(size, []).append((ends[max(ends, key=int)], f"{arm:7} {rest}"))
    for size, runs in sorted(results.items()):
        best = {
            arm: min((p for p, name in runs if name.startswith(arm)), default=math.nan) for arm in ("full", "lora")
        }
        print(f"\n{size}: share of the gap from LoRA {best['lora']:.2f} to full rank {best['full']:.2f}")
        for value, name in sorted(runs):
            share = (best["lora"] - value) / (best["lora"] - best["full"])
            print(f"  {value:8.3f} {share:7.1%}  {name}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, help="a text file, plain or .gz")
    parser.add_argument("--out", type=Path, default=Path("benchmark-out/pretrain"))
    parser.add_argument("--arm", choices=ARMS, default="sst")
    for name, default in {"hidden": 64, "layers": 2, "ffn": 0, "r": 4, "vocabulary": 2048, "length": 64}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    for name, default in {"steps": 6000, "batch": 16, "seed": 0, "restart-every": 600}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument(
        "--lr", type=float, default=3e-3, help="of embeddings, head and norms; of everything in 'full'"
    )
    parser.add_argument("--factor-lr", type=float, default=3e-3, help="of the factors of the projections")
    parser.add_argument("--value-lr", type=float, default=0.0, help="of the singular values; 0: as the factors")
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=JSON", help="a field of the config")
    parser.add_argument("--table", action="store_true", help="print what has been run, and stop")
    parser.add_argument("--quiet", action="store_true")
    arguments = parser.parse_args()
    if arguments.table:
        return table(arguments.out)
    if arguments.text is None or not arguments.text.is_file():
        parser.error(f"--text should name a text file, got {arguments.text}.")
    arguments.out.mkdir(parents=True, exist_ok=True)
    file = arguments.out / f"{label(arguments)}.json"
    return None if file.exists() else run(arguments, file)


if __name__ == "__main__":
    main()
