"""How many singular values count."""

from __future__ import annotations

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
