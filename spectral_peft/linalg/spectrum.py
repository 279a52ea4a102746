"""How many singular values count."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def effective_rank(
    S: Tensor,  # shape: (..., r)
) -> Tensor:  # shape: (...)
    """exp(-sum_i p_i log p_i) with p = |S| / sum |S| (Roy & Vetterli, 2007); 0 for a zero spectrum.

    Between 1 (one triplet carries everything) and r (all carry the same). Magnitudes, because trained "singular
    values" may be negative.
    """
    magnitudes = S.abs().to(torch.promote_types(S.dtype, torch.float32))
    total = magnitudes.sum(-1, keepdim=True)
    entropy = torch.special.entr(magnitudes / total).sum(-1)
    return torch.where(total.squeeze(-1) > 0, entropy.exp(), 0)


def energy_rank(
    S: Tensor,  # shape: (r,), descending
    share: float,
) -> int:
    """The smallest rank with sum_{i <= rank} S_i^2 >= share * sum_i S_i^2.

    Raises:
        ValueError: `share` is not in (0, 1].
    """
    if not 0 < share <= 1:
        raise ValueError(f"`share` should be above 0 and at most 1, got {share}.")
    energy = S.double().square().cumsum(-1)
    return int((energy < share * energy[-1]).sum()) + 1


def noise_rank(
    S: Tensor,  # shape: (min(m, n),)
    shape: tuple[int, int],
) -> int:
    """The number of singular values of an (m, n) matrix above the edge of what noise alone would give.

    Those of a matrix of independent entries of variance s^2 fill the interval s sqrt(n) sqrt(x), x from the law of
    Marchenko & Pastur (1967) with ratio b = m / n <= 1, whose upper end is s (sqrt(n) + sqrt(m)). s is taken from the
    median singular value (Gavish & Donoho, 2014, section III.E), so that a few large values do not raise the edge.

    Args:
        S: All singular values of the matrix.
        shape: (m, n), in any order.
    """
    m, n = sorted(shape)
    scale = float(S.double().median()) / math.sqrt(_marchenko_pastur_median(m / n))
    return int((S.double() > scale * (1 + math.sqrt(m / n))).sum())


def _marchenko_pastur_median(ratio: float) -> float:
    """The median of the law with density sqrt((b - x) (x - a)) / (2 pi ratio x) on [a, b] = (1 -+ sqrt(ratio))^2."""
    low, high = (1 - math.sqrt(ratio)) ** 2, (1 + math.sqrt(ratio)) ** 2
    # x = the middle - half the width times cos(t) takes the roots at both ends out of the integral.
    t = torch.linspace(0, math.pi, 20_001, dtype=torch.float64)
    x = (low + high) / 2 - (high - low) / 2 * t.cos()
    density = t.sin().square() / x.clamp(min=1e-12)
    mass = torch.cumulative_trapezoid(density, t)
    return float(x[1:][mass >= mass[-1] / 2][0])
