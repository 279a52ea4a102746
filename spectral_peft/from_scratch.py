"""Models that train from nothing in factored form, of which no dense weight is ever allocated."""

from __future__ import annotations

import copy
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from peft.tuners.tuners_utils import check_target_module_exists
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from spectral_peft.config import SpectralConfig


def from_scratch(
    model_config: PretrainedConfig,
    config: SpectralConfig,
    *,
    auto_class: Any = AutoModelForCausalLM,
    device: torch.device | str | None = None,
) -> PeftModel:
    """A model with the architecture of `model_config` whose targeted weights exist as factors only.

    The model is built on the meta device, gets its adapter there, and what the adapter does not replace is then
    allocated and initialized as transformers does. The factors start at random, with the scale of the dense
    initialization. Everything trains and is saved with the adapter: `modules_to_save` is set to what is not targeted,
    unless `config` names others.

    Args:
        model_config: For example `AutoConfig.from_pretrained(...)`, or a `LlamaConfig`.
        config: An `SCTConfig` with `init="random"`. It is copied.
        auto_class: The class whose `from_config` builds the model.
        device: Where what is not factored goes; None is the default device.

    Raises:
        ValueError: the input and output embeddings are tied, and only one of them or both are targeted.
        SpectralError: the method of `config` cannot start without a weight.
    """
    device = torch.get_default_device() if device is None else torch.device(device)
    with torch.device("meta"):
        base = auto_class.from_config(model_config)
    config = copy.deepcopy(config)
    targeted = {name for name, _ in base.named_modules() if check_target_module_exists(config, name)}
    if config.modules_to_save is None:
        config.modules_to_save = _untouched(base, targeted)
    with device:
        model: PeftModel = get_peft_model(base, config)
        materialize_(model, device)
    return model


def _untouched(model: nn.Module, targeted: set[str]) -> list[str]:
    """The last names of the modules that hold parameters and take no adapter."""
    holders = (name for name, module in model.named_modules() if list(module.parameters(recurse=False)))
    return sorted({name.rpartition(".")[2] for name in holders if name not in targeted})


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
