"""Every optimizer: its state after a swap, skipped steps, and the rate that schedulers and warm-up make together."""

from __future__ import annotations

import copy
from collections.abc import Callable

import bitsandbytes
import pytest
import torch
import transformers
from peft import get_peft_model
from torch import Tensor, nn
from torch.optim import Optimizer
from torchao.optim.subclass_4bit import OptimState4bit
from torchao.optim.subclass_8bit import OptimState8bit
from torchao.optim.subclass_fp8 import OptimStateFp8

from spectral_peft import SCTConfig, SpectralConfig, SpectralError, SSTConfig
from spectral_peft.training import reset_state
from tests.methods import SCHEDULED, Method, counted
from tests.models import batch, llama, train_, trainable, updates


class Recipe:
    """An optimizer class with its arguments, by a name for test ids."""

    def __init__(self, name: str, optimizer_cls: Callable[..., Optimizer], **kwargs: object) -> None:
        self.name, self.optimizer_cls, self.kwargs = name, optimizer_cls, kwargs

    def __call__(self, parameters: object, lr: float = 1e-2) -> Optimizer:
        return self.optimizer_cls(parameters, lr=lr, **self.kwargs)


# min_8bit_size: the states of small tensors are in float32 otherwise.
USUAL = [
    Recipe("adamw", torch.optim.AdamW, foreach=False),
    Recipe("adamw-foreach", torch.optim.AdamW, foreach=True),
    Recipe("adamw-fused", torch.optim.AdamW, fused=True),
    Recipe("adamw-amsgrad", torch.optim.AdamW, amsgrad=True),
    Recipe("sgd-momentum", torch.optim.SGD, momentum=0.9),
    Recipe("adafactor", torch.optim.Adafactor),
    Recipe("adafactor-hf", transformers.Adafactor, relative_step=False, scale_parameter=False),
    Recipe("adafactor-hf-moments", transformers.Adafactor, relative_step=False, beta1=0.9),
    Recipe("adamw-8bit", bitsandbytes.optim.AdamW8bit, min_8bit_size=1),
]
FURTHER = [
    Recipe("sgd", torch.optim.SGD),
    Recipe("adagrad", torch.optim.Adagrad, initial_accumulator_value=0.1),
    Recipe("adadelta", torch.optim.Adadelta),
    Recipe("adamax", torch.optim.Adamax),
    Recipe("asgd", torch.optim.ASGD),
    Recipe("nadam", torch.optim.NAdam),
    Recipe("radam", torch.optim.RAdam),
    Recipe("rmsprop", torch.optim.RMSprop, momentum=0.9, centered=True),
    Recipe("rprop", torch.optim.Rprop),
    Recipe("adamw-32bit-bnb", bitsandbytes.optim.AdamW32bit),
    Recipe("ademamix-8bit", bitsandbytes.optim.AdEMAMix8bit, min_8bit_size=1),
    Recipe("lion-8bit", bitsandbytes.optim.Lion8bit, min_8bit_size=1),
    Recipe("sgd-8bit", bitsandbytes.optim.SGD8bit, momentum=0.9, min_8bit_size=1),
]
every_optimizer = pytest.mark.parametrize("recipe", USUAL + FURTHER, ids=lambda recipe: recipe.name)


def gradients_(parameters: list[nn.Parameter], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for value in parameters:
        value.grad = torch.randn(value.shape, generator=generator) * 10.0**seed


@every_optimizer
def test_the_step_after_a_reset_is_that_of_a_fresh_optimizer(recipe: Recipe) -> None:
    """Of the parameters that were reset; the others go on as if nothing had happened."""
    shapes = ((24, 32), (32,), (24, 32))
    parameters = [nn.Parameter(torch.randn(shape)) for shape in shapes]
    optimizer = recipe(parameters)
    for seed in range(3):
        gradients_(parameters, seed)
        optimizer.step()
    undisturbed, fresh_parameters = copy.deepcopy(parameters), copy.deepcopy(parameters)
    other, fresh = recipe(undisturbed), recipe(fresh_parameters)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))

    reset_state(optimizer, parameters[:2])
    for held, stepped in ((parameters, optimizer), (undisturbed, other), (fresh_parameters, fresh)):
        gradients_(held, seed=0)
        stepped.step()
    for value, expected in zip(parameters, (*fresh_parameters[:2], undisturbed[2]), strict=True):
        assert torch.equal(value, expected)
    assert recipe.name == "sgd" or not torch.equal(parameters[0], undisturbed[0])


def test_a_reset_before_the_first_step_does_nothing() -> None:
    parameter = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([parameter])
    reset_state(optimizer, [parameter])
    assert not optimizer.state


@pytest.mark.parametrize(
    "zeros",
    [
        lambda shape: OptimState8bit.zeros(shape, True, 256),
        lambda shape: OptimState8bit.zeros(shape, False, 256),
        lambda shape: OptimState4bit.zeros(shape, False, 128),
        lambda shape: OptimStateFp8.zeros(shape, 256),
    ],
    ids=["8-bit-signed", "8-bit-unsigned", "4-bit", "fp8"],
)
def test_the_quantized_states_of_torchao_are_reset(zeros: Callable[[tuple[int, int]], Tensor]) -> None:
    """Without its optimizers, which compile their step."""
    parameter = nn.Parameter(torch.ones(64, 64))
    optimizer = torch.optim.AdamW([parameter])
    moment = zeros((64, 64))
    moment.copy_(torch.rand(64, 64) + 1)
    optimizer.state[parameter] = {"step": torch.tensor(3.0), "exp_avg": moment}
    reset_state(optimizer, [parameter])
    assert optimizer.state[parameter]["exp_avg"] is moment
    assert not moment.dequantize().any()
    moment.copy_(torch.ones(64, 64))  # the code book is still there
    assert torch.allclose(moment.dequantize(), torch.ones(64, 64), rtol=0.1)


def absorbing() -> SpectralConfig:
    return SCTConfig(r=8, target_modules="all-linear", retract_every=2, absorb=True)


def swapping(pool: int | None = None) -> SpectralConfig:
    return SSTConfig(
        r=8, target_modules="all-linear", pool=pool, steps_per_iteration=2, iterations_per_round=2, warmup_steps=1
    )


@pytest.mark.parametrize("config", [swapping, lambda: swapping(pool=12), absorbing], ids=["sst", "sst-pool", "sct"])
@pytest.mark.parametrize("recipe", USUAL, ids=lambda recipe: recipe.name)
def test_after_a_swap_training_goes_on_as_with_a_fresh_optimizer(
    recipe: Recipe, config: Callable[[], SpectralConfig]
) -> None:
    model = get_peft_model(llama(), config())
    optimizer = recipe(trainable(model))
    train_(model, lr=1e-2, steps=4, optimizer=optimizer)
    twin = copy.deepcopy(model)
    train_(model, lr=1e-2, steps=2, optimizer=optimizer)
    train_(twin, lr=1e-2, steps=2, optimizer=recipe(trainable(twin)))
    for value, expected in zip(trainable(model), trainable(twin), strict=True):
        assert torch.equal(value, expected)


def test_lbfgs_is_refused_before_anything_changes() -> None:
    model = get_peft_model(llama(), swapping())
    optimizer = torch.optim.LBFGS(trainable(model))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(SpectralError, match=r"LBFGS wrong\. Use an optimizer"):
        optimizer.step(lambda: model(input_ids=batch(), labels=batch()).loss)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    "config",
    [
        *(counted(method) for method in SCHEDULED),
        SCTConfig(r=8, target_modules="all-linear", gradient="riemannian", retract_every=100),
    ],
    ids=[*map(str, SCHEDULED), "riemannian"],
)
def test_a_step_that_a_fused_optimizer_skips_in_its_kernel_does_not_count(config: SpectralConfig) -> None:
    """A GradScaler calls `step` of a fused optimizer all the same; the kernel then does nothing."""
    model = get_peft_model(llama(), config)
    optimizer, scaler = torch.optim.AdamW(trainable(model), lr=1e-2, fused=True), torch.amp.GradScaler("cpu")
    counts = []
    for number in range(3):
        before = copy.deepcopy(model.state_dict())
        loss = model(input_ids=batch(), labels=batch()).loss
        scaler.scale(loss * (float("inf") if number == 1 else 1)).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        counts.append({int(update.step) for update in updates(model)})
        unchanged = all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        assert unchanged == (number == 1)
    assert counts == [{1}, {1}, {2}]


SCHEDULERS = {
    "linear": {},
    "cosine": {},
    "cosine_with_min_lr": {"min_lr_rate": 0.1},
    "constant_with_warmup": {},
    "polynomial": {},
    "inverse_sqrt": {},
    "warmup_stable_decay": {"num_decay_steps": 4},
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_warmup_multiplies_the_rate_of_a_scheduler(name: str) -> None:
    """A step of SGD is the gradient times the rate, so the rate shows in the step of the singular values."""
    config = SSTConfig(r=8, target_modules=["q_proj"], steps_per_iteration=5, warmup_steps=3)
    model = get_peft_model(llama(), config)
    optimizer = torch.optim.SGD(trainable(model), lr=1.0)
    scheduler = transformers.get_scheduler(
        name, optimizer, num_warmup_steps=3, num_training_steps=10, scheduler_specific_kwargs=SCHEDULERS[name]
    )
    for step in range(10):
        model(input_ids=batch(step), labels=batch(step)).loss.backward()
        rate = scheduler.get_last_lr()[0] * min(1, (step % 5 + 1) / 4)
        expected = [(update.dS.weight - rate * update.dS.weight.grad).clone() for update in updates(model)]
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        if (step + 1) % 5:  # otherwise other vectors, and with them their values, were swapped in
            for update, dS in zip(updates(model), expected, strict=True):
                dS = dS.maximum(-update.S.weight)
                assert torch.allclose(update.dS.weight, dS, rtol=0, atol=1e-7)


@pytest.mark.parametrize("recipe", USUAL, ids=lambda recipe: recipe.name)
def test_every_method_trains_with_every_optimizer(method: Method, recipe: Recipe) -> None:
    """And goes on from `state_dict` as if it had not been interrupted."""
    model = get_peft_model(llama(), method())
    optimizer = recipe(trainable(model), method.lr)
    train_(model, method.lr, steps=3, optimizer=optimizer)
    twin = copy.deepcopy(model)
    other = recipe(trainable(twin), method.lr)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for value in (model, twin):
        train_(value, method.lr, steps=3, optimizer=optimizer if value is model else other)
    assert all(update.has_moved() for update in updates(model))
    for name, value in model.state_dict().items():
        assert torch.isfinite(value).all()
        assert torch.equal(value, twin.state_dict()[name])
