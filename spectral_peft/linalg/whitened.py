"""Truncation that is optimal for given inputs instead of for all of them."""

from __future__ import annotations

import torch
from torch import Tensor

from spectral_peft.linalg.drivers import Factors
from spectral_peft.linalg.precision import factorizing, working_copy
from spectral_peft.linalg.svd import svd, svd_of_product, truncated_svd


RIDGE = 1e-6


def whitened_svd(
    W: Tensor,  # shape: (m, n)
    C: Tensor,  # shape: (n, n), or (n,) for a diagonal
    rank: int,
    algorithm: str = "auto",
    ridge: float = RIDGE,
) -> Factors:
    """The matrix W_r of this rank with the least E||(W - W_r) x||^2 over inputs with E[x x^T] = `C`, as its SVD.

    The error is ||(W - W_r) L||_F^2 with C = L L^T, so the U of the truncated SVD of W L gives the optimum: W_r L =
    U U^T W L, and W_r = U U^T W. That form needs no inverse of L, and holds for a singular C. The result is factored
    once more as U diag(S) Vh with orthonormal U and Vh, which are not singular vectors of W unless C is a multiple of
    the identity; then it is `truncated_svd(W, rank)`. At full rank it is the SVD of W.

    Sources: Wang et al. (2025), SVD-LLM, arXiv 2403.07378, whose W_r = U S Vh L^-1 is the same matrix; Chen et al.
    (2021), DRONE.

    Args:
        W: the weight of x -> W x.
        C: the second moments of the inputs, symmetric and positive semidefinite up to rounding.
        rank: between 1 and min(m, n).
        algorithm: as in `truncated_svd`.
        ridge: see `whiten`.

    Raises:
        TypeError, SpectralError: as `svd`, for either matrix.
        ValueError: the shapes do not fit, `rank` is out of range, or `algorithm` is unknown.
    """
    W = working_copy(W)
    if rank == min(W.shape):
        _check_shapes(W, C)
        return svd(W)
    U = truncated_svd(whiten(W, C, ridge), rank, algorithm).U
    with factorizing(W):
        return svd_of_product(U, U.mT @ W)


def whiten(
    W: Tensor,  # shape: (m, n)
    C: Tensor,  # shape: (n, n), or (n,) for a diagonal
    ridge: float = RIDGE,
) -> Tensor:  # shape: (m, n)
    """W L with L L^T = C + `ridge` * mean(diag C) * I, in float32 at least.

    Its squared singular values are what the triplets of `whitened_svd` hold of E||W x||^2. The ridge is for
    directions that no input has: it ranks them, behind all others, as the plain SVD does. A `C` of zeros, from which
    nothing can be learnt, counts as the identity. L is the Cholesky factor in float64; where rounding has made C
    indefinite beyond the ridge, the square root of its positive part.

    Raises:
        TypeError, SpectralError: as `svd`, for either matrix.
        ValueError: the shapes do not fit.
    """
    _check_shapes(W, C)
    W, C = working_copy(W), working_copy(C).to(W.device, torch.float64)
    with factorizing(W):
        diagonal = C if C.ndim == 1 else C.diagonal()
        mean = diagonal.mean()
        shift = ridge * mean if mean > 0 else torch.ones_like(mean)
        if C.ndim == 1:
            return (W * (C + shift).clamp(min=0).sqrt()).to(W.dtype)
        root = _square_root(C + shift * torch.eye(len(C), dtype=C.dtype, device=C.device))
        return (W.to(C.dtype) @ root).to(W.dtype)


def _square_root(C: Tensor) -> Tensor:  # shape: (n, n)
    """L with L L^T = C, or the nearest positive semidefinite matrix."""
    L, info = torch.linalg.cholesky_ex(C)
    if info == 0:
        return L
    eigenvalues, V = torch.linalg.eigh(C)
    return V * eigenvalues.clamp(min=0).sqrt()


def _check_shapes(W: Tensor, C: Tensor) -> None:
    n = W.shape[-1]
    if W.ndim != 2 or C.shape not in ((n,), (n, n)):
        raise ValueError(
            f"`C` should be (n, n) or (n,) for `W` of shape (m, n), got {tuple(C.shape)} for {tuple(W.shape)}."
        )
