"""A base weight that was given up for what replaces it: nothing pretends that it is still there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn

from spectral_peft import SCTConfig, SpectralError, SSTConfig
from tests.models import batch, llama, logits, train_


FREED = [(SCTConfig, {}), (SSTConfig, {"keep_base_weight": False})]


@pytest.fixture(params=FREED, ids=["sct", "sst"])
def model(request: pytest.FixtureRequest) -> PeftModel:
    config, fields = request.param
    model = get_peft_model(llama(), config(r=8, target_modules="all-linear", **fields))
    train_(model, 1e-2)
    return model


def test_unloading_is_refused(model: PeftModel) -> None:
    before = logits(model)
    with pytest.raises(SpectralError, match=r"`unload`.* needs the base weight.*keep_base_weight=True"):
        model.unload()
    assert torch.equal(logits(model), before)
    merged = model.merge_and_unload()
    torch.testing.assert_close(logits(merged), before, rtol=1e-4, atol=1e-4)


def test_a_forward_pass_without_the_adapter_is_refused(model: PeftModel) -> None:
    model.base_model.set_adapter([])
    with pytest.raises(SpectralError, match="a forward pass without the adapter in its place needs the base weight"):
        model(input_ids=batch())


def test_the_change_of_a_weight_that_is_gone_is_refused_when_merged_too(model: PeftModel) -> None:
    model.merge_adapter()
    layer: Any = model.get_submodule("base_model.model.model.layers.0.mlp.up_proj")
    with pytest.raises(SpectralError, match="the change by a merged adapter needs the base weight"):
        layer.get_delta_weight("default")


def test_an_adapter_of_the_same_name_is_refused_and_the_trained_one_stays(model: PeftModel) -> None:
    before, config = logits(model), model.peft_config["default"]
    with pytest.raises(SpectralError, match="needs the base weight"), pytest.warns(UserWarning, match="second time"):
        get_peft_model(model.get_base_model(), type(config)(r=4, target_modules="all-linear"))
    assert torch.equal(logits(model), before)
    assert model.peft_config["default"] is config


@pytest.mark.parametrize("targets", [["embed_tokens", "up_proj"], ["lm_head", "up_proj"]])
def test_an_adapted_embedding_or_head_reloads(targets: list[str], tmp_path: Path) -> None:
    model = get_peft_model(llama(), SCTConfig(r=8, target_modules=targets))
    train_(model, 1e-2)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(llama(), tmp_path)), logits(model))


def test_a_failing_second_config_leaves_the_trained_adapter() -> None:
    """The same for a base that is kept: some layers have their new update when a later one fails."""
    model = get_peft_model(llama(), SSTConfig(r=8, target_modules="all-linear"))
    train_(model, 1e-2)
    before, config = logits(model), model.peft_config["default"]
    broken: nn.Linear = model.get_submodule("base_model.model.model.layers.1.mlp.down_proj").base_layer
    with torch.no_grad():
        broken.weight[0, 0] = float("nan")
    with pytest.raises(SpectralError, match="down_proj"), pytest.warns(UserWarning, match="second time"):
        get_peft_model(model.get_base_model(), SSTConfig(r=4, target_modules="all-linear"))
    assert torch.equal(logits(model), before)
    assert model.peft_config["default"] is config
