"""Truncation that is optimal for given inputs instead of for all of them."""

from __future__ import annotations

import torch
from torch import Tensor

from spectral_peft.linalg.drivers import Factors
from spectral_peft.linalg.precision import factorizing, working_copy
from spectral_peft.linalg.svd import svd, svd_of_product, truncated_svd


RIDGE = 1e-6
GRADIENT_RIDGE = 1.0
"""Of the mean of the diagonal: gradients differ much from token to token, and thousands of them say little about a
single direction."""


def whitened_svd(
    W: Tensor,  # shape: (m, n)
    C: Tensor,  # shape: (n, n), or (n,) for a diagonal
    rank: int,
    algorithm: str = "auto",
    ridge: float = RIDGE,
    G: Tensor | None = None,  # shape: (m, m), or (m,) for a diagonal
) -> Factors:
    """The matrix W_r of this rank with the least E||(W - W_r) x||^2 over inputs with E[x x^T] = `C`, as its SVD.

    The error is ||(W - W_r) L||_F^2 with C = L L^T, so the U of the truncated SVD of W L gives the optimum: W_r L =
    U U^T W L, and W_r = U U^T W. That form needs no inverse of L, and holds for a singular C. The result is factored
    once more as U diag(S) Vh with orthonormal U and Vh, which are not singular vectors of W unless C is a multiple of
    the identity; then it is `truncated_svd(W, rank)`. At full rank it is the SVD of W.

    With the second moments `G` of the gradients g of a loss with respect to W x, what is least is
    ||K^T (W - W_r) L||_F^2 with G = K K^T: the mean square change of the loss to first order, if x and g were
    independent, which is the Kronecker form of the Fisher information (Martens & Grosse, 2015, eq. 2). Then W_r =
    K^-T U U^T K^T W, U from the SVD of K^T W L.

    Sources: Wang et al. (2025), SVD-LLM, arXiv 2403.07378, whose W_r = U S Vh L^-1 is the same matrix; Chen et al.
    (2021), DRONE.

    Args:
        W: the weight of x -> W x.
        C: the second moments of the inputs, symmetric and positive semidefinite up to rounding.
        rank: between 1 and min(m, n).
        algorithm: as in `truncated_svd`.
        ridge: see `whiten`.
        G: None, or the second moments of the gradients, as `C`.

    Raises:
        TypeError, SpectralError: as `svd`, for any of the matrices.
        ValueError: the shapes do not fit, `rank` is out of range, or `algorithm` is unknown.
    """
    W = working_copy(W)
    if rank == min(W.shape):
        _check_shapes(W, C, G)
        return svd(W)
    U = truncated_svd(whiten(W, C, ridge, G), rank, algorithm).U
    with factorizing(W):
        if G is None:
            return svd_of_product(U, U.mT @ W)
        K, U = _root(G, GRADIENT_RIDGE, W.device), U.double()
        B = U / K[:, None] if K.ndim == 1 else torch.linalg.solve(K.mT, U)
        return svd_of_product(B.to(W.dtype), (U.mT @ _times(K, W.double())).to(W.dtype))


def whiten(
    W: Tensor,  # shape: (m, n)
    C: Tensor,  # shape: (n, n), or (n,) for a diagonal
    ridge: float = RIDGE,
    G: Tensor | None = None,  # shape: (m, m), or (m,) for a diagonal
) -> Tensor:  # shape: (m, n)
    """W L with L L^T = C + `ridge` * mean(diag C) * I, in float32 at least; K^T W L with K K^T from `G`, if given.

    Its squared singular values are what the triplets of `whitened_svd` hold of E||W x||^2. The ridge is for
    directions that no input has: it ranks them, behind all others, as the plain SVD does. That of G is
    `GRADIENT_RIDGE`. A `C` of zeros, from which nothing can be learnt, counts as the identity. L is the Cholesky
    factor in float64; where rounding has made C indefinite beyond the ridge, the square root of its positive part.

    Raises:
        TypeError, SpectralError: as `svd`, for any of the matrices.
        ValueError: the shapes do not fit.
    """
    _check_shapes(W, C, G)
    W = working_copy(W)
    with factorizing(W):
        L = _root(C, ridge, W.device)
        whitened = W.double() * L if L.ndim == 1 else W.double() @ L
        if G is not None:
            whitened = _times(_root(G, GRADIENT_RIDGE, W.device), whitened)
        return whitened.to(W.dtype)


def _times(K: Tensor, W: Tensor) -> Tensor:
    """K^T W, for a matrix or a diagonal K."""
    return K[:, None] * W if K.ndim == 1 else K.mT @ W


def _root(C: Tensor, ridge: float, device: torch.device) -> Tensor:
    """L in float64 with L L^T = C + ridge * mean(diag C) * I; the diagonal of L for a diagonal C."""
    C = working_copy(C).to(device, torch.float64)
    diagonal = C if C.ndim == 1 else C.diagonal()
    mean = diagonal.mean()
    shift = ridge * mean if mean > 0 else torch.ones_like(mean)
    if C.ndim == 1:
        return (C + shift).clamp(min=0).sqrt()
    return _square_root(C + shift * torch.eye(len(C), dtype=C.dtype, device=device))


def _square_root(C: Tensor) -> Tensor:  # shape: (n, n)
    """L with L L^T = C, or the nearest positive semidefinite matrix."""
    L, info = torch.linalg.cholesky_ex(C)
    if info == 0:
        return L
    eigenvalues, V = torch.linalg.eigh(C)
    return V * eigenvalues.clamp(min=0).sqrt()


def _check_shapes(W: Tensor, C: Tensor, G: Tensor | None) -> None:
    m, n = W.shape if W.ndim == 2 else (-1, -1)
    for name, side, moments, size in (("C", "n", C, n), ("G", "m", G, m)):
        if moments is not None and moments.shape not in ((size,), (size, size)):
            raise ValueError(
                f"`{name}` should be ({side}, {side}) or ({side},) for `W` of shape (m, n), got "
                f"{tuple(moments.shape)} for {tuple(W.shape)}."
            )
