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

from spectral_peft.sharded import is_sharded, whole
from spectral_peft.unsupported import refuse_flattened
from spectral_peft.update import SpectralUpdate


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
    """Sets the optimizer state of these parameters to zero in place: moments, and Adam's count of steps."""
    for parameter in parameters:
        state = optimizer.state.get(parameter, {})
        for name, value in state.items():
            if isinstance(value, Tensor):
                value.zero_()
            elif isinstance(value, (int, float)):
                state[name] = type(value)(0)


def _before(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    for update in steps_of(optimizer):
        refuse_flattened(update)
        with whole(update, gradients=True):
            update.before_optimizer_step()


def _after(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    by_class: defaultdict[type[SpectralUpdate], list[SpectralUpdate]] = defaultdict(list)
    for update in steps_of(optimizer):
        if is_sharded(update):  # one at a time: no process has room for all of them
            with whole(update) as shard_of:
                stale = list(update.after_optimizer_step())
            reset_state(optimizer, [shard_of.get(id(parameter), parameter) for parameter in stale])
        else:
            by_class[type(update)].append(update)
    for update_cls, updates in by_class.items():
        reset_state(optimizer, update_cls.after_optimizer_step_of(updates))


register_optimizer_step_pre_hook(_before)
register_optimizer_step_post_hook(_after)
