"""The after-step engine: one spectral step for every optimizer step, and for nothing else."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import get_peft_model
from torch import nn

from spectral_peft import SST, SSTConfig
from spectral_peft.training import reset_state
from tests.models import batch, layers, llama, train_, trainable, updates


def model(**fields: object) -> nn.Module:
    return get_peft_model(llama(), SSTConfig(r=4, target_modules="all-linear", **fields))


def steps(module: nn.Module) -> set[int]:
    return {int(update.step) for update in updates(module)}


def test_optimizer_steps_are_counted_not_micro_batches() -> None:
    module = model()
    optimizer = torch.optim.AdamW(trainable(module), lr=1e-3)
    for number in range(1, 13):
        module(input_ids=batch(), labels=batch()).loss.backward()
        if number % 4 == 0:
            optimizer.step()
            optimizer.zero_grad()
    assert steps(module) == {3}


def test_a_step_that_a_grad_scaler_skips_does_not_count() -> None:
    module = model()
    optimizer, scaler = torch.optim.SGD(trainable(module), lr=1e-3), torch.amp.GradScaler("cpu")
    for number in range(3):
        loss = module(input_ids=batch(), labels=batch()).loss
        scaler.scale(loss * (float("inf") if number == 1 else 1)).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    assert steps(module) == {2}


def test_other_optimizers_and_other_models_do_not_drive_it() -> None:
    module, other = model(), model()
    head = torch.optim.AdamW([nn.Parameter(torch.ones(3))], lr=1e-3)
    head.param_groups[0]["params"][0].grad = torch.ones(3)
    head.step()
    train_(other, lr=1e-3, steps=2)
    assert steps(module) == {0}
    assert steps(other) == {2}


def test_two_optimizers_on_one_adapter_count_once() -> None:
    module = model()
    vectors = [value for name, value in module.named_parameters() if value.requires_grad and ".dS." not in name]
    values = [value for name, value in module.named_parameters() if value.requires_grad and ".dS." in name]
    for _ in range(3):
        module(input_ids=batch(), labels=batch()).loss.backward()
        for held in (vectors, values):
            torch.optim.AdamW(held, lr=1e-3).step()
    assert steps(module) == {3}


def test_closures() -> None:
    module = model()
    optimizer = torch.optim.SGD(trainable(module), lr=1e-3)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = module(input_ids=batch(), labels=batch()).loss
        loss.backward()
        return loss

    for _ in range(2):
        optimizer.step(closure)
    assert steps(module) == {2}


def test_only_the_adapter_that_trains_is_stepped() -> None:
    module = model()
    held = trainable(module)
    module.add_adapter("second", SSTConfig(r=4, target_modules="all-linear"))
    module.set_adapter("second")
    optimizer = torch.optim.AdamW([*held, *trainable(module)], lr=1e-3)
    train_(module, lr=1e-3, steps=2, optimizer=optimizer)
    second = {int(value) for name, value in module.state_dict().items() if name.endswith("second.step")}
    first = {int(value) for name, value in module.state_dict().items() if name.endswith("default.step")}
    assert (first, second) == ({0}, {2})


def test_updates_of_one_step_are_handed_to_their_class_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the order of the layers: what is computed for many at once is then the same on every process."""
    module, together = model(), []
    monkeypatch.setattr(SST, "after_optimizer_step_of", lambda group: together.append(group) or [])
    train_(module, lr=1e-3, steps=2)
    assert together == [list(updates(module))] * 2


def test_an_optimizer_that_gets_other_parameters_drives_their_updates() -> None:
    module = model()
    optimizer = torch.optim.AdamW(trainable(module), lr=1e-3)
    train_(module, lr=1e-3, steps=2, optimizer=optimizer)
    module.add_adapter("second", SSTConfig(r=4, target_modules="all-linear"))
    module.set_adapter("second")
    optimizer.param_groups[0]["params"] = trainable(module)  # as many as before
    train_(module, lr=1e-3, steps=3, optimizer=optimizer)
    steps = [{int(layer.update_of(name).step) for layer in layers(module)} for name in ("default", "second")]
    assert steps == [{2}, {3}]


def test_copies_are_driven_too() -> None:
    twin = copy.deepcopy(model())
    train_(twin, lr=1e-3, steps=2)
    assert steps(twin) == {2}


def test_reset_state_keeps_the_tensors() -> None:
    parameter, untouched = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    for optimizer_cls in (torch.optim.AdamW, torch.optim.Adam, torch.optim.RMSprop, torch.optim.Adafactor):
        optimizer = optimizer_cls([parameter, untouched], lr=1e-3)
        parameter.grad = untouched.grad = torch.ones(3)
        optimizer.step()
        state = dict(optimizer.state[parameter])
        reset_state(optimizer, [parameter])
        for name, value in state.items():
            assert optimizer.state[parameter][name] is value
            assert not torch.as_tensor(value).any()
        assert any(torch.as_tensor(value).any() for value in optimizer.state[untouched].values())
