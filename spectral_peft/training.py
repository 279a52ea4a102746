"""The after-step engine: one spectral step after every optimizer step, wherever the optimizer is stepped."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from weakref import ReferenceType, WeakKeyDictionary, ref

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from spectral_peft.update import SpectralUpdate
from spectral_peft.watch import count_as_driven, count_step, steps_seen, watch


class _Held(NamedTuple):
    """What an optimizer moves, as it was looked up: updates with the parameter by which they were found.

    Attributes:
        seen: The calls of `drive` and the number of parameters of the optimizer at that time.
        updates: Only referred to: an optimizer does not keep an adapter alive that was deleted.
    """

    seen: tuple[int, int]
    updates: list[tuple[ReferenceType[SpectralUpdate], nn.Parameter]]


# In the order of their creation, which is that of the layers: what is computed for many updates at once is then the
# same on every process and after a resume. A WeakSet has no order.
_driven: WeakKeyDictionary[SpectralUpdate, None] = WeakKeyDictionary()
_drives = 0
_held: WeakKeyDictionary[Optimizer, _Held] = WeakKeyDictionary()
# By optimizer: the parameters whose state was reset, by their identity, until `take_resets` asks for them.
_resets: WeakKeyDictionary[Any, set[int]] = WeakKeyDictionary()


def drive(updates: Iterable[SpectralUpdate]) -> None:
    """Gives these updates their spectral step after every step of the optimizer that holds their parameters.

    Through torch's global optimizer hooks, so that Trainer, TRL, accelerate and bare loops need no code for it, and
    steps that a GradScaler skips are not counted.
    """
    global _drives
    _drives += 1
    for update in updates:
        if update.scheduled:
            _driven[update] = None
            watch(update)


def steps_of(optimizer: Optimizer) -> Iterator[SpectralUpdate]:
    """The driven updates whose parameters this optimizer moves."""
    if not _driven:
        return
    # Noted per optimizer: a loop that has one for each layer would look through all updates for each of them.
    seen = _drives, sum(len(group["params"]) for group in optimizer.param_groups)
    held = _held.get(optimizer)
    if held is None or held.seen != seen:
        ids = {id(value) for group in optimizer.param_groups for value in group["params"]}
        found = ((ref(update), _first_parameter(update)) for update in _driven)
        held = _held[optimizer] = _Held(seen, [(update, value) for update, value in found if id(value) in ids])
    for reference, parameter in held.updates:
        update = reference()
        if update is not None and parameter.requires_grad:
            yield update


def _first_parameter(update: SpectralUpdate) -> nn.Parameter:
    return next(value for _, value in update.trained_parameters())


@torch.no_grad()
def reset_state(optimizer: Optimizer, parameters: Iterable[nn.Parameter]) -> None:
    """Sets the optimizer state of these parameters to zero in place: moments, and Adam's count of steps."""
    for parameter in parameters:
        state = optimizer.state.get(parameter, {})
        for name, value in state.items():
            if isinstance(value, Tensor):
                value.zero_()
            elif isinstance(value, (int, float)):
                state[name] = type(value)(0)


def take_resets(optimizer: Any) -> set[int]:
    """The parameters, by their identity, whose state `optimizer` had reset since the last call."""
    return _resets.pop(optimizer, set())


def take_step(updates: Iterable[SpectralUpdate], optimizer: Any) -> None:
    """The spectral step of updates that a step of `optimizer` moved."""
    by_class: defaultdict[type[SpectralUpdate], list[SpectralUpdate]] = defaultdict(list)
    for update in updates:
        by_class[type(update)].append(update)
    for update_cls, group in by_class.items():
        stale = list(update_cls.after_optimizer_step_of(group))
        if stale and optimizer is not None:
            reset_state(optimizer, stale)
            _resets.setdefault(optimizer, set()).update(map(id, stale))


# Where torch's hooks see the steps


def _skips(optimizer: Optimizer) -> bool:
    """Whether a GradScaler has this step skipped within a fused kernel; other optimizers it does not call at all."""
    found_inf = getattr(optimizer, "found_inf", None)
    return found_inf is not None and bool(found_inf)


def _before(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    for update in steps_of(optimizer):
        update.before_optimizer_step()


def _after(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    updates = list(steps_of(optimizer))
    for update in updates:
        count_step(update)
    if updates and not _skips(optimizer):
        take_step(updates, optimizer)


register_optimizer_step_pre_hook(_before)
register_optimizer_step_post_hook(_after)


# Where they do not


def begin_step(updates: Iterable[SpectralUpdate]) -> dict[SpectralUpdate, int]:
    """Before a step of whatever moves these updates; what it returns is for `finish_step`."""
    steps = {update: steps_seen(update) for update in updates}
    for update, seen in steps.items():
        if not seen:  # the hooks do it themselves
            update.before_optimizer_step()
    return steps


def finish_step(steps: dict[SpectralUpdate, int], optimizer: Any) -> None:
    """The spectral step of those updates whose step no hook has seen since `begin_step`."""
    missed = [update for update, seen in steps.items() if steps_seen(update) == seen]
    for update in missed:
        count_as_driven(update)
    take_step(missed, optimizer)


def trained_updates(model: nn.Module) -> list[SpectralUpdate]:
    """The updates of a model whose parameters require a gradient."""
    updates = (module for module in model.modules() if isinstance(module, SpectralUpdate))
    return [update for update in updates if any(value.requires_grad for _, value in update.trained_parameters())]


@contextmanager
def spectral_step(model: nn.Module, optimizer: Any = None) -> Iterator[None]:
    """Runs the schedules of a model around a step that is not one of a torch optimizer.

    ::

        with spectral_step(model):
            for parameter in parameters:
                parameter.data -= lr * parameter.grad

    Not needed where a torch optimizer holds the adapter's parameters, and does nothing there: its steps are seen.

    Args:
        model: A model with spectral adapters.
        optimizer: What keeps state of the parameters, by parameter in its `state`, which is reset where a schedule
            makes it stale. None if nothing does.
    """
    steps = begin_step(update for update in trained_updates(model) if update.scheduled)
    yield
    finish_step(steps, optimizer)
