"""The one error type of the package, and what more than one method says with it."""

from __future__ import annotations


class SpectralError(ValueError):
    """Raised where a caller can act on it: load the weight, choose another rank, skip the layer."""


def diverged(name: str, when: str = "") -> SpectralError:
    """The error for a trained tensor that is not finite any more."""
    return SpectralError(
        f"{name} holds NaN or Inf{when}: the training has diverged. Lower the learning rate, or clip gradients."
    )
