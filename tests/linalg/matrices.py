"""Matrices to decompose, and what every decomposition owes."""

from __future__ import annotations

import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor


few = settings(derandomize=True, deadline=None, max_examples=40)


def gaussian(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def with_spectrum(S: Tensor, m: int, n: int) -> Tensor:
    """A float32 m x n matrix with the singular values `S`."""
    U, V = (
        torch.linalg.qr(gaussian(size, S.numel(), seed=seed, dtype=torch.float64)).Q for seed, size in ((1, m), (2, n))
    )
    return ((U * S.double()) @ V.mT).float()


@st.composite
def matrices(draw: st.DrawFn) -> Tensor:
    """Tall, wide, rank-deficient, with zero columns and rows, zero, batched."""
    m, n = draw(st.integers(1, 24)), draw(st.integers(1, 24))
    inner = draw(st.integers(0, min(m, n)))
    batch = draw(st.sampled_from([(), (), (3,)]))
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))
    seed = draw(st.integers(0, 10**6))
    A = gaussian(*batch, m, inner, seed=seed, dtype=dtype) @ gaussian(*batch, inner, n, seed=seed + 1, dtype=dtype)
    if draw(st.booleans()):
        A[..., draw(st.integers(0, n - 1))] = 0
    return A * 10.0 ** draw(st.integers(-6, 6))


def assert_canonical(U: Tensor) -> None:
    pivots = U.gather(-2, U.abs().argmax(-2, keepdim=True))
    assert (pivots >= 0).all()
