from __future__ import annotations

import math

import pytest
import torch

from spectral_peft.linalg.sampling import PROBABILITIES, draw, in_turn, top


@pytest.mark.parametrize("rule", PROBABILITIES.values(), ids=PROBABILITIES)
def test_probabilities_sum_to_one(rule: object) -> None:
    for S in (torch.rand(7, dtype=torch.float64), torch.zeros(7, dtype=torch.float64)):
        torch.testing.assert_close(rule(S).sum(), torch.ones((), dtype=torch.float64))


def test_the_mixture_is_the_paper_s() -> None:
    S = torch.tensor([4.0, 3.0, 2.0, 1.0])
    torch.testing.assert_close(PROBABILITIES["mixture"](S), 0.5 * (1 / 4 + S / 10))


def test_single_draws_follow_the_probabilities() -> None:
    p = torch.tensor([0.5, 0.3, 0.15, 0.05, 0.0])
    counts = torch.zeros(5)
    for seed in range(4000):
        counts[draw(p, 1, seed)] += 1
    torch.testing.assert_close(counts / 4000, p, rtol=0, atol=4 * math.sqrt(0.25 / 4000))


def test_second_draws_follow_what_is_left() -> None:
    """P({0, 1}) = p0 p1 / (1 - p0) + p1 p0 / (1 - p1) without replacement."""
    p = torch.tensor([0.5, 0.3, 0.2])
    hits = sum(draw(p, 2, seed).tolist() == [0, 1] for seed in range(4000)) / 4000
    assert hits == pytest.approx(0.5 * 0.3 / 0.5 + 0.3 * 0.5 / 0.7, abs=4 * math.sqrt(0.25 / 4000))


def test_draws_are_distinct_and_take_impossible_indices_last() -> None:
    p = torch.zeros(10)
    p[[2, 5, 7]] = 1 / 3
    assert draw(p, 3, seed=0).tolist() == [2, 5, 7]
    assert len(set(draw(p, 8, seed=0).tolist())) == 8
    assert {2, 5, 7} <= set(draw(p, 8, seed=0).tolist())


def test_uniform_draws_cover_what_probability_says() -> None:
    """K / r draws of r among k visit 1 - (1 - r/k)^(k/r) of all: 64.8 % at 768 and 64."""
    visited = torch.cat([draw(torch.full((768,), 1 / 768), 64, seed) for seed in range(12)]).unique()
    assert len(visited) / 768 == pytest.approx(1 - (1 - 64 / 768) ** 12, abs=0.05)


def test_the_global_generator_is_left_alone() -> None:
    state = torch.get_rng_state()
    draw(torch.full((8,), 1 / 8), 3, seed=5)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(("k", "r"), [(12, 4), (10, 4), (7, 7), (9, 2)])
def test_in_turn_everyone_has_a_turn(k: int, r: int) -> None:
    rounds = math.ceil(k / r)
    assert set(torch.cat([in_turn(k, r, i) for i in range(rounds)]).tolist()) == set(range(k))
    assert torch.equal(in_turn(k, r, rounds), in_turn(k, r, 0))
    assert all(len(set(in_turn(k, r, i).tolist())) == r for i in range(rounds))


def test_top_takes_the_largest() -> None:
    assert top(torch.tensor([1.0, 5.0, 3.0, 4.0]), 2).tolist() == [1, 3]
