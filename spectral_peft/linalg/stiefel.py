"""Retractions onto the Stiefel manifold of matrices with orthonormal columns."""

from __future__ import annotations

import torch
from torch import Tensor

from spectral_peft.linalg.precision import exact_products, factorizing, working_copy
from spectral_peft.linalg.svd import svd


NEARLY_ORTHONORMAL = 0.5
"""Frobenius norm of G / c - I, with c the mean of the diagonal of G = X^T X, up to which X can be retracted from G
alone: the condition of G is then at most 3."""


def qr_retraction(
    X: Tensor,  # shape: (..., m, r)
) -> Tensor:  # shape: (..., m, r)
    """The Q factor of `X`, with the signs that make the diagonal of R non-negative.

    A retraction (Absil, Mahony & Sepulchre, 2008, example 4.1.3), but not the nearest point: column i is only made
    orthogonal to the columns before it, so the result depends on their order. Computed in float32 at least, in the
    dtype of `X`. Where `X` is rank-deficient, arbitrary orthonormal columns complete it.

    Raises:
        TypeError: `X` is not of a real floating-point dtype.
        ValueError: m < r.
        SpectralError: `X` has no data, or NaN or Inf entries.
    """
    _check_tall(X)
    working = working_copy(X)
    with factorizing(X):
        return _sign_fixed_q(working).to(X.dtype).contiguous()


def cholesky_qr_retraction(
    X: Tensor,  # shape: (..., m, r)
) -> Tensor:  # shape: (..., m, r)
    """`qr_retraction(X)`, faster for well-conditioned `X`: X L^-T with L the Cholesky factor of X^T X.

    The same matrix, since R = L^T has a positive diagonal. The error in orthonormality grows with the square of the
    condition of X, so where the result shows one, or there is no Cholesky factor, `qr_retraction` answers.

    Raises:
        TypeError, ValueError, SpectralError: as `qr_retraction`.
    """
    _check_tall(X)
    working = working_copy(X)
    with factorizing(X):
        L, info = torch.linalg.cholesky_ex(working.mT @ working)
        Q = torch.linalg.solve_triangular(L, working.mT, upper=False).mT
        accurate = (info == 0) & _is_orthonormal(Q)
        if not accurate.all():
            Q = torch.where(accurate[..., None, None], Q, _sign_fixed_q(working))
        return Q.to(X.dtype).contiguous()


def polar_retraction(
    X: Tensor,  # shape: (..., m, r)
) -> Tensor:  # shape: (..., m, r)
    """X (X^T X)^(-1/2), the matrix with orthonormal columns nearest to `X` in the Frobenius norm.

    A retraction (Absil, Mahony & Sepulchre, 2008, example 4.1.3); nearest by Higham (2008), theorem 8.4. From the
    eigendecomposition of X^T X, or where that is too ill-conditioned from the SVD of X, as U Vh. Computed in float32
    at least, in the dtype of `X`.

    Raises:
        TypeError, ValueError, SpectralError: as `qr_retraction`.
    """
    _check_tall(X)
    working = working_copy(X)
    with factorizing(X):
        Q = _polar_from_gram(working)
        accurate = _is_orthonormal(Q)
        if not accurate.all():
            U, _, Vh = svd(working)
            Q = torch.where(accurate[..., None, None], Q, U @ Vh)
        return Q.to(X.dtype).contiguous()


def normalize_(
    X: Tensor,  # shape: (..., m, n)
    dim: int,
) -> None:
    """Gives the vectors of X along `dim` length 1: `F.normalize` in place, bit by bit, without its copy of X."""
    X.div_(torch.linalg.vector_norm(X, dim=dim, keepdim=True).clamp_min_(1e-12))


def orthonormality_error(
    X: Tensor,  # shape: (..., m, r)
) -> Tensor:  # shape: (...)
    """The largest entry of |X^T X - I|, in float32 at least."""
    with factorizing(X):
        X = X.to(torch.promote_types(X.dtype, torch.float32))
        identity = torch.eye(X.shape[-1], dtype=X.dtype, device=X.device)
        return (X.mT @ X - identity).abs().amax(dim=(-2, -1))


def tangent_projection(
    X: Tensor,  # shape: (..., m, r), orthonormal columns
    D: Tensor,  # shape: (..., m, r)
) -> Tensor:  # shape: (..., m, r)
    """D - X sym(X^T D): the direction nearest to `D` along which the columns of `X` stay orthonormal to first order.

    The orthogonal projection onto the tangent space of the Stiefel manifold (Absil, Mahony & Sepulchre, 2008, eq.
    3.35). Computed in float32 at least, in the dtype of `D`.
    """
    with exact_products(X.device):
        dtype = torch.promote_types(X.dtype, torch.float32)
        working, direction = X.to(dtype), D.to(dtype)
        core = working.mT @ direction
        return (direction - working @ ((core + core.mT) / 2)).to(D.dtype)


def polar_transform(
    G: Tensor,  # shape: (..., r, r)
    distance: float,
) -> Tensor:  # shape: (..., r, r)
    """T = G^(-1/2), so that X T is the polar factor of X if G = X^T X; `distance` as in `NEARLY_ORTHONORMAL`, < 1.

    By the coupled Newton-Schulz iteration (Higham, 2008, chapter 6), whose residual R = I - T G T becomes
    3/4 R^2 + 1/4 R^3 in each step: products alone, which batch well.
    """
    scale = G.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    identity = torch.eye(G.shape[-1], dtype=G.dtype, device=G.device)
    Y = G / scale
    step = Z = (3 * identity - Y) / 2
    while (distance := 0.75 * distance**2 + 0.25 * distance**3) > torch.finfo(G.dtype).eps / 4:
        Y = Y @ step
        step = (3 * identity - Z @ Y) / 2
        Z = step @ Z
    return Z / scale.sqrt()


def cholesky_transform(
    G: Tensor,  # shape: (..., r, r)
    distance: float,
) -> Tensor:  # shape: (..., r, r)
    """T = L^-T with G = L L^T, so that X T is the sign-fixed Q factor of X if G = X^T X; `distance` plays no part."""
    identity = torch.eye(G.shape[-1], dtype=G.dtype, device=G.device)
    return torch.linalg.solve_triangular(torch.linalg.cholesky(G), identity, upper=False).mT


def _check_tall(X: Tensor) -> None:
    if X.ndim < 2 or X.shape[-2] < X.shape[-1]:
        raise ValueError(f"`X` should have at least as many rows as columns, got shape {tuple(X.shape)}.")


def _sign_fixed_q(X: Tensor) -> Tensor:
    Q, R = torch.linalg.qr(X)
    # Not torch.sign: it is 0 where R_ii = 0, and would erase that column.
    negative = R.diagonal(dim1=-2, dim2=-1).unsqueeze(-2) < 0
    return torch.where(negative, -Q, Q)


def _polar_from_gram(X: Tensor) -> Tensor:
    eigenvalues, V = torch.linalg.eigh(X.mT @ X)
    return X @ (V * eigenvalues.rsqrt().unsqueeze(-2)) @ V.mT


def _is_orthonormal(Q: Tensor) -> Tensor:  # shape: (...)
    return orthonormality_error(Q) <= 10 * Q.shape[-1] * torch.finfo(Q.dtype).eps
