"""Adapters on parameters that are a stack of matrices, one for each expert of a mixture."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.func import functional_call

from spectral_peft.config import SpectralConfig
from spectral_peft.layer import SpectralLinear
from spectral_peft.unsupported import refuse_split_weight
from spectral_peft.update import SpectralUpdate


class Slice(nn.Module):
    """One matrix of a stacked parameter as a layer of its own; its `weight` is a view of the parameter."""

    def __init__(self, owner: nn.Module, parameter_name: str, index: int) -> None:
        super().__init__()
        self.owner = (owner,)  # in a tuple: as a child it would be there twice
        self.parameter_name = parameter_name
        self.index = index

    @property
    def weight(self) -> Tensor:
        return getattr(self.owner[0], self.parameter_name)[self.index]

    def extra_repr(self) -> str:
        return f"{self.parameter_name}[{self.index}]"


class ExpertLinear(SpectralLinear):
    """The adapters of one matrix of a stack. It is never called: `SpectralExperts` asks it for its change."""

    def new_update(self, config: SpectralConfig, r: int) -> SpectralUpdate:
        update = super().new_update(config, r)
        if update.replaces:
            raise TypeError(
                f"{self.key} is one matrix of a parameter (`target_parameters`), which {type(config).__name__} cannot "
                "replace. Choose a method that adds to the weight: SVFit, PiSSA, or SST with `pool`."
            )
        if config.dropout:
            raise ValueError(
                f"{self.key} is one matrix of a parameter (`target_parameters`), whose input an adapter does not see: "
                f"`dropout` should be 0, got {config.dropout}."
            )
        return update

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """PEFT's `convert_to_lora` makes a LoRA for modules only."""
        return False


class SpectralExperts(nn.Module):
    """A module of which some parameters W (experts, p, q) are stacks of matrices with adapters.

    It is called with W + [matrix of update 0, matrix of update 1, ...] in the place of W, rounded to the dtype of W:
    this sum is built in every forward pass, and kept for the backward pass. Each matrix is a layer with a name of its
    own, such as experts.down_proj.7, and everything but the forward pass is that of other layers.
    """

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.parameter_names: tuple[str, ...] = ()

    @property
    def configs(self) -> dict[str, SpectralConfig]:
        """The config of each adapter of these parameters."""
        layers = (self.layers_of(name)[0] for name in self.parameter_names)
        return {name: config for layer in layers for name, config in layer.configs.items()}

    def layers_of(self, parameter_name: str) -> list[SpectralLinear]:
        """The layers of the matrices of a parameter, in their order."""
        return list(self.get_submodule(parameter_name))  # type: ignore[call-overload]

    def add_parameter(self, parameter_name: str, key: str) -> None:
        """Makes a layer without adapters for each matrix of a parameter, whose full name is `key`.

        Raises:
            TypeError: the parameter is not a stack of floating point matrices.
            SpectralError: this process has not the whole of it.
        """
        stack = getattr(self.base_layer, parameter_name)
        refuse_split_weight(stack, key)
        if stack.ndim != 3 or not stack.is_floating_point():
            raise TypeError(
                f"Target parameter {key} is {stack.dtype} of shape {tuple(stack.shape)}; supported are floating point "
                "stacks of matrices (experts, rows, columns). Name modules in `target_modules`."
            )
        layers = (
            ExpertLinear(Slice(self.base_layer, parameter_name, index), f"{key}.{index}")
            for index in range(len(stack))
        )
        # In a new dictionary: PEFT is walking over the children of this module when it adds a second adapter.
        self._modules = {**self._modules, parameter_name: nn.ModuleList(layers)}
        self.parameter_names = (*self.parameter_names, parameter_name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        changed = {name: self._changed(name) for name in self.parameter_names}
        present = {name: value for name, value in changed.items() if value is not None}
        return functional_call(self.base_layer, present, args, kwargs)

    def _changed(self, parameter_name: str) -> Tensor | None:
        """The parameter with the changes of the active adapters, or None if it stays as it is."""
        layers = self.layers_of(parameter_name)
        first = layers[0]
        if first.disable_adapters and first.merged:
            for layer in layers:
                layer.unmerge()
        active = [name for name in first.active_adapters if name in first.configs]
        if first.disable_adapters or first.merged or not active:
            return None
        base: Tensor = getattr(self.base_layer, parameter_name)
        total = base
        with torch.autocast(base.device.type, enabled=False):
            for adapter_name in active:
                total = total + _changes(layers, adapter_name)
        return total.to(base.dtype)

    def merged_parameter(self, parameter_name: str, adapter_name: str) -> Tensor:
        """A parameter with one adapter merged, as a new tensor."""
        return torch.stack([layer.merged_weight(adapter_name) for layer in self.layers_of(parameter_name)])

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """PEFT's hook for layers that it does not know: the module without adapters."""
        if merge:
            for name in self.parameter_names:
                for layer in self.layers_of(name):
                    layer.merge(safe_merge=safe_merge, adapter_names=adapter_names)
        return self.base_layer


def _changes(layers: Sequence[SpectralLinear], adapter_name: str) -> Tensor:
    """The changes of all matrices, as the images of the unit vectors: training then has the method's own gradient."""
    update = layers[0].update_of(adapter_name)
    assert update is not None
    _, value = next(update.trained_parameters())
    dtype = torch.promote_types(value.dtype, torch.float32)
    units = torch.eye(layers[0].in_features, dtype=dtype, device=value.device)
    return torch.stack([layer.change(adapter_name, units) for layer in layers]).mT  # type: ignore[misc]


def expert_layers(
    parent: nn.Module, name: str, module: nn.Module, parameter_name: str, key: str
) -> list[SpectralLinear]:
    """The layers of the matrices of a parameter of `module`, the child `name` of `parent`, wrapped in its place.

    PEFT names the wrapper, or what is in it, if there is one already.

    Raises:
        TypeError: as `SpectralExperts.add_parameter`; or the module has an adapter of another PEFT method.
    """
    if isinstance(module, BaseTunerLayer):
        raise TypeError(f"The module of target parameter {key} has an adapter already ({type(module).__name__}).")
    wrappers = [candidate for candidate in (module, parent) if isinstance(candidate, SpectralExperts)]
    experts = wrappers[0] if wrappers else SpectralExperts(module)
    if parameter_name not in experts.parameter_names:
        experts.add_parameter(parameter_name, key)
    if not wrappers:
        setattr(parent, name, experts)
    return experts.layers_of(parameter_name)
