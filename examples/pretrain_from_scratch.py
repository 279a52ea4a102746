"""Pre-train a small Llama from nothing with SST or SCT and the Trainer, on any text file; stop it and it goes on.

    python examples/pretrain_from_scratch.py --text corpus.txt
    python examples/pretrain_from_scratch.py --text corpus.txt --resume     # from the last checkpoint
    python examples/pretrain_from_scratch.py --text corpus.txt --method sct --output-dir sct-out

SST: all singular values of every projection train, and r of the singular vectors at a time; the result is a model of
full rank. SCT: every projection is three thin factors of rank r from the first step to the last; no dense weight is
allocated before the end. Embeddings, norms and head train in full. At the end the model is merged into a plain one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Literal

import torch
from datasets import Dataset, load_dataset
from peft import PeftModel, get_peft_model
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from transformers import (
    HfArgumentParser,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.hf_argparser import HfArg

from spectral_peft import (
    SCTConfig,
    SSTConfig,
    build_factored,
    create_spectral_optimizer,
    parameter_report,
    untargeted_modules,
)


@dataclass
class Arguments:
    """What to train, on what, and how."""

    text: str = HfArg(help="a plain text file")
    method: Literal["sst", "sct"] = HfArg(default="sst", help="sparse spectral or spectral compact training")
    output_dir: str = HfArg(default="pretrain-out", help="checkpoints; the plain model goes to its folder merged")
    resume: bool = HfArg(default=False, help="go on from the last checkpoint in --output-dir")
    hidden: int = HfArg(default=128, help="hidden size")
    layers: int = HfArg(default=2, help="number of layers")
    r: int = HfArg(default=16, help="SST: singular vectors that train at a time; SCT: the rank")
    vocabulary: int = HfArg(default=2048, help="tokens of the byte-level BPE that is trained on the text")
    length: int = HfArg(default=64, help="tokens of an example")
    steps: int = HfArg(default=2000, help="optimizer steps")
    batch: int = HfArg(default=16, help="examples per batch and device")
    steps_per_iteration: int = HfArg(default=200, help="SST: steps from one exchange of vectors to the next")
    save_every: int = HfArg(default=500, help="steps from one checkpoint to the next")
    learning_rate: float = HfArg(default=3e-3, help="peak of the schedule, of embeddings, norms and head")


def trained_tokenizer(lines: Dataset, vocabulary: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE of the text."""
    bpe = Tokenizer(BPE())
    bpe.pre_tokenizer, bpe.decoder = ByteLevel(add_prefix_space=False), ByteLevelDecoder()
    trainer = BpeTrainer(vocab_size=vocabulary, initial_alphabet=ByteLevel.alphabet(), show_progress=False)
    bpe.train_from_iterator(lines[:100_000]["text"], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe)


def blocks(lines: Dataset, tokenizer: PreTrainedTokenizerFast, length: int) -> Dataset:
    """The text as blocks of `length` tokens."""

    def cut(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        ids = list(chain.from_iterable(tokenizer(batch["text"])["input_ids"]))
        rows = [ids[start : start + length] for start in range(0, len(ids) - length + 1, length)]
        return {"input_ids": rows, "labels": rows}

    return lines.map(cut, batched=True, batch_size=1000, remove_columns=["text"])


def spectral_llama(arguments: Arguments) -> PeftModel:
    """A Llama whose projections exist as singular triplets only."""
    llama = LlamaConfig(
        hidden_size=arguments.hidden,
        intermediate_size=3 * arguments.hidden,
        num_hidden_layers=arguments.layers,
        num_attention_heads=4,
        vocab_size=arguments.vocabulary,
        max_position_embeddings=arguments.length,
    )
    common = {"r": arguments.r, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    if arguments.method == "sct":
        return build_factored(llama, SCTConfig(init="random", **common))
    model = LlamaForCausalLM(llama)
    steps = arguments.steps_per_iteration
    rest = untargeted_modules(model)  # embeddings, norms and head
    return get_peft_model(
        model, SSTConfig(modules_to_save=rest, keep_base_weight=False, steps_per_iteration=steps, **common)
    )


def optimizer_of(model: PeftModel, arguments: Arguments) -> torch.optim.Optimizer:
    """AdamW with the measured rates, or multiples of them: vectors by their height, singular values faster."""
    factor = arguments.learning_rate / 3e-3
    vectors = {"sst": 2.5e-3, "sct": 7.5e-4}[arguments.method]
    rates = {"lr": 3e-3 * factor, "factor_lr": vectors * factor, "value_lr": 1e-2 * factor}
    return create_spectral_optimizer(model, torch.optim.AdamW, **rates)


def main(argv: Sequence[str] | None = None) -> float:
    """Train, and return the loss on a random hundredth of the text, which is held out."""
    (arguments,) = HfArgumentParser(Arguments, description=__doc__.splitlines()[0]).parse_args_into_dataclasses(argv)

    set_seed(0)
    lines = load_dataset("text", data_files=arguments.text, split="train")
    tokenizer = trained_tokenizer(lines, arguments.vocabulary)
    data = blocks(lines, tokenizer, arguments.length).train_test_split(0.01, seed=0)
    model = spectral_llama(arguments)
    print(parameter_report(model))
    training = TrainingArguments(
        output_dir=arguments.output_dir,
        max_steps=arguments.steps,
        per_device_train_batch_size=arguments.batch,
        lr_scheduler_type="cosine",
        warmup_steps=0.02,
        save_steps=arguments.save_every,
        logging_steps=max(1, arguments.steps // 20),
        report_to="none",
        dataloader_pin_memory=torch.accelerator.is_available(),
    )
    optimizers = (optimizer_of(model, arguments), None)
    trainer = Trainer(model, training, train_dataset=data["train"], eval_dataset=data["test"], optimizers=optimizers)
    trainer.train(resume_from_checkpoint=arguments.resume)
    loss = trainer.evaluate()["eval_loss"]
    merged = Path(arguments.output_dir) / "merged"
    model.merge_and_unload().save_pretrained(merged)
    tokenizer.save_pretrained(merged)
    print(f"held-out loss {loss:.3f}; a plain model and its tokenizer are in {merged}")
    return loss


if __name__ == "__main__":
    main()
