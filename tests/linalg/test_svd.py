"""Decompositions: what an SVD is, whatever the shape, the driver and the state of the process."""

from __future__ import annotations

import importlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from spectral_peft.errors import SpectralError
from spectral_peft.linalg import (
    Factors,
    canonical_signs,
    orthonormality_error,
    randomized_svd,
    singular_values,
    svd,
    truncated_svd,
)
from tests.tolerance import tolerance


few = settings(derandomize=True, deadline=None, max_examples=40)
ALGORITHMS = ("auto", "exact", "randomized")


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


def assert_canonical(U: Tensor) -> None:
    pivots = U.gather(-2, U.abs().argmax(-2, keepdim=True))
    assert (pivots >= 0).all()


@few
@given(A=matrices())
def test_svd_is_one(A: Tensor) -> None:
    factors = svd(A)
    assert factors.S.dtype == A.dtype
    assert_is_svd(factors, A)
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


@few
@given(A=matrices(), algorithm=st.sampled_from(ALGORITHMS), data=st.data())
def test_truncation_attains_the_eckart_young_error(A: Tensor, algorithm: str, data: st.DataObject) -> None:
    rank = data.draw(st.integers(1, min(A.shape[-2:])))
    factors = truncated_svd(A, rank, algorithm)
    S = torch.linalg.svdvals(A)
    assert factors.S.shape[-1] == rank
    optimal = torch.linalg.vector_norm(S[..., rank:], dim=-1)
    error = torch.linalg.matrix_norm(factors.matrix() - A)
    assert (error <= 1.01 * optimal + tolerance(A.dtype, 24) * S.amax()).all()
    assert_canonical(factors.U)
    assert all(tensor.is_contiguous() for tensor in factors)


SPECTRA = {
    "power 1/2": torch.arange(1, 201.0) ** -0.5,
    "power 1": torch.arange(1, 201.0) ** -1,
    "exponential": torch.exp(-torch.arange(200.0) / 5),
    "rank 3": torch.tensor([3.0, 2.0, 1.0]),
    "step": torch.cat((torch.full((8,), 10.0), torch.full((192,), 0.1))),
    "flat": torch.ones(200),
}


@pytest.mark.parametrize("shape", [(200, 200), (300, 200), (200, 300)], ids=str)
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_randomized_is_within_a_percent_of_optimal(spectrum: str, shape: tuple[int, int]) -> None:
    S, rank = SPECTRA[spectrum], 8
    A = with_spectrum(S, *shape)
    factors = randomized_svd(A, rank)
    noise = tolerance(torch.float32, 1) * float(torch.linalg.vector_norm(S))
    assert torch.linalg.matrix_norm(A - factors.matrix()) <= 1.01 * torch.linalg.vector_norm(S[rank:]) + noise
    assert torch.linalg.vector_norm(factors.S) >= 0.99 * torch.linalg.vector_norm(S[:rank])
    assert orthonormality_error(factors.U) <= tolerance(torch.float32, rank)
    assert orthonormality_error(factors.Vh.mT) <= tolerance(torch.float32, rank)


def test_randomized_captures_more_with_a_tighter_tolerance() -> None:
    A = gaussian(300, 200)
    optimum = torch.linalg.svdvals(A)[:8].square().sum()
    lost = [float(1 - randomized_svd(A, 8, limit).S.square().sum() / optimum) for limit in (0.1, 0.001)]
    assert lost[0] > 0.02
    assert lost[1] < 0.002


def test_randomized_that_does_not_converge_is_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    # Not by its dotted name: there, the function hides the module.
    monkeypatch.setattr(importlib.import_module("spectral_peft.linalg.svd"), "_MAX_ITERATIONS", 2)
    A = gaussian(300, 200)
    assert torch.equal(randomized_svd(A, 8, 1e-6).S, svd(A).S[:8])


def test_batch_is_a_loop() -> None:
    A = torch.stack([with_spectrum(SPECTRA["power 1"], 200, 200), gaussian(200, 200) / 50])
    for algorithm in ALGORITHMS:
        together = truncated_svd(A, 4, algorithm)
        for i, matrix in enumerate(A):
            alone = truncated_svd(matrix, 4, algorithm)
            assert torch.linalg.vector_norm(together.S[i]) >= 0.99 * torch.linalg.vector_norm(alone.S)


def projector(factors: Factors) -> Tensor:
    return factors.U @ factors.U.mT


def test_same_result_whatever_the_global_seed_and_the_global_state_untouched() -> None:
    A = with_spectrum(SPECTRA["power 1"], 300, 200)
    torch.manual_seed(1)
    first = randomized_svd(A, 8)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    second = randomized_svd(A, 8)
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def test_same_result_whatever_the_number_of_threads() -> None:
    A = with_spectrum(SPECTRA["power 1"], 300, 200)
    threads = torch.get_num_threads()
    results = []
    try:
        for number in (1, 2):
            torch.set_num_threads(number)
            results.append(projector(randomized_svd(A, 8)))
    finally:
        torch.set_num_threads(threads)
    assert (results[0] - results[1]).abs().max() <= tolerance(torch.float32, 200)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_half_precision_is_factorised_in_float32(algorithm: str) -> None:
    A = gaussian(120, 80).bfloat16()
    factors, expected = truncated_svd(A, 2, algorithm), truncated_svd(A.float(), 2, algorithm)
    assert factors.S.dtype == torch.float32
    assert torch.equal(factors.matrix(), expected.matrix())


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_autocast_does_not_reach_inside(algorithm: str) -> None:
    A = gaussian(120, 80)
    expected = truncated_svd(A, 2, algorithm)
    with torch.autocast("cpu", torch.bfloat16):
        factors = truncated_svd(A, 2, algorithm)
    assert all(torch.equal(one, other) for one, other in zip(factors, expected, strict=True))


def test_low_matmul_precision_does_not_reach_inside_and_is_restored() -> None:
    A = gaussian(256, 256)
    expected = randomized_svd(A, 8)
    try:
        torch.set_float32_matmul_precision("medium")
        factors = randomized_svd(A, 8)
        after = torch.get_float32_matmul_precision()
    finally:
        torch.set_float32_matmul_precision("highest")
    assert after == "medium"
    assert torch.equal(factors.U, expected.U)


def test_no_gradient_is_recorded() -> None:
    A = gaussian(120, 80).requires_grad_()
    for algorithm in ALGORITHMS:
        assert not any(tensor.requires_grad for tensor in truncated_svd(A, 2, algorithm))


def test_auto_is_randomized_for_a_small_subspace_only() -> None:
    A = gaussian(200, 160)
    for rank, algorithm in ((8, "randomized"), (100, "exact")):
        assert torch.equal(truncated_svd(A, rank).S, truncated_svd(A, rank, algorithm).S)
    assert not torch.equal(truncated_svd(A, 8).S, truncated_svd(A, 8, "exact").S)


def test_truncated_factors_hold_no_more_memory_than_they_show() -> None:
    for tensor in truncated_svd(gaussian(40, 40), 3, "exact"):
        assert tensor.untyped_storage().nbytes() == tensor.nbytes


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


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("rank", [0, -1, 3])
def test_refused_ranks(algorithm: str, rank: int) -> None:
    with pytest.raises(ValueError, match=rf"between 1 and min\(m, n\) = 2, got {rank}\."):
        truncated_svd(torch.ones(3, 2), rank, algorithm)


def test_unknown_algorithm() -> None:
    with pytest.raises(ValueError, match="'auto', 'exact', 'randomized', got 'fast'"):
        truncated_svd(torch.ones(3, 2), 1, "fast")
