"""The after-step engine: one spectral step after every optimizer step, wherever the optimizer is stepped."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

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
    """What an optimizer moves, as it was looked up.

    Attributes:
        seen: The calls of `drive`, and the parameters of the optimizer by their identity, at that time.
        parts: Its trained parameters, by update. Only referred to: an optimizer does not keep an adapter alive that
            was deleted.
    """

    seen: tuple[int, ...]
    parts: WeakKeyDictionary[SpectralUpdate, list[nn.Parameter]]


class _Step:
    """A step of one update, in which several optimizers may step one after the other.

    It begins with the first of them, and ends when every trained parameter has been stepped. What no optimizer holds
    is waited for once: until the one that began steps again, or another one does for the second time. After that only
    what some optimizer is known to hold. Which one begins is seen in the very first step: one that is
    skipped there, and not the others, is taken for one that comes later.

    Attributes:
        first: The parameters, by their identity, of the optimizer with which steps begin.
        stepped: Those that have been stepped since this step began; None between two steps.
        has_ended: Whether there was a step before this one.
    """

    def __init__(self, first: set[int]) -> None:
        self.first = first
        self.stepped: set[int] | None = None
        self.has_ended = False

    def is_overdue(self, own: set[int]) -> bool:
        """Whether an optimizer of these parameters begins the next step: one of them has left out this one."""
        return bool(self.stepped and own & (self.stepped | self.first))


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
_held: WeakKeyDictionary[Optimizer, _Held] = WeakKeyDictionary()  # those that have stepped
_steps: WeakKeyDictionary[SpectralUpdate, _Step] = WeakKeyDictionary()
# By optimizer: the parameters whose state was reset, by their identity, until `take_resets` asks for them.
_resets: WeakKeyDictionary[Any, set[int]] = WeakKeyDictionary()


def drive(updates: Iterable[SpectralUpdate]) -> None:
    """Gives these updates their spectral step after every step of the optimizers that hold their parameters.

    Through torch's global optimizer hooks, so that Trainer, TRL, accelerate and bare loops need no code for it, and
    steps that a GradScaler skips are not counted.
    """
    global _drives
    _drives += 1
    for update in updates:
        if update.scheduled:
            _driven[update] = None
            watch(update)


def _parts(optimizer: Optimizer) -> Iterator[tuple[SpectralUpdate, set[int]]]:
    """The driven updates of which this optimizer moves parameters, with the identities of those that train now."""
    if not _driven:
        return
    # Noted per optimizer: a loop that has one for each layer would look through all updates for each of them.
    ids = [id(value) for group in optimizer.param_groups for value in group["params"]]
    seen = (_drives, *ids)
    held = _held.get(optimizer)
    if held is None or held.seen != seen:
        held = _held[optimizer] = _Held(seen, _look_up({*ids}))
    for update, parameters in held.parts.items():
        own = {id(value) for value in parameters if value.requires_grad}
        if own:
            yield update, own


def _look_up(ids: set[int]) -> WeakKeyDictionary[SpectralUpdate, list[nn.Parameter]]:
    parts: WeakKeyDictionary[SpectralUpdate, list[nn.Parameter]] = WeakKeyDictionary()
    for update in _driven:
        own = [value for _, value in update.trained_parameters() if id(value) in ids]
        if own:
            parts[update] = own
    return parts


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


def take_step(updates: Iterable[SpectralUpdate], optimizers: Iterable[Any]) -> None:
    """The spectral step of updates that were moved; state of theirs that it makes stale is reset in `optimizers`."""
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
    for optimizer in optimizers if stale else ():
        held = [parameter for parameter in stale if parameter in optimizer.state]
        if held:
            reset_state(optimizer, held)
            _resets.setdefault(optimizer, set()).update(map(id, held))


def _begin(update: SpectralUpdate) -> None:
    refuse_flattened(update)
    if is_sharded(update):
        with whole(update, gradients=True):
            update.before_optimizer_step()
    else:
        update.before_optimizer_step()


# Where torch's hooks see the steps


def _is_skipped(optimizer: Optimizer) -> bool:
    """Whether a GradScaler has found Inf or NaN, and left it to a fused optimizer to skip the step in its kernel."""
    found_inf = getattr(optimizer, "found_inf", None)
    return found_inf is not None and bool(found_inf)


def _before(optimizer: Optimizer, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
    parts = list(_parts(optimizer))
    if parts and isinstance(optimizer, torch.optim.LBFGS):
        raise SpectralError(
            f"{type(parts[0][0]).__name__} changes its parameters after every step, which makes the history of LBFGS "
            "wrong. Use an optimizer with a state for each parameter, such as AdamW."
        )
    if not parts or _is_skipped(optimizer):
        return None
    steps = {update: _steps.setdefault(update, _Step(own)) for update, own in parts}
    _end([update for update, own in parts if steps[update].is_overdue(own)])
    begun = [update for update, step in steps.items() if not step.stepped]
    for update in begun:
        steps[update].stepped = set()
    return _begin_with(begun, args, kwargs)


def _begin_with(updates: Iterable[SpectralUpdate], args: Any, kwargs: Any) -> tuple[Any, Any] | None:
    """Begins now, or where the step is given a closure after that: it is the closure that computes the gradients.

    Returns:
        The changed arguments of the step, if so.
    """
    closure = args[1] if len(args) > 1 else kwargs.get("closure")
    if not callable(closure):
        for update in updates:
            _begin(update)
        return None

    def then_begin() -> Any:
        loss = closure()
        for update in updates:
            _begin(update)
        return loss

    return ((args[0], then_begin, *args[2:]), kwargs) if len(args) > 1 else (args, {**kwargs, "closure": then_begin})


def _after(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    parts = list(_parts(optimizer))
    for update, _ in parts:
        count_step(update)
    if not parts or _is_skipped(optimizer):
        return
    ended = []
    for update, own in parts:
        step = _steps.get(update)
        if step is not None and step.stepped is not None:  # not so for an optimizer around one that has ended it
            step.stepped |= own
            if not _awaited(update, step.stepped, step.has_ended):
                ended.append(update)
    _end(ended)


def _awaited(update: SpectralUpdate, stepped: set[int], has_ended: bool) -> set[int]:
    """The parameters, by their identity, that another optimizer has yet to step."""
    missing = {id(value) for _, value in update.trained_parameters() if value.requires_grad} - stepped
    if missing and has_ended:
        missing &= {id(value) for held in _held.values() for value in held.parts.get(update, ())}
    return missing


def _end(updates: list[SpectralUpdate]) -> None:
    for update in updates:
        _steps[update].stepped, _steps[update].has_ended = None, True
    take_step(updates, list(_held))


register_optimizer_step_pre_hook(_before)
register_optimizer_step_post_hook(_after)


# Where they do not


def begin_step(updates: Iterable[SpectralUpdate], optimizer: Any) -> dict[SpectralUpdate, int]:
    """Before a step of whatever moves these updates; what it returns is for `finish_step`."""
    steps = {update: steps_seen(update) for update in updates}
    held = _held_updates(optimizer)
    for update in steps:
        if update not in held:  # otherwise the hooks do it themselves
            _begin(update)
    return steps


def finish_step(steps: dict[SpectralUpdate, int], optimizer: Any) -> None:
    """The spectral step of those updates that no torch optimizer moves: a step of one that no hook saw was skipped."""
    held = _held_updates(optimizer)
    missed = [update for update, seen in steps.items() if steps_seen(update) == seen and update not in held]
    for update in missed:
        count_as_driven(update)
    take_step(missed, [] if optimizer is None else [optimizer])


def _held_updates(optimizer: Any) -> set[SpectralUpdate]:
    """Those of which a torch optimizer moves parameters: this one, if it is one, or one that has stepped."""
    known = {*_held, optimizer} if isinstance(optimizer, Optimizer) else {*_held}
    return {update for each in known for update, _ in _parts(each)}


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
            makes it stale. None if nothing does. A torch optimizer that a GradScaler may keep from its first step has
            to be named: before that step nothing else tells that it moves the parameters.
    """
    steps = begin_step((update for update in trained_updates(model) if update.scheduled), optimizer)
    yield
    finish_step(steps, optimizer)
