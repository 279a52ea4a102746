"""When a method that works in iterations and rounds does what."""

from __future__ import annotations

from typing import NamedTuple


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
