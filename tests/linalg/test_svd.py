"""The exact SVD: what an SVD is, whatever the shape and the driver."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from torch import Tensor

from spectral_peft.errors import SpectralError
from spectral_peft.linalg import (
    Factors,
    canonical_signs,
    orthonormality_error,
    randomized_svd,
    singular_values,
    svd,
    svd_of_product,
    truncated_svd,
)
from tests.linalg.matrices import assert_canonical, few, gaussian, matrices
from tests.tolerance import tolerance


def assert_is_svd(factors: Factors, A: Tensor) -> None:
    k = min(A.shape[-2:])
    limit = tolerance(factors.S.dtype, max(A.shape[-2:]))
    assert factors.U.shape == (*A.shape[:-1], k)
    assert factors.Vh.shape == (*A.shape[:-2], k, A.shape[-1])
    assert (orthonormality_error(factors.U) <= limit).all()
    assert (orthonormality_error(factors.Vh.mT) <= limit).all()
    assert (factors.S >= 0).all()
    assert (factors.S.diff(dim=-1) <= 0).all()
    assert (factors.matrix() - A).abs().max() <= limit * A.abs().max() * k
    assert all(tensor.is_contiguous() for tensor in factors)


@few
@given(A=matrices())
def test_svd_is_one(A: Tensor) -> None:
    factors = svd(A)
    assert factors.S.dtype == A.dtype
    assert_is_svd(factors, A)
    assert_canonical(factors.U)


@pytest.mark.parametrize("shape", [(40, 5, 30), (5, 7, 30), (30, 12, 12), (2, 40, 3, 20)])
def test_the_svd_of_a_product_is_that_of_the_matrix(shape: tuple[int, ...]) -> None:
    *batch, m, s, n = shape
    B, A = gaussian(*batch, m, s), gaussian(*batch, s, n, seed=1)
    factors, expected = svd_of_product(B, A), svd(B @ A)
    k = min(m, s, n)
    assert factors.S.shape[-1] == k
    torch.testing.assert_close(factors.matrix(), B @ A)
    torch.testing.assert_close(factors.S, expected.S[..., :k])
    assert (orthonormality_error(factors.U) < tolerance(A.dtype, m)).all()
    assert (orthonormality_error(factors.Vh.mT) < tolerance(A.dtype, n)).all()
    assert_canonical(factors.U)


@few
@given(A=matrices())
def test_svd_survives_the_failure_of_every_driver(A: Tensor) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise torch.linalg.LinAlgError("The algorithm failed to converge.")

    expected = torch.linalg.svdvals(A)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.linalg, "svd", refuse)
        patch.setattr(torch.linalg, "svdvals", refuse)
        factors, S = svd(A.float()), singular_values(A.float())
    assert_is_svd(factors, A.float())
    limit = tolerance(torch.float32, max(A.shape[-2:])) * expected.amax()
    assert (factors.S - expected).abs().max() <= limit
    assert (S - expected).abs().max() <= limit


def test_second_driver_is_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    dtypes = []
    original = torch.linalg.svd

    def only_float64(A: Tensor, **kwargs: object) -> object:
        dtypes.append(A.dtype)
        if A.dtype == torch.float32:
            raise torch.linalg.LinAlgError
        return original(A, **kwargs)

    monkeypatch.setattr(torch.linalg, "svd", only_float64)
    A = gaussian(7, 5)
    factors = svd(A)
    assert dtypes == [torch.float32, torch.float64]
    assert factors.S.dtype == torch.float32
    assert_is_svd(factors, A)


def test_all_drivers_failing_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise torch.linalg.LinAlgError

    monkeypatch.setattr(torch.linalg, "svd", refuse)
    monkeypatch.setattr(torch.linalg, "eigh", refuse)
    with pytest.raises(SpectralError, match=r"\(7, 5\)"):
        svd(gaussian(7, 5))


@few
@given(A=matrices())
def test_singular_values_are_those_of_the_svd(A: Tensor) -> None:
    S = singular_values(A)
    torch.testing.assert_close(S, svd(A).S, rtol=0, atol=tolerance(A.dtype, 24) * float(S.max()))


@few
@given(A=matrices())
def test_canonical_signs(A: Tensor) -> None:
    U, S, Vh = torch.linalg.svd(A, full_matrices=False)
    signs = torch.where(gaussian(S.shape[-1]) < 0, -1, 1).to(A.dtype)
    before = U.clone()
    flipped = canonical_signs(U * signs, signs.unsqueeze(-1) * Vh)
    expected = canonical_signs(U, Vh)
    assert_canonical(flipped[0])
    assert torch.equal(Factors(flipped[0], S, flipped[1]).matrix(), Factors(U, S, Vh).matrix())
    assert torch.equal(U, before)
    assert all(torch.equal(one, other) for one, other in zip(flipped, expected, strict=True))


def test_canonical_signs_keep_a_zero_column() -> None:
    U, Vh = canonical_signs(torch.zeros(3, 1), torch.tensor([[-1.0, 2.0]]))
    assert torch.equal(U, torch.zeros(3, 1))
    assert torch.equal(Vh, torch.tensor([[-1.0, 2.0]]))


DECOMPOSITIONS = {
    "svd": svd,
    "singular_values": singular_values,
    "randomized": lambda A: randomized_svd(A, 1),
    "exact": lambda A: truncated_svd(A, 1, "exact"),
}


@pytest.mark.parametrize("name", DECOMPOSITIONS)
def test_refused_matrices(name: str) -> None:
    decompose = DECOMPOSITIONS[name]
    for dtype in (torch.int64, torch.bool, torch.complex64):
        with pytest.raises(TypeError, match=str(dtype)):
            decompose(torch.ones(3, 2, dtype=dtype))
    with pytest.raises(SpectralError, match="load it first"):
        decompose(torch.empty(3, 2, device="meta"))
    A = torch.ones(3, 2)
    A[0, 0], A[1, 1], A[2, 1] = float("nan"), float("inf"), -float("inf")
    with pytest.raises(SpectralError, match=r"\(3, 2\) has 1 NaN and 2 Inf"):
        decompose(A)


def test_finite_entries_with_an_overflowing_sum_are_accepted() -> None:
    assert torch.isfinite(svd(torch.full((4, 4), 2e38)).U).all()


def test_small_matrices_are_factorized_on_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    original = torch.linalg.svd

    def watched(*args: object, **kwargs: object) -> object:
        seen.append(torch.get_num_threads())
        return original(*args, **kwargs)

    monkeypatch.setattr(torch.linalg, "svd", watched)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        svd(torch.randn(12, 10))
        monkeypatch.setattr("spectral_peft.linalg.precision.SMALL", 100)
        svd(torch.randn(12, 10))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    assert seen == [1, 2]
