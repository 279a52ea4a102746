"""How many optimizer steps were seen of each update, and a warning for a schedule that nothing drives."""

from __future__ import annotations

import warnings
from typing import Any
from weakref import WeakKeyDictionary, ref

from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.hooks import RemovableHandle

from spectral_peft.update import SpectralUpdate


CHANGES = 3
"""Changes without a step before there is a warning."""
ENTRIES = 16
"""Entries of a parameter that are compared."""

# By update: the steps of torch optimizers that moved it. 0 where something else drives it.
_steps: WeakKeyDictionary[SpectralUpdate, int] = WeakKeyDictionary()
_watches: WeakKeyDictionary[SpectralUpdate, list[_Watch]] = WeakKeyDictionary()
_warned = False


def count_step(update: SpectralUpdate) -> None:
    """Notes a step of a torch optimizer that holds this update; also one that a GradScaler skipped."""
    _steps[update] = _steps.get(update, 0) + 1


def count_as_driven(update: SpectralUpdate) -> None:
    """Notes that the schedule runs without a torch optimizer."""
    _steps.setdefault(update, 0)


def steps_seen(update: SpectralUpdate) -> int:
    """How many steps of torch optimizers were seen in this process that moved this update."""
    return _steps.get(update, 0)


def watch(update: SpectralUpdate) -> None:
    """Warns once in a process if a scheduled update trains for a while and its schedule never runs.

    A few entries are compared after backward passes number 1, 2, 4, 8, ...; the first step that is seen ends it.
    Neither inference nor a compiled forward pass has anything to do with it.
    """
    if not update.scheduled or update in _watches:
        return
    _watches[update] = [_Watch(update, value) for _, value in update.trained_parameters() if value.requires_grad]
    if _start_again not in update._load_state_dict_post_hooks.values():  # a copy has the hooks of the original
        update.register_load_state_dict_post_hook(_start_again)  # type: ignore[no-untyped-call]


def _start_again(update: nn.Module, _: Any) -> None:
    """What a checkpoint changes was not trained, and it may have put other parameters in the place of the watched."""
    if isinstance(update, SpectralUpdate) and update in _watches:
        for one in _watches.pop(update):
            one.handle.remove()
        if update not in _steps:
            watch(update)


class _Watch:
    """Follows one trained parameter from backward pass to backward pass."""

    def __init__(self, update: SpectralUpdate, parameter: nn.Parameter) -> None:
        self.update = ref(update)
        self.passes = self.changes = 0
        self.noted: Tensor | None = None
        self.handle: RemovableHandle = parameter.register_post_accumulate_grad_hook(self.look)  # type: ignore[no-untyped-call]

    def look(self, parameter: Tensor) -> None:
        """After a backward pass: at every power of two compares the entries with those noted before."""
        update = self.update()
        if _warned or update is None or update in _steps:
            self.handle.remove()
            return
        self.passes += 1
        if self.passes & (self.passes - 1):
            return
        own = parameter.detach()
        own = own.to_local() if isinstance(own, DTensor) else own  # loaded after it was sharded
        now = own.flatten()[:ENTRIES].clone()
        if self.noted is not None and not now.equal(self.noted):
            self.changes += 1
        self.noted = now
        if self.changes == CHANGES:
            _warn(type(update).__name__)


def _warn(method: str) -> None:
    global _warned
    _warned = True
    warnings.warn(
        f"The parameters of an adapter change, but the schedule of {method} never ran: they are not moved by a torch "
        "optimizer, whose steps would run it. With a Trainer add `trainer.add_callback(SpectralCallback(trainer))`; "
        "in a loop of your own do the optimizer's step within `with spectral_step(model):`.",
        stacklevel=2,
    )
