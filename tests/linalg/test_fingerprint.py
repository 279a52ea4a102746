"""Sketches tell matrices apart and do not see rounding."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from spectral_peft.linalg import SKETCH_SIZE, same_matrix, sketch


few = settings(derandomize=True, deadline=None, max_examples=25)
shapes = st.tuples(st.integers(20, 200), st.integers(20, 200))
SAME = 0.01


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@few
@given(shape=shapes, seed=st.integers(0, 10**6))
def test_random_matrices_differ(shape: tuple[int, int], seed: int) -> None:
    one, other = sketch(gaussian(*shape, seed=seed)), sketch(gaussian(*shape, seed=seed + 1))
    assert one.shape == (SKETCH_SIZE,) == (9,)
    assert one.dtype == torch.float32
    assert 0.15 < one[1:].square().mean().sqrt() < 1
    assert (one[1:] - other[1:]).abs().max() > 0.2
    assert same_matrix(one, one, 0)
    assert not same_matrix(one, other, SAME)


@few
@given(shape=shapes, seed=st.integers(0, 10**6), dtype=st.sampled_from([torch.bfloat16, torch.float16]))
def test_rounding_is_not_seen(shape: tuple[int, int], seed: int, dtype: torch.dtype) -> None:
    A = gaussian(*shape, seed=seed)
    assert (sketch(A.to(dtype)) - sketch(A))[1:].abs().max() < 0.01
    assert same_matrix(sketch(A.to(dtype)), sketch(A), SAME)


@pytest.mark.parametrize("change", ["transposed", "flipped", "negated", "scaled", "rows lost", "rolled"])
def test_changes_are_seen(change: str) -> None:
    A = 1e-4 * gaussian(64, 64)
    rows_lost = A.clone()
    rows_lost[:8] = 0
    changed = {
        "transposed": A.mT,
        "flipped": A.flip(0),
        "negated": -A,
        "scaled": 1.02 * A,
        "rows lost": rows_lost,
        "rolled": A.roll(1, 1),
    }[change]
    assert not same_matrix(sketch(A), sketch(changed), SAME)


def test_scale_changes_the_norm_only() -> None:
    A = gaussian(30, 40)
    torch.testing.assert_close(sketch(4 * A)[1:], sketch(A)[1:])
    torch.testing.assert_close(sketch(4 * A)[0], 4 * torch.linalg.matrix_norm(A))


def test_value_is_the_same_everywhere() -> None:
    A = (torch.arange(12.0) - 5).reshape(3, 4)
    probes = [torch.cos(torch.tensor(p, dtype=torch.float64).sqrt() * torch.arange(1, 5)) for p in (2, 53)]
    norm = torch.linalg.matrix_norm(A)
    result = sketch(A)
    assert float(result[0]) == pytest.approx(float(norm))
    row = torch.cos(torch.tensor(19, dtype=torch.float64).sqrt() * torch.arange(1, 4))
    assert float(result[8]) == pytest.approx(float(row @ A.double() @ probes[1] / norm), rel=1e-5)


def test_zero_matches_zero_only() -> None:
    assert torch.equal(sketch(torch.zeros(5, 4)), torch.zeros(9))
    assert same_matrix(torch.zeros(9), sketch(torch.zeros(5, 4)), SAME)
    for scale in (1e-12, 1.0, 1e12):
        assert not same_matrix(torch.zeros(9), sketch(scale * gaussian(5, 4)), SAME)


def test_nan_matches_nothing() -> None:
    broken = sketch(torch.full((3, 3), float("nan")))
    assert not same_matrix(broken, broken, SAME)


def test_leading_dimensions_are_rows() -> None:
    A = gaussian(3, 5, 7)
    assert torch.equal(sketch(A), sketch(A.reshape(15, 7)))


def test_autocast_does_not_reach_inside() -> None:
    A = gaussian(64, 64)
    expected = sketch(A)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(sketch(A), expected)
