"""The command line, on adapters that were trained and saved."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from typer.testing import CliRunner

from spectral_peft import SCTConfig, SpectralError, SVFitConfig, build_factored, load_factored, save_factored
from spectral_peft.cli import app, main
from spectral_peft.stored import open_adapter
from tests.methods import Method
from tests.models import layers, llama, logits, train_, updates
from tests.tolerance import tolerance


def run(*words: object, code: int = 0) -> Any:
    """The JSON that the command prints."""
    result = CliRunner().invoke(app, [*map(str, words), "--json"], catch_exceptions=False)
    assert result.exit_code == code, result.output
    return json.loads(result.stdout)


@pytest.fixture
def saved(method: Method, tmp_path: Path) -> tuple[PeftModel, Path]:
    llama().save_pretrained(tmp_path / "base")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), method())
    train_(model, method.lr)
    model.save_pretrained(tmp_path / "adapter")
    return model, tmp_path / "adapter"


def edit(folder: Path, name: str, change: Any) -> None:
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    key = next(key for key in tensors if key.endswith(name))
    tensors[key] = change(tensors[key])
    save_file(tensors, file)


def test_an_adapter_is_read_without_its_base(saved: tuple[PeftModel, Path], method: Method) -> None:
    model, folder = saved
    stored = open_adapter(folder)
    assert list(stored.updates) == sorted(layer.key for layer in layers(model))
    for layer in layers(model):
        read, update = stored.updates[layer.key], layer.update_of("default")
        assert torch.equal(read.matrix(), update.matrix())
    rows = run("inspect", folder)["modules"]
    assert {row["module"] for row in rows} == set(stored.updates)
    assert all(row["r"] == 8 for row in rows)
    assert all(0 < row["effective rank"] <= 64 if method.has_values else row["effective rank"] is None for row in rows)


def test_a_sound_adapter_passes_and_a_damaged_one_does_not(saved: tuple[PeftModel, Path], method: Method) -> None:
    _, folder = saved
    assert run("verify", folder)["passed"]
    trained = sorted(method.trained)[0]
    edit(folder, trained, lambda value: value.index_fill(-1, torch.tensor([0]), torch.nan))
    failed = [finding for finding in run("verify", folder, code=1)["findings"] if not finding["passed"]]
    assert [(finding["check"], trained in finding["detail"]) for finding in failed] == [("finite", True)]


def test_another_start_or_lost_orthonormality_is_found(saved: tuple[PeftModel, Path], method: Method) -> None:
    model, folder = saved
    orthonormal = [f"{name}.weight" for name in next(updates(model)).orthonormal]
    edit(folder, (orthonormal or sorted(method.start))[0], lambda value: 2 * value)
    failed = [finding for finding in run("verify", folder, code=1)["findings"] if not finding["passed"]]
    assert [finding["check"] for finding in failed] == ["orthonormal" if orthonormal else "start"]


def test_pruning_keeps_the_largest_values(saved: tuple[PeftModel, Path], method: Method, tmp_path: Path) -> None:
    model, folder = saved
    if not method.replaces:
        with pytest.raises(SpectralError, match=r"adds to the base weight.*export_lora"):
            run("prune", folder, tmp_path / "pruned")
        assert not (tmp_path / "pruned").exists()
        return
    rows = {row["module"]: row for row in run("prune", folder, tmp_path / "pruned", "--share", 0.8)}
    pruned = PeftModel.from_pretrained(llama(), str(tmp_path / "pruned"))
    for layer in layers(pruned):
        W = model.base_model.model.get_submodule(layer.key).update_of("default").matrix().double()
        U, S, Vh = torch.linalg.svd(W, full_matrices=False)
        r = next(i for i in range(1, len(S) + 1) if S[:i].sum() >= 0.8 * S.sum())
        assert rows[layer.key]["kept"] == r < len(S)
        error = (layer.update_of("default").matrix() - (U[:, :r] * S[:r]) @ Vh[:r]).norm() / W.norm()
        assert error < tolerance(torch.float32, 64)
        assert rows[layer.key]["error"] == pytest.approx(float((S[r:].norm() / S.norm()).detach()), rel=1e-4)
    run("prune", folder, tmp_path / "whole", "--share", 1.0)
    whole = PeftModel.from_pretrained(llama(), str(tmp_path / "whole"))
    torch.testing.assert_close(logits(whole), logits(model), atol=1e-3, rtol=1e-3)


def test_exports(saved: tuple[PeftModel, Path], method: Method, tmp_path: Path) -> None:
    model, folder = saved
    run("export", folder, tmp_path / "dense", "--to", "merged")
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    torch.testing.assert_close(logits(dense), logits(model), atol=1e-3, rtol=1e-3)
    rank = ["--rank", 4] if method.replaces else []
    rows = run("export", folder, tmp_path / "lora", "--to", "lora", *rank)
    assert len(rows) == len(list(updates(model)))
    assert json.loads((tmp_path / "lora" / "adapter_config.json").read_text())["peft_type"] == "LORA"


def test_the_head_of_a_classifier_is_exported(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "base")
    base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=3)
    model = get_peft_model(base, SVFitConfig(r=4, target_modules=["q_proj"], task_type="SEQ_CLS"))
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(SpectralError, match=r"does not fit .*base as AutoModelForSequenceClassification loads it"):
        run("export", tmp_path / "adapter", tmp_path / "out", "--to", "merged")
    with pytest.raises(SpectralError, match=r"no place for 1 tensors of the adapter, such as .*score\.weight"):
        run("export", tmp_path / "adapter", tmp_path / "out", "--auto-class", "AutoModelForCausalLM")
    run("export", tmp_path / "adapter", tmp_path / "out", "--to", "merged", "--num-labels", 3)
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert torch.equal(merged.score.weight, model.base_model.model.score.modules_to_save["default"].weight)
    assert run("export", tmp_path / "adapter", tmp_path / "lora", "--num-labels", 3)
    assert any("score" in name for name in load_file(tmp_path / "lora" / "adapter_model.safetensors"))


def test_the_base_has_the_revision_that_the_adapter_names(tmp_path: Path) -> None:
    cache = tmp_path / "home" / "hub" / "models--me--tiny"
    (cache / "refs").mkdir(parents=True)
    for seed, (revision, commit) in enumerate([("main", "a" * 40), ("v2", "b" * 40)]):
        llama(seed=seed).save_pretrained(cache / "snapshots" / commit)
        (cache / "refs" / revision).write_text(commit)
    config = SVFitConfig(r=4, target_modules=["q_proj"], base_model_name_or_path="me/tiny", revision="v2")
    base = llama(seed=1)
    base.name_or_path = "me/tiny"
    model = get_peft_model(base, config, revision="v2")
    model.save_pretrained(tmp_path / "adapter")
    words = ["export", str(tmp_path / "adapter"), str(tmp_path / "out"), "--to", "merged"]
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    subprocess.run([sys.executable, "-m", "spectral_peft.cli", *words], env=environment, check=True, timeout=120)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), logits(llama(seed=1)))


def test_a_factored_model_is_pruned_to_one(tmp_path: Path) -> None:
    model = build_factored(llama().config, SCTConfig(r=8, init="random", target_modules="all-linear"))
    save_factored(model, tmp_path / "factored")
    rows = run("prune", tmp_path / "factored", tmp_path / "same", "--share", 1.0)
    assert all(row["values"] == row["kept"] == 8 for row in rows)
    torch.testing.assert_close(logits(load_factored(tmp_path / "same")), logits(model))
    assert 'load_factored("same")' in (tmp_path / "same" / "README.md").read_text()


def test_nothing_is_exported_over_what_is_there(saved: tuple[PeftModel, Path], method: Method) -> None:
    _, folder = saved
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    for words in (["export"], ["export", "--to", "merged"]):
        with pytest.raises(SpectralError, match="is not empty"):
            run(words[0], folder, folder, *words[1:], "--base", folder.parent / "base")
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


@pytest.mark.parametrize(("targets", "count"), [("q_proj", 2), ("q_proj, v_proj", 4), (r".*\.0\..*_proj", 7)])
def test_targets_are_names_or_a_regular_expression(targets: str, count: int, tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path)
    assert len(run("suggest-ranks", tmp_path, "--targets", targets)) == count


def test_ranks_are_suggested(tmp_path: Path) -> None:
    base = llama()
    base.save_pretrained(tmp_path / "base")
    rows = run("suggest-ranks", tmp_path / "base", "--energy", 0.5, "--plot", tmp_path / "spectra.svg")
    for row in rows:
        S = torch.linalg.svdvals(base.get_submodule(row["module"]).weight.detach().double())
        assert row["energy"] == next(i for i in range(1, 99) if (S[:i] ** 2).sum() >= 0.5 * (S**2).sum())
        assert row["noise"] <= 3  # nothing but noise: the model is random
        assert row["budget"] is None or 1 <= row["budget"] <= len(S)
    assert (tmp_path / "spectra.svg").stat().st_size > 1000


@pytest.mark.parametrize("name", ["svfit", "pissa", "sst", "sct"])
def test_memory_is_estimated_from_a_config(name: str, tmp_path: Path) -> None:
    llama().config.save_pretrained(tmp_path)
    rows = run("estimate-memory", tmp_path, "--method", name, "--r", 4, "--tokens", 32)
    assert rows["optimizer"] == 2 * rows["gradients"] > 0
    assert rows["total"] >= rows["weights"] + rows["optimizer"] + rows["gradients"]


def test_tied_weights_are_planned_apart_and_told(tmp_path: Path) -> None:
    config = llama().config
    config.tie_word_embeddings = True
    config.save_pretrained(tmp_path)
    result = CliRunner().invoke(app, ["estimate-memory", str(tmp_path), "--r", "4"], catch_exceptions=False)
    assert result.exit_code == 0
    assert "Embedding and head are tied; the plan has them apart" in result.stderr


def test_a_dtype_that_is_none() -> None:
    result = CliRunner().invoke(app, ["export", "adapter", "out", "--to", "merged", "--dtype", "bf16"])
    assert result.exit_code == 2
    assert "'bf16' is not one of" in result.output
    result = CliRunner().invoke(app, ["export", "adapter", "out", "--dtype", "bfloat16"])
    assert result.exit_code == 2
    assert "is for --to merged" in result.output


def test_methods_are_listed() -> None:
    assert {row["method"] for row in run("methods")} >= {"svfit", "pissa", "sst", "sct"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["inspect", "./nowhere"], r"no folder ./nowhere"),
        (["verify", "{empty}"], r"holds no adapter: there is no adapter_config.json"),
        (["inspect", "{lora}"], r"adapter of type .*LORA.*, not of a spectral method"),
        (["inspect", "{garbled}"], r"adapter_config.json cannot be read"),
        (["inspect", "{torn}"], r"truncated or damaged"),
    ],
)
def test_errors_are_one_line(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    places = {name: tmp_path / name for name in ("empty", "lora", "garbled", "torn")}
    for place in places.values():
        place.mkdir()
    (places["lora"] / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    (places["garbled"] / "adapter_config.json").write_text('{"peft_type": ')
    (places["torn"] / "adapter_config.json").write_text('{"peft_type": "SPECTRAL_SCT"}')
    (places["torn"] / "adapter_model.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{}")
    monkeypatch.setattr("sys.argv", ["spectral-peft", *(word.format(**places) for word in words)])
    with pytest.raises(SystemExit) as exit_status:
        main()
    assert exit_status.value.code == 1
    printed = capsys.readouterr().err
    assert re.fullmatch(f"error: .*{message}.*\n", printed), printed
