"""Ranks of several matrices from one budget of numbers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def allocate_ranks(
    spectra: Sequence[Tensor],  # shape of each: (min(m, n),), descending
    shapes: Sequence[tuple[int, int]],  # (m, n) of each
    budget: int,
    power: float = 1.0,
    *,
    comparable: bool = False,
) -> list[int | None]:
    """Ranks that leave out least of the spectra, at a total cost of at most `budget` numbers.

    What a matrix leaves out at rank r is sum_{i > r} S_i^p / sum_i S_i^p, p = `power`: a share, so that no matrix
    counts more because it is larger or scaled. With p = 2 it is the share of the energy; with p = 1 that of the
    nuclear norm, which does not starve matrices with a few very large values. Where the spectra are `comparable`, all
    in the units of one loss, it is sum_{i > r} S_i^p itself. The factors of rank r cost r (m + n + 1) numbers. So a
    triplet gains S_i^p / sum S^p, or S_i^p, and costs m + n + 1: triplets are taken in the order of gain per cost,
    after the first one of every matrix, up to the first that the budget cannot pay for. This is one threshold for
    all matrices (Everett, 1963): no other ranks of the same total cost leave out less, where no matrix stays dense.
    Ranks never fall when the budget rises, and what is left of it is less than the next triplet costs.

    Factors that would cost as much as the dense matrix are pointless: such a matrix costs its m n numbers and stays
    dense. That leaves out nothing, a jump that the order does not look ahead to: it would leave whole matrices dense,
    and others with one triplet, wherever spectra are flat.

    Args:
        spectra: The singular values of each matrix.
        shapes: (m, n) of each matrix.
        budget: How many numbers the factors may hold together.
        power: The exponent p.
        comparable: Whether the spectra are in the same unit.

    Returns:
        The rank of each matrix, at least 1; None where it is to stay dense.

    Raises:
        ValueError: `budget` does not pay for one triplet of every matrix.
    """
    costs = [_costs(m, n) for m, n in shapes]
    least = sum(int(cost[0]) for cost in costs)
    if budget < least:
        raise ValueError(f"`budget` should be at least {least:,}, one triplet of each matrix, got {budget:,}.")
    gains = [_gains(S, m + n + 1, power, comparable) for S, (m, n) in zip(spectra, shapes, strict=True)]
    taken = _in_order(gains, costs, budget).tolist()
    return [rank if rank * (m + n + 1) < m * n else None for rank, (m, n) in zip(taken, shapes, strict=True)]


def _costs(m: int, n: int) -> Tensor:  # shape: (min(m, n),), int64
    """What each further triplet adds to the cost of a matrix: no matrix costs more than its dense form."""
    totals = (torch.arange(min(m, n) + 1) * (m + n + 1)).clamp(max=m * n)
    return totals.diff()


def _gains(S: Tensor, cost: int, power: float, comparable: bool) -> Tensor:  # shape: (k,), float64
    """Gain per number of each triplet; the first is beyond comparison, since every matrix has one."""
    values = S.detach().cpu().double().pow(power)
    whole = 1.0 if comparable else values.sum().clamp(min=torch.finfo(torch.float64).tiny)
    gains = values / whole / cost
    gains[0] = torch.inf
    return gains


def _in_order(gains: list[Tensor], costs: list[Tensor], budget: int) -> Tensor:  # shape: (matrices,)
    """How many triplets of each matrix the budget pays for. Among equal gains the matrices take turns."""
    owner = torch.cat([torch.full((len(gain),), index) for index, gain in enumerate(gains)])
    turn = torch.cat([torch.arange(len(gain)) for gain in gains])
    by_turn = turn.argsort(stable=True)
    order = by_turn[torch.cat(gains)[by_turn].argsort(descending=True, stable=True)]
    paid = torch.cat(costs)[order].cumsum(0) <= budget
    return torch.bincount(owner[order[paid]], minlength=len(gains))
