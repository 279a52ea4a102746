"""What a model with adapters trains, and what it keeps in memory: two numbers that papers like to mix."""

from __future__ import annotations

from typing import NamedTuple

from peft.utils.other import ModulesToSaveWrapper
from torch import nn
from transformers.pytorch_utils import Conv1D

from spectral_peft.layer import SpectralLinear
from spectral_peft.targets import other_modules


class ParameterReport(NamedTuple):
    """Numbers (not bytes, where not said) of a model with spectral adapters.

    Attributes:
        dense: Parameters of the model without adapters.
        trained: Parameters that an optimizer moves. For SST r (m + n) + min(m, n) per matrix, and what else trains.
        stored: Parameters in memory: trained ones, frozen starts, and base weights that were not freed.
        weight_bytes: Bytes of what is stored.
        gradient_bytes: Bytes of the gradients.
        adam_bytes: Bytes of the two moments that Adam keeps.
    """

    dense: int
    trained: int
    stored: int
    weight_bytes: int
    gradient_bytes: int
    adam_bytes: int

    def __str__(self) -> str:
        mib = 2**20
        return (
            f"trained {self.trained:,} of {self.dense:,} ({self.trained / self.dense:.2%}), stored {self.stored:,} "
            f"({self.stored / self.dense:.2%}); weights {self.weight_bytes / mib:,.1f} MiB, gradients "
            f"{self.gradient_bytes / mib:,.1f} MiB, Adam's moments {self.adam_bytes / mib:,.1f} MiB"
        )


def parameter_report(model: nn.Module) -> ParameterReport:
    """Counts the parameters of a model with spectral adapters, tied ones once."""
    layers = [module for module in model.modules() if isinstance(module, SpectralLinear)]
    containers = [layer.get_submodule(name) for layer in layers for name in layer.adapter_layer_names]
    # PEFT trains a copy of each module in `modules_to_save` and keeps the original beside it.
    copies = [module.modules_to_save for module in model.modules() if isinstance(module, ModulesToSaveWrapper)]
    added = {id(value) for module in (*containers, *copies) for value in module.parameters()}
    parameters = list(model.parameters())
    trained = [value for value in parameters if value.requires_grad]
    freed = sum(layer.out_features * layer.in_features for layer in layers if layer.is_freed)
    gradients = sum(value.numel() * value.element_size() for value in trained)
    return ParameterReport(
        dense=sum(value.numel() for value in parameters if id(value) not in added) + freed,
        trained=sum(value.numel() for value in trained),
        stored=sum(value.numel() for value in parameters),
        weight_bytes=sum(value.numel() * value.element_size() for value in parameters),
        gradient_bytes=gradients,
        adam_bytes=2 * gradients,
    )


def untargeted_modules(model: nn.Module) -> list[str]:
    """Names of the modules that hold parameters and take no adapter with "all-linear": embeddings, norms and head.

    As `modules_to_save` they train in full beside the adapters, are saved and resume: for pre-training from scratch.
    A warning names the parameters of a module that holds such modules, or linear layers, beside parameters of its own:
    they stay as they are.
    """
    head = getattr(model, "get_output_embeddings", lambda: None)()
    targeted = [
        name
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and module is not head
    ]
    return other_modules(model, targeted)
