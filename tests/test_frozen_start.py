"""What is frozen stays frozen, whoever loads an adapter; and a checkpoint without it is of that very start."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, inject_adapter_in_model

from spectral_peft import SpectralError
from tests.methods import METHODS, Method
from tests.models import batch, llama, logits, train_, trainable, updates


RECOMPUTABLE = [method for method in METHODS if method.recomputable]


@pytest.fixture(params=METHODS, ids=str)
def method(request: pytest.FixtureRequest) -> Method:
    return request.param


@pytest.fixture
def adapter(method: Method, tmp_path: Path) -> Path:
    model = get_peft_model(llama(), method(task_type="CAUSAL_LM"))
    train_(model, method.lr)
    model.save_pretrained(tmp_path)
    return tmp_path


def test_transformers_trains_on_what_peft_trains_on(method: Method, adapter: Path) -> None:
    """What transformers loads into, it makes train; the first forward pass and `train` freeze."""
    by_peft = PeftModel.from_pretrained(llama(), adapter, is_trainable=True)
    by_transformers = llama()
    by_transformers.load_adapter(adapter, is_trainable=True)
    for model in (by_peft, by_transformers):
        train_(model, method.lr)
    assert sum(value.numel() for value in trainable(by_transformers)) == sum(v.numel() for v in trainable(by_peft))
    torch.testing.assert_close(logits(by_transformers), logits(by_peft), rtol=1e-4, atol=1e-4)


def test_a_pass_in_eval_mode_freezes_too(method: Method, adapter: Path) -> None:
    model = llama()
    model.load_adapter(adapter, is_trainable=True)
    model.eval()(input_ids=batch())
    assert not any(value.requires_grad for update in updates(model) for _, value in update.frozen())


def test_train_freezes_before_any_pass(method: Method, adapter: Path) -> None:
    """What wraps the model for several processes looks at what trains before the first pass."""
    model = llama()
    model.load_adapter(adapter, is_trainable=True)
    model.train()
    assert not any(value.requires_grad for update in updates(model) for _, value in update.frozen())


@pytest.mark.parametrize("method", RECOMPUTABLE, ids=str)
def test_the_state_of_a_model_without_data_has_names_and_shapes(method: Method) -> None:
    config = method(save_start=False, target_modules=["up_proj"])
    model = inject_adapter_in_model(config, llama(), low_cpu_mem_usage=True)
    state = get_peft_model_state_dict(model)
    assert state
    assert all(value.is_meta for value in state.values())


@pytest.mark.parametrize("method", RECOMPUTABLE, ids=str)
def test_a_start_that_has_changed_is_not_left_out(method: Method, tmp_path: Path) -> None:
    model = get_peft_model(llama(), method(save_start=False, target_modules=["up_proj"]))
    update = next(updates(model))
    for _, value in update.frozen():
        value.data.mul_(1.1)
    with pytest.raises(SpectralError, match=r"up_proj: what should be frozen has changed.*`save_start = True`"):
        model.save_pretrained(tmp_path)
    model.peft_config["default"].save_start = True
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(llama(), tmp_path)), logits(model))
