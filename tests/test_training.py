"""The after-step engine: one spectral step for every optimizer step, and for nothing else."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import get_peft_model
from torch import nn

from spectral_peft import SST, SCTConfig, SSTConfig, spectral_step
from spectral_peft.training import reset_state
from tests.methods import SCHEDULED, Method, counted
from tests.methods import SST as SWAPPING
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


def split(module: nn.Module, part: str) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """The trained parameters with `part` in their name, and the others."""
    named = [(part in name, value) for name, value in module.named_parameters() if value.requires_grad]
    return [value for found, value in named if found], [value for found, value in named if not found]


def each(parameters: list[nn.Parameter]) -> list[list[nn.Parameter]]:
    return [[value] for value in parameters]


def backward(module: nn.Module, number: int) -> torch.Tensor:
    loss = module(input_ids=batch(number), labels=batch(number)).loss
    loss.backward()
    return loss


def assert_equal(one: nn.Module, other: nn.Module) -> None:
    for (name, value), expected in zip(one.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(value, expected), name


DIVISIONS = {
    "vectors, values": lambda module: reversed(split(module, ".dS.")),
    "values, vectors": lambda module: split(module, ".dS."),
    "each by itself": lambda module: each(trainable(module)),
}
RIEMANNIAN = SCTConfig(r=4, target_modules="all-linear", gradient="riemannian")
ABSORBING = SCTConfig(r=4, target_modules="all-linear", absorb=True, retract_every=2)


@pytest.mark.parametrize("divide", DIVISIONS.values(), ids=DIVISIONS)
@pytest.mark.parametrize("config", [SWAPPING(r=4), RIEMANNIAN, ABSORBING], ids=["sst", "riemannian", "absorbing"])
def test_several_optimizers_do_what_one_does(config: object, divide: object) -> None:
    """The spectral step comes after the last of them, and every one loses the state that it makes stale."""
    modules = [get_peft_model(llama(), config) for _ in range(2)]
    one = torch.optim.AdamW(trainable(modules[0]), lr=1e-2)
    several = [torch.optim.AdamW(held, lr=1e-2) for held in divide(modules[1])]
    for number in range(5):
        for module, optimizers in zip(modules, ([one], several), strict=True):
            backward(module, number)
            for optimizer in optimizers:
                optimizer.step()
            module.zero_grad()
        assert_equal(*modules)


@pytest.mark.parametrize("skipped", ["U", "dS"])
def test_after_one_of_two_optimizers_has_skipped_its_step_they_go_on_together(skipped: str) -> None:
    """A GradScaler looks for Inf in the gradients of each of them."""
    module = get_peft_model(llama(), SCTConfig(r=4, target_modules="all-linear", retract_every=2, absorb=True))
    optimizers = dict(zip(("dS", "U"), map(torch.optim.AdamW, split(module, ".dS.")), strict=True))
    counts = []
    for number in range(6):
        backward(module, number)
        for name in ("U", "dS"):
            if (name, number) != (skipped, 2):
                optimizers[name].step()
        counts.append(steps(module))
        module.zero_grad()
    assert counts[:2] == [{1}, {2}]
    assert counts[3:] == [{4}, {5}, {6}]


@pytest.mark.parametrize(
    ("method", "name"), [(method, name) for method in SCHEDULED for name in sorted(method.trained)], ids=str
)
def test_a_frozen_part_stops_nothing(method: Method, name: str) -> None:
    module = get_peft_model(llama(), counted(method))
    frozen, others = split(module, f".{name}")
    for value in frozen:
        value.requires_grad_(False)
    train_(module, lr=1e-2, steps=2, optimizer=torch.optim.AdamW(others, lr=1e-2))
    assert steps(module) == {2}


def test_a_part_that_no_optimizer_holds_is_waited_for_once() -> None:
    module = model()
    optimizer = torch.optim.AdamW(split(module, ".U.")[1], lr=1e-3)
    counts = []
    for number in range(4):
        backward(module, number)
        optimizer.step()
        counts.append(steps(module))
    assert counts == [{0}, {2}, {3}, {4}]


class Around(torch.optim.Optimizer):
    """An optimizer whose step is that of another one on the same parameters, as those that look ahead."""

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        super().__init__(inner.param_groups, {})
        self.inner = inner

    def step(self, closure: object = None) -> None:
        self.inner.step()


def test_a_step_that_raised_is_no_step() -> None:
    module = model()
    optimizer = torch.optim.AdamW(trainable(module), lr=1e-3)

    def closure() -> torch.Tensor:
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        optimizer.step(closure)
    assert steps(module) == {0}
    train_(module, lr=1e-3, steps=2, optimizer=optimizer)
    assert steps(module) == {2}


def test_a_step_within_a_step_counts_once() -> None:
    module = model()
    train_(module, lr=1e-3, steps=3, optimizer=Around(torch.optim.AdamW(trainable(module), lr=1e-3)))
    assert steps(module) == {3}


@pytest.mark.parametrize("config", [SWAPPING(r=4), RIEMANNIAN], ids=["sst", "sct"])
@pytest.mark.parametrize("by_name", [False, True], ids=["positional", "by-name"])
def test_a_closure_is_a_plain_loop(config: object, by_name: bool) -> None:
    """The gradients that a schedule works on are those that the closure computes."""
    modules = [get_peft_model(llama(), config) for _ in range(2)]
    plain, other = (torch.optim.AdamW(trainable(module), lr=1e-2) for module in modules)
    for number in range(5):
        plain.zero_grad()
        expected = backward(modules[0], number)
        plain.step()

        def closure(number: int = number) -> torch.Tensor:
            other.zero_grad()
            return backward(modules[1], number)

        loss = other.step(closure=closure) if by_name else other.step(closure)
        assert torch.equal(loss, expected)
        assert_equal(*modules)


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


@pytest.mark.parametrize("before", [True, False], ids=["of-an-adapter-there", "of-a-new-adapter"])
def test_an_optimizer_that_gets_other_parameters_drives_their_updates(before: bool) -> None:
    module, second = model(), SSTConfig(r=4, target_modules="all-linear")
    if before:
        module.add_adapter("second", second)
    optimizer = torch.optim.AdamW(trainable(module), lr=1e-3)
    train_(module, lr=1e-3, steps=2, optimizer=optimizer)
    if not before:
        module.add_adapter("second", second)
    module.set_adapter("second")
    optimizer.param_groups[0]["params"] = trainable(module)  # as many as before
    train_(module, lr=1e-3, steps=3, optimizer=optimizer)
    steps = [{int(layer.update_of(name).step) for layer in layers(module)} for name in ("default", "second")]
    assert steps == [{2}, {3}]


@pytest.mark.parametrize("method", SCHEDULED, ids=str)
def test_a_new_optimizer_for_each_step_within_a_spectral_step_counts_once(method: Method) -> None:
    module, counts = get_peft_model(llama(), counted(method)), []
    for number in range(3):
        backward(module, number)
        with spectral_step(module):
            torch.optim.SGD(trainable(module), lr=1e-3).step()
        module.zero_grad()
        counts.append(steps(module))
    assert counts == [{1}, {2}, {3}]


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
