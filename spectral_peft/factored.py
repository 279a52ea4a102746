"""Models whose weights exist as factors only: built from a config, saved and loaded without a dense weight."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PretrainedConfig, PreTrainedModel
from transformers.utils import CONFIG_NAME, GENERATION_CONFIG_NAME

from spectral_peft.card import complete_card
from spectral_peft.config import SpectralConfig
from spectral_peft.errors import SpectralError
from spectral_peft.stored import load_config, load_tensors
from spectral_peft.targets import other_modules, targeted_modules


BASE = "base"
"""Subfolder of a factored checkpoint with the config of the model: beside adapter_config.json, transformers would take
a config.json for that of a model whose dense weights are there too."""
FAR_MORE = 100
"""A checkpoint may lack tensors, which are then named, but no model has this many times the numbers of its own."""

LOADING = 'from spectral_peft import load_factored\n\nmodel = load_factored("{}")'


def build_factored(
    model_config: PretrainedConfig,
    config: SpectralConfig,
    *,
    auto_class: Any = AutoModelForCausalLM,
    device: torch.device | str | None = None,
) -> PeftModel:
    """A model with the architecture of `model_config` whose targeted weights exist as factors only.

    The model is built on the meta device, gets its adapter there, and what the adapter does not replace is then
    allocated and initialized as transformers does. The factors start at random, with one scale for all, that of the
    dense initialization. Everything trains and is saved with the adapter: `modules_to_save` is set to what is not
    targeted, unless `config` names others, and `bias` to "spectral_only" if it is "none".

    Args:
        model_config: For example `AutoConfig.from_pretrained(...)`, or a `LlamaConfig`.
        config: An `SCTConfig` with `init="random"`. It is copied; its `init_std`, if None, becomes that of
            `model_config`, such as its `initializer_range`.
        auto_class: The class whose `from_config` builds the model.
        device: None is the default device. "meta" allocates nothing at all, for `estimate_memory`.

    Raises:
        ValueError: weights of the model are tied, such as those of embedding and head.
        SpectralError: the method of `config` cannot start without a weight.
    """
    with torch.device("meta"):
        base = auto_class.from_config(model_config)
    config = copy.deepcopy(config)
    _refuse_tied(base)
    if getattr(config, "init", None) == "random" and getattr(config, "init_std", 0.0) is None:
        config.init_std = _initial_std(model_config)  # type: ignore[attr-defined]
    if config.modules_to_save is None:
        config.modules_to_save = other_modules(base, targeted_modules(base, config))
    if config.bias == "none":
        config.bias = "spectral_only"
    return _materialized(base, config, device)


def _materialized(base: nn.Module, config: SpectralConfig, device: torch.device | str | None) -> PeftModel:
    """A model on the meta device with its adapter, allocated without the weights that the adapter replaces."""
    device = torch.get_default_device() if device is None else torch.device(device)
    with device:
        model: PeftModel = get_peft_model(base, config)
        if device.type != "meta":
            materialize_(model, device)
    return model


def _initial_std(model_config: PretrainedConfig) -> float:
    """The standard deviation of linear layers, looked up as `PreTrainedModel._init_weights` does."""
    config = model_config.get_text_config()
    names = ("initializer_range", "init_std", "initializer_factor")
    return next((getattr(config, name) for name in names if getattr(config, name, None)), 0.02)


def save_factored(model: PeftModel, folder: str | Path, *, shard_bytes: int = 5 * 10**9) -> None:
    """Saves a model of `build_factored`, or one that was converted: all of its tensors, and the config of the model.

    The adapter is saved as `save_pretrained` does it; what does not train is saved beside it, in the same file.

    Args:
        model: What to save.
        folder: Gets adapter_model.safetensors, adapter_config.json and base/config.json, and
            base/generation_config.json for a model that generates.
        shard_bytes: Size above which the tensors go to several files, adapter_model-00001-of-00002.safetensors and so
            on, with an index. PEFT itself loads an adapter from one file only; `load_factored` loads both.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = copy.copy(model.peft_config["default"])
    config.inference_mode, config.base_model_name_or_path = True, None  # a converted model needs its base no more
    base: Any = model.get_base_model()
    base.config.save_pretrained(str(folder / BASE))
    if base.can_generate():
        base.generation_config.save_pretrained(str(folder / BASE))
    model.create_or_update_model_card(str(folder))
    config.save_pretrained(str(folder))
    complete_card(folder, config, loading=LOADING.format(folder.name))
    tensors = get_peft_model_state_dict(model, save_embedding_layers=False)
    tensors |= {name: value for name, value in _beside_adapter(model).items() if name not in tensors}
    pattern = SAFETENSORS_WEIGHTS_NAME.replace(".", "{suffix}.")
    save_torch_state_dict(tensors, folder, filename_pattern=pattern, max_shard_size=shard_bytes)


def _beside_adapter(model: PeftModel) -> dict[str, Tensor]:
    """What the model holds and PEFT saves with no adapter; weights that were given up hold nothing."""
    copies = ("original_module", "modules_to_save", model.base_model.prefix)
    beside = {name: value for name, value in model.state_dict().items() if value.numel()}
    return {name: value for name, value in beside.items() if not any(f".{part}" in name for part in copies)}


def load_factored(
    folder: str | Path, *, auto_class: Any = AutoModelForCausalLM, device: torch.device | str | None = None
) -> PeftModel:
    """Loads what `save_factored` saved, to train on or to generate; no dense weight is allocated.

    Args:
        folder: What `save_factored` wrote.
        auto_class: The class whose `from_config` builds the model.
        device: None is the default device.

    Raises:
        FileNotFoundError: `folder` holds no such model, or not all of its files.
        SpectralError: a tensor is missing or does not fit.
    """
    folder = Path(folder)
    config_file = folder / BASE / CONFIG_NAME
    if not config_file.is_file():
        raise FileNotFoundError(
            f"{folder} holds no factored model: there is no {config_file}. `save_factored` saves one; an adapter of a "
            "model that exists without it loads with `PeftModel.from_pretrained`."
        )
    tensors = load_tensors(folder)
    config = load_config(folder)
    config.inference_mode = False
    try:
        model_config = AutoConfig.from_pretrained(str(config_file.parent), trust_remote_code=False)
        _refuse_deeper(model_config, tensors)
        _refuse_larger(_planned(model_config, config, auto_class, "meta"), tensors)
    except SpectralError:
        raise
    except Exception as error:  # whatever transformers and the model's own code make of a damaged config
        raise SpectralError(f"The model of {config_file} cannot be built: {error!r:.1000}") from error
    model = _planned(model_config, config, auto_class, device)
    beside = _beside_adapter(model).keys()
    if missing := sorted(beside - tensors.keys()):
        raise SpectralError(
            f"The checkpoint in {folder} lacks {len(missing)} tensors of the model, such as {missing[0]}: it is "
            "incomplete. `save_factored` saves everything, `save_pretrained` only what trains."
        )
    try:
        model.load_state_dict({name: tensors.pop(name) for name in beside}, strict=False)
        set_peft_model_state_dict(model, tensors)
    except KeyError as error:  # what PEFT raises for a module of `modules_to_save` that is not there
        raise SpectralError(f"The checkpoint in {folder} has no tensor {error}: it is incomplete.") from error
    except RuntimeError as error:  # what torch raises for one of another shape
        raise SpectralError(f"The checkpoint in {folder} does not fit {config_file}: {error}") from error
    if (folder / BASE / GENERATION_CONFIG_NAME).is_file():
        base: Any = model.get_base_model()
        base.generation_config = GenerationConfig.from_pretrained(str(folder / BASE))
    return model


def _planned(
    model_config: PretrainedConfig, config: SpectralConfig, auto_class: Any, device: torch.device | str | None
) -> PeftModel:
    """The model of a checkpoint, which trains what `config` says and no more."""
    with torch.device("meta"):
        base = auto_class.from_config(model_config)
    _refuse_tied(base)
    return _materialized(base, copy.deepcopy(config), device)


def _refuse_deeper(model_config: PretrainedConfig, tensors: dict[str, Tensor]) -> None:
    layers = getattr(model_config.get_text_config(), "num_hidden_layers", 0)
    if layers > len(tensors):
        raise SpectralError(
            f"The config of the model has {layers} layers, the checkpoint only {len(tensors)} tensors."
        )


def _refuse_larger(planned: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Before anything is allocated: a damaged config may describe a model that no machine holds."""
    wanted = sum(value.numel() for value in planned.parameters())
    stored = sum(value.numel() for value in tensors.values())
    if wanted > FAR_MORE * stored:
        raise SpectralError(
            f"The config describes a model of {wanted:,} parameters, the checkpoint holds {stored:,} numbers: they do "
            "not belong together."
        )


def _refuse_tied(model: PreTrainedModel) -> None:
    if model.all_tied_weights_keys:
        pairs = ", ".join(f"{one} and {other}" for one, other in sorted(model.all_tied_weights_keys.items()))
        raise ValueError(
            f"Weights of the model are tied ({pairs}), which train apart from each other here. Set "
            "`tie_word_embeddings=False` in the config of the model."
        )


@torch.no_grad()
def materialize_(model: nn.Module, device: torch.device | str) -> None:
    """Allocates what is on the meta device, and initializes it as the transformers model that it is part of does."""

    def visit(module: nn.Module, owner: PreTrainedModel | None) -> None:
        owner = module if isinstance(module, PreTrainedModel) else owner
        for child in module.children():
            visit(child, owner)
        tensors = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        if any(tensor.is_meta for tensor in tensors):
            module.to_empty(device=device, recurse=False)
            if owner is not None:
                owner._init_weights(module)

    visit(model, None)
