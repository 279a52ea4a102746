r"""Text classification with the Trainer and `evaluate`, with any method of this package or LoRA.

    python examples/classify_text.py                # a tiny encoder on made sentences: a check of some seconds
    python examples/classify_text.py --model answerdotai/ModernBERT-base --dataset fancyzhx/ag_news --method sst \
        --metric accuracy f1 --max_steps 2000 --per_device_train_batch_size 32 --bf16 --output_dir news-sst

The classifier on top trains in full beside the adapter. All flags of transformers' TrainingArguments are flags here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, NamedTuple

import datasets
import evaluate
import numpy as np
import torch
from peft import LoraConfig, PeftConfig, PeftModel, TaskType, get_peft_model
from stand_ins import SIZES, VOCABULARY, load_tokenizer
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    DataCollatorWithPadding,
    HfArgumentParser,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.hf_argparser import HfArg

from spectral_peft import PiSSAConfig, SCTConfig, SSTConfig, SVFitConfig, create_spectral_optimizer


class Method(NamedTuple):
    """The config of a method, its rank and learning rate, and that of singular values as a multiple of it."""

    config: Callable[..., PeftConfig]
    r: int
    learning_rate: float
    values: float = 1.0


METHODS = {
    "svfit": Method(SVFitConfig, r=128, learning_rate=3e-2),
    "pissa": Method(PiSSAConfig, r=8, learning_rate=3e-4),
    "sst": Method(partial(SSTConfig, pool=32), r=8, learning_rate=3e-4, values=100),
    "sct": Method(SCTConfig, r=128, learning_rate=3e-4, values=10),
    "lora": Method(partial(LoraConfig, lora_alpha=16), r=8, learning_rate=1e-3),
}


@dataclass
class Arguments:
    """What to train, on what, with which method."""

    model: str | None = HfArg(default=None, help="Hub id or folder of an encoder; default: a tiny BERT")
    dataset: str | None = HfArg(default=None, help="Hub id or folder, with train and test; default: made sentences")
    text_column: str = HfArg(default="text", help="column of the text")
    label_column: str = HfArg(default="label", help="column of the class")
    method: Literal["svfit", "pissa", "sst", "sct", "lora"] = HfArg(default="svfit", help="what trains")
    r: int | None = HfArg(default=None, help="rank; default: the method's own")
    max_length: int = HfArg(default=256, help="tokens of a text; the rest is cut off")
    metric: list[str] = field(
        default_factory=list, metadata={"help": "metrics of `evaluate`, from the Hub; default: accuracy and macro-F1"}
    )


@dataclass
class Training(TrainingArguments):
    """The Trainer's flags, with defaults of this script."""

    output_dir: str = "classify-out"
    learning_rate: float | None = HfArg(default=None, help="peak of the schedule; default: the method's own")
    max_steps: int = HfArg(default=100, help="optimizer steps; -1: as many as num_train_epochs takes")
    warmup_steps: float = 0.1
    eval_strategy: str = "epoch"
    save_strategy: str = "no"
    report_to: str = "none"
    dataloader_pin_memory: bool = torch.accelerator.is_available()


class AccuracyAndF1(evaluate.Metric):
    """Accuracy and macro-F1; for these, `evaluate.load` would need scripts of the Hub and scikit-learn."""

    def _info(self) -> evaluate.MetricInfo:
        labels = {name: datasets.Value("int64") for name in ("predictions", "references")}
        return evaluate.MetricInfo(description=str(self.__doc__), citation="", features=datasets.Features(labels))

    def _compute(self, predictions: Sequence[int], references: Sequence[int]) -> dict[str, float]:
        found, true = np.asarray(predictions), np.asarray(references)
        classes = np.union1d(found, true)
        hits = [2 * np.sum((found == c) & (true == c)) / (np.sum(found == c) + np.sum(true == c)) for c in classes]
        return {"accuracy": float(np.mean(found == true)), "f1": float(np.mean(hits))}


def scorer(names: list[str]) -> Callable[[Any], dict[str, float]]:
    """The Trainer's `compute_metrics`, out of metrics of the Hub or the one above."""
    metrics = [evaluate.load(name) for name in names] or [AccuracyAndF1(keep_in_memory=True)]

    def score(prediction: Any) -> dict[str, float]:
        answers = prediction.predictions.argmax(-1)
        scores: dict[str, float] = {}
        for metric in metrics:
            average = {"average": "macro"} if metric.name in ("f1", "precision", "recall") else {}
            scores |= metric.compute(predictions=answers, references=prediction.label_ids, **average)
        return scores

    return score


def made_sentences() -> datasets.DatasetDict:
    """Sentences on three subjects."""
    nouns = {"music": ["a song", "the flute", "a waltz"], "food": ["a soup", "the bread", "a pear"],
             "sea": ["a wave", "the tide", "a reef"]}  # fmt: skip
    frames = [f"{who} {verb}" for who in ("Ann", "Bob", "My aunt") for verb in ("likes", "knows", "finds", "misses")]
    rows = [
        {"text": f"{frame} {noun}.", "label": number}
        for frame in frames
        for number, words in enumerate(nouns.values())
        for noun in words
    ]
    label = datasets.ClassLabel(names=list(nouns))
    return datasets.Dataset.from_list(rows).cast_column("label", label).train_test_split(0.25, seed=0)


def load_data(arguments: Arguments) -> datasets.DatasetDict:
    """Training and test data, with the names of the classes."""
    data = datasets.load_dataset(arguments.dataset) if arguments.dataset else made_sentences()
    column = arguments.label_column
    for split in ("train", "test"):
        if split not in data or not {column, arguments.text_column} <= set(data[split].column_names):
            raise ValueError(
                f"{arguments.dataset} should have train and test with the columns {arguments.text_column} and "
                f"{column} (--text_column, --label_column), got {data.column_names}."
            )
    if not isinstance(data["train"].features[column], datasets.ClassLabel):
        names = sorted(map(str, data["train"].unique(column)))
        data = data.cast_column(column, datasets.Value("string")).cast_column(column, datasets.ClassLabel(names=names))
    return data


def load_encoder(name: str | None, labels: list[str]) -> Any:
    """The encoder of the Hub or of a folder with a new classifier; without a name a tiny BERT, always the same."""
    set_seed(0)  # for the classifier, and for what follows
    ids = {"id2label": dict(enumerate(labels)), "label2id": {label: number for number, label in enumerate(labels)}}
    if name:
        return AutoModelForSequenceClassification.from_pretrained(name, dtype=torch.float32, **ids)
    return AutoModelForSequenceClassification.from_config(
        BertConfig(vocab_size=VOCABULARY, initializer_range=0.1, **SIZES, **ids)
    )


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Train, save the adapter, load it back and score it; return the scores."""
    arguments, training = HfArgumentParser(
        (Arguments, Training), description=__doc__.splitlines()[0]
    ).parse_args_into_dataclasses(argv)
    method = METHODS[arguments.method]
    training.learning_rate = training.learning_rate or method.learning_rate

    data = load_data(arguments)
    labels = data["train"].features[arguments.label_column].names
    tokenizer = load_tokenizer(arguments.model, data["train"][arguments.text_column])
    data = data.map(
        lambda rows: tokenizer(rows[arguments.text_column], truncation=True, max_length=arguments.max_length),
        batched=True,
        remove_columns=[name for name in data["train"].column_names if name != arguments.label_column],
    ).rename_column(arguments.label_column, "labels")

    config = method.config(r=arguments.r or method.r, target_modules="all-linear", task_type=TaskType.SEQ_CLS)
    if arguments.method == "sst" and training.max_steps > 0:  # each vector of the pool has its turn once on average
        config.steps_per_iteration = max(1, training.max_steps * config.r // config.pool)
    model = get_peft_model(load_encoder(arguments.model, labels), config)
    model.print_trainable_parameters()
    rate = training.learning_rate
    optimizer = create_spectral_optimizer(model, torch.optim.AdamW, lr=rate, value_lr=method.values * rate)

    common = {
        "args": training,
        "eval_dataset": data["test"],
        "data_collator": DataCollatorWithPadding(tokenizer),
        "compute_metrics": scorer(arguments.metric),
    }
    trainer = Trainer(model, train_dataset=data["train"], optimizers=(optimizer, None), **common)
    trainer.train()
    trained = trainer.evaluate()
    trainer.save_model()  # the adapter and the classifier, without the encoder

    again = PeftModel.from_pretrained(load_encoder(arguments.model, labels), training.output_dir)
    scores = Trainer(again, **common).evaluate()
    print(f"loss {trained['eval_loss']:.4f} when trained, {scores['eval_loss']:.4f} loaded from {training.output_dir}")
    return scores


if __name__ == "__main__":
    main()
