"""What a configuration accepts, and what it says when it does not."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from peft import PeftConfig, get_peft_config, get_peft_model

from spectral_peft import PiSSAConfig, SpectralError, SVFitConfig
from spectral_peft.config import FORMAT_VERSION
from tests.methods import Method
from tests.models import llama, updates


@pytest.mark.parametrize("r", [0, -1, 0.0, -0.5, 1.5, 64.0, True, None, "energy", "energy=0", "energy=2", "99%", [8]])
def test_impossible_ranks_are_refused(method: Method, r: object) -> None:
    with pytest.raises(ValueError, match=r"`r` .*got"):
        method(r=r)
    with pytest.raises(ValueError, match=r"`r` .*got"):
        method(rank_pattern={"q_proj": r})


@pytest.mark.parametrize("r", [1, 4096, 0.5, 1.0, "energy=0.9", "energy=1"])
def test_possible_ranks_are_kept(free_rank_method: Method, r: object) -> None:
    assert free_rank_method(r=r).r == r


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"dropout": 1.0}, r"`dropout` should be in \[0, 1\), got 1\.0"),
        ({"dropout": -0.1}, "`dropout`"),
        ({"bias": "lora_only"}, "`bias` should be one of 'none', 'all', 'spectral_only', got 'lora_only'"),
        ({"svd": "fast"}, "`svd` should be one of 'auto', 'exact', 'randomized', got 'fast'"),
        ({"layers_to_transform": [0]}, "`layers_to_transform` cannot be used when `target_modules` is a str"),
        ({"layers_pattern": "layers"}, "`layers_pattern` cannot be used when `target_modules` is a str"),
        ({"target_modules": ["q_proj"], "layers_pattern": "layers"}, "`layers_to_transform` must also be specified"),
    ],
)
def test_wrong_fields_are_refused(method: Method, fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        method(**fields)


@pytest.mark.parametrize("alpha", [0, -1.0, float("nan")])
def test_pissa_needs_a_positive_alpha(alpha: float) -> None:
    with pytest.raises(ValueError, match="`alpha` should be positive"):
        PiSSAConfig(alpha=alpha)


def test_a_copy_with_another_field_is_a_new_config(method: Method) -> None:
    """It starts when it is added, as any config that no checkpoint belongs to."""
    config = dataclasses.replace(method(), dropout=0.1)
    assert not config.from_checkpoint
    update = next(updates(get_peft_model(llama(), config)))
    assert update.is_started()


def test_ranks_that_were_measured_on_another_model_are_told(free_rank_method: Method) -> None:
    config = free_rank_method(r="energy=0.5", target_modules=["up_proj"])
    get_peft_model(llama(), config)
    with pytest.warns(UserWarning, match="r='energy=0.5' stands for were measured when this config was first used"):
        get_peft_model(llama(seed=1), config)


def test_a_config_survives_its_file(method: Method, tmp_path: Path) -> None:
    config = method(r="energy=0.9", target_modules=["q_proj", "v_proj"], rank_pattern={"q_proj": 4}, dropout=0.1)
    config.save_pretrained(tmp_path)
    for loaded in (PeftConfig.from_pretrained(tmp_path), get_peft_config(config.to_dict())):
        assert type(loaded) is method.config
        assert loaded.to_dict() == config.to_dict()


def test_a_checkpoint_of_a_newer_release_is_refused(method: Method, tmp_path: Path) -> None:
    edit(method, tmp_path, format_version=FORMAT_VERSION + 1)
    with pytest.raises(SpectralError, match="Update spectral_peft from where you installed it"):
        PeftConfig.from_pretrained(tmp_path)


def test_unknown_fields_of_the_same_format_are_said(method: Method, tmp_path: Path) -> None:
    edit(method, tmp_path, new_field=1)
    with pytest.warns(UserWarning, match=r"Unexpected keyword arguments \['new_field'\]"):
        assert PeftConfig.from_pretrained(tmp_path).r == 8


def edit(method: Method, folder: Path, **fields: object) -> None:
    method().save_pretrained(folder)
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


@pytest.mark.parametrize(("save_start", "dtype"), [(True, torch.float32), (False, torch.float64)])
def test_vectors_that_are_recomputed_come_from_float64(save_start: bool, dtype: torch.dtype) -> None:
    """In float32 another machine's rounding turns vectors of nearly equal singular values."""
    factors = SVFitConfig(save_start=save_start).decompose(torch.randn(12, 10), 4)
    assert {value.dtype for value in factors} == {dtype}
