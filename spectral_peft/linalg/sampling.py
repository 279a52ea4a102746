"""Which singular triplets train next."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from types import MappingProxyType

import torch
from torch import Tensor

from spectral_peft.linalg.drivers import Factors


def mixture(S: Tensor) -> Tensor:  # shape: (k,) -> (k,)
    """p_i = (1/k + S_i / sum S) / 2 (Zhao et al., 2025): half uniform, half by singular value."""
    return (uniform(S) + by_singular_value(S)) / 2


def uniform(S: Tensor) -> Tensor:  # shape: (k,) -> (k,)
    """p_i = 1/k."""
    return torch.full_like(S, 1 / len(S))


def by_singular_value(S: Tensor) -> Tensor:  # shape: (k,) -> (k,)
    """p_i = S_i / sum S; uniform where all are zero."""
    total = S.sum()
    return S / total if total > 0 else uniform(S)


PROBABILITIES: MappingProxyType[str, Callable[[Tensor], Tensor]] = MappingProxyType(
    {"mixture": mixture, "uniform": uniform, "singular_values": by_singular_value}
)


def draw(p: Tensor, r: int, seed: int) -> Tensor:  # shape: (k,) -> (r,) int64, ascending
    """`r` different indices, each drawn with probability proportional to `p` among those that are left.

    The r largest of log p_i + g_i with Gumbel noise g_i are such a draw (Vieira, 2014; Kool et al., 2019, section
    3). Indices with p_i = 0 come last instead of failing. From a generator of its own on the CPU, in float64: the
    same `p` and `seed` give the same indices on every rank and device, and the global random state is left alone.
    """
    noise = torch.rand(len(p), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    gumbel = -torch.log(-torch.log(noise.clamp(min=1e-300)))
    scores = p.detach().cpu().double().log() + gumbel
    return scores.topk(r).indices.sort().values


def seed_of(text: str) -> int:
    """A seed for a generator, the same one on every machine."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")


def scrambled(factors: Factors, seed: str) -> Factors:
    """The same singular values, with random orthonormal vectors that follow from `seed`."""
    generator = torch.Generator().manual_seed(seed_of(seed))
    U, Vh = (torch.randn(value.shape, generator=generator).to(value) for value in (factors.U, factors.Vh))
    return Factors(torch.linalg.qr(U).Q, factors.S, torch.linalg.qr(Vh.mT).Q.mT)


def top(S: Tensor, r: int) -> Tensor:  # shape: (k,) -> (r,)
    """The indices of the `r` largest singular values, ascending."""
    return S.detach().cpu().topk(r).indices.sort().values


def in_turn(k: int, r: int, iteration: int) -> Tensor:  # shape: (r,)
    """The next `r` of k indices in turn: after ceil(k / r) iterations each has had its turn."""
    first = iteration % math.ceil(k / r) * r
    return torch.arange(first, first + r).remainder(k).sort().values
