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
    """Inside, products of float32 matrices on the device of `A` are exact to float32, and no gradient is recorded.

    Autocast and TF32 (which many training scripts switch on) would make factors that are orthonormal to 1e-3 only.
    The switches of TF32 are those of the process, not of the thread.
    """
    with torch.no_grad(), torch.autocast(A.device.type, enabled=False), _ieee_float32():
        yield


@contextmanager
def _ieee_float32_by_backend() -> Iterator[None]:
    backends = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]
    before = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        yield
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision


@contextmanager
def _ieee_float32_globally() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("highest")
        yield
    finally:
        torch.set_float32_matmul_precision(before)


# The settings by backend came with torch 2.9; where a script has used them, the older functions raise.
_ieee_float32 = (
    _ieee_float32_by_backend if hasattr(torch.backends.cuda.matmul, "fp32_precision") else _ieee_float32_globally
)


def _refuse_non_finite(A: Tensor) -> None:
    # The sum is ten times as fast, and finite only if every entry is; it may overflow where they all are.
    if torch.isfinite(A.sum()) or torch.isfinite(A).all():
        return
    nans, infs = int(A.isnan().sum()), int(A.isinf().sum())
    raise SpectralError(f"The matrix of shape {tuple(A.shape)} has {nans} NaN and {infs} Inf entries.")
