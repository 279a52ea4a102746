"""The leading triplets: optimal, and the same whatever the state of the process."""

from __future__ import annotations

import importlib

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from spectral_peft.linalg import Factors, orthonormality_error, randomized_svd, svd, truncated_svd
from tests.linalg.matrices import assert_canonical, few, gaussian, matrices, with_spectrum
from tests.tolerance import tolerance


ALGORITHMS = ("auto", "exact", "randomized")


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


@pytest.fixture
def decomposed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes that `torch.linalg.svd` is called with."""
    shapes, original = [], torch.linalg.svd

    def record(A: Tensor, **kwargs: object) -> object:
        shapes.append(tuple(A.shape))
        return original(A, **kwargs)

    monkeypatch.setattr(torch.linalg, "svd", record)
    return shapes


@pytest.mark.parametrize("spectrum", ["power 1", "exponential", "rank 3", "step"])
def test_randomized_ends_without_the_exact_svd(spectrum: str, decomposed: list[tuple[int, ...]]) -> None:
    randomized_svd(with_spectrum(SPECTRA[spectrum], 300, 200), 8)
    assert len(decomposed) <= 5
    assert set(decomposed) == {(16, 16)}


def test_randomized_ends_when_it_gains_no_more_than_is_rounded(decomposed: list[tuple[int, ...]]) -> None:
    for seed in range(20):  # of low rank, so that the residual is nothing but rounding, of either sign
        randomized_svd(gaussian(300, 3, seed=seed) @ gaussian(3, 200, seed=seed + 1), 8)
    assert len(decomposed) <= 50
    assert set(decomposed) == {(16, 16)}


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
def test_half_precision_is_factorized_in_float32(algorithm: str) -> None:
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
        before = matmul_precisions()
        factors = randomized_svd(A, 8)
        after = matmul_precisions()
    finally:
        torch.set_float32_matmul_precision("highest")
    assert after == before
    assert torch.equal(factors.U, expected.U)


def matmul_precisions() -> list[str]:
    by_backend = [
        backend.fp32_precision
        for backend in (torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, "matmul", None))
        if hasattr(backend, "fp32_precision")  # from torch 2.9 on
    ]
    return [torch.get_float32_matmul_precision(), *by_backend]


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


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("rank", [0, -1, 3])
def test_refused_ranks(algorithm: str, rank: int) -> None:
    with pytest.raises(ValueError, match=rf"between 1 and min\(m, n\) = 2, got {rank}\."):
        truncated_svd(torch.ones(3, 2), rank, algorithm)


def test_unknown_algorithm() -> None:
    with pytest.raises(ValueError, match="'auto', 'exact', 'randomized', got 'fast'"):
        truncated_svd(torch.ones(3, 2), 1, "fast")
