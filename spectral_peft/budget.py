"""Ranks from a budget of parameters that several modules share."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

from torch import Tensor, nn
from tqdm import tqdm

from spectral_peft.config import SpectralConfig
from spectral_peft.errors import SpectralError
from spectral_peft.layer import SpectralLinear
from spectral_peft.linalg import one_thread_if_small
from spectral_peft.ranks import parse_share
from spectral_peft.targets import targeted_modules
from spectral_peft.wrapping import wrap


def share_budgets_(model: nn.Module, config: SpectralConfig) -> None:
    """Puts ranks in the place of the budgets of `config`: in its `rank_pattern` and `dense_modules`, in place.

    The modules that ask for the same budget share it. A checkpoint's config has its ranks already, and no spectrum is
    computed.

    Raises:
        TypeError, SpectralError: a module cannot have an adapter, or its weight cannot be decomposed.
        ValueError: a budget is too small for one triplet of each module.
    """
    pools: dict[str, list[SpectralLinear]] = {}
    for key, layer in _candidates(model, config).items():
        pools.setdefault(str(config.rank_of(key)), []).append(layer)
    ranks: dict[str, int | None] = {}
    for r, layers in pools.items():
        ranks.update(_ranks(config, r, layers))
    dense = [key for key, rank in ranks.items() if rank is None]
    config.rank_pattern = {**{key: rank for key, rank in ranks.items() if rank}, **config.rank_pattern}
    config.dense_modules = [*config.dense_modules, *dense]
    config.was_measured = config.was_measured or bool(ranks)
    if dense:
        warnings.warn(
            f"{len(dense)} modules stay dense and get no adapter, because factors of the rank that the budget gives "
            f"them would hold as many numbers: {', '.join(dense)}.",
            stacklevel=2,
        )


def _candidates(model: nn.Module, config: SpectralConfig) -> dict[str, SpectralLinear]:
    """The targeted modules whose rank is a budget; those without an adapter so far in a layer outside the model."""
    if not any(_is_budget(r) for r in (config.r, *config.rank_pattern.values())):
        return {}
    return {
        key: module if isinstance(module, SpectralLinear) else wrap(module, key)
        for key, module in targeted_modules(model, config).items()
        if _is_budget(config.rank_of(key))
    }


def _is_budget(r: object) -> bool:
    return isinstance(r, str) and parse_share(r)[0] == "budget"


def _ranks(config: SpectralConfig, r: str, layers: Sequence[SpectralLinear]) -> dict[str, int | None]:
    """The ranks of the layers that share the budget `r`, by name; None for those that stay dense."""
    shapes = [(layer.out_features, layer.in_features) for layer in layers]
    total = sum(m * n for m, n in shapes)
    progress = tqdm(layers, desc="Sharing the budget", unit=" layers", delay=2, leave=False)
    spectra = [_spectrum(config, layer) for layer in progress]
    try:
        ranks = config.allocate(spectra, shapes, int(parse_share(r)[1] * total))
    except ValueError as error:
        raise ValueError(
            f"`r` is too small: {r!r} of {total:,} parameters in {len(layers)} modules. {error}"
        ) from error
    return {layer.key: rank for layer, rank in zip(layers, ranks, strict=True)}


def _spectrum(config: SpectralConfig, layer: SpectralLinear) -> Tensor:
    weight = layer.effective_weight()
    try:
        with one_thread_if_small(weight):
            return config.spectrum(weight, layer.key).cpu()
    except SpectralError as error:
        raise SpectralError(f"{layer.key}: {error}") from error
