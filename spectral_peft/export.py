"""The way out to servers that load nothing but plain LoRA."""

from __future__ import annotations

import warnings
from collections.abc import Collection
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm
from transformers.pytorch_utils import Conv1D

from spectral_peft.checkpoint import adapter_updates
from spectral_peft.config import SpectralConfig
from spectral_peft.embedding import SpectralEmbedding
from spectral_peft.errors import SpectralError
from spectral_peft.experts import ExpertLinear
from spectral_peft.layer import SpectralLinear
from spectral_peft.linalg import Factors, svd_of_product, truncated_svd
from spectral_peft.stored import new_folder


MAX_SERVED_RANK = 512
"""The largest `max_lora_rank` of vLLM."""


@torch.no_grad()
def export_lora(
    model: PeftModel, folder: str | Path, adapter_name: str = "default", rank: int | None = None
) -> dict[str, float]:
    """Saves an adapter as a plain LoRA, which stock PEFT and servers load without this package.

    The change of each weight is decomposed as U diag(S) Vh from its thin factors, without the dense change, and saved
    as lora_B = U sqrt(S) and lora_A = sqrt(S) Vh. One rank for all, filled up with zeros, and `lora_alpha` equal to
    it, so that there is neither a rank nor an alpha pattern. `modules_to_save`, biases and token embeddings that were
    trained are saved too; a warning then says that vLLM and llama.cpp refuse them, or that the rank is beyond vLLM's.
    The model is left as it is.

    Args:
        model: A model with a spectral adapter.
        folder: Where adapter_model.safetensors and adapter_config.json go. It should not exist, or be empty.
        adapter_name: The adapter to export.
        rank: The rank of the LoRA. None takes the smallest that is exact: that of an SVFit adapter is r, of a PiSSA
            adapter 2 r, of SST on a pool twice the pool. With a smaller one the best approximation is saved,
            up to about 1 % of its norm.

    Returns:
        The relative error of the change in the Frobenius norm, by module; rounding where `rank` is None.

    Raises:
        SpectralError: the change has full rank, as that of an adapter that replaces its base weight, and there is no
            `rank`; or it is one of `target_parameters`; or `folder` holds something.
        ValueError: the model has no such spectral adapter, or `rank` is not positive.
    """
    folder = new_folder(folder)
    layers = {layer.key: layer for _, layer, _ in adapter_updates(model, adapter_name)}
    if not layers:
        raise ValueError(f"The model has no spectral adapter named '{adapter_name}'.")
    if any(isinstance(layer, ExpertLinear) for layer in layers.values()):
        raise SpectralError(
            f"The adapter '{adapter_name}' changes parameters that are stacks of matrices (`target_parameters`), for "
            "which servers have no LoRA. Use `export_merged`, or `merge_and_unload`."
        )
    if rank is not None and rank < 1:
        raise ValueError(f"`rank` should be positive, got {rank}.")
    factors = {
        key: change_triplets(layer, adapter_name, rank) for key, layer in tqdm(layers.items(), "Exporting", delay=2)
    }
    r = rank or max(len(S) for (_, S, _), _ in factors.values())
    tensors = _untouched_tensors(model, adapter_name)
    _warn_of_servers(tensors, r)
    for key, (triplets, _) in factors.items():
        tensors.update(_lora_tensors(layers[key], triplets, r))
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
    _lora_config(model, adapter_name, layers, r).save_pretrained(str(folder))
    return {key: error for key, (_, error) in factors.items()}


def _warn_of_servers(others: Collection[str], r: int) -> None:
    reasons = []
    if others:
        reasons.append(
            f"vLLM and llama.cpp refuse it, since it holds {len(others)} tensors beside the LoRA, such as "
            f"{min(others)} (from modules_to_save, trainable_token_indices or bias)"
        )
    if r > MAX_SERVED_RANK:
        reasons.append(f"vLLM refuses ranks above {MAX_SERVED_RANK}, and this one is {r}; pass a smaller `rank`")
    if reasons:
        warnings.warn(
            f"Stock PEFT loads this LoRA, but {', and '.join(reasons)}. `export_merged` writes a dense model.",
            stacklevel=3,
        )


def change_triplets(layer: SpectralLinear, adapter_name: str, rank: int | None) -> tuple[Factors, float]:
    """The leading triplets in float64 of what an adapter changes in one weight, and the relative error of leaving
    out the others.
    """
    layer.settle(adapter_name)
    update = layer.update_of(adapter_name)
    assert update is not None
    thin = update.thin_change()
    if thin is not None:
        B, A = thin
        triplets = svd_of_product(B.double(), A.double())
    elif rank is None:
        raise SpectralError(
            f"{layer.key}: the change by the adapter '{adapter_name}' has full rank, so no small LoRA is exact. Pass "
            "`rank` for the best approximation of that rank, or use `merge_and_unload`."
        )
    else:
        delta = layer.get_delta_weight(adapter_name).double()
        delta = delta.mT if layer.weight_is_transposed else delta
        whole = delta.norm()
        triplets = truncated_svd(delta, min(rank, *delta.shape))
        rest = (whole**2 - triplets.S.norm() ** 2).clamp(min=0).sqrt()
        return triplets, float(rest / whole) if whole else 0.0
    kept = Factors(triplets.U[:, :rank], triplets.S[:rank], triplets.Vh[:rank])
    whole = triplets.S.norm()
    return kept, float(triplets.S[len(kept.S) :].norm() / whole) if whole else 0.0


def _lora_tensors(layer: SpectralLinear, triplets: Factors, r: int) -> dict[str, Tensor]:
    U, S, Vh = triplets
    root, missing = S.sqrt(), r - len(S)
    A = F.pad(root[:, None] * Vh, (0, 0, 0, missing)).float().contiguous().cpu()
    B = F.pad(U * root, (0, missing)).float().contiguous().cpu()
    prefix = f"base_model.model.{layer.key}."
    if isinstance(layer, SpectralEmbedding):
        return {f"{prefix}lora_embedding_A": A, f"{prefix}lora_embedding_B": B}
    return {f"{prefix}lora_A.weight": A, f"{prefix}lora_B.weight": B}


def _untouched_tensors(model: PeftModel, adapter_name: str) -> dict[str, Tensor]:
    """What the adapter's checkpoint holds beside its updates: modules trained in full, biases, token embeddings."""
    prefix = str(model.base_model.prefix)
    state = get_peft_model_state_dict(model, adapter_name=adapter_name)
    return {key: value.contiguous().cpu() for key, value in state.items() if f".{prefix}" not in key}


def _lora_config(model: PeftModel, adapter_name: str, layers: Collection[str], r: int) -> LoraConfig:
    config: SpectralConfig = model.peft_config[adapter_name]  # type: ignore[assignment]
    return LoraConfig(
        r=r,
        lora_alpha=r,
        target_modules=_shortest_names(model.get_base_model(), layers),
        exclude_modules=None,
        bias="lora_only" if config.bias == "spectral_only" else config.bias,  # type: ignore[arg-type]
        modules_to_save=config.modules_to_save,
        trainable_token_indices=config.trainable_token_indices,
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),
        task_type=config.task_type,
        base_model_name_or_path=config.base_model_name_or_path,
        revision=config.revision,
        inference_mode=True,
    )


def _shortest_names(model: nn.Module, keys: Collection[str]) -> list[str]:
    """The last parts of the names, if they name these modules and no others; else the names."""
    ends = {key.rpartition(".")[2] for key in keys}
    named = {name for name, _ in model.named_modules() if name.rpartition(".")[2] in ends}
    return sorted(ends if named == set(keys) else keys)
