r"""Supervised fine-tuning with TRL: its SFTTrainer takes the config of any method as it takes a LoraConfig.

    python examples/sft_trl.py                     # a tiny model on made conversations: a check of some seconds
    python examples/sft_trl.py --model Qwen/Qwen3-0.6B --dataset trl-lib/Capybara --method pissa \
        --max_steps 1000 --per_device_train_batch_size 8 --output_dir qwen-pissa

All flags of TRL's SFTConfig are flags here, and `--config recipe.yaml` reads them from a file.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from datasets import Dataset, load_dataset
from peft import LoraConfig, PeftConfig, PeftModel
from stand_ins import load_causal_lm, load_tokenizer
from transformers.hf_argparser import HfArg
from trl import SFTConfig, SFTTrainer, TrlParser

from spectral_peft import PiSSAConfig, SCTConfig, SpectralCallback, SSTConfig, SVFitConfig


class Method(NamedTuple):
    """The config of a method, with the rank and the peak learning rate that it gets without flags."""

    config: Callable[..., PeftConfig]
    r: int
    learning_rate: float


METHODS = {
    "svfit": Method(SVFitConfig, r=64, learning_rate=3e-2),
    "pissa": Method(PiSSAConfig, r=16, learning_rate=3e-4),
    "sst": Method(partial(SSTConfig, pool=32), r=8, learning_rate=3e-4),
    "sct": Method(SCTConfig, r=128, learning_rate=1.5e-4),
    "lora": Method(partial(LoraConfig, lora_alpha=32), r=16, learning_rate=1e-3),
}


@dataclass
class Arguments:
    """What to train, on what, with which method."""

    model: str | None = HfArg(default=None, help="Hub id or folder of a causal language model; default: a tiny one")
    dataset: str | None = HfArg(default=None, help="Hub id or folder of data in one of TRL's formats; default: made")
    method: Literal["svfit", "pissa", "sst", "sct", "lora"] = HfArg(default="svfit", help="what trains")
    r: int | None = HfArg(default=None, help="rank; default: the method's own")


@dataclass
class Training(SFTConfig):
    """TRL's flags, with defaults of this script."""

    output_dir: str = "sft-out"
    learning_rate: float | None = HfArg(default=None, help="peak of the schedule; default: the method's own")
    max_steps: int = HfArg(default=60, help="optimizer steps; -1: as many as num_train_epochs takes")
    lr_scheduler_type: str = "cosine"
    bf16: bool = HfArg(default=torch.accelerator.is_available(), help="autocast to bfloat16; default: on a GPU")
    save_strategy: str = "no"


def made_conversations() -> Dataset:
    """Small sums as questions and answers."""
    pairs = [(f"What is {a} and {b}?", f"{a} and {b} make {a + b}.") for a in range(12) for b in range(12)]
    turns = [[{"role": "user", "content": q}, {"role": "assistant", "content": a}] for q, a in pairs]
    return Dataset.from_dict({"messages": turns})


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Train, save the adapter, load it back; return the last entry of the log with a loss."""
    arguments, training = TrlParser((Arguments, Training), description=__doc__.splitlines()[0]).parse_args_and_config(
        argv
    )
    method = METHODS[arguments.method]
    training.learning_rate = training.learning_rate or method.learning_rate

    data = load_dataset(arguments.dataset, split="train") if arguments.dataset else made_conversations()
    texts = () if arguments.model else (turn["content"] for turns in data["messages"] for turn in turns)
    tokenizer = load_tokenizer(arguments.model, texts)
    config = method.config(r=arguments.r or method.r, target_modules="all-linear", task_type="CAUSAL_LM")
    if arguments.method == "sst" and training.max_steps > 0:  # each vector of the pool has its turn once on average
        config.steps_per_iteration = max(1, training.max_steps * config.r // config.pool)
    trainer = SFTTrainer(
        load_causal_lm(arguments.model),
        training,
        train_dataset=data,
        processing_class=tokenizer,
        peft_config=config,
    )
    if arguments.method != "lora":
        trainer.add_callback(SpectralCallback(trainer))  # optional: checks that the adapter trains, adds logs
    trainer.model.print_trainable_parameters()
    trainer.train()
    trainer.save_model()

    PeftModel.from_pretrained(load_causal_lm(arguments.model), training.output_dir)  # as a program that uses it would
    print(f"The adapter is in {training.output_dir}; it was loaded back.")
    return [entry for entry in trainer.state.log_history if "loss" in entry][-1]


if __name__ == "__main__":
    main()
