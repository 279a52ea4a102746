"""A schedule that nothing drives is told of once, and nothing else is."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn

from spectral_peft import spectral_step
from tests.methods import METHODS, SCHEDULED, SST, Method
from tests.models import batch, layers, llama, train_, trainable, updates


ENOUGH = 20


@pytest.fixture(autouse=True)
def _not_warned_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("spectral_peft.watch._warned", False)


@pytest.fixture
def silence() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        yield


def backward(model: nn.Module, number: int = 0) -> None:
    """Of one model, or of each one in a list."""
    model.zero_grad()
    for one in model if isinstance(model, nn.ModuleList) else [model]:
        one(input_ids=batch(number), labels=batch(number)).loss.backward()


@torch.no_grad()
def descend_(model: nn.Module) -> None:
    for parameter in trainable(model):
        parameter -= 1e-2 * parameter.grad


def gradient_step(model: nn.Module, number: int) -> None:
    backward(model, number)
    descend_(model)


def train_by_hand_(model: nn.Module, step: Callable[[nn.Module, int], None] = gradient_step) -> None:
    for number in range(ENOUGH):
        step(model, number)


@pytest.mark.parametrize("method", SCHEDULED, ids=str)
def test_parameters_that_move_without_a_step_are_told_of_once(method: Method) -> None:
    models = nn.ModuleList(get_peft_model(llama(), method(r=4)) for _ in range(2))
    name = type(next(updates(models))).__name__
    with pytest.warns(UserWarning, match=rf"schedule of {name} never ran.*with spectral_step\(model\)") as told:
        train_by_hand_(models)
    assert sum(issubclass(warning.category, UserWarning) for warning in told) == 1


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_are_watched_too(duplicate: Callable[[nn.Module], nn.Module]) -> None:
    with pytest.warns(UserWarning, match="never ran"):
        train_by_hand_(duplicate(get_peft_model(llama(), SST(r=4))))


@pytest.mark.parametrize(
    ("method", "name"), [(method, name) for method in SCHEDULED for name in sorted(method.trained)], ids=str
)
def test_every_part_is_watched(method: Method, name: str) -> None:
    model = get_peft_model(llama(), method(r=4))
    for parameter_name, value in model.named_parameters():
        if value.requires_grad and f".{name}" not in parameter_name:
            value.requires_grad_(False)
    with pytest.warns(UserWarning, match="never ran"):
        train_by_hand_(model)


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_a_loaded_adapter_is_watched_too(tmp_path: Path, low_cpu_mem_usage: bool) -> None:
    """Also where loading it replaces its parameters."""
    get_peft_model(llama(), SST(r=4)).save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(llama(), tmp_path, is_trainable=True, low_cpu_mem_usage=low_cpu_mem_usage)
    with pytest.warns(UserWarning, match="never ran"):
        train_by_hand_(model)


def test_a_compiled_layer_is_watched_too() -> None:
    layer = next(layers(get_peft_model(llama(), SST(r=4))))
    compiled, x = torch.compile(layer, backend="eager", fullgraph=True), torch.randn(3, layer.in_features)

    def step(layer: nn.Module, _: int) -> None:
        layer.zero_grad()
        compiled(x).square().sum().backward()
        descend_(layer)

    with pytest.warns(UserWarning, match="never ran"):
        train_by_hand_(layer, step=step)


@pytest.mark.usefixtures("silence")
def test_gradient_accumulation_is_no_training_without_steps(method: Method) -> None:
    model = get_peft_model(llama(), method(r=4))
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-3)
    for number in range(3 * ENOUGH):
        model(input_ids=batch(number), labels=batch(number)).loss.backward()
        if number % 4 == 3:
            optimizer.step()
            optimizer.zero_grad()


@pytest.mark.usefixtures("silence")
def test_gradients_evaluation_and_inference_are_no_training() -> None:
    model = get_peft_model(llama(), SST(r=4))
    for number in range(ENOUGH):
        backward(model, number)
        with torch.no_grad():
            model(input_ids=batch(number))


@pytest.mark.usefixtures("silence")
def test_checkpoints_that_are_loaded_are_no_training() -> None:
    """Gradients at the checkpoints of a training, as attribution methods look at them."""
    model = get_peft_model(llama(), SST(r=4))
    states = []
    for _ in range(ENOUGH):
        train_(model, lr=1e-2, steps=1)
        states.append({name: value.clone() for name, value in model.state_dict().items()})
    other = get_peft_model(llama(), SST(r=4))
    for state in states:
        other.load_state_dict(state)
        backward(other)


@pytest.mark.usefixtures("silence")
def test_a_schedule_that_is_driven_by_hand_is_driven() -> None:
    def step(model: nn.Module, number: int) -> None:
        backward(model, number)
        with spectral_step(model):
            descend_(model)

    train_by_hand_(get_peft_model(llama(), SST(r=4)), step=step)


@pytest.mark.usefixtures("silence")
@pytest.mark.parametrize("method", [method for method in METHODS if method not in SCHEDULED], ids=str)
def test_a_method_without_a_schedule_has_none_to_drive(method: Method) -> None:
    train_by_hand_(get_peft_model(llama(), method(r=4)))


def test_watching_ends_with_the_first_step_that_is_seen() -> None:
    model = get_peft_model(llama(), SST(r=4))
    train_(model, lr=1e-3, steps=2)
    assert not any(parameter._post_accumulate_grad_hooks for parameter in trainable(model))
