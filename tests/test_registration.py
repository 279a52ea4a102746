"""The types are known wherever PEFT and transformers look types up."""

from __future__ import annotations

import pickle
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from peft import (
    AutoPeftModelForCausalLM,
    LoraConfig,
    PeftConfig,
    PeftModel,
    PeftModelForCausalLM,
    convert_to_lora,
    get_peft_model,
    inject_adapter_in_model,
)
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from transformers import AutoModelForCausalLM

from spectral_peft import SpectralConfig, register
from spectral_peft.config import SpectralPeftType
from tests.methods import Method
from tests.models import approximated_, layers, llama, logits, train_
from tests.tolerance import tolerance


FUNCTION = tolerance(torch.float32, 32)


@pytest.fixture
def base_folder(tmp_path: Path) -> str:
    llama().save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")


@pytest.fixture
def adapter(method: Method, base_folder: str, tmp_path: Path) -> tuple[str, torch.Tensor]:
    """A trained adapter on disk, and the logits that it gives."""
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base_folder), method(task_type="CAUSAL_LM"))
    train_(model, method.lr)
    folder = str(tmp_path / "adapter")
    model.save_pretrained(folder)
    return folder, logits(model)


def test_types_and_prefixes(method: Method) -> None:
    config, name = method(), method.config.method
    assert config.peft_type == f"SPECTRAL_{name.upper()}"
    assert config.peft_type.value == config.peft_type.name == f"SPECTRAL_{name.upper()}"
    assert PEFT_TYPE_TO_CONFIG_MAPPING[config.peft_type.value] is method.config
    assert PEFT_TYPE_TO_PREFIX_MAPPING[config.peft_type.value] == f"spectral_{name}_"
    status = get_peft_model(llama(), config).get_model_status()
    assert status.peft_types == {"default": config.peft_type.value}


def test_peft_finds_the_adapter(method: Method, adapter: tuple[str, torch.Tensor], base_folder: str) -> None:
    folder, expected = adapter
    assert type(PeftConfig.from_pretrained(folder)) is method.config
    assert torch.equal(logits(AutoPeftModelForCausalLM.from_pretrained(folder)), expected)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base_folder), folder)
    assert isinstance(model, PeftModelForCausalLM)
    assert torch.equal(logits(model), expected)
    model.load_adapter(folder, adapter_name="again")
    model.set_adapter("again")
    assert torch.equal(logits(model), expected)


def test_transformers_finds_the_adapter(adapter: tuple[str, torch.Tensor], base_folder: str) -> None:
    folder, expected = adapter
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(folder)), expected)
    model = AutoModelForCausalLM.from_pretrained(base_folder)
    plain = logits(model)
    model.load_adapter(folder)
    assert torch.equal(logits(model), expected)
    model.disable_adapters()
    assert torch.equal(logits(model), plain)
    model.enable_adapters()
    assert torch.equal(logits(model), expected)
    model.delete_adapter("default")
    assert torch.equal(logits(model), plain)


def test_transformers_adds_and_saves_an_adapter(method: Method, base_folder: str, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(base_folder)
    model.add_adapter(method())
    train_(model, method.lr)
    model.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(base_folder)
    again.load_adapter(str(tmp_path / "saved"))
    assert torch.equal(logits(again), logits(model))


def test_a_model_can_be_injected_without_a_wrapper(method: Method) -> None:
    model = inject_adapter_in_model(method(), llama())
    assert sum(1 for _ in layers(model)) == 14
    expected = logits(approximated_(llama(), model, method))
    torch.testing.assert_close(logits(model), expected, rtol=FUNCTION, atol=FUNCTION)


def test_peft_converts_an_adapter_to_lora(method: Method) -> None:
    model = get_peft_model(llama(), method(r=4, task_type="CAUSAL_LM"))
    train_(model, method.lr)
    config, state_dict = convert_to_lora(model, rank=1.0)  # all of the singular values
    assert isinstance(config, LoraConfig)
    lora = get_peft_model(llama(), config)
    from peft import set_peft_model_state_dict

    set_peft_model_state_dict(lora, state_dict)
    # PEFT converts through an SVD of the dense change: exact at full rank up to a few roundings of float32.
    torch.testing.assert_close(logits(lora), logits(model), rtol=10 * FUNCTION, atol=10 * FUNCTION)


def test_importing_twice_registers_once(method: Method) -> None:
    """A model that was made before is of the class that is known after it."""
    config = method()
    model, model_cls = get_peft_model(llama(), config), PEFT_TYPE_TO_TUNER_MAPPING[config.peft_type]
    assert register(method.config) is method.config
    assert PEFT_TYPE_TO_CONFIG_MAPPING[config.peft_type] is method.config
    assert PEFT_TYPE_TO_TUNER_MAPPING[config.peft_type] is model_cls
    assert torch.equal(logits(pickle.loads(pickle.dumps(model))), logits(model))


def test_a_second_method_of_the_same_name_is_refused() -> None:
    with pytest.raises(ValueError, match=r"SPECTRAL_SVFIT is taken by spectral_peft\.tuners\.svfit\.SVFitConfig"):

        @register
        @dataclass
        class SVFitConfig(SpectralConfig):
            method: ClassVar[str] = "svfit"


def test_the_type_is_an_open_string() -> None:
    peft_type = SpectralPeftType("SPECTRAL_X")
    assert peft_type == "SPECTRAL_X"
    assert {peft_type: 1}["SPECTRAL_X"] == 1
    assert str(peft_type).partition(".")[-1] == "SPECTRAL_X"


def test_the_methods_are_unknown_without_the_import() -> None:
    """What the documentation tells users who see PEFT's bare KeyError."""
    code = "from peft import PeftConfig, get_peft_config; get_peft_config({'peft_type': 'SPECTRAL_SVFIT'})"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "KeyError: 'SPECTRAL_SVFIT'" in result.stderr
