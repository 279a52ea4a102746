"""What the spectra of a model say about ranks."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn
from tqdm import tqdm

from spectral_peft.config import SpectralConfig
from spectral_peft.linalg import allocate_ranks, effective_rank, energy_rank, noise_rank, singular_values
from spectral_peft.targets import targeted_modules
from spectral_peft.wrapping import wrap


__all__ = ["RankSuggestion", "suggest_ranks"]


class RankSuggestion(NamedTuple):
    """Ranks for one weight.

    Attributes:
        module: Name of the module.
        shape: (out_features, in_features).
        energy: The smallest rank that holds the share of the squared singular values.
        entropy: exp(entropy of the singular values): how many count (Roy & Vetterli, 2007).
        noise: Singular values beyond the Marchenko-Pastur edge: how many are no noise.
        budget: The weight's share of a budget of parameters; None where it would stay dense.
    """

    module: str
    shape: tuple[int, int]
    energy: int
    entropy: float
    noise: int
    budget: int | None


@torch.no_grad()
def suggest_ranks(
    model: nn.Module, config: SpectralConfig, *, energy: float = 0.9, budget: float = 0.5
) -> list[RankSuggestion]:
    """Four views of how large a rank the targeted weights of a model need.

    Args:
        model: The model without adapters.
        config: Its `target_modules` and the like say which weights.
        energy: The share of the squared singular values, in (0, 1]: `r="energy=..."`.
        budget: The share of the parameters of all these weights together, in (0, 1): `r="budget=..."`.

    Raises:
        ValueError: no module is targeted, or a share is out of its range.
    """
    if not 0 < budget < 1:
        raise ValueError(f"`budget` should be above 0 and below 1, got {budget}.")
    layers = {key: wrap(module, key) for key, module in targeted_modules(model, config).items()}
    if not layers:
        raise ValueError(f"No module of the model matches `target_modules` {config.target_modules!r}.")
    shapes = [(layer.out_features, layer.in_features) for layer in layers.values()]
    spectra = [
        singular_values(layer.effective_weight()).cpu()
        for layer in tqdm(layers.values(), "Spectra", unit=" weights", delay=2, leave=False)
    ]
    shared = allocate_ranks(spectra, shapes, int(budget * sum(m * n for m, n in shapes)))
    return [
        RankSuggestion(key, shape, energy_rank(S, energy), float(effective_rank(S)), noise_rank(S, shape), share)
        for key, shape, S, share in zip(layers, shapes, spectra, shared, strict=True)
    ]
