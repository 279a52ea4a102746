"""Singular value decompositions: exact, randomized, truncated."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import MappingProxyType

import torch
from torch import Tensor
from torch.nn import functional as F

from spectral_peft.linalg.drivers import Factors, NotConverged, decompose
from spectral_peft.linalg.precision import factorizing, working_copy


_MAX_ITERATIONS = 16
_SEED = 0


def svd(
    A: Tensor,  # shape: (..., m, n)
) -> Factors:
    """The thin SVD of `A`, in float32 at least, on its device, contiguous and canonical in sign.

    Where the default driver does not converge, others follow: `gesvd` (CUDA only), float64 on the CPU, the
    eigendecomposition of the smaller Gram matrix in float64.

    Raises:
        TypeError: `A` is not of a real floating-point dtype.
        SpectralError: `A` has no data (meta), has NaN or Inf entries, or no driver converges.
    """
    return _exact(A, min(A.shape[-2:]))


def svd_of_product(
    B: Tensor,  # shape: (..., m, s)
    A: Tensor,  # shape: (..., s, n)
) -> Factors:
    """`svd(B A)` with k = min(m, s, n) triplets; where s is smaller than m and n, from the QRs of B and A^T alone.

    B = Q_l R_l and A^T = Q_r R_r give B A = Q_l (R_l R_r^T) Q_r^T, and the SVD of the core is a small one.

    Raises:
        TypeError, SpectralError: as `svd`.
    """
    B, A = working_copy(B), working_copy(A)
    with factorizing(A):
        if A.shape[-2] >= min(B.shape[-2], A.shape[-1]):
            return svd(B @ A)
        (Q_left, R_left), (Q_right, R_right) = torch.linalg.qr(B), torch.linalg.qr(A.mT)
        core = svd(R_left @ R_right.mT)
        return _finished(Factors(Q_left @ core.U, core.S, core.Vh @ Q_right.mT))


def completed(factors: Factors, k: int) -> Factors:
    """The same matrix in `k` triplets, at most min(m, n): those of `factors`, and others of singular value 0."""
    missing = k - len(factors.S)
    if missing <= 0:
        return factors
    generator = torch.Generator().manual_seed(0)

    def filled(X: Tensor) -> Tensor:  # shape: (m, s) -> (m, k)
        random = torch.randn(len(X), missing, generator=generator).to(X)
        return torch.cat([X, torch.linalg.qr(torch.cat([X, random], dim=1)).Q[:, -missing:]], dim=1)

    return Factors(filled(factors.U), F.pad(factors.S, (0, missing)), filled(factors.Vh.mT).mT)


def singular_values(
    A: Tensor,  # shape: (..., m, n)
) -> Tensor:  # shape: (..., min(m, n))
    """All singular values of `A`, descending, in float32 at least.

    Raises:
        TypeError, SpectralError: as `svd`.
    """
    A = working_copy(A)
    with factorizing(A):
        try:
            return torch.linalg.svdvals(A)
        except NotConverged:
            return decompose(A).S


def canonical_signs(
    U: Tensor,  # shape: (..., m, r)
    Vh: Tensor,  # shape: (..., r, n)
) -> tuple[Tensor, Tensor]:
    """`U` and `Vh` with the entry of largest magnitude of every u_i positive; U diag(S) Vh is unchanged.

    An SVD leaves the sign of each triplet open, and LAPACK and cuSOLVER choose differently.
    """
    pivots = U.gather(-2, U.abs().argmax(dim=-2, keepdim=True))
    signs = torch.ones_like(pivots).masked_fill_(pivots < 0, -1)
    return U * signs, Vh * signs.mT


def randomized_svd(
    A: Tensor,  # shape: (..., m, n)
    rank: int,
    tolerance: float = 0.01,
) -> Factors:
    """The leading `rank` triplets of `A` by randomized subspace iteration, stopped by an a-posteriori estimate.

    With E the energy sum_i S_i^2 that the triplets capture, the iteration ends when what more of it would still gain
    is at most 2 * tolerance * min(E, ||A||_F^2 - E), so that the captured norm and the norm of the residual are both
    within about `tolerance` of the optimum, or when E grows no faster than it is rounded. What is still to gain is
    extrapolated geometrically from the last two gains. Should it not end, the exact `svd` answers. The random numbers
    come from an own generator with a fixed seed: same matrix, same result, and the global state is left alone.

    Source: Halko, Martinsson & Tropp (2011), Algorithm 4.4, with oversampling; the shift of A^T A that accelerates it
    is that of dashSVD (Feng, Yu, Xie & Tang, 2024, arXiv 2404.09276, ACM TOMS Algorithm 1043).

    Raises:
        TypeError, SpectralError: as `svd`.
        ValueError: `rank` is not between 1 and min(m, n).
    """
    A = working_copy(A)
    _check_rank(A, rank)
    with factorizing(A):
        return _finished(_leading(A, rank, tolerance))


def truncated_svd(
    A: Tensor,  # shape: (..., m, n)
    rank: int,
    algorithm: str = "auto",
) -> Factors:
    """The leading `rank` triplets of `A`, S descending: the best approximation of that rank (Eckart & Young, 1936).

    Args:
        A: the matrix, or a batch of them.
        rank: the number of triplets.
        algorithm: "exact", "randomized", or "auto": randomized where its subspace has at most a quarter of min(m, n)
            dimensions, exact otherwise.

    Raises:
        TypeError, SpectralError: as `svd`.
        ValueError: `rank` is not between 1 and min(m, n), or `algorithm` is unknown.
    """
    if algorithm not in ALGORITHMS:
        raise ValueError(f"`algorithm` should be one of {', '.join(map(repr, ALGORITHMS))}, got {algorithm!r}.")
    _check_rank(A, rank)
    return ALGORITHMS[algorithm](A, rank)


def _exact(A: Tensor, rank: int) -> Factors:
    A = working_copy(A)
    with factorizing(A):
        return _finished(_truncate(decompose(A), rank))


def _auto(A: Tensor, rank: int) -> Factors:
    cheap = 4 * _subspace_width(A, rank) <= min(A.shape[-2:])
    return (randomized_svd if cheap else _exact)(A, rank)


ALGORITHMS: MappingProxyType[str, Callable[[Tensor, int], Factors]] = MappingProxyType(
    {"auto": _auto, "exact": _exact, "randomized": randomized_svd}
)


def _check_rank(A: Tensor, rank: int) -> None:
    if A.ndim < 2:
        raise ValueError(f"`A` should be a matrix or a batch of matrices, got shape {tuple(A.shape)}.")
    if not 1 <= rank <= min(A.shape[-2:]):
        raise ValueError(f"`rank` should be between 1 and min(m, n) = {min(A.shape[-2:])}, got {rank}.")


def _truncate(factors: Factors, rank: int) -> Factors:
    U, S, Vh = factors
    return Factors(U[..., :rank], S[..., :rank], Vh[..., :rank, :])


def _finished(factors: Factors) -> Factors:
    """Canonical signs; contiguous, because LAPACK answers column-major and safetensors refuses to save that.

    `S` is cloned: as a view it would keep the whole spectrum alive, and be saved with it.
    """
    U, Vh = canonical_signs(factors.U, factors.Vh)
    return Factors(U.contiguous(), factors.S.clone(), Vh.contiguous())


def _subspace_width(A: Tensor, rank: int) -> int:
    """`rank` and an oversampling of a quarter of it, at least 8: the spectra of language models are flat."""
    return min(rank + max(8, rank // 4), *A.shape[-2:])


def _leading(A: Tensor, rank: int, tolerance: float) -> Factors:
    width = _subspace_width(A, rank)
    if width == min(A.shape[-2:]):
        return _truncate(decompose(A), rank)
    total = torch.linalg.vector_norm(A, dim=-1).double().square().sum(-1)  # row norms: a float64 copy of A is slow
    energies: list[Tensor] = []
    for V, AV, captured in _subspace_iterates(A, width):
        energies.append(captured[..., :rank].sum(-1))
        if _converged(energies, total, tolerance, torch.finfo(A.dtype).eps):
            Q, R = torch.linalg.qr(AV)
            W, S, Xh = decompose(R)
            return _truncate(Factors(Q @ W, S, Xh @ V.mT), rank)
    return _truncate(decompose(A), rank)


def _subspace_iterates(A: Tensor, width: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Ever better right subspaces: an orthonormal V (n, width), A V, and the squared singular values of A V, float64.

    The next V spans (A^T A - shift) V. A shift of half the smallest captured eigenvalue of A^T A brings the unwanted
    ones, in [0, S_width^2], from a ratio S_width^2 / S_r^2 to the wanted down to one of about its square.
    """
    generator = torch.Generator().manual_seed(_SEED)
    V = torch.linalg.qr(A.mT @ torch.randn(A.shape[-2], width, generator=generator).to(A)).Q
    for _ in range(_MAX_ITERATIONS):
        AV = A @ V
        exact = AV.double()  # the Gram matrix squares the condition
        captured = torch.linalg.eigvalsh(exact.mT @ exact).flip(-1).clamp(min=0)
        yield V, AV, captured
        shift = captured[..., -1:, None].to(A.dtype) / 2
        V = torch.linalg.qr(A.mT @ AV - shift * V).Q


def _converged(energies: list[Tensor], total: Tensor, tolerance: float, eps: float) -> bool:
    if len(energies) < 2:
        return False
    energy, gain = energies[-1], energies[-1] - energies[-2]
    ratio = 0.5 * torch.ones_like(gain)  # a guess on the safe side while there is only one gain to go by
    if len(energies) > 2:
        ratio = (gain / (energies[-2] - energies[-3])).nan_to_num(0.95).clamp(0, 0.95)
    to_come = gain * ratio / (1 - ratio)
    allowed = 2 * tolerance * torch.minimum(energy, total - energy)
    return bool(((to_come <= allowed) | (gain <= 4 * eps * energy)).all())
