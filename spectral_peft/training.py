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

from spectral_peft.errors import SpectralError
from spectral_peft.sharded import is_sharded, whole
from spectral_peft.unsupported import refuse_flattened
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


# Names of optimizer state that starts at zero: of torch, transformers, bitsandbytes and torchao.
_FROM_ZERO = {
    *("step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "exp_inf", "momentum_buffer"),
    *("square_avg", "grad_avg", "acc_delta", "sum"),
    *("row_var", "col_var", "variance", "exp_avg_sq_row", "exp_avg_sq_col", "RMS"),  # both Adafactors
    *("state1", "state2", "absmax1", "absmax2", "max1", "max2", "new_max1", "new_max2", "gnorm_vec", "unorm_vec"),
}
# What the codes of 8-bit states stand for. Those of bitsandbytes are shared by all parameters.
_CODE_BOOKS = {"qmap1", "qmap2", "qmap"}

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
    """Has the next step of these parameters be that of a fresh optimizer.

    State that is known to start at zero is set to zero in place, quantized moments by their codes and scales; code
    books are left alone. An optimizer with any other state (NAdam, Rprop, ScheduleFree, ...) makes it anew at its next
    step. The momentum of SGD starts at zero, which differs from a fresh one with `dampening`. What an optimizer keeps
    for a whole group stays.
    """
    for parameter in parameters:
        state = optimizer.state.get(parameter, {})
        if not state.keys() <= _FROM_ZERO | _CODE_BOOKS:
            del optimizer.state[parameter]
            continue
        # In place: a distributed checkpoint that lacks the state of some parameters cannot be loaded.
        for name, value in state.items():
            if isinstance(value, Tensor):
                _zero_(name, value)
            elif isinstance(value, (int, float)):
                state[name] = type(value)(0)
        if "sum" in state:  # Adagrad's, which is made with the optimizer and has a start of its own
            state["sum"].fill_(optimizer.defaults.get("initial_accumulator_value", 0))


def _zero_(name: str, value: Tensor) -> None:
    flatten = getattr(value, "__tensor_flatten__", None)
    if flatten is not None:  # a quantized or a sharded tensor, made of tensors
        for inner in flatten()[0]:
            part = getattr(value, inner)
            if isinstance(part, Tensor):  # a sharded one has its mesh there too
                _zero_(inner, part)
    elif name not in _CODE_BOOKS:
        value.zero_()


def take_resets(optimizer: Any) -> set[int]:
    """The parameters, by their identity, whose state `optimizer` had reset since the last call."""
    return _resets.pop(optimizer, set())


def take_step(updates: Iterable[SpectralUpdate], optimizer: Any) -> None:
    """The spectral step of updates that a step of `optimizer` moved."""
    by_class: defaultdict[type[SpectralUpdate], list[SpectralUpdate]] = defaultdict(list)
    stale: list[nn.Parameter] = []
    for update in updates:
        if is_sharded(update):  # one at a time: no process has room for all of them
            with whole(update) as shard_of:
                changed = list(update.after_optimizer_step())
            stale += [shard_of.get(id(parameter), parameter) for parameter in changed]
        else:
            by_class[type(update)].append(update)
    for update_cls, group in by_class.items():
        stale += update_cls.after_optimizer_step_of(group)
    if stale and optimizer is not None:
        reset_state(optimizer, stale)
        _resets.setdefault(optimizer, set()).update(map(id, stale))


def _begin(update: SpectralUpdate) -> None:
    refuse_flattened(update)
    with whole(update, gradients=True):
        update.before_optimizer_step()


# Where torch's hooks see the steps


def _is_skipped(optimizer: Optimizer) -> bool:
    """Whether a GradScaler has found Inf or NaN, and left it to a fused optimizer to skip the step in its kernel."""
    found_inf = getattr(optimizer, "found_inf", None)
    return found_inf is not None and bool(found_inf)


def _before(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    updates = list(steps_of(optimizer))
    if updates and isinstance(optimizer, torch.optim.LBFGS):
        raise SpectralError(
            f"{type(updates[0]).__name__} changes its parameters after every step, which makes the history of LBFGS "
            "wrong. Use an optimizer with a state for each parameter, such as AdamW."
        )
    if not (updates and _is_skipped(optimizer)):
        for update in updates:
            _begin(update)


def _after(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    updates = list(steps_of(optimizer))
    for update in updates:
        count_step(update)
    if updates and not _is_skipped(optimizer):
        take_step(updates, optimizer)


register_optimizer_step_pre_hook(_before)
register_optimizer_step_post_hook(_after)


# Where they do not


def begin_step(updates: Iterable[SpectralUpdate]) -> dict[SpectralUpdate, int]:
    """Before a step of whatever moves these updates; what it returns is for `finish_step`."""
    steps = {update: steps_seen(update) for update in updates}
    for update, seen in steps.items():
        if not seen:  # the hooks do it themselves
            _begin(update)
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
