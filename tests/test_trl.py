"""TRL's trainers take the configs as they take LoRA's; its reference model is the disabled or the copied adapter."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import nn
from transformers import PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from spectral_peft import SpectralCallback, SpectralError, SpectralUpdate
from tests.methods import SST, Method, counted
from tests.models import llama, train_, trainable, updates


STEPS = 3
WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "dog", "ran", "to", "yes", "no", "hot", "cold", "up", "down"]
CHAT = "{% for message in messages %}{{ message['role'] }} {{ message['content'] }} {% endfor %}"


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """One token per word, made in memory."""
    special = ["<unk>", "<pad>", "<eos>", "user", "assistant"]
    words = Tokenizer(WordLevel({word: number for number, word in enumerate([*special, *WORDS])}, unk_token="<unk>"))
    words.pre_tokenizer = WhitespaceSplit()
    made = PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<unk>", pad_token="<pad>", eos_token="<eos>", chat_template=CHAT
    )
    made.model_max_length = 32
    return made


TALKS = Dataset.from_list(
    [{"messages": [{"role": "user", "content": f"{a} {b}"}, {"role": "assistant", "content": b}]}
     for a, b in zip(WORDS[:12], WORDS[4:], strict=True)]
)  # fmt: skip
PREFERENCES = Dataset.from_list(
    [{"prompt": f"{a} ", "chosen": f"{b} {b}", "rejected": a} for a, b in zip(WORDS[:12], WORDS[4:], strict=True)]
)


def arguments(cls: Any, folder: Path, **fields: Any) -> Any:
    return cls(
        str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        logging_steps=1,
        learning_rate=1e-3,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        bf16=False,
        gradient_checkpointing=False,
        use_cpu=True,
        **fields,
    )


def train(run: Any, with_callback: bool = True) -> list[dict[str, float]]:
    """Trains, checks that every trained parameter moved and that schedules ran; returns the logs of the loss."""
    if with_callback:
        run.add_callback(SpectralCallback(run))
    before = [value.detach().clone() for value in trainable(run.model)]
    run.train()
    assert not any(torch.equal(a, b) for a, b in zip(before, trainable(run.model), strict=True))
    assert spectral_steps(run.model) in ({STEPS}, set())
    return [log for log in run.state.log_history if "loss" in log]


def spectral_steps(model: nn.Module) -> set[int]:
    trained = (update for update in updates(model) if next(iter(update.trained_parameters()))[1].requires_grad)
    return {int(update.step) for update in trained if update.scheduled}


@pytest.mark.parametrize("with_callback", [False, True], ids=["plain", "callback"])
def test_sft(method: Method, tokenizer: Any, with_callback: bool, tmp_path: Path) -> None:
    run = SFTTrainer(
        llama(),
        arguments(SFTConfig, tmp_path, max_length=16),
        train_dataset=TALKS,
        processing_class=tokenizer,
        peft_config=counted(method, task_type="CAUSAL_LM"),
    )
    assert isinstance(next(updates(run.model)), SpectralUpdate)
    for log in train(run, with_callback):
        assert ("spectral/effective_rank" in log) == (with_callback and method.has_values)
        assert "entropy" in log  # TRL's own figures are still there


def dpo(model: nn.Module, tokenizer: Any, folder: Path, config: Any = None, **fields: Any) -> DPOTrainer:
    return DPOTrainer(
        model,
        args=arguments(DPOConfig, folder, max_length=16, **fields),
        train_dataset=PREFERENCES,
        processing_class=tokenizer,
        peft_config=config,
    )


def assert_starts_at_its_reference(logs: list[dict[str, float]], exact: bool) -> None:
    """Before the first step model and reference are the same: no margin, and the loss is log 2."""
    rewards = [logs[0]["rewards/chosen"], logs[0]["rewards/rejected"], logs[0]["loss"] - math.log(2)]
    assert rewards == pytest.approx([0, 0, 0], abs=1e-7 if exact else 1e-5)
    assert any(abs(log["rewards/margins"]) > 1e-7 for log in logs[1:])


def test_dpo_against_the_disabled_adapter(method: Method, tokenizer: Any, tmp_path: Path) -> None:
    """Exactly at the start for what is added to the weight, up to rounding for what replaces it.

    At full rank where there is one: a method that approximates the weight is another model than its reference below.
    """
    config = counted(method, task_type="CAUSAL_LM", **({"r": 1.0} if method.free_rank else {}))
    logs = train(dpo(llama(), tokenizer, tmp_path, config))
    assert_starts_at_its_reference(logs, exact=not method.replaces)


def test_dpo_against_a_copy_of_a_trained_adapter(method: Method, tokenizer: Any, tmp_path: Path) -> None:
    first = get_peft_model(llama(), counted(method, task_type="CAUSAL_LM"))
    train_(first, method.lr)
    first.save_pretrained(tmp_path / "adapter")
    model = PeftModel.from_pretrained(llama(), tmp_path / "adapter", is_trainable=True)
    run = dpo(model, tokenizer, tmp_path)
    assert set(model.peft_config) == {"default", "ref"}
    run.add_callback(SpectralCallback(run))
    run.train()
    assert_starts_at_its_reference([log for log in run.state.log_history if "loss" in log], exact=True)
    assert spectral_steps(model) == ({5 + STEPS} if next(updates(model)).scheduled else set())


def test_an_optimizer_that_was_built_before_trl_adds_the_adapter(tokenizer: Any, tmp_path: Path) -> None:
    base = llama()
    run = SFTTrainer(
        base,
        arguments(SFTConfig, tmp_path, max_length=16),
        train_dataset=TALKS,
        processing_class=tokenizer,
        peft_config=SST(r=4, task_type="CAUSAL_LM"),
        optimizers=(torch.optim.AdamW(base.parameters(), lr=1e-3), None),
    )
    run.add_callback(SpectralCallback(run))
    with pytest.raises(SpectralError, match="built before the adapter was added"):
        run.train()
