"""The after-step engine: one spectral step after every optimizer step, wherever the optimizer is stepped."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Any
from weakref import ReferenceType, WeakKeyDictionary, ref

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from spectral_peft.errors import SpectralError
from spectral_peft.update import SpectralUpdate


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
# By optimizer: the calls of `drive` and the number of its parameters when it was looked at, and what it moves.
_updates_of: WeakKeyDictionary[Optimizer, tuple[tuple[int, int], list[ReferenceType[SpectralUpdate]]]] = (
    WeakKeyDictionary()
)


def drive(updates: Iterable[SpectralUpdate]) -> None:
    """Gives these updates their spectral step after every step of the optimizer that holds their parameters.

    Through torch's global optimizer hooks, so that Trainer, TRL, accelerate and bare loops need no code for it, and
    steps that a GradScaler skips are not counted.
    """
    global _drives
    _drives += 1
    _driven.update((update, None) for update in updates if update.scheduled)


def steps_of(optimizer: Optimizer) -> Iterator[SpectralUpdate]:
    """The driven updates whose parameters this optimizer moves."""
    if not _driven:
        return
    # Noted per optimizer: a loop that has one for each layer would look through all updates for each of them.
    seen = _drives, sum(len(group["params"]) for group in optimizer.param_groups)
    known = _updates_of.get(optimizer)
    if known is None or known[0] != seen:
        held = {id(value) for group in optimizer.param_groups for value in group["params"]}
        updates = [ref(update) for update in _driven if id(_first_parameter(update)) in held]
        known = _updates_of[optimizer] = (seen, updates)
    for reference in known[1]:
        update = reference()
        if update is not None and _first_parameter(update).requires_grad:
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
            _zero_(inner, getattr(value, inner))
    elif name not in _CODE_BOOKS:
        value.zero_()


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
            update.before_optimizer_step()


def _after(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    by_class: defaultdict[type[SpectralUpdate], list[SpectralUpdate]] = defaultdict(list)
    for update in steps_of(optimizer):
        by_class[type(update)].append(update)
    if by_class and _is_skipped(optimizer):
        return
    for update_cls, updates in by_class.items():
        reset_state(optimizer, update_cls.after_optimizer_step_of(updates))


register_optimizer_step_pre_hook(_before)
register_optimizer_step_post_hook(_after)
