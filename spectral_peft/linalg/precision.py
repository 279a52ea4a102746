"""The precision in which matrices are factorised, and what may be factorised at all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from spectral_peft.errors import SpectralError


def working_copy(A: Tensor) -> Tensor:
    """`A` in float32 at least (float64 stays); `A` itself if nothing has to change.

    Raises:
        TypeError: `A` is not of a real floating-point dtype.
        SpectralError: `A` is on the meta device, or has NaN or Inf entries.
    """
    if not A.is_floating_point():
        raise TypeError(f"A matrix to factorise should have a real floating-point dtype, got {A.dtype}.")
    if A.is_meta:
        raise SpectralError(
            f"The weight of shape {tuple(A.shape)} is on the meta device and has no data; load it first."
        )
    A = A.detach().to(torch.float64 if A.dtype == torch.float64 else torch.float32)
    _refuse_non_finite(A)
    return A


@contextmanager
def full_precision(A: Tensor) -> Iterator[None]:
    """Inside, matrix products on the device of `A` keep the dtype of their operands, and no gradient is recorded.

    Autocast would run them in half precision: "float32" factors orthonormal to 1e-2 only.
    """
    with torch.no_grad(), torch.autocast(A.device.type, enabled=False):
        yield


def _refuse_non_finite(A: Tensor) -> None:
    if torch.isfinite(A).all():
        return
    nans, infs = int(A.isnan().sum()), int(A.isinf().sum())
    raise SpectralError(f"The matrix of shape {tuple(A.shape)} has {nans} NaN and {infs} Inf entries.")
