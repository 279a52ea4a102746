"""Ranks from a budget: never more than it, nearly all of it, and the best that it buys."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from spectral_peft.linalg import allocate_ranks
from tests.linalg.matrices import few


Shapes = list[tuple[int, int]]


@st.composite
def problems(draw: st.DrawFn, most: int = 4, size: int = 12) -> tuple[list[Tensor], Shapes]:
    """Spectra and shapes: flat, steep, with zeros, of very different scales."""
    shapes = draw(st.lists(st.tuples(st.integers(1, size), st.integers(1, size)), min_size=1, max_size=most))
    spectra = []
    for m, n in shapes:
        entry = st.floats(0, 10) if draw(st.booleans()) else st.sampled_from([0.0, 1.0])
        S = draw(st.lists(entry, min_size=min(m, n), max_size=min(m, n)))
        spectra.append(torch.tensor(sorted(S, reverse=True)) * 10.0 ** draw(st.integers(-3, 3)))
    return spectra, shapes


def cost(rank: int | None, m: int, n: int) -> int:
    return m * n if rank is None else rank * (m + n + 1)


def total(ranks: list[int | None], shapes: Shapes) -> int:
    return sum(cost(rank, m, n) for rank, (m, n) in zip(ranks, shapes, strict=True))


def least(shapes: Shapes) -> int:
    return sum(min(m + n + 1, m * n) for m, n in shapes)


def drawn_budget(data: st.DataObject, shapes: Shapes) -> int:
    return data.draw(st.integers(least(shapes), sum(m * n for m, n in shapes)))


@few
@given(problem=problems(), data=st.data())
def test_the_budget_is_kept_and_used_up_to_one_triplet(
    problem: tuple[list[Tensor], Shapes], data: st.DataObject
) -> None:
    spectra, shapes = problem
    budget = drawn_budget(data, shapes)
    ranks = allocate_ranks(spectra, shapes, budget)
    spent = total(ranks, shapes)
    assert spent <= budget
    assert spent > budget - max(m + n + 1 for m, n in shapes) or all(rank is None for rank in ranks)


@few
@given(problem=problems(), data=st.data())
def test_what_is_not_smaller_than_the_dense_matrix_stays_dense(
    problem: tuple[list[Tensor], Shapes], data: st.DataObject
) -> None:
    spectra, shapes = problem
    for rank, (m, n) in zip(allocate_ranks(spectra, shapes, drawn_budget(data, shapes)), shapes, strict=True):
        assert rank is None or (rank >= 1 and rank * (m + n + 1) < m * n)
    assert allocate_ranks(spectra, shapes, sum(m * n for m, n in shapes)) == [None] * len(shapes)


@few
@given(problem=problems(), data=st.data())
def test_no_rank_falls_when_the_budget_rises(problem: tuple[list[Tensor], Shapes], data: st.DataObject) -> None:
    spectra, shapes = problem
    first, second = sorted(drawn_budget(data, shapes) for _ in range(2))
    poor, rich = allocate_ranks(spectra, shapes, first), allocate_ranks(spectra, shapes, second)
    assert all(more is None or (less is not None and less <= more) for less, more in zip(poor, rich, strict=True))


@few
@given(problem=problems(), data=st.data(), powers=st.lists(st.integers(-9, 9), min_size=4, max_size=4))
def test_the_scale_of_a_matrix_does_not_matter(
    problem: tuple[list[Tensor], Shapes], data: st.DataObject, powers: list[int]
) -> None:
    spectra, shapes = problem
    budget = drawn_budget(data, shapes)
    scaled = [S * 2.0**power for S, power in zip(spectra, powers, strict=False)]  # exact, so that ties stay ties
    assert allocate_ranks(scaled, shapes, budget) == allocate_ranks(spectra, shapes, budget)


@few
@given(S=st.lists(st.floats(0.01, 10), min_size=8, max_size=8), copies=st.integers(2, 5), data=st.data())
def test_equal_matrices_get_equal_ranks(S: list[float], copies: int, data: st.DataObject) -> None:
    spectra = [torch.tensor(sorted(S, reverse=True))] * copies
    for values in (spectra, [torch.ones(8)] * copies):
        ranks = allocate_ranks(values, [(20, 8)] * copies, data.draw(st.integers(29 * copies, 29 * 5 * copies)))
        assert max(ranks) - min(ranks) <= 1
        assert ranks == sorted(ranks, reverse=True)


def left_out(ranks: tuple[int, ...], spectra: list[Tensor], power: float) -> float:
    values = [S.double() ** power for S in spectra]
    return sum(float(v[rank:].sum() / v.sum().clamp(min=1e-300)) for rank, v in zip(ranks, values, strict=True))


@few
@given(problem=problems(most=3, size=9), data=st.data(), power=st.sampled_from([0.5, 1.0, 2.0]))
def test_no_other_ranks_of_the_same_cost_leave_out_less(
    problem: tuple[list[Tensor], Shapes], data: st.DataObject, power: float
) -> None:
    spectra, shapes = problem
    ranks = allocate_ranks(spectra, shapes, drawn_budget(data, shapes), power)
    factored = [i for i, rank in enumerate(ranks) if rank is not None]
    spectra, shapes = [spectra[i] for i in factored], [shapes[i] for i in factored]
    ranks = tuple(ranks[i] for i in factored)
    spent = total(list(ranks), shapes)
    affordable = (
        other
        for other in itertools.product(*(range(1, min(shape) + 1) for shape in shapes))
        if total(list(other), shapes) <= spent
    )
    assert left_out(ranks, spectra, power) <= min(left_out(other, spectra, power) for other in affordable) + 1e-12


def test_ranks_by_hand() -> None:
    """Both cost 9 a triplet. Shares: 4, 2, 1 of 7, and 2, 2, 2 of 6."""
    spectra, shapes = [torch.tensor([4.0, 2.0, 1.0]), torch.tensor([2.0, 2.0, 2.0])], [(3, 5), (5, 3)]
    with pytest.raises(ValueError, match="at least 18, one triplet of each matrix, got 17"):
        allocate_ranks(spectra, shapes, 17)
    assert allocate_ranks(spectra, shapes, 18) == [1, 1]
    assert allocate_ranks(spectra, shapes, 23) == [1, 1]
    assert allocate_ranks(spectra, shapes, 24) == [1, None]  # the second triplet of a 5 x 3 matrix makes it dense
    assert allocate_ranks(spectra, shapes, 30) == [None, None]


def test_a_zero_matrix_gets_one_triplet() -> None:
    assert allocate_ranks([torch.zeros(8), torch.arange(8, 0, -1)], [(8, 8), (8, 8)], 68) == [1, 3]


def test_comparable_spectra_are_taken_as_they_are() -> None:
    """A matrix with twice the values gets more triplets: by shares both would have the same."""
    spectra, shapes = [2 * torch.arange(8.0, 0, -1), torch.arange(8.0, 0, -1)], [(8, 40)] * 2
    assert allocate_ranks(spectra, shapes, 7 * 49) == [4, 3]
    assert allocate_ranks(spectra, shapes, 7 * 49, comparable=True) == [5, 2]
    mixed = [torch.tensor([3.0, 2.9, 2.8, 2.7]), torch.tensor([9.0, 3.1, 0.1, 0.1])]
    assert allocate_ranks(mixed, [(4, 400), (4, 100)], 2 * (405 + 105), comparable=True) == [2, 2]
