"""Figures about the adapters that train, for logs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

import torch
from torch import nn

from spectral_peft.layer import SpectralLinear
from spectral_peft.linalg import effective_rank, orthonormality_error
from spectral_peft.training import trained_updates
from spectral_peft.update import SpectralUpdate


@torch.no_grad()
def spectral_statistics(model: nn.Module, *, per_layer: bool = False) -> dict[str, float]:
    """Figures about the adapters of `model` that train, as plain numbers by name.

    - ``spectral/effective_rank``: the mean over all weights of exp(entropy of the singular values), which lies between
      1 and their number.
    - ``spectral/orthonormality_error``: the largest entry of abs(X^T X - I) over all trained factors X that should be
      orthonormal (SST, SCT).
    - ``spectral/<name>``: what the method itself counts, the mean over all weights: ``swaps`` and ``decompositions``
      of SST, ``retractions`` of SCT.
    - ``spectral/<module>/effective_rank``, ``largest_value`` and ``smallest_value``: with `per_layer`, of each weight;
      the values are magnitudes.

    Costs about as much as one retraction of all factors; for PiSSA that of an SVD of its small matrices.

    Args:
        model: A model with spectral adapters; empty without one that trains.
        per_layer: Whether figures of every weight are added.
    """
    updates = trained_updates(model)
    figures: defaultdict[str, list[float]] = defaultdict(list)
    for update in updates:
        values = update.singular_values()
        if values is not None:
            figures["effective_rank"].append(float(effective_rank(values)))
        for name, value in update.statistics().items():
            figures[name].append(value)
    entries = {f"spectral/{name}": sum(values) / len(values) for name, values in figures.items()}
    errors = [_orthonormality_error(update) for update in updates if update.orthonormal]
    if errors:
        entries["spectral/orthonormality_error"] = max(errors)
    if per_layer:
        entries.update(_spectra(model, {*updates}))
    return entries


def _orthonormality_error(update: SpectralUpdate) -> float:
    factors = (value for name, value in update.trained_parameters() if name.split(".")[0] in update.orthonormal)
    return max(float(orthonormality_error(X if X.shape[0] >= X.shape[1] else X.mT)) for X in factors)


def _spectra(model: nn.Module, updates: set[SpectralUpdate]) -> Iterator[tuple[str, float]]:
    for layer in model.modules():
        if isinstance(layer, SpectralLinear):
            for update in updates.intersection(map(layer.update_of, layer.configs)):
                values = update.singular_values()
                if values is not None:
                    yield f"spectral/{layer.key}/effective_rank", float(effective_rank(values))
                    yield f"spectral/{layer.key}/largest_value", float(values.abs().max())
                    yield f"spectral/{layer.key}/smallest_value", float(values.abs().min())
