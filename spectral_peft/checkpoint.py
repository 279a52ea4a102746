"""What an adapter checkpoint holds, and the checks of one before any of it reaches the model."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import chain

from peft.tuners.tuners_utils import BaseTuner
from torch import Tensor, nn

from spectral_peft.config import SpectralConfig
from spectral_peft.errors import SpectralError
from spectral_peft.experts import ExpertLinear, SpectralExperts
from spectral_peft.layer import SpectralLinear
from spectral_peft.sharded import is_sharded
from spectral_peft.update import SpectralUpdate


# What FSDP1, activation checkpointing and torch.compile put into the names of modules. The first two take theirs out
# of state dicts themselves.
_WRAPPER = re.compile(r"\b(_fsdp_wrapped_module|_checkpoint_wrapped_module|_orig_mod)\.")


def unwrapped(name: str) -> str:
    """The name that a module or tensor has without the wrappers around its parents."""
    return _WRAPPER.sub("", name)


def wrapped_keys(model: nn.Module, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns `state_dict`, in unwrapped names, in those of the model's own state dict."""
    names = (name for name, _ in chain(model.named_parameters(), model.named_buffers()) if "_orig_mod." in name)
    own = {unwrapped(name): re.sub("_(fsdp|checkpoint)_wrapped_module\\.", "", name) for name in names}
    return {own.get(key, key): value for key, value in state_dict.items()}


def adapter_updates(model: nn.Module, adapter_name: str) -> Iterator[tuple[str, SpectralLinear, SpectralUpdate]]:
    """The updates of an adapter: (state dict prefix of the update, its layer, the update)."""
    for name, layer in model.named_modules():
        if isinstance(layer, SpectralLinear):
            for container in layer.adapter_layer_names:
                updates = getattr(layer, container)
                if adapter_name in updates:
                    yield f"{unwrapped(name)}.{container}.{adapter_name}.".lstrip("."), layer, updates[adapter_name]


def tensor_keys(model: nn.Module, adapter_name: str) -> list[str]:
    """Unwrapped state dict keys of all tensors of an adapter."""
    return [
        f"{prefix}{name}" for prefix, _, update in adapter_updates(model, adapter_name) for name in update.state_dict()
    ]


def start_keys(model: nn.Module, adapter_name: str) -> set[str]:
    """State dict keys of the frozen starts of an adapter, which `save_start=False` leaves out of a checkpoint."""
    return {
        f"{prefix}{name}" for prefix, _, update in adapter_updates(model, adapter_name) for name, _ in update.frozen()
    }


def complete_state_dict(model: nn.Module, adapter_name: str, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns `state_dict`, in the model's unwrapped keys, with the starts that a checkpoint left out computed anew.

    Raises:
        SpectralError: a tensor is missing or has the wrong shape or kind of dtype, or the adapter was trained on
            another base weight. Nothing has changed then.
    """
    completed = dict(state_dict)
    for prefix, layer, update in adapter_updates(model, adapter_name):
        if adapter_name in layer.merged_adapters:
            raise SpectralError(f"{layer.key}: '{adapter_name}' is merged; call `unmerge_adapter` before loading it.")
        own = {key.removeprefix(prefix): value for key, value in state_dict.items() if key.startswith(prefix)}
        if "fingerprint" in own:
            layer.check_base(adapter_name, own["fingerprint"])
        if not layer.configs[adapter_name].save_start:
            own = {**recomputed_start(layer, adapter_name, update), **own}
        _check_tensors(prefix, update, own)
        completed.update({f"{prefix}{key}": value for key, value in own.items()})
    for _, layer, update in adapter_updates(model, adapter_name):
        layer.settled[adapter_name] = False
        update.restore_dtype_()  # else what comes would be rounded
    return completed


def recomputed_start(layer: SpectralLinear, adapter_name: str, update: SpectralUpdate) -> dict[str, Tensor]:
    """The frozen start of an update, by state dict key; computed from the base weight if the update has none."""
    if update.is_meta:
        config = layer.configs[adapter_name]
        update = layer.new_update(config, update.r)
        layer.start_(update, config)
    return {name: weight.detach() for name, weight in update.frozen()}


def _check_tensors(prefix: str, update: SpectralUpdate, tensors: dict[str, Tensor]) -> None:
    for key, expected in update.state_dict().items():
        if key not in tensors:
            raise SpectralError(
                f"The adapter checkpoint has no tensor {prefix}{key}: it is incomplete, or was saved with other "
                "`target_modules` or by another method. Save the adapter again, or load it with its own "
                "adapter_config.json."
            )
        if tensors[key].shape != expected.shape:
            raise SpectralError(
                f"The tensor {prefix}{key} of the adapter checkpoint has shape {tuple(tensors[key].shape)}; expected "
                f"{tuple(expected.shape)}: `r` or `rank_pattern` differ, or the base model has other sizes. Load it "
                "with its own adapter_config.json."
            )
        if tensors[key].is_floating_point() != expected.is_floating_point():
            raise SpectralError(
                f"The tensor {prefix}{key} of the adapter checkpoint is {tensors[key].dtype}; expected a dtype like "
                f"{expected.dtype}. The file is damaged; save the adapter again."
            )
    try:
        update.check_state(tensors)
    except SpectralError as error:
        raise SpectralError(
            f"{prefix.rstrip('.')}: {error} The checkpoint is damaged; save the adapter again."
        ) from error


def is_fresh(model: nn.Module, adapter_name: str) -> bool:
    """Whether an adapter was injected only to be filled by a checkpoint: never used and never trained."""
    return not any(
        layer.settled[adapter_name] or update.has_moved() for _, layer, update in adapter_updates(model, adapter_name)
    )


def remove_adapter(model: nn.Module, adapter_name: str) -> None:
    """Takes every trace of an adapter out of a model: the undo of an injection or a loading that failed."""
    for layer in model.modules():
        if isinstance(layer, SpectralLinear):
            layer.discard_adapter(adapter_name)
    _unwrap_idle(model)
    for module in model.modules():
        configs = vars(module).get("peft_config")
        if isinstance(configs, dict):
            configs.pop(adapter_name, None)
            if not configs and not isinstance(module, BaseTuner):
                del module.peft_config


def refuse_changed_start(key: str, update: SpectralUpdate) -> None:
    """Raises SpectralError if the frozen start, which a checkpoint leaves out, is not that of the weight any more."""
    if update.is_meta or is_sharded(update) or not update.fingerprint.any() or update.has_noted_start():
        return
    raise SpectralError(
        f"{key}: what should be frozen has changed since the adapter was added, and would not be in a checkpoint with "
        "`save_start=False`. Set `save_start = True` in the config of the adapter, and save it then."
    )


Former = dict[SpectralLinear, tuple[SpectralUpdate, SpectralConfig, bool]]


def adapter_in_place(model: nn.Module, adapter_name: str) -> Former:
    """What the layers hold under this name, for `undo_injection`."""
    return {
        layer: (update, layer.configs[adapter_name], layer.settled[adapter_name])
        for _, layer, update in adapter_updates(model, adapter_name)
    }


def undo_injection(model: nn.Module, adapter_name: str, former: Former) -> None:
    """Takes a failed injection back; an adapter that had this name before is put into its place again."""
    if not former:
        remove_adapter(model, adapter_name)
        return
    for layer in model.modules():
        if isinstance(layer, SpectralLinear):
            layer.discard_adapter(adapter_name)
    for layer, (update, config, settled) in former.items():
        getattr(layer, config.container)[adapter_name] = update
        layer.configs[adapter_name], layer.settled[adapter_name] = config, settled
    _unwrap_idle(model)
    for module in model.modules():
        configs = vars(module).get("peft_config")
        if isinstance(configs, dict):
            configs[adapter_name] = config


def _unwrap_idle(model: nn.Module) -> None:
    """Puts modules back into the place of layers that have no adapter."""
    for name, module in list(model.named_modules()):
        wraps = isinstance(module, (SpectralLinear, SpectralExperts)) and not isinstance(module, ExpertLinear)
        if wraps and not module.configs:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, module.base_layer)
