"""Every trainable parameter is in one group, at the rate of what it is."""

from __future__ import annotations

import gc
import math
import weakref
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers import Trainer, TrainingArguments

from spectral_peft import (
    SCTConfig,
    SpectralError,
    create_spectral_optimizer,
    parameter_groups,
    step_in_backward,
    untargeted_modules,
)
from tests.methods import SVFIT, Method
from tests.models import batch, gpt2, layers, llama, train_, trainable, updates


def rates(groups: list[dict[str, object]]) -> dict[int, tuple[float, float]]:
    """(learning rate, weight decay) of each parameter."""
    return {id(value): (group["lr"], group["weight_decay"]) for group in groups for value in group["params"]}


def test_every_trainable_parameter_is_in_one_group(method: Method) -> None:
    base = llama()
    model = get_peft_model(base, method(modules_to_save=untargeted_modules(base)))
    groups = parameter_groups(model, 1e-3, factor_lr=5e-4, value_lr=5e-3, weight_decay=0.1)
    grouped = [id(value) for group in groups for value in group["params"]]
    assert sorted(grouped) == sorted(id(value) for value in trainable(model))
    assert len({(group["name"], group["lr"], group["weight_decay"]) for group in groups}) == len(groups)


def test_the_rates_of_factors_values_and_the_rest(method: Method) -> None:
    base = llama()
    model = get_peft_model(base, method(modules_to_save=["lm_head", "norm"]))
    rate = rates(parameter_groups(model, 1e-3, factor_lr=5e-4, value_lr=5e-3, weight_decay=0.1))
    for layer in layers(model):
        for name, value in layer.update_of("default").trained_parameters():
            if name in ("U.weight", "Vh.weight"):
                height = layer.out_features if name == "U.weight" else layer.in_features
                assert rate[id(value)] == (pytest.approx(5e-4 * math.sqrt(1024 / height)), 0)
            elif name == "dS.weight":
                assert rate[id(value)] == (5e-3, 0)
            else:  # PiSSA's
                assert rate[id(value)] == (1e-3, 0.1)
    for name, value in model.named_parameters():
        if value.requires_grad and "modules_to_save" in name:
            assert rate[id(value)] == (1e-3, 0.1 if "lm_head" in name else 0)


def test_one_rate_alone_is_that_of_all_but_for_the_height() -> None:
    model = get_peft_model(gpt2(), SCTConfig(r=4, target_modules=["c_fc"], bias="spectral_only"))
    groups = parameter_groups(model, 1e-3)
    found = {group["name"]: (group["lr"], group["weight_decay"]) for group in groups}
    assert found == {
        "factors of height 128": (pytest.approx(1e-3 * math.sqrt(8)), 0),
        "factors of height 32": (pytest.approx(1e-3 * math.sqrt(32)), 0),
        "singular values": (1e-3, 0),
        "vectors": (1e-3, 0),
    }


def test_a_step_of_adam_turns_all_columns_alike() -> None:
    model = get_peft_model(llama(), SCTConfig(r=4, target_modules="all-linear", retract_every=1000))
    optimizer = create_spectral_optimizer(model, torch.optim.Adam, lr=1e-3, factor_lr=1e-5)
    before = {id(update): update.U.weight.detach().clone() for update in updates(model)}
    model(input_ids=batch(), labels=batch()).loss.backward()
    optimizer.step()
    for update in updates(model):
        turned = (update.U.weight - before[id(update)]).norm(dim=0)
        torch.testing.assert_close(turned, torch.full_like(turned, 32 * 1e-5), rtol=1e-2, atol=0)


def test_a_trainer_takes_the_optimizer_and_schedules_every_group(tmp_path: Path) -> None:
    model = get_peft_model(llama(), SCTConfig(r=4, target_modules="all-linear"))
    optimizer = create_spectral_optimizer(
        model, torch.optim.AdamW, lr=1e-3, value_lr=1e-2, weight_decay=0.1, betas=(0.9, 0.95)
    )
    start = [group["lr"] for group in optimizer.param_groups]
    rows = [{"input_ids": row, "labels": row} for row in batch().tolist()]
    arguments = TrainingArguments(str(tmp_path), max_steps=2, warmup_steps=1, report_to="none", save_strategy="no")
    Trainer(model, arguments, train_dataset=rows, optimizers=(optimizer, None)).train()
    assert all(group["betas"] == (0.9, 0.95) for group in optimizer.param_groups)
    assert [group["initial_lr"] for group in optimizer.param_groups] == start
    assert all(group["lr"] == 0 for group in optimizer.param_groups)  # the end of the linear schedule
    assert len(optimizer.state) == 3 * 14


def test_a_model_that_trains_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="No parameter of the model requires a gradient"):
        parameter_groups(nn.Linear(2, 2).requires_grad_(False), 1e-3)


def test_steps_in_backward_are_those_of_a_plain_loop(method: Method) -> None:
    plain, other = (get_peft_model(llama(), method(modules_to_save=["lm_head"])) for _ in range(2))
    train_(plain, 1e-2, steps=4, optimizer=create_spectral_optimizer(plain, torch.optim.AdamW, lr=1e-2))
    step_in_backward(other, torch.optim.AdamW, lr=1e-2)
    other.train()
    for number in range(4):
        other(input_ids=batch(number), labels=batch(number)).loss.backward()
    for (name, expected), value in zip(plain.state_dict().items(), other.state_dict().values(), strict=True):
        torch.testing.assert_close(value, expected, msg=name)


def test_a_second_call_of_steps_in_backward_is_refused() -> None:
    model = get_peft_model(llama(), SVFIT(r=4))
    step_in_backward(model, torch.optim.SGD, lr=1.0)
    with pytest.raises(SpectralError, match="stepped in backward already"):
        step_in_backward(model, torch.optim.SGD, lr=2.0)


def test_steps_in_backward_go_with_the_model(method: Method) -> None:
    """And are taken as long as it is there, though nobody holds the optimizers."""
    model = get_peft_model(llama(), method(modules_to_save=["lm_head"]))
    before = [value.detach().clone() for value in trainable(model)]
    step_in_backward(model, torch.optim.AdamW, lr=1e-2)
    gc.collect()
    model(input_ids=batch(), labels=batch()).loss.backward()
    assert not any(torch.equal(a, b) for a, b in zip(before, trainable(model), strict=True))
    left = [weakref.ref(value) for value in trainable(model)]
    del model
    gc.collect()
    assert [value for value in left if value() is not None] == []
