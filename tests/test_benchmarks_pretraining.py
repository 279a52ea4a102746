"""Every experiment of the pre-training benchmark trains on a text that is made here; the analyses of its models."""

from __future__ import annotations

import argparse
import copy
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers import LlamaForCausalLM

from benchmarks import pruning, spectra
from benchmarks.experiment import EXPERIMENTS, Experiment, ExperimentError, find
from benchmarks.tasks import pretraining


NAMES = sorted(path.name for path in (EXPERIMENTS / "pretraining").iterdir() if path.is_dir())
IDS = torch.arange(16).reshape(2, 8)
TINY = {"steps": 3, "layers": 1, "vocabulary": 300, "length": 8, "batch": 2, "warmup_steps": 1}


@pytest.fixture(scope="module")
def arguments(tmp_path_factory: pytest.TempPathFactory) -> argparse.Namespace:
    text = tmp_path_factory.mktemp("text") / "text.txt"
    text.write_text("".join(f"the square of {i} is {i * i}, and its cube is {i**3}\n" for i in range(500)))
    return argparse.Namespace(data=text, cache=text.parent / "cache")


def tiny(name: str, **training: object) -> Experiment:
    (experiment,) = find("pretraining", name)
    restart = 2 if experiment.training["restart_every"] else None
    settings = {**experiment.training, **TINY, "restart_every": restart, "keep_model": False, **training}
    if settings["galore"]:
        pytest.importorskip("galore_torch", reason="GaLore is optional", exc_type=ImportError)
    return replace(experiment, training=settings)


def train_(model: nn.Module, experiment: Experiment, learning_rate: float) -> torch.optim.Optimizer:
    """Three steps on the same rows."""
    optimizer = pretraining.build_optimizer(model, experiment.training, learning_rate)
    for _ in range(3):
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


@pytest.mark.parametrize("name", NAMES)
def test_every_experiment_trains(name: str, arguments: argparse.Namespace) -> None:
    found = pretraining.run(tiny(name), 1e-2, 0, arguments)
    assert [point["step"] for point in found["curve"]] == [1, 2, 3]
    assert found["validation"] == found["curve"][-1]["perplexity"] < found["curve"][0]["perplexity"]
    assert json.loads(json.dumps(found)) == found


def test_adapters_train_few_of_the_numbers_of_the_projections(arguments: argparse.Namespace) -> None:
    def trained(name: str) -> int:
        return pretraining.run(tiny(name, steps=1), 1e-2, 0, arguments)["cost"]["trainable_parameters"]

    layer = 4 * 64 * 64 + 3 * 64 * 172  # the projections
    thin = 4 * 4 * 2 * 64 + 3 * 4 * (64 + 172)  # their factors of rank 4
    dense = trained("full") - layer
    assert trained("lora-r4") == dense + thin
    assert trained("sst-r4") == dense + thin + 7 * 64


@pytest.mark.parametrize("name", ["lora-r4", "opt-lora-r4"])
def test_all_but_the_base_of_the_projections_trains(name: str) -> None:
    experiment = tiny(name)
    model = get_peft_model(pretraining.base_model(experiment.training, 0), experiment.config())
    before = copy.deepcopy(dict(model.named_parameters()))
    train_(model, experiment, 1e-2)
    still = {name for name, value in model.named_parameters() if torch.equal(value, before[name])}
    assert still == {name for name in before if "base_layer.weight" in name}  # an OPT has biases, which train


def test_a_run_is_its_seed(arguments: argparse.Namespace) -> None:
    first, again, other = (pretraining.run(tiny("sst-r4"), 1e-2, seed, arguments) for seed in (0, 0, 1))
    assert first["curve"] == again["curve"] != other["curve"]


def test_a_schedule_draws_with_the_seed_of_the_run(
    arguments: argparse.Namespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    seeds = []

    def noted(model, config):
        seeds.append(config.seed)
        return get_peft_model(model, config)

    monkeypatch.setattr(pretraining, "get_peft_model", noted)
    pretraining.run(tiny("sst-r4"), 1e-2, 3, arguments)
    assert seeds == [3]


def test_galore_moves_the_projections_in_r_dimensions() -> None:
    """All steps before the first change of the basis lie in it, so the change of a weight has rank r."""
    experiment = tiny("galore-r4-scale0.25")
    model = pretraining.base_model(experiment.training, 0)
    before = [layer.weight.detach().clone() for layer in pretraining.projections(model)]
    head = model.get_output_embeddings().weight.detach().clone()
    train_(model, experiment, 1e-2)
    assert len(before) == 7
    for layer, start in zip(pretraining.projections(model), before, strict=True):
        assert torch.linalg.matrix_rank(layer.weight.detach() - start, rtol=1e-3) == 4
    assert torch.linalg.matrix_rank(model.get_output_embeddings().weight.detach() - head, rtol=1e-3) > 4


def test_galore_asks_for_its_package(monkeypatch: pytest.MonkeyPatch, arguments: argparse.Namespace) -> None:
    (experiment,) = find("pretraining", "galore-r4-scale1")
    monkeypatch.setitem(sys.modules, "galore_torch", None)
    with pytest.raises(ModuleNotFoundError, match="pip install galore-torch"):
        pretraining.run(replace(experiment, training={**experiment.training, **TINY}), 1e-2, 0, arguments)


def test_a_restart_of_relora_keeps_the_function() -> None:
    experiment = tiny("relora-r4")
    model = get_peft_model(pretraining.base_model(experiment.training, 0), experiment.config())
    optimizer = train_(model, experiment, 1e-1)
    start = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        before = model(input_ids=IDS).logits
        pretraining.restart_lora(model, optimizer)
        after = model(input_ids=IDS).logits
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-5)
    for name, value in model.named_parameters():
        if "lora_" in name:
            assert start[name].any()
            assert not torch.equal(value, start[name])
            assert not any(state.any() for state in optimizer.state[value].values())
        assert "lora_B" not in name or not value.any()


def test_what_is_kept_is_what_was_trained(arguments: argparse.Namespace, tmp_path: Path) -> None:
    """And pruning to the whole sum changes nothing, to less of it keeps fewer values; spectra know full rank."""
    ends = {}
    for name in ("full", "lora-r4", "sst-r4"):
        found = pretraining.run(tiny(name, keep_model=True), 1e-2, 0, arguments)
        ends[name] = found["validation"]
        folder = pretraining.kept_model(name, 1e-2, 0, arguments.cache)
        _, rows = pretraining.split(arguments.data, 300, 8, arguments.cache)
        kept = LlamaForCausalLM.from_pretrained(folder)
        assert pretraining.perplexity(kept, rows) == pytest.approx(ends[name], rel=1e-4)
        whole, half = pruning.pruned(folder, rows, (100, 50))
        assert whole["perplexity"] == pytest.approx(ends[name], rel=1e-4)
        assert half["percent_of_values"] < 50 < 99 < whole["percent_of_values"]
        assert half["perplexity"] != pytest.approx(ends[name], rel=1e-4)
    flags = ["--cache", str(arguments.cache), "--results", str(tmp_path)]
    spectra.main([*flags, "--full", "full/*", "--models", "lora-r4/*,sst-r4/*"])
    files = {file.stem: json.loads(file.read_text()) for file in (tmp_path / "analysis" / "spectra").iterdir()}
    assert sorted(files) == ["full-lr0.01-seed0", "lora-r4-lr0.01-seed0", "sst-r4-lr0.01-seed0", "start-seed0"]
    assert files["full-lr0.01-seed0"]["distance_to_full"] == 0 < files["sst-r4-lr0.01-seed0"]["distance_to_full"]
    assert [len(one["singular_values"]) for one in files.values()] == [7] * 4
    start = pretraining.base_model(tiny("full").training, 0)
    values = torch.linalg.svdvals(start.model.layers[0].mlp.up_proj.weight.detach()).tolist()
    found = files["start-seed0"]["singular_values"]["model.layers.0.mlp.up_proj"]
    assert found == pytest.approx(values, abs=1e-5)


def test_a_model_that_was_not_kept(tmp_path: Path) -> None:
    with pytest.raises(ExperimentError, match=r"no full/\*: run that with `keep_model`"):
        pretraining.kept_models("full/*", tmp_path)


def test_there_is_a_text_without_a_file(tmp_path: Path) -> None:
    train, held_out = pretraining.split(None, 512, 64, tmp_path)
    assert len(train) > held_out.numel() == 256 * 64


def test_a_text_that_is_too_short(arguments: argparse.Namespace) -> None:
    with pytest.raises(ExperimentError, match=r"has [\d,]+ tokens; at least 131,072 are needed"):
        pretraining.run(tiny("full", length=256), 1e-2, 0, arguments)
