"""Pre-train a small Llama from nothing with SST and the HF Trainer, on any text file; stop it and it goes on.

    python examples/pretrain_from_scratch.py --text corpus.txt
    python examples/pretrain_from_scratch.py --text corpus.txt --resume     # from the last checkpoint

All singular values of every projection train, and r of the singular vectors at a time; embeddings, norms and head
train in full. The dense weights are freed. At the end the model is merged into a plain one and saved.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from itertools import chain
from pathlib import Path

import torch
from datasets import Dataset, load_dataset
from peft import get_peft_model
from tokenizers import ByteLevelBPETokenizer
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, set_seed

from spectral_peft import SSTConfig, parameter_report, untargeted_modules


def blocks(text: Path, vocabulary: int, length: int) -> Dataset:
    """The text as blocks of `length` tokens of a byte-level BPE that is trained on it."""
    lines = load_dataset("text", data_files=str(text), split="train")
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(lines[:100_000]["text"], vocab_size=vocabulary, show_progress=False)

    def cut(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        ids = list(chain.from_iterable(encoding.ids for encoding in bpe.encode_batch(batch["text"])))
        rows = [ids[start : start + length] for start in range(0, len(ids) - length + 1, length)]
        return {"input_ids": rows, "labels": rows}

    return lines.map(cut, batched=True, batch_size=1000, remove_columns=["text"])


def spectral_llama(arguments: argparse.Namespace) -> torch.nn.Module:
    """A Llama whose projections exist as singular triplets only."""
    model = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=arguments.hidden,
            intermediate_size=3 * arguments.hidden,
            num_hidden_layers=arguments.layers,
            num_attention_heads=4,
            vocab_size=arguments.vocabulary,
            max_position_embeddings=arguments.length,
        )
    )
    return get_peft_model(
        model,
        SSTConfig(
            r=arguments.r,
            target_modules="all-linear",
            modules_to_save=untargeted_modules(model),
            keep_base_weight=False,
            steps_per_iteration=arguments.steps_per_iteration,
            task_type="CAUSAL_LM",
        ),
    )


def main(argv: Sequence[str] | None = None) -> float:
    """Train, and return the loss on the held-out last hundredth of the text."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True, help="a plain text file")
    parser.add_argument("--output-dir", type=Path, default=Path("pretrain-out"))
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in --output-dir")
    numbers = {"hidden": 128, "layers": 2, "r": 16, "vocabulary": 2048, "length": 64, "steps": 2000, "batch": 16}
    for name, default in {**numbers, "steps-per-iteration": 200, "save-every": 500}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--learning-rate", type=float, default=1e-2)
    arguments = parser.parse_args(argv)

    set_seed(0)
    data = blocks(arguments.text, arguments.vocabulary, arguments.length).train_test_split(0.01, seed=0)
    model = spectral_llama(arguments)
    print(parameter_report(model))
    training = TrainingArguments(
        output_dir=str(arguments.output_dir),
        max_steps=arguments.steps,
        per_device_train_batch_size=arguments.batch,
        learning_rate=arguments.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=0.02,
        weight_decay=0.0,
        save_steps=arguments.save_every,
        logging_steps=max(1, arguments.steps // 20),
        report_to="none",
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    trainer = Trainer(model, training, train_dataset=data["train"], eval_dataset=data["test"])
    trainer.train(resume_from_checkpoint=arguments.resume)
    loss = trainer.evaluate()["eval_loss"]
    model.merge_and_unload().save_pretrained(arguments.output_dir / "merged")
    print(f"held-out loss {loss:.3f}; a plain model is in {arguments.output_dir / 'merged'}")
    return loss


if __name__ == "__main__":
    main()
