"""The one PEFT layer: adapters by name around a base layer, for every spectral method."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from spectral_peft.config import SpectralConfig
from spectral_peft.errors import SpectralError
from spectral_peft.linalg import one_thread_if_small, sketch
from spectral_peft.mixed_batch import by_sample
from spectral_peft.quantized import is_same_base, quantization_of, refuse_merging, refuse_replacing
from spectral_peft.sharded import is_sharded
from spectral_peft.training import drive
from spectral_peft.update import Size, SpectralUpdate, compute_dtype


class SpectralLinear(nn.Module, BaseTunerLayer):
    """Adds the updates of the active adapters to the output of an nn.Linear or a Conv1D, or replaces it by one.

    The updates of one method live in one ModuleDict by adapter name, whose own name begins with the method's prefix,
    because transformers finds adapter tensors by that prefix. Adapters of several methods can share the layer.
    """

    def __init__(self, base_layer: nn.Module, key: str) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.key = key
        self.adapter_layer_names: tuple[str, ...] = ()
        self.other_param_names: tuple[str, ...] = ("configs", "settled")
        self.configs: dict[str, SpectralConfig] = {}
        self.settled: dict[str, bool] = {}
        self.merged_adapters: list[str] = []
        self.unmerged_weight: nn.Parameter | None = None
        self.cast_input_dtype_enabled = True
        self.quantization_backend = quantization_of(self.get_base_layer(), key)
        # Conv1D and nn.Embedding store their weight as (in_features, out_features).
        self.weight_is_transposed = isinstance(self.get_base_layer(), (Conv1D, nn.Embedding))
        self.out_features, self.in_features = self.effective_weight().shape

    @property
    def base_parameter(self) -> nn.Parameter:
        """The parameter of the innermost base layer, empty if it was freed."""
        return self.get_base_layer().weight  # type: ignore[return-value]

    def effective_weight(self) -> Tensor:  # shape: (out_features, in_features)
        """The base weight as the matrix W of x -> x W^T; a quantized one as a new tensor.

        Raises:
            SpectralError: it was freed.
        """
        self.need_base_weight("this")
        weight: Tensor = self.get_base_weight()
        return weight.mT if self.weight_is_transposed else weight

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        drive(update for name in self.configs if (update := self.update_of(name)) is not None)

    # Adapters

    def update_of(self, adapter_name: str) -> SpectralUpdate | None:
        """The update of this adapter as it stands, or None if it has none on this layer."""
        for container in self.adapter_layer_names:
            updates = self.get_submodule(container)
            if isinstance(updates, nn.ModuleDict) and adapter_name in updates:
                return updates[adapter_name]  # type: ignore[return-value]
        return None

    def update_layer(self, adapter_name: str, config: SpectralConfig, *, r: int, container: str) -> None:
        """Puts a new update of rank `r` under `adapter_name`; nothing has changed if its start cannot be computed.

        The start is left out where a checkpoint is about to bring it: if PEFT creates parameters on the meta device,
        and for the config of a checkpoint that holds it. `settle` makes up for it if no checkpoint comes.
        """
        update = self.new_update(config, r)
        if update.replaces:
            refuse_replacing(self.quantization_backend, self.key)
        if update.replaces and isinstance(self.base_layer, BaseTunerLayer):
            raise TypeError(
                f"Target module {self.key} already has an adapter of another PEFT method, which an adapter that "
                "replaces the base weight would silence. Merge or unload the other one first."
            )
        in_place = self.configs.get(adapter_name)
        if in_place is not None and in_place.container != container:
            raise ValueError(
                f"{self.key}: there is an adapter '{adapter_name}' of the method {in_place.method} already. Choose "
                "another name, or delete that one first."
            )
        awaits_checkpoint = config.from_checkpoint and config.save_start
        if update.is_meta:
            update.to("meta")  # PEFT puts the parameters alone there
        elif not awaits_checkpoint:
            self.start_(update, config)
        if container not in self.adapter_layer_names:
            self.add_module(container, nn.ModuleDict())
            self.adapter_layer_names = (*self.adapter_layer_names, container)
        getattr(self, container)[adapter_name] = update
        drive([update])
        self.configs[adapter_name] = config
        self.settled[adapter_name] = not config.from_checkpoint
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def discard_adapter(self, adapter_name: str) -> None:
        """Forgets an adapter without touching which ones are active: the undo of `update_layer`."""
        for attribute in (*self.adapter_layer_names, *self.other_param_names):
            if adapter_name in getattr(self, attribute):
                del getattr(self, attribute)[adapter_name]

    def new_update(self, config: SpectralConfig, r: int) -> SpectralUpdate:
        """A zero update for this layer, in float32 at least, on the device of the base weight."""
        weight = self.base_parameter
        dtype = torch.promote_types(weight.dtype, torch.float32)
        device = None if weight.is_meta else weight.device
        update = config.build(Size(self.out_features, self.in_features, r, dtype, device, self.key))
        if config.dropout > 0:
            update.dropout = nn.Dropout(config.dropout)
        return update

    def start_(self, update: SpectralUpdate, config: SpectralConfig) -> None:
        """Starts `update` from the base weight.

        Raises:
            SpectralError: adapters are merged into it.
        """
        if self.merged:
            raise SpectralError(
                f"{self.key}: an adapter starts from the base weight, into which {self.merged_adapters} are merged. "
                "Call `unmerge_adapter` first."
            )
        weight = self.effective_weight()
        with one_thread_if_small(weight):
            config.start_(update, weight, self.key)
            if not weight.is_meta:  # there was no weight that a checkpoint could belong to
                update.take_fingerprint_(weight)
        if not config.init_weights:
            update.perturb_()

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def settle(self, adapter_name: str) -> None:
        """Before the first use of an update from a checkpoint: checks that it belongs to the base weight.

        Starts it if no checkpoint came after all. Works on the tensors alone, whoever loaded them.

        Raises:
            SpectralError: the adapter was trained on another base weight, or its singular vectors were recomputed
                and are not those that it was trained with.
        """
        update = self.update_of(adapter_name)
        if update is not None:
            update.freeze_start_()  # transformers makes everything train that it loads into
        if update is None or self.settled[adapter_name] or self.merged or is_sharded(update):
            return  # a sharded one is whole when it is used
        if not update.is_started():
            self.start_(update, self.configs[adapter_name])
        elif update.fingerprint.any():
            self.check_base(adapter_name, update.fingerprint)
            self.check_start(adapter_name, update)
            # Not `state_dict`, at which FSDP2 takes the parameters of this very pass back.
            update.check_state(dict([*update.named_parameters(), *update.named_buffers()]))
        if update.frees_base:
            self.free_base_weight_()
        self.settled[adapter_name] = True

    def check_base(self, adapter_name: str, fingerprint: Tensor) -> None:
        """Raises SpectralError if the adapter with this fingerprint was trained on another base weight."""
        of_base = fingerprint[0].cpu().view(torch.float32)
        config = self.configs[adapter_name]
        if not config.check_base or self.merged or self.is_freed or not of_base.any():
            return
        if is_sharded(self.get_base_layer()):
            return  # this follows at the first use, when it is whole
        here = sketch(self.effective_weight()).cpu()
        if not is_same_base(of_base, here, config.base_quantization, self.quantization_backend):
            raise SpectralError(
                f"{self.key}: the adapter '{adapter_name}' was trained on another base weight. Load it on the base "
                "model and revision that its adapter_config.json names. To use it on this one all the same, load its "
                "config, set `config.check_base = False` and pass `config=config`."
            )

    def check_start(self, adapter_name: str, update: SpectralUpdate) -> None:
        """Raises SpectralError if recomputed singular vectors are not those that the adapter was trained with."""
        if self.configs[adapter_name].save_start:
            return
        if not update.has_noted_start():
            raise SpectralError(
                f"{self.key}: the singular vectors recomputed from the base weight are not those that the adapter "
                f"'{adapter_name}' was trained with. Load it on the base in the dtype and with the torch release of "
                "its training, and save it there with `save_start=True`."
            )

    def _freeze_non_trainable_peft_weights(self, adapter_names: str | Sequence[str] | None = None) -> None:
        """PEFT's hook after it switches gradients on: the frozen starts stay without."""
        for name in self.configs:
            update = self.update_of(name)
            if update is not None:
                update.freeze_start_()

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """Moves an update to the device of the base weight; PEFT would round its float32 to the base's dtype too."""
        update = self.update_of(adapter_name)
        device = device or self.base_parameter.device
        if update is not None and not update.is_meta and device.type != "meta":
            update.to(device)

    # The function

    def change(self, adapter_name: str, x: Tensor) -> Tensor | None:
        """What the adapter adds to the base layer's output, or None if it has no update here."""
        update = self.update_of(adapter_name)
        if update is None:
            return None
        if not self.settled[adapter_name]:
            self.settle(adapter_name)
        return update(x)

    def replacing(self, adapter_names: Sequence[str]) -> str | None:
        """The one among these adapters whose update stands in the place of the base weight, if there is one."""
        names = [name for name in adapter_names if (update := self.update_of(name)) is not None and update.replaces]
        if len(names) > 1:
            raise ValueError(f"{self.key}: the adapters {names} each replace the base weight; activate one of them.")
        return names[0] if names else None

    def forward(self, x: Tensor, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any) -> Tensor:
        if self.disable_adapters and self.merged:
            self.unmerge()
        if self.disable_adapters or self.merged:
            self.need_base_weight("`disable_adapter`")
            return self.base_layer(x, *args, **kwargs)
        if adapter_names is not None:
            return self._mixed_batch_forward(x, *args, adapter_names=adapter_names, **kwargs)
        replaced = self.replacing(self.active_adapters) is not None
        if not replaced:
            self.need_base_weight("a forward pass without the adapter in its place")
        return self.adapted(None if replaced else self.base_layer(x, *args, **kwargs), x, self.active_adapters)

    def _mixed_batch_forward(self, x: Tensor, *args: Any, adapter_names: Sequence[str], **kwargs: Any) -> Tensor:
        """PEFT's name for a batch in which every sample has its own adapter."""
        replacing = {name for name in adapter_names if self.replacing([name]) is not None}
        if not replacing.issuperset(adapter_names):
            self.need_base_weight("a sample that goes through another adapter, or none,")
            base = self.base_layer(x, *args, **kwargs)
        return by_sample(
            adapter_names,
            len(x),
            lambda name, rows: self.adapted(None if name in replacing else base[rows], x[rows], [name]),
        )

    def adapted(self, base: Tensor | None, x: Tensor, adapter_names: Sequence[str]) -> Tensor:
        """The base layer's output with the changes of these adapters; it is None if one of them replaces it."""
        if base is None:
            bias = getattr(self.get_base_layer(), "bias", None)  # nn.Embedding has no such attribute
            result: Tensor = torch.zeros((), device=x.device) if bias is None else bias
            dtype = compute_dtype(x, self.base_parameter)
        else:
            result, dtype = base, base.dtype
        for adapter_name in adapter_names:
            change = self.change(adapter_name, x)
            if change is not None:
                result = result + change
        return result.to(dtype)

    # The base weight of updates that replace it

    @property
    def is_freed(self) -> bool:
        """Whether the base weight was given up for an update that replaces it."""
        return self.base_parameter.numel() == 0

    def need_base_weight(self, what: str, weight: Tensor | None = None) -> None:
        """Raises SpectralError if the base weight, by default the one in use, was freed."""
        if (self.base_parameter if weight is None else weight).numel() == 0:
            raise SpectralError(
                f"{self.key}: {what} needs the base weight, which was freed because an adapter replaces it. Add the "
                "adapter with `keep_base_weight=True` to keep it."
            )

    def free_base_weight_(self) -> None:
        """Gives up the base weight; what is left in its place has its dtype and device, and no entries."""
        base = self.base_parameter
        device = torch.get_default_device() if base.is_meta else base.device
        empty = torch.empty(0, dtype=base.dtype, device=device)
        self.get_base_layer().weight = nn.Parameter(empty, requires_grad=False)

    # Merging

    def get_delta_weight(self, adapter: str) -> Tensor:
        """The change of the base weight by this adapter, in the base weight's own shape.

        Raises:
            ValueError: this layer has no such adapter.
            SpectralError: the adapter replaces the base weight, which was freed.
        """
        update = self.update_of(adapter)
        if update is None:
            raise ValueError(f"{self.key} has no adapter '{adapter}'; it has {sorted(self.configs)}.")
        self.settle(adapter)
        delta = self._matrix(update)
        if update.replaces:
            delta = delta - self._weight_before_merging()
        return delta.mT if self.weight_is_transposed else delta

    @staticmethod
    def _matrix(update: SpectralUpdate) -> Tensor:
        with torch.autocast(update.fingerprint.device.type, enabled=False):
            return update.matrix()

    def _weight_before_merging(self) -> Tensor:
        if self.unmerged_weight is None:
            return self.effective_weight()
        self.need_base_weight("the change by a merged adapter", self.unmerged_weight)
        return self.unmerged_weight.mT if self.weight_is_transposed else self.unmerged_weight

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """PEFT's `convert_to_lora` can express every change of a base weight that is still there."""
        return not self.is_freed

    @torch.no_grad()
    def merged_weight(self, adapter_name: str) -> Tensor:
        """The base weight with this adapter merged, in its own shape and dtype, as a new tensor."""
        update, base = self.update_of(adapter_name), self.get_base_weight()
        self.settle(adapter_name)
        if update is not None and update.replaces:
            matrix = self._matrix(update)
            return (matrix.mT if self.weight_is_transposed else matrix).to(base.dtype).contiguous()
        # The sum is rounded to the base's dtype once; adding a rounded change would round twice.
        return (base + self.get_delta_weight(adapter_name)).to(base.dtype)

    @torch.no_grad()
    def _merge_one_(self, adapter_name: str, safe: bool) -> None:
        update = self.update_of(adapter_name)
        if update is None:
            return
        merged = self.merged_weight(adapter_name)
        if safe and not torch.isfinite(merged).all():
            raise ValueError(
                f"{self.key}: NaN or Inf in the weights merged with adapter '{adapter_name}', which seems to be "
                "broken; nothing was merged into this layer."
            )
        if update.replaces:
            self.unmerged_weight = self.base_parameter
            self.get_base_layer().weight = nn.Parameter(merged, requires_grad=False)
        else:
            self.base_parameter.copy_(merged)
        self.merged_adapters.append(adapter_name)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Brings the given adapters, by default the active ones, into the base weight.

        Args:
            safe_merge: Refuse to merge weights that are not finite.
            adapter_names: The adapters to merge.

        Raises:
            ValueError: with `safe_merge`, if the merged weight would hold NaN or Inf; or an adapter would replace a
                weight into which others are merged. The weight is then left as it was.
            SpectralError: the base weight is quantized.
        """
        refuse_merging(self.quantization_backend, self.key)
        names = check_adapters_to_merge(self, adapter_names)
        replacing = self.replacing([*names, *self.merged_adapters])
        if replacing in names and self.merged_adapters:
            raise ValueError(
                f"{self.key}: the adapter '{replacing}' replaces the weight, into which {self.merged_adapters} are "
                "merged and would be lost. Call `unmerge_adapter` first, and merge all of them in one call."
            )
        for adapter_name in sorted(names, key=lambda name: name != replacing):  # what replaces goes first
            self._merge_one_(adapter_name, safe_merge)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Takes the merged adapters out of the base weight again.

        Exact up to the rounding of its dtype; bit by bit where an adapter had replaced the weight.
        """
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
        while self.merged_adapters:
            adapter_name = self.merged_adapters[-1]
            update = self.update_of(adapter_name)
            if update is not None and update.replaces and self.unmerged_weight is not None:
                self.get_base_layer().weight, self.unmerged_weight = self.unmerged_weight, None
            else:
                self.base_parameter.sub_(self.get_delta_weight(adapter_name))
            self.merged_adapters.pop()

    def extra_repr(self) -> str:
        return f"adapters={sorted(self.configs)}"


def refuse_merged(model: nn.Module, before_what: str) -> None:
    """Raises ValueError if an adapter of the model is merged."""
    if any(isinstance(layer, SpectralLinear) and layer.merged for layer in model.modules()):
        raise ValueError(f"There are merged adapters; call `unmerge_adapter` before {before_what}.")
