"""Singular value pruning: the small values of a trained adapter are dropped, and their vectors with them."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import NamedTuple

import torch
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from spectral_peft.card import complete_card
from spectral_peft.config import SpectralConfig
from spectral_peft.errors import SpectralError
from spectral_peft.factored import BASE, LOADING
from spectral_peft.linalg import Factors, svd
from spectral_peft.stored import StoredAdapter, new_folder
from spectral_peft.tuners.sct import SCTConfig
from spectral_peft.update import Size, SpectralUpdate


__all__ = ["Pruned", "prune"]


class Pruned(NamedTuple):
    """What pruning kept of one weight: `kept` of `values` singular values, and `error`, ||W' - W||_F / ||W||_F."""

    values: int
    kept: int
    error: float


@torch.no_grad()
def prune(adapter: StoredAdapter, folder: str | Path, share: float) -> dict[str, Pruned]:
    """Saves an adapter that keeps the largest singular values of each weight, as an SCT adapter of their rank.

    Kept are the fewest values with sum_{i <= r} S_i >= share * sum_i S_i (Zhao et al., 2025, appendix G), after an SVD
    of the weight as it was trained. All else that the adapter holds is copied.

    Args:
        adapter: Of a method that stands in the place of the base weight: SST without a pool, or SCT.
        folder: Where the pruned adapter goes; it should not exist, or be empty.
        share: Of the sum of the singular values, in (0, 1].

    Returns:
        What was kept, by module.

    Raises:
        ValueError: `share` is not in (0, 1].
        SpectralError: the adapter's method adds to the base weight, or `folder` holds something.
    """
    if not 0 < share <= 1:
        raise ValueError(f"`share` should be above 0 and at most 1, got {share}.")
    folder = new_folder(folder)
    pruned: dict[str, Pruned] = {}
    old, new = f".{adapter.config.container}.", f".{SCTConfig(r=1).container}."
    tensors = {name: value for name, value in adapter.tensors.items() if old not in name}
    for module, update in tqdm(adapter.updates.items(), "Pruning", unit=" weights", delay=2):
        if update is None or not update.replaces:
            raise SpectralError(
                f"{module}: an adapter of type {adapter.config.method!r} adds to the base weight, whose "
                "singular values are not its own. `export_lora` with a `rank` makes it smaller."
            )
        pruned[module], kept = _pruned(update, module, share)
        tensors.update({f"base_model.model.{module}{new}{name}": value for name, value in kept.items()})
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
    config = _config(adapter.config, {module: result.kept for module, result in pruned.items()})
    config.save_pretrained(str(folder))
    if (adapter.folder / BASE).is_dir():  # of a factored model
        shutil.copytree(adapter.folder / BASE, folder / BASE)
        complete_card(folder, config, loading=LOADING.format(folder.name))
    return pruned


def _pruned(update: SpectralUpdate, module: str, share: float) -> tuple[Pruned, dict[str, Tensor]]:
    W = update.matrix()
    U, S, Vh = svd(W)
    rounding = S[0] * max(W.shape) * torch.finfo(S.dtype).eps  # all that a weight of lower rank has beside its values
    values = max(1, int(S.gt(rounding).sum()))
    kept = min(values, int((S.double().cumsum(0) < share * S.double().sum()).sum()) + 1)
    rest, whole = S[kept:].norm(), S.norm()
    smaller = SCTConfig(r=kept).build(Size(W.shape[0], W.shape[1], kept, W.dtype, key=module))
    smaller.start_(Factors(U[:, :kept], S[:kept], Vh[:kept]))
    smaller.take_fingerprint_(W)
    smaller.fingerprint[0] = update.fingerprint[0]  # of the base weight, which is not known here
    return Pruned(values, kept, float(rest / whole) if whole else 0.0), smaller.state_dict()


def _config(config: SpectralConfig, ranks: dict[str, int]) -> SCTConfig:
    """The config of an SCT adapter on the same modules, with what every spectral config has."""
    shared = {field.name for field in dataclasses.fields(SpectralConfig) if field.init} - {"peft_type", "auto_mapping"}
    fields = {name: getattr(config, name) for name in shared}
    fields.update(r=max(ranks.values()), rank_pattern=dict(ranks), inference_mode=True, save_start=True)
    return SCTConfig(**fields)
