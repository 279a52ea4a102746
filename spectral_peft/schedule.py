"""When a method that works in iterations and rounds does what, and the count of steps that this follows."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Schedule(NamedTuple):
    """When SST does what, counted in optimizer steps.

    Attributes:
        steps_per_iteration: Steps with the same trained vectors.
        iterations_per_round: Iterations from one SVD of the weight to the next.
        warmup_steps: Length of the linear warm-up of the learning rate after every change of the trained vectors.
    """

    steps_per_iteration: int
    iterations_per_round: int
    warmup_steps: int

    def is_swap(self, step: int) -> bool:
        """Whether an iteration ends with this step."""
        return step % self.steps_per_iteration == 0

    def is_svd(self, step: int) -> bool:
        """Whether a round ends with this step."""
        return step % (self.steps_per_iteration * self.iterations_per_round) == 0

    def warmup(self, step: int) -> float:
        """The factor on the learning rate of the step that follows `step` finished ones."""
        return min(1.0, (step % self.steps_per_iteration + 1) / (self.warmup_steps + 1))


class Count:
    """The number in a buffer that counts steps, without waiting for the buffer's device at every step.

    It is read from there once, and again after anything but `add_one_` has replaced the buffer or written to it in a
    way that autograd counts: loading a checkpoint, `copy_`, DDP's broadcast of buffers. That one comes with every
    forward pass, so that every step reads; DDP's `broadcast_buffers=False` saves it. Not seen is what autograd does
    not count: writing through `.data`, and `torch.distributed.broadcast` of the buffer itself.
    """

    def __init__(self) -> None:
        self._of: tuple[Tensor, int] | None = None
        self._number = 0

    def __reduce__(self) -> tuple[type[Count], tuple[()]]:
        return Count, ()  # a copy reads its own buffer

    def of(self, buffer: Tensor) -> int:
        if self._of is None or self._of[0] is not buffer or self._of[1] != buffer._version:
            self._note(buffer, int(buffer))
        return self._number

    @torch.no_grad()
    def add_one_(self, buffer: Tensor) -> int:
        number = self.of(buffer) + 1
        self._note(buffer.add_(1), number)
        return number

    def _note(self, buffer: Tensor, number: int) -> None:
        self._of, self._number = (buffer, buffer._version), number
