"""Exports start from any folder or live model, and leave it as it is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from spectral_peft import export_lora, export_merged
from tests.methods import Method
from tests.models import batch, llama, logits, train_, trainable
from tests.test_cli import run
from tests.tolerance import tolerance


FUNCTION = tolerance(torch.float32, 64)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    llama().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def of_folder(base: Path, adapter: Path) -> Tensor:
    return logits(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter))


def check_exports(method: Method, base: Path, adapter: Path, out: Path) -> None:
    """By the command, which knows no more than the folder."""
    before = {file: file.read_bytes() for file in adapter.rglob("*") if file.is_file()}
    expected = of_folder(base, adapter)
    assert (expected - logits(llama())).abs().max() > 1e-3
    run("export", adapter, out / "dense", "--to", "merged")
    dense = AutoModelForCausalLM.from_pretrained(out / "dense")
    torch.testing.assert_close(logits(dense), expected, rtol=FUNCTION, atol=FUNCTION)
    if not method.replaces:
        run("export", adapter, out / "lora", "--to", "lora")
        torch.testing.assert_close(of_folder(base, out / "lora"), expected, rtol=FUNCTION, atol=FUNCTION)
    assert {file: file.read_bytes() for file in adapter.rglob("*") if file.is_file()} == before


def test_a_checkpoint_of_a_trainer(method: Method, base: Path, tmp_path: Path) -> None:
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), method())
    rows = [{"input_ids": batch(seed)[0], "labels": batch(seed)[0]} for seed in range(4)]
    arguments = TrainingArguments(
        tmp_path / "run", max_steps=2, save_steps=1, learning_rate=method.lr, report_to="none", use_cpu=True
    )
    Trainer(model, arguments, train_dataset=rows).train()
    assert (tmp_path / "run" / "checkpoint-1" / "optimizer.pt").is_file()
    check_exports(method, base, tmp_path / "run" / "checkpoint-1", tmp_path / "one")


def test_one_of_several_adapters_in_a_folder(method: Method, base: Path, tmp_path: Path) -> None:
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), method(init_weights=False))
    model.add_adapter("second", method(init_weights=False))
    model.save_pretrained(tmp_path / "both")
    check_exports(method, base, tmp_path / "both" / "second", tmp_path / "second")
    assert (of_folder(base, tmp_path / "both") - of_folder(base, tmp_path / "both" / "second")).abs().max() > 1e-3


def to_lora(method: Method) -> Callable[[PeftModel, Path], None]:
    return lambda model, folder: export_lora(model, folder, rank=4 if method.replaces else None) and None


@pytest.mark.parametrize("kind", ["lora", "merged"])
def test_training_goes_on_as_if_nothing_had_been_exported(method: Method, kind: str, tmp_path: Path) -> None:
    export = export_merged if kind == "merged" else to_lora(method)
    results = []
    for exports in (False, True):
        model = get_peft_model(llama(), method())
        model.add_adapter("second", method(init_weights=False))
        torch.manual_seed(1)
        optimizer = torch.optim.AdamW(trainable(model), lr=method.lr)
        train_(model, method.lr, steps=3, optimizer=optimizer)
        model.train()
        if exports:
            export(model, tmp_path)
        assert model.training
        train_(model, method.lr, steps=3, optimizer=optimizer)
        results.append((model.state_dict(), [value.requires_grad for value in model.parameters()]))
    (one, trained), (other, still_trained) = results
    assert all(torch.equal(value, other[name]) for name, value in one.items())
    assert trained == still_trained


@pytest.mark.parametrize("kind", ["lora", "merged"])
def test_an_adapter_that_is_not_active_is_exported(thin_method: Method, kind: str, tmp_path: Path) -> None:
    model: nn.Module = get_peft_model(llama(), thin_method(init_weights=False))
    model.add_adapter("second", thin_method(init_weights=False))
    first = logits(model)
    (export_merged if kind == "merged" else export_lora)(model, tmp_path, "second")
    assert torch.equal(logits(model), first)
    loaded = (
        AutoModelForCausalLM.from_pretrained(tmp_path)
        if kind == "merged"
        else PeftModel.from_pretrained(llama(), tmp_path)
    )
    model.set_adapter("second")
    torch.testing.assert_close(logits(loaded), logits(model), rtol=FUNCTION, atol=FUNCTION)
