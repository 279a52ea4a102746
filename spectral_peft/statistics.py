"""Figures about the adapters that train, for logs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from spectral_peft.layer import SpectralLinear
from spectral_peft.linalg import effective_rank, orthonormality_error
from spectral_peft.sharded import whole
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

    Costs about as much as one retraction of all factors; for PiSSA that of an SVD of its small matrices. Where FSDP2
    has sharded parameters, they are gathered for one weight at a time: every process has to call this.

    Args:
        model: A model with spectral adapters; empty without one that trains.
        per_layer: Whether figures of every weight are added.
    """
    spectra: dict[SpectralUpdate, dict[str, float]] = {}
    figures: defaultdict[str, list[float]] = defaultdict(list)
    errors: list[float] = []
    for update in trained_updates(model):
        with whole(update):
            values = update.singular_values()
            if values is not None:
                spectra[update] = _spectrum(values)
                figures["effective_rank"].append(spectra[update]["effective_rank"])
            if update.orthonormal:
                errors.append(_orthonormality_error(update))
        for name, value in update.statistics().items():
            figures[name].append(value)
    entries = {f"spectral/{name}": sum(values) / len(values) for name, values in figures.items()}
    if errors:
        entries["spectral/orthonormality_error"] = max(errors)
    if per_layer:
        entries.update(_by_layer(model, spectra))
    return entries


def _spectrum(values: Tensor) -> dict[str, float]:
    magnitudes = values.abs()
    return {
        "effective_rank": float(effective_rank(values)),
        "largest_value": float(magnitudes.max()),
        "smallest_value": float(magnitudes.min()),
    }


def _orthonormality_error(update: SpectralUpdate) -> float:
    factors = (value for name, value in update.trained_parameters() if name.split(".")[0] in update.orthonormal)
    return max(float(orthonormality_error(X if X.shape[0] >= X.shape[1] else X.mT)) for X in factors)


def _by_layer(model: nn.Module, spectra: dict[SpectralUpdate, dict[str, float]]) -> Iterator[tuple[str, float]]:
    for layer in model.modules():
        if isinstance(layer, SpectralLinear):
            for update in map(layer.update_of, layer.configs):
                if update in spectra:
                    for name, value in spectra[update].items():
                        yield f"spectral/{layer.key}/{name}", value
