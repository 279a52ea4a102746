"""Retractions: on the manifold, the right point of it, and geoopt agrees."""

from __future__ import annotations

import math
from collections.abc import Callable

import geoopt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from spectral_peft.errors import SpectralError
from spectral_peft.linalg import (
    cholesky_qr_retraction,
    orthonormality_error,
    polar_retraction,
    qr_retraction,
    tangent_projection,
)
from tests.tolerance import tolerance


few = settings(derandomize=True, deadline=None, max_examples=40)
Retraction = Callable[[Tensor], Tensor]
RETRACTIONS = (qr_retraction, cholesky_qr_retraction, polar_retraction)
every_retraction = pytest.mark.parametrize("retract", RETRACTIONS, ids=lambda function: function.__name__)
MANIFOLD = geoopt.EuclideanStiefel()


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@st.composite
def tall(draw: st.DrawFn, *, deficient: bool) -> Tensor:
    m = draw(st.integers(1, 40))
    r = draw(st.integers(1, min(m, 12)))
    batch = draw(st.sampled_from([(), (), (2,), (2, 3)]))
    seed = draw(st.integers(0, 10**6))
    if not deficient:
        return torch.linalg.qr(gaussian(*batch, m, r, seed=seed)).Q + 0.1 * gaussian(*batch, m, r, seed=seed + 1) / m
    inner = draw(st.integers(0, r))
    return gaussian(*batch, m, inner, seed=seed) @ gaussian(*batch, inner, r, seed=seed + 1)


@every_retraction
@few
@given(X=st.one_of(tall(deficient=False), tall(deficient=True)), dtype=st.sampled_from([torch.float32, torch.float64]))
def test_result_is_orthonormal(retract: Retraction, X: Tensor, dtype: torch.dtype) -> None:
    Q = retract(X.to(dtype))
    assert Q.shape == X.shape
    assert Q.dtype == dtype
    assert Q.is_contiguous()
    assert (orthonormality_error(Q) <= tolerance(dtype, max(X.shape[-2:]))).all()


@every_retraction
@few
@given(X=tall(deficient=False))
def test_points_of_the_manifold_stay(retract: Retraction, X: Tensor) -> None:
    Q = retract(X)
    assert (retract(Q) - Q).abs().max() <= tolerance(torch.float64, X.shape[-2])


@few
@given(X=tall(deficient=False), seed=st.integers(0, 100))
def test_qr_agrees_with_geoopt(X: Tensor, seed: int) -> None:
    point, step = MANIFOLD.projx(X), 0.1 * gaussian(*X.shape, seed=seed)
    expected = MANIFOLD.retr(point, step)
    limit = 100 * tolerance(torch.float64, X.shape[-2])  # the step makes the condition up to about 10: its square
    assert (qr_retraction(point + step) - expected).abs().max() <= limit
    assert (cholesky_qr_retraction(point + step) - expected).abs().max() <= limit


@few
@given(X=tall(deficient=False))
def test_polar_agrees_with_geoopt(X: Tensor) -> None:
    assert (polar_retraction(X) - MANIFOLD.projx(X)).abs().max() <= tolerance(torch.float64, X.shape[-2])


def test_polar_is_the_nearest_point_and_qr_is_not() -> None:
    X = torch.linalg.qr(gaussian(30, 5)).Q + 0.1 * gaussian(30, 5, seed=1)
    to_polar, to_qr = (torch.linalg.matrix_norm(retract(X) - X) for retract in (polar_retraction, qr_retraction))
    assert to_polar < 0.99 * to_qr
    assert torch.isclose(to_polar, torch.linalg.vector_norm(torch.linalg.svdvals(X) - 1))


def test_qr_has_a_non_negative_diagonal() -> None:
    X = gaussian(4, 20, 6)
    R = qr_retraction(X).mT @ X
    assert (R.diagonal(dim1=-2, dim2=-1) > 0).all()


def with_condition(condition: float) -> Tensor:
    S = torch.logspace(0, -math.log10(condition), 6, dtype=torch.float64)
    return (torch.linalg.qr(gaussian(40, 6)).Q * S) @ torch.linalg.qr(gaussian(6, 6, seed=1)).Q


@pytest.mark.parametrize("condition", [1e2, 1e4, 1e12])
@every_retraction
def test_ill_conditioned_is_still_orthonormal(retract: Retraction, condition: float) -> None:
    assert orthonormality_error(retract(with_condition(condition).float())) <= tolerance(torch.float32, 6)


@pytest.mark.parametrize("condition", [1e2, 1e4])
@every_retraction
def test_ill_conditioned_is_the_right_point(retract: Retraction, condition: float) -> None:
    X = with_condition(condition)
    expected = MANIFOLD.projx(X) if retract is polar_retraction else MANIFOLD.retr(X, torch.zeros_like(X))
    # Rounding X to float32 alone moves the point by eps times the condition.
    assert (retract(X.float()) - expected).abs().max() <= condition * tolerance(torch.float32, 1)


@every_retraction
def test_only_the_bad_matrices_of_a_batch_fall_back(retract: Retraction) -> None:
    good = torch.linalg.qr(gaussian(20, 4).float()).Q * 1.1
    bad = good.clone()
    bad[:, 2] = bad[:, 0]
    both = retract(torch.stack((good, bad)))
    assert (both[0] - retract(good)).abs().max() <= tolerance(torch.float32, 20)
    assert (orthonormality_error(both) <= tolerance(torch.float32, 20)).all()


def test_cholesky_is_used_where_it_is_accurate(monkeypatch: pytest.MonkeyPatch) -> None:
    X = gaussian(200, 8).float()
    monkeypatch.setattr(torch.linalg, "qr", None)
    assert orthonormality_error(cholesky_qr_retraction(X)) <= tolerance(torch.float32, 8)


def test_gram_is_used_where_it_is_accurate(monkeypatch: pytest.MonkeyPatch) -> None:
    X = gaussian(200, 8).float()
    monkeypatch.setattr(torch.linalg, "svd", None)
    assert orthonormality_error(polar_retraction(X)) <= tolerance(torch.float32, 8)


@every_retraction
def test_half_precision_is_computed_in_float32_and_rounded_once(retract: Retraction) -> None:
    X = torch.linalg.qr(gaussian(200, 8)).Q.bfloat16()
    Q = retract(X)
    assert Q.dtype == torch.bfloat16
    assert torch.equal(Q, retract(X.float()).bfloat16())


@every_retraction
def test_autocast_and_gradients_do_not_reach_inside(retract: Retraction) -> None:
    X = gaussian(64, 8).float().requires_grad_()
    expected = retract(X)
    with torch.autocast("cpu", torch.bfloat16):
        Q = retract(X)
    assert not Q.requires_grad
    assert torch.equal(Q, expected)


@every_retraction
def test_refused_matrices(retract: Retraction) -> None:
    with pytest.raises(ValueError, match=r"at least as many rows as columns, got shape \(2, 3\)"):
        retract(torch.ones(2, 3))
    with pytest.raises(TypeError, match=r"torch\.int64"):
        retract(torch.ones(3, 2, dtype=torch.int64))
    with pytest.raises(SpectralError, match=r"\(3, 2\) has 6 NaN"):
        retract(torch.full((3, 2), float("nan")))


@few
@given(X=tall(deficient=False), seed=st.integers(0, 100))
def test_tangent_projection_agrees_with_geoopt(X: Tensor, seed: int) -> None:
    point, D = MANIFOLD.projx(X), gaussian(*X.shape, seed=seed)
    projected = tangent_projection(point, D)
    assert (projected - MANIFOLD.proju(point, D)).abs().max() <= tolerance(torch.float64, X.shape[-2])
    assert (tangent_projection(point, projected) - projected).abs().max() <= tolerance(torch.float64, X.shape[-2])


def test_tangent_projection_is_computed_in_float32_and_rounded_once() -> None:
    X, D = torch.linalg.qr(gaussian(200, 8)).Q.bfloat16(), gaussian(200, 8, seed=1).bfloat16().requires_grad_()
    projected = tangent_projection(X, D)
    assert projected.dtype == torch.bfloat16
    assert not projected.requires_grad
    assert torch.equal(projected, tangent_projection(X.float(), D.float()).bfloat16())


def test_orthonormality_error() -> None:
    X = torch.eye(4, 2).repeat(2, 1, 1)
    X[1, 0, 1] = 0.5
    assert torch.equal(orthonormality_error(X), torch.tensor([0.0, 0.5]))
    assert orthonormality_error(torch.eye(4, 2).bfloat16()).dtype == torch.float32
    assert not orthonormality_error(torch.ones(3, 2, requires_grad=True)).requires_grad
