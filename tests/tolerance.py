"""The one tolerance of the tests."""

from __future__ import annotations

import torch


def tolerance(dtype: torch.dtype, n: int) -> float:
    """10 n eps: what rounding may do to a computation of size `n` in `dtype`."""
    return 10 * n * torch.finfo(dtype).eps
