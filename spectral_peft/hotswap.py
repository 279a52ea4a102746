"""Another adapter's tensors in the place of a loaded one's, without an injection."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from peft.utils.save_and_load import set_peft_model_state_dict
from torch import Tensor

from spectral_peft.checkpoint import adapter_updates
from spectral_peft.config import SpectralConfig
from spectral_peft.errors import SpectralError
from spectral_peft.linalg import same_matrix
from spectral_peft.stored import adapter_folder, load_config, load_tensors
from spectral_peft.update import SAME_START


@torch.no_grad()
def hotswap_adapter(model: PeftModel, source: str | Path, adapter_name: str = "default") -> None:
    """Writes the tensors of a saved adapter into those of a loaded one, which keeps its name.

    What `peft.utils.hotswap.hotswap_adapter` does for LoRA. All parameters stay where they are, so that a compiled
    model is not compiled again. The two adapters have to agree in method, ranks and targets, and in what trains beside
    the updates. All is checked before anything changes.

    Args:
        model: A model with the adapter, which `torch.compile` may have wrapped.
        source: A folder with the other adapter, or its id on the Hub.
        adapter_name: The adapter whose tensors are overwritten.

    Raises:
        FileNotFoundError: there is no such adapter.
        SpectralError: the adapters do not agree, a file is damaged, or `source` was trained on another base weight.
        ValueError: the model has no spectral adapter of this name, or has merged it.
    """
    model = getattr(model, "_orig_mod", model)
    layers = [layer for _, layer, _ in adapter_updates(model, adapter_name)]
    if not layers:
        raise ValueError(f"The model has no spectral adapter named '{adapter_name}'.")
    if any(adapter_name in layer.merged_adapters for layer in layers):
        raise ValueError(f"The adapter '{adapter_name}' is merged; call `unmerge_adapter` before it is swapped.")
    folder = adapter_folder(source)
    config: Any = model.peft_config[adapter_name]
    _check_config(config, load_config(folder))
    tensors = load_tensors(folder)
    _check_names(set(get_peft_model_state_dict(model, adapter_name=adapter_name)), set(tensors), folder)
    if not config.save_start:
        _check_starts(model, adapter_name, tensors)
    set_peft_model_state_dict(model, tensors, adapter_name)
    for layer in layers:
        layer.settle(adapter_name)


def _check_config(own: SpectralConfig, other: SpectralConfig) -> None:
    names = ("peft_type", "save_start", *own.function_fields)
    differing = [
        f"{name} is {getattr(own, name)!r} and {getattr(other, name, None)!r}"
        for name in names
        if getattr(own, name) != getattr(other, name, None)
    ]
    if differing:
        raise SpectralError(
            f"The loaded adapter and the other one do not agree: {', '.join(differing)}. Load the other one under a "
            "name of its own with `load_adapter`."
        )


def _check_names(own: set[str], other: set[str], folder: Path) -> None:
    differing = sorted(own ^ other)
    if differing:
        raise SpectralError(
            f"The loaded adapter and that in {folder} do not hold the same tensors: {len(own - other)} are missing "
            f"there and {len(other - own)} have no place here, such as {differing[0]}. Load the other one under a "
            "name of its own with `load_adapter`."
        )


def _check_starts(model: PeftModel, adapter_name: str, tensors: dict[str, Tensor]) -> None:
    """A checkpoint without singular vectors goes on with those that are there; its fingerprint tells whether."""
    for prefix, layer, update in adapter_updates(model, adapter_name):
        noted = tensors[prefix.removesuffix(f"{adapter_name}.") + "fingerprint"]
        theirs, own = (side[1].cpu().view(torch.float32) for side in (noted, update.fingerprint))
        if not same_matrix(theirs, own, SAME_START):
            raise SpectralError(
                f"{layer.key}: the other adapter was trained with other singular vectors than those of "
                f"'{adapter_name}', and its checkpoint does not hold them. Save it with `save_start=True`."
            )
