"""Adapters added up: one whose change is the weighted sum of the changes of others."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from peft.tuners.tuners_utils import BaseTuner
from torch import Tensor, nn

from spectral_peft.checkpoint import adapter_updates
from spectral_peft.config import FORMAT_VERSION, SpectralConfig
from spectral_peft.errors import SpectralError
from spectral_peft.layer import SpectralLinear, refuse_merged
from spectral_peft.linalg import Factors, svd_of_product
from spectral_peft.update import SpectralUpdate


COMBINATIONS = ("svd", "linear", "cat")
Term = tuple[float, SpectralUpdate]


@torch.no_grad()
def add_weighted_adapter(
    tuner: BaseTuner,
    adapters: Sequence[str],
    weights: Sequence[float],
    adapter_name: str,
    combination_type: str,
    svd_rank: int | None,
) -> None:
    """`SpectralModel.add_weighted_adapter`, which says what is raised; the model changes after all is computed."""
    _check(tuner, adapters, weights, adapter_name, combination_type, svd_rank)
    # The fingerprint of the sum is that of the base weight, which is not there while an adapter is merged.
    refuse_merged(tuner.model, "adapters are added up")
    terms: dict[SpectralLinear, list[Term]] = {}
    for name, weight in zip(adapters, weights, strict=True):
        for _, layer, update in adapter_updates(tuner.model, name):
            layer.settle(name)
            terms.setdefault(layer, []).append((weight, update))
    first: SpectralConfig = tuner.peft_config[adapters[0]]  # type: ignore[assignment]
    if combination_type == "linear":
        config, sums = first, {layer: _linear_sum(layer, of_layer, first) for layer, of_layer in terms.items()}
    else:
        triplets = {layer: _triplets(layer, of_layer) for layer, of_layer in terms.items()}
        if combination_type == "svd":
            triplets = {layer: _leading(triplets[layer], svd_rank or _largest_rank(terms[layer])) for layer in terms}
        config = first.for_changes(max(len(factors.S) for factors in triplets.values()))
        sums = {layer: _of_triplets(layer, triplets[layer], terms[layer][0][1], config) for layer in terms}
    ranks = {layer.key: update.r for layer, update in sums.items()}
    tuner.peft_config[adapter_name] = replace(
        config,
        r=max(ranks.values()),
        rank_pattern={**ranks},
        target_modules="|".join(map(re.escape, ranks)),
        exclude_modules=None,
        layers_to_transform=None,
        layers_pattern=None,
        dense_modules=[],
        save_start=True,
        format_version=FORMAT_VERSION,  # its tensors come as those of a checkpoint do, after it was added
    )
    tuner.inject_adapter(tuner.model, adapter_name)
    for layer, update in sums.items():
        layer.update_of(adapter_name).load_state_dict(update.state_dict())  # type: ignore[union-attr]


@contextmanager
def _naming(layer: SpectralLinear) -> Iterator[None]:
    try:
        yield
    except SpectralError as error:
        raise SpectralError(f"{layer.key}: {error}") from error


def _linear_sum(layer: SpectralLinear, terms: list[Term], config: SpectralConfig) -> SpectralUpdate:
    update = layer.new_update(config, terms[0][1].r)
    with _naming(layer):
        _add_up_(update, terms)
    update.take_fingerprint_(layer.effective_weight())
    return update


def _of_triplets(
    layer: SpectralLinear, triplets: Factors, first: SpectralUpdate, config: SpectralConfig
) -> SpectralUpdate:
    update = layer.new_update(config, config.rank_for_change(len(triplets.S), first.r))
    with _naming(layer):
        update.take_change_(triplets)
    update.take_fingerprint_(layer.effective_weight())
    return update


def _add_up_(update: SpectralUpdate, terms: list[Term]) -> None:
    """The start that all terms share, and the weighted sum of what was trained from it."""
    start = dict(terms[0][1].frozen())
    if not update.is_linear:
        raise SpectralError(
            f"the change by {type(update).__name__} is a product of what it trains, so a sum of trained parameters is "
            "not the sum of the changes. Use combination_type 'cat' or 'svd'."
        )
    if not all(_equal(start, dict(other.frozen())) for _, other in terms[1:]):
        raise SpectralError(
            "the adapters have different singular vectors, so a sum of what they trained is not the sum of their "
            "changes. Use combination_type 'cat' or 'svd'."
        )
    trained = {
        name: sum(weight * dict(other.trained_parameters())[name] for weight, other in terms)
        for name, _ in update.trained_parameters()
    }
    update.load_state_dict({**start, **trained, **dict(update.named_buffers())})


def _equal(start: dict[str, nn.Parameter], other: dict[str, nn.Parameter]) -> bool:
    return all(torch.equal(value, other[name]) for name, value in start.items())


def _triplets(layer: SpectralLinear, terms: list[Term]) -> Factors:
    """The singular triplets of the weighted sum, in float64."""
    with _naming(layer):
        changes = [(weight, *_thin_change(update)) for weight, update in terms]
    B = torch.cat([weight * B.double() for weight, B, _ in changes], dim=1)
    return svd_of_product(B, torch.cat([A.double() for _, _, A in changes]))


def _largest_rank(terms: list[Term]) -> int:
    return max(len(_thin_change(update)[1]) for _, update in terms)


def _leading(triplets: Factors, r: int) -> Factors:
    return Factors(triplets.U[:, :r], triplets.S[:r], triplets.Vh[:r])


def _thin_change(update: SpectralUpdate) -> tuple[Tensor, Tensor]:
    thin = update.thin_change()
    if thin is None:
        raise SpectralError(
            f"{type(update).__name__} replaces the weight, and a weighted sum of weights has no factors of its size. "
            "Merge the adapters into copies of the model and average those."
        )
    return thin


def _check(
    tuner: BaseTuner,
    adapters: Sequence[str],
    weights: Sequence[float],
    adapter_name: str,
    combination_type: str,
    svd_rank: int | None,
) -> None:
    if adapter_name in tuner.peft_config:
        raise ValueError(f"There is an adapter '{adapter_name}' already; choose another name.")
    if not adapters or len(adapters) != len(weights):
        raise ValueError(f"There should be one weight for each adapter, got {len(weights)} for {list(adapters)}.")
    for name in adapters:
        if name not in tuner.peft_config:
            raise ValueError(f"Adapter {name} does not exist; there are {sorted(tuner.peft_config)}.")
    if combination_type not in COMBINATIONS:
        raise ValueError(f"Invalid combination_type: {combination_type}; one of {', '.join(COMBINATIONS)}.")
    if svd_rank is not None and (combination_type != "svd" or svd_rank < 1):
        raise ValueError(f"`svd_rank` should be positive, with combination_type 'svd', got {svd_rank}.")
    for name in adapters:
        _refuse_other_training(name, tuner.peft_config[name])  # type: ignore[arg-type]


def _refuse_other_training(name: str, config: SpectralConfig) -> None:
    if config.target_parameters:
        raise ValueError(
            f"The adapter '{name}' changes parameters (`target_parameters`), which cannot be added up; merge the "
            "adapters into copies of the model and average those."
        )
    if config.modules_to_save or config.trainable_token_indices or config.bias != "none":
        raise ValueError(
            f"The adapter '{name}' trains more than its updates (modules_to_save, trainable_token_indices or bias), "
            "which cannot be added up."
        )
