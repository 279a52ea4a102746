"""The one error type of the package."""

from __future__ import annotations


class SpectralError(ValueError):
    """Raised where a caller can act on it: load the weight, choose another rank, skip the layer."""
