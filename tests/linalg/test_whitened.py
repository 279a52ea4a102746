"""Truncation for given inputs: no matrix of the rank has less error on them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from spectral_peft import SpectralError
from spectral_peft.linalg import orthonormality_error, singular_values, truncated_svd, whiten, whitened_svd
from spectral_peft.linalg.whitened import GRADIENT_RIDGE
from tests.linalg.matrices import assert_canonical, few, gaussian, with_spectrum
from tests.tolerance import tolerance


@st.composite
def cases(draw: st.DrawFn) -> tuple[Tensor, Tensor, int]:
    """A weight, the second moments of inputs that may span few directions or be of very different size, and a rank."""
    m, n = draw(st.integers(1, 16)), draw(st.integers(1, 16))
    seed = draw(st.integers(0, 10**6))
    x = gaussian(draw(st.sampled_from([1, n, 4 * n])), n, seed=seed)
    x[:, 0] *= draw(st.sampled_from([0.0, 1.0, 100.0]))
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))
    return gaussian(m, n, seed=seed + 1, dtype=dtype), (x.T @ x) / len(x), draw(st.integers(1, min(m, n)))


def output_error(W: Tensor, approximation: Tensor, C: Tensor) -> float:
    """E||(W - W_r) x||^2, in float64."""
    difference = W.double() - approximation.double()
    return float((difference @ C.double() @ difference.T).trace())


def least_error(W: Tensor, C: Tensor, rank: int) -> float:
    """The energy of W C^(1/2) beyond its leading triplets, in float64."""
    eigenvalues, V = torch.linalg.eigh(C.double())
    root = V * eigenvalues.clamp(min=0).sqrt() @ V.T
    return float(torch.linalg.svdvals(W.double() @ root)[rank:].square().sum())


@few
@given(case=cases())
def test_the_error_is_the_least_of_the_rank(case: tuple[Tensor, Tensor, int]) -> None:
    W, C, rank = case
    factors = whitened_svd(W, C, rank, "exact")
    scale = output_error(W, torch.zeros_like(W), C) + 1e-30
    error = output_error(W, factors.matrix(), C)
    assert error <= least_error(W, C, rank) + (1e-5 + tolerance(W.dtype, 16)) * scale
    assert error <= output_error(W, truncated_svd(W, rank, "exact").matrix(), C) + 1e-5 * scale


@few
@given(case=cases())
def test_the_factors_are_an_svd(case: tuple[Tensor, Tensor, int]) -> None:
    W, C, rank = case
    U, S, Vh = whitened_svd(W, C, rank)
    assert (U.shape, S.shape, Vh.shape) == ((W.shape[0], rank), (rank,), (rank, W.shape[1]))
    assert max(orthonormality_error(U), orthonormality_error(Vh.mT)) <= tolerance(W.dtype, 16)
    assert (S.diff() <= 0).all()
    assert (S >= 0).all()
    assert_canonical(U)
    assert all(tensor.is_contiguous() and tensor.dtype == W.dtype for tensor in (U, S, Vh))


@few
@given(case=cases())
def test_full_rank_is_exact(case: tuple[Tensor, Tensor, int]) -> None:
    W, C, _ = case
    limit = tolerance(W.dtype, 16)
    torch.testing.assert_close(whitened_svd(W, C, min(W.shape)).matrix(), W, rtol=limit, atol=limit)


@pytest.mark.parametrize("C", [torch.eye(24), 3 * torch.ones(24), torch.zeros(24, 24), torch.zeros(24)], ids=str)
@pytest.mark.parametrize("algorithm", ["exact", "randomized"])
def test_inputs_without_a_preferred_direction_give_the_plain_svd(C: Tensor, algorithm: str) -> None:
    W = with_spectrum(torch.arange(20, 0, -1) ** 2.0, 20, 24)
    plain = truncated_svd(W, 5, "exact")
    torch.testing.assert_close(whitened_svd(W, C, 5, algorithm).matrix(), plain.matrix(), rtol=1e-3, atol=0.5)
    exact = whitened_svd(W, C, 5, "exact")
    torch.testing.assert_close(exact.matrix(), plain.matrix(), rtol=1e-4, atol=1e-2)
    torch.testing.assert_close(exact.S, plain.S, rtol=1e-5, atol=1e-3)


def test_a_diagonal_is_its_matrix() -> None:
    W, c = gaussian(12, 10), gaussian(10).square()
    by_vector, by_matrix = whitened_svd(W, c, 4), whitened_svd(W, torch.diag(c), 4)
    torch.testing.assert_close(by_vector.matrix(), by_matrix.matrix(), rtol=1e-4, atol=1e-5)


def test_directions_without_inputs_are_ranked_by_the_plain_svd() -> None:
    """All inputs lie along the first axis: after the triplet that serves them come the leading ones of the rest."""
    W, C = gaussian(12, 10, dtype=torch.float64), torch.zeros(10, 10)
    C[0, 0] = 1
    U = W[:, :1] / W[:, :1].norm()
    rest = (W - U @ (U.T @ W))[:, 1:]
    expected = torch.cat([W[:, :1], U @ (U.T @ W[:, 1:]) + truncated_svd(rest, 3, "exact").matrix()], dim=1)
    torch.testing.assert_close(whitened_svd(W, C, 4, "exact").matrix(), expected, rtol=1e-3, atol=1e-3)


def test_moments_that_rounding_has_made_indefinite() -> None:
    W, C = gaussian(12, 10), torch.eye(10)
    C[0, 1] = C[1, 0] = 1 + 1e-3
    assert torch.linalg.eigvalsh(C)[0] < 0
    factors = whitened_svd(W, C, 4, "exact")
    assert output_error(W, factors.matrix(), C) <= 1.01 * least_error(W, C, 4)


@few
@given(case=cases(), spread=st.sampled_from([1.0, 100.0]))
def test_gradients_weigh_the_error(case: tuple[Tensor, Tensor, int], spread: float) -> None:
    """No matrix of the rank has less of ||K^T (W - W_r) L||, K from the moments of the gradients and their ridge."""
    W, C, rank = case
    m = len(W)
    g = gaussian(2 * m, m, seed=7)
    g[:, 0] *= spread
    G = (g.T @ g) / len(g)
    K, L = (
        (V * values.clamp(min=0).sqrt()) @ V.T
        for values, V in (
            torch.linalg.eigh(M.double() + ridge * (M.diagonal().mean() or 1) * torch.eye(len(M)))
            for M, ridge in ((G, GRADIENT_RIDGE), (C, 0))
        )
    )
    least = torch.linalg.svdvals(K @ W.double() @ L)
    difference = W.double() - whitened_svd(W, C, rank, "exact", G=G).matrix().double()
    scale = float(least.square().sum()) + 1e-30
    error = float((K @ difference @ L).square().sum())
    assert error <= float(least[rank:].square().sum()) + (1e-4 + tolerance(W.dtype, 16)) * scale
    without = W.double() - whitened_svd(W, C, rank, "exact").matrix().double()
    assert error <= float((K @ without @ L).square().sum()) + 1e-4 * scale


def test_gradients_without_a_preferred_direction_change_nothing() -> None:
    W, C = gaussian(12, 10), gaussian(10).square()
    expected = whitened_svd(W, C, 4, "exact").matrix()
    for G in (torch.eye(12), torch.full((12,), 3.0), torch.zeros(12, 12)):
        torch.testing.assert_close(whitened_svd(W, C, 4, "exact", G=G).matrix(), expected, rtol=1e-4, atol=1e-4)
    g = gaussian(12, seed=3).square()
    by_vector, by_matrix = whitened_svd(W, C, 4, G=g), whitened_svd(W, C, 4, G=torch.diag(g))
    torch.testing.assert_close(by_vector.matrix(), by_matrix.matrix(), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match=r"`G` should be \(m, m\) or \(m,\) for `W`.*got \(10,\) for \(12, 10\)"):
        whitened_svd(W, C, 4, G=torch.ones(10))


@pytest.mark.parametrize("diagonal", [False, True])
def test_whitened_values_are_the_second_moment_of_the_output(diagonal: bool) -> None:
    W, x = gaussian(12, 10), gaussian(200, 10, seed=1)
    C = x.T @ x / len(x)
    if diagonal:
        x, C = torch.diag(C.diagonal().sqrt()) * 10**0.5, C.diagonal()
    values = singular_values(whiten(W, C))
    assert float(values.square().sum()) == pytest.approx(float((x @ W.T).square().sum(1).mean()), rel=1e-4)


def test_half_precision_is_computed_in_float32() -> None:
    W, C = gaussian(12, 10).bfloat16(), torch.eye(10, dtype=torch.bfloat16)
    assert {value.dtype for value in whitened_svd(W, C, 3)} == {torch.float32}


@pytest.mark.parametrize("shape", [(9, 9), (12,), (12, 12), (10, 9), ()], ids=str)
def test_moments_of_another_size_are_refused(shape: tuple[int, ...]) -> None:
    for rank in (3, 10):
        with pytest.raises(ValueError, match=r"`C` should be \(n, n\) or \(n,\) for `W`"):
            whitened_svd(torch.ones(12, 10), torch.ones(shape), rank)


@pytest.mark.parametrize("rank", [0, 11])
def test_ranks_out_of_range_are_refused(rank: int) -> None:
    with pytest.raises(ValueError, match="`rank` should be between 1 and"):
        whitened_svd(gaussian(12, 10), torch.eye(10), rank)


def test_broken_moments_are_refused() -> None:
    with pytest.raises(SpectralError, match="NaN"):
        whitened_svd(gaussian(12, 10), torch.full((10,), torch.nan), 3)
