"""The way back to dense weights, one shard of a checkpoint at a time."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from peft import PeftModel
from peft.utils import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm
from transformers.core_model_loading import revert_weight_conversion
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from spectral_peft.errors import SpectralError
from spectral_peft.experts import SpectralExperts
from spectral_peft.layer import SpectralLinear, refuse_merged
from spectral_peft.quantized import quantization_of
from spectral_peft.stored import new_folder


class _Entry(NamedTuple):
    """A tensor of the dense checkpoint that is not there yet."""

    name: str
    like: Tensor
    make: Callable[[], Tensor]


@torch.no_grad()
def export_merged(
    model: PeftModel,
    folder: str | Path,
    adapter_name: str = "default",
    *,
    dtype: torch.dtype | None = None,
    shard_bytes: int = 5 * 10**9,
) -> None:
    """Saves the dense model with an adapter merged, as `AutoModel...from_pretrained` loads it without this package.

    Weights are merged, written and forgotten shard by shard: beside the model, memory holds one shard. Quantized
    weights are dequantized, and not quantized again. The model is left as it is. A folder that could not be finished
    is removed.

    Args:
        model: A model with spectral adapters, factored ones included.
        folder: Gets config.json, generation_config.json for a model that generates, and model.safetensors, or several
            of these with their index. It should not exist, or be empty. A model knows no tokenizer: save it there too,
            with its own `save_pretrained`, for programs such as llama.cpp's convert_hf_to_gguf.py.
        adapter_name: The adapter to merge.
        dtype: That of the saved weights; None leaves each in the dtype of its base weight, or in the one that a
            quantized weight is dequantized to.
        shard_bytes: Size above which a new file begins.

    Raises:
        ValueError: the model has no such spectral adapter, or has merged one.
        SpectralError: `folder` holds something, or could not be written, because the disk is full for example.
    """
    refuse_merged(model, "a merged model is exported")
    folder = new_folder(folder)
    base: Any = model.get_base_model()
    entries = list(_entries(base, adapter_name, dtype))
    existed = folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _config(base, entries, dtype).save_pretrained(str(folder))
        if base.can_generate():
            base.generation_config.save_pretrained(str(folder))
        _write(base, entries, folder, shard_bytes)
    except Exception as error:
        shutil.rmtree(folder, ignore_errors=True)
        if existed:
            folder.mkdir()
        if isinstance(error, OSError) or "I/O error" in str(error):  # safetensors wraps the errors of the disk
            raise SpectralError(f"The merged model could not be written to {folder}: {error}") from error
        raise


def _config(base: Any, entries: list[_Entry], dtype: torch.dtype | None) -> Any:
    """The config of the model, not quantized, which no longer ties weights if training has made them differ."""
    config = copy.deepcopy(base.config)
    config.architectures = [type(base).__name__]  # as transformers notes it when it saves a model
    config.dtype = dtype or base.dtype
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    if base.all_tied_weights_keys.keys() & {entry.name for entry in entries}:
        config.tie_word_embeddings = False
    return config


def _entries(base: Any, adapter_name: str, dtype: torch.dtype | None) -> Iterator[_Entry]:
    """The state dict of the dense model, in its order; no weight is merged yet.

    The config ties all or nothing: where training has made one pair differ, all names are there.
    """
    layers = [module for module in base.modules() if isinstance(module, SpectralLinear)]
    if not any(adapter_name in layer.configs for layer in layers):
        raise ValueError(f"The model has no spectral adapter named '{adapter_name}'.")
    tensors = {name: (value, make) for name, value, make in _tensors(base, "", adapter_name)}
    sources = {name: source for name, source in base.all_tied_weights_keys.items() if name in tensors}
    tied = all(
        source in tensors and _is_same(tensors[name][1](), tensors[source][1]()) for name, source in sources.items()
    )
    for name, (value, make) in tensors.items():
        if not (tied and name in sources):
            target = value.dtype if dtype is None or not value.is_floating_point() else dtype
            yield _Entry(name, value.to("meta", target), partial(_as, make, target))


def _as(make: Callable[[], Tensor], dtype: torch.dtype) -> Tensor:
    made = make()
    moved = made.to("cpu", dtype).contiguous()
    return moved.clone() if moved is made else moved  # a file holds no two names of one tensor


def _is_same(one: Tensor, other: Tensor) -> bool:
    return one.data_ptr() == other.data_ptr() or torch.equal(one, other)


Named = Iterator[tuple[str, Tensor, Callable[[], Tensor]]]


def _tensors(module: nn.Module, prefix: str, adapter_name: str) -> Named:
    """Name, a tensor of the shape and dtype, and the tensor's maker, for what the dense `module` would save."""
    if isinstance(module, ModulesToSaveWrapper):
        trained = adapter_name in module.modules_to_save
        copied = module.modules_to_save[adapter_name] if trained else module.original_module
        yield from _tensors(copied, prefix, adapter_name)
    elif isinstance(module, AuxiliaryTrainingWrapper):
        raise SpectralError(f"{prefix[:-1]}: token embeddings that were trained apart need `merge_and_unload`.")
    elif isinstance(module, SpectralExperts):
        yield from _merged_experts(module, prefix, adapter_name)
    elif isinstance(module, SpectralLinear):
        yield from _merged_tensors(module, prefix, adapter_name)
    else:
        kept = set(module.state_dict(keep_vars=True))
        own = {**dict(module.named_parameters(recurse=False)), **dict(module.named_buffers(recurse=False))}
        backend = quantization_of(module, prefix[:-1])
        if backend is not None:
            weight = backend.get_base_weight(module)
            del own["weight"]
            yield f"{prefix}weight", weight.to("meta"), partial(backend.get_base_weight, module)
        yield from ((f"{prefix}{name}", value, value.detach) for name, value in own.items() if name in kept)
        for name, child in module.named_children():
            yield from _tensors(child, f"{prefix}{name}.", adapter_name)


def _merged_tensors(layer: SpectralLinear, prefix: str, adapter_name: str) -> Named:
    for name, value, make in _tensors(layer.get_base_layer(), prefix, adapter_name):
        if name == f"{prefix}weight" and layer.update_of(adapter_name) is not None:
            dense = torch.empty(layer.out_features, layer.in_features, dtype=value.dtype, device="meta")
            yield name, dense, partial(layer.merged_weight, adapter_name)
        else:
            yield name, value, make


def _merged_experts(experts: SpectralExperts, prefix: str, adapter_name: str) -> Named:
    adapted = {
        f"{prefix}{name}": name
        for name in experts.parameter_names
        if experts.layers_of(name)[0].update_of(adapter_name) is not None
    }
    for name, value, make in _tensors(experts.base_layer, prefix, adapter_name):
        yield name, value, partial(experts.merged_parameter, adapted[name], adapter_name) if name in adapted else make


def _write(base: Any, entries: list[_Entry], folder: Path, shard_bytes: int) -> None:
    """In the names and shapes of published checkpoints of this architecture, such as one tensor for each expert."""
    planned = {entry.name: entry.like for entry in entries}
    split = split_torch_state_dict_into_shards(planned, max_shard_size=shard_bytes)
    make = {entry.name: entry.make for entry in entries}
    total, file_of = split.metadata["total_size"], {}
    with tqdm(total=total, desc="Merging", unit="B", unit_scale=True, delay=2) as progress:
        for file, names in split.filename_to_tensors.items():
            shard = revert_weight_conversion(base, {name: make[name]() for name in names})
            shard = {name: value.contiguous() for name, value in shard.items()}
            save_file(shard, folder / file, metadata={"format": "pt"})
            file_of.update(dict.fromkeys(shard, file))
            progress.update(sum(planned[name].nbytes for name in names))
    if split.is_sharded:
        index = {"metadata": {"total_size": total}, "weight_map": file_of}
        (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(index, indent=2))
