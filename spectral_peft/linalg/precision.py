"""The conditions under which matrices are factorized, and what may be factorized at all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from spectral_peft.errors import SpectralError


SMALL = 2**21
"""Entries up to which a matrix is factorized on one thread."""


def working_copy(A: Tensor) -> Tensor:
    """`A` in float32 at least (float64 stays); `A` itself if nothing has to change.

    Raises:
        TypeError: `A` is not of a real floating-point dtype.
        SpectralError: `A` is on the meta device, or has NaN or Inf entries.
    """
    if not A.is_floating_point():
        raise TypeError(f"A matrix to factorize should have a real floating-point dtype, got {A.dtype}.")
    if A.is_meta:
        raise SpectralError(
            f"The weight of shape {tuple(A.shape)} is on the meta device and has no data; load it first."
        )
    A = A.detach().to(torch.float64 if A.dtype == torch.float64 else torch.float32)
    _refuse_non_finite(A)
    return A


@contextmanager
def exact_products(device: torch.device) -> Iterator[None]:
    """Inside, products of float32 matrices on this device are exact to float32, and no gradient is recorded.

    Autocast and TF32 (which many training scripts switch on) would make factors that are orthonormal to 1e-3 only.
    The switches of TF32 are those of the process, not of the thread.
    """
    with torch.no_grad(), torch.autocast(device.type, enabled=False), _ieee_float32():
        yield


@contextmanager
def factorizing(A: Tensor) -> Iterator[None]:
    """`exact_products` on the device of `A`; if it is small and on the CPU, on one thread."""
    with exact_products(A.device), one_thread_if_small(A):
        yield


@contextmanager
def one_thread_if_small(
    A: Tensor,  # shape: any
) -> Iterator[None]:
    """Inside, operations run on one thread if `A` is on the CPU and has at most `SMALL` entries.

    LAPACK opens many short parallel regions. Where a process gets less CPU time than it sees cores (containers, busy
    machines), their barriers cost far more than threads gain: 4.4 s against 9 ms for the SVD of a 192 x 576 matrix.
    """
    threads = torch.get_num_threads()
    if A.device.type != "cpu" or A.numel() > SMALL or threads == 1:
        yield
        return
    try:
        torch.set_num_threads(1)
        yield
    finally:
        torch.set_num_threads(threads)


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
