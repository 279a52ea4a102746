"""The one PEFT tuner for every spectral method, and the registration of a method with PEFT."""

from __future__ import annotations

import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING, PeftType
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel

from spectral_peft.budget import share_budgets_
from spectral_peft.card import tags_of
from spectral_peft.checkpoint import (
    adapter_in_place,
    adapter_updates,
    complete_state_dict,
    is_fresh,
    refuse_changed_start,
    remove_adapter,
    start_keys,
    tensor_keys,
    undo_injection,
    unwrapped,
    wrapped_keys,
)
from spectral_peft.combination import add_weighted_adapter
from spectral_peft.config import SpectralConfig, SpectralPeftType
from spectral_peft.errors import SpectralError
from spectral_peft.experts import SpectralExperts, expert_layers
from spectral_peft.layer import SpectralLinear
from spectral_peft.mixed_batch import adapter_per_sample
from spectral_peft.quantized import name_of, refuse_merging
from spectral_peft.targets import is_targeted, refuse_unmatched_patterns
from spectral_peft.wrapping import refuse_fused, wrap


class SpectralModel(BaseTuner):
    """Injects the updates of one spectral method into a model; `register` makes the subclass of each method."""

    prefix: str
    tuner_layer_cls = SpectralLinear
    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING  # type: ignore[assignment]

    # Injection

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Tensor] | None = None,
    ) -> None:
        """PEFT's injection, with a progress bar; if it fails, the model is given back as it was."""
        former = adapter_in_place(model, adapter_name)
        config: SpectralConfig = self.peft_config[adapter_name]  # type: ignore[assignment]
        _warn_of_ranks_of_another_model(config)
        as_given = dict(vars(config))
        self._clamped: list[str] = []
        self._energy_ranks: dict[str, int] = {}
        self._progress = tqdm(desc="Starting adapters", unit=" layers", delay=2, leave=False)
        try:
            with warnings.catch_warnings():
                # `refuse_unmatched_patterns` knows better: PEFT does not look at the matrices of parameters.
                warnings.filterwarnings("ignore", "The following rank_pattern keys did not match", RuntimeWarning)
                super().inject_adapter(model, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage, state_dict)
        except Exception:
            undo_injection(model, adapter_name, former)
            vars(config).update(as_given)
            raise
        finally:
            self._progress.close()
            del self._progress
        # A checkpoint must know the ranks of its tensors without the spectra. Noted at once: a full name could be the
        # ending of another one.
        config.rank_pattern = {**self._energy_ranks, **config.rank_pattern}
        config.was_measured = config.was_measured or bool(self._energy_ranks)
        if isinstance(model, PreTrainedModel):
            model.add_model_tags(tags_of(config))  # PEFT's and the trainers' model cards have them from there
        # Only now: had a later layer failed, the weights of the earlier ones would be lost.
        for _, layer, update in adapter_updates(model, adapter_name):
            if update.frees_base and (layer.settled[adapter_name] or layer.base_parameter.is_meta):
                layer.free_base_weight_()
        if self._clamped:
            warnings.warn(
                f"`r` is larger than min(out_features, in_features) of {len(self._clamped)} modules and was clamped "
                f"to it there: {', '.join(self._clamped)}.",
                stacklevel=2,
            )

    def _create_and_replace(
        self,
        peft_config: SpectralConfig,  # type: ignore[override]  # PEFT passes the config of this method
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        self._progress.set_postfix_str(current_key, refresh=False)
        if parameter_name is None:
            targets = [self._layer(target, target_name, parent, current_key)]
        else:
            targets = expert_layers(parent, target_name, target, parameter_name, current_key)
        for layer in targets:
            try:
                r = self._rank(peft_config, layer)
                layer.update_layer(adapter_name, peft_config, r=r, container=peft_config.container)
            except SpectralError as error:
                said = str(error).removeprefix(f"{layer.key}: ")
                raise SpectralError(f"{layer.key}: {said}") from error
            if not peft_config.from_checkpoint:
                peft_config.base_quantization = peft_config.base_quantization or name_of(layer.quantization_backend)
        self._progress.update()

    def _layer(self, target: nn.Module, target_name: str, parent: nn.Module, key: str) -> SpectralLinear:
        if isinstance(target, SpectralLinear):
            return target
        refuse_fused(parent, key)
        layer = wrap(target, key)
        # Before there is an update: PEFT moves what it finds to the device of the weight, which may be "meta".
        self._replace_module(parent, target_name, layer, target)
        return layer

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        """Without what PEFT's does beside: moving updates, which are where their weight is, and copying the weight of
        a layer that is unloaded, which fails for embeddings with `trainable_token_indices`.
        """
        setattr(parent, child_name, new_module)

    def _rank(self, config: SpectralConfig, layer: SpectralLinear) -> int:
        """The rank for this layer, clamped; one that an energy stands for is kept for the config."""
        wanted, weight = config.rank_of(layer.key), layer.effective_weight()
        r = min(config.resolve_rank(weight, layer.key), *weight.shape)
        if isinstance(wanted, int) and r < wanted:
            if not config.clamps_rank:
                raise ValueError(
                    f"{layer.key}: `r` should be at most min(out_features, in_features) = {r}, got {wanted}. Lower "
                    "it, or give this module a rank of its own in `rank_pattern`."
                )
            self._clamped.append(f"{layer.key} (to {r})")
        if isinstance(wanted, str):
            self._energy_ranks[layer.key] = r
        return r

    def _prepare_model(self, peft_config: SpectralConfig, model: nn.Module) -> None:  # type: ignore[override]
        """PEFT's hook before the first layer is touched: budgets are about all of them."""
        refuse_unmatched_patterns(model, peft_config)
        share_budgets_(model, peft_config)

    @staticmethod
    def _check_target_module_exists(peft_config: SpectralConfig, key: str) -> Any:  # type: ignore[override]
        return is_targeted(peft_config, key)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """Updates start in float32; `autocast_adapter_dtype=False` asks for the dtype of the base weight."""
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        if not autocast_adapter_dtype:
            for _, layer, update in adapter_updates(self.model, adapter_name):
                update.to(layer.get_base_weight().dtype)

    # The function

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """PEFT's hook around every forward pass and generation: `adapter_names` is for the layers."""
        adapter_names = kwargs.get("adapter_names")
        if adapter_names is None:
            yield
            return
        if any(isinstance(module, SpectralExperts) for module in self.modules()):
            raise ValueError("`adapter_names` needs adapters of modules; here are some of `target_parameters` too.")
        encoder = self.model.get_encoder() if hasattr(self.model, "get_encoder") else None
        encoder = None if encoder is self.model else encoder  # what transformers answers where there is none
        with adapter_per_sample(self, adapter_names, kwargs.get("num_beams") or 1, encoder):
            yield

    def add_weighted_adapter(
        self,
        adapters: list[str],
        weights: list[float],
        adapter_name: str,
        combination_type: str = "svd",
        svd_rank: int | None = None,
    ) -> None:
        """Adds an adapter whose change of each weight is the weighted sum of the changes by others, and freezes it.

        As PEFT's for LoRA, but "linear" and "cat" are both exact up to rounding. Possible for SVFit, PiSSA and SST on
        a pool; the new adapter is of their method, with the vectors of the sum where its start is stored (for SST they
        are its pool), and goes on training as such when it is activated.

        Args:
            adapters: Names of the adapters to add up; their ranks and targets may differ.
            weights: One number for each, of any sign.
            adapter_name: Name of the new one.
            combination_type: "linear": the sum of what was trained, of the rank of one; for SVFit adapters that share
                their singular vectors. "cat": all triplets of the sum; its rank is the sum of the ranks, where a
                PiSSA adapter counts twice, and no more than min(out_features, in_features). "svd": the best
                approximation of rank `svd_rank`.
            svd_rank: None means the largest of the ranks of the changes.

        Raises:
            SpectralError: the method has no update for such a sum.
            ValueError: an unknown adapter or combination, or one that trains more than its updates; a name that is
                taken; merged adapters.
        """
        add_weighted_adapter(self, adapters, weights, adapter_name, combination_type, svd_rank)

    # Merging

    def _check_merge_allowed(self) -> None:
        """PEFT's look ahead: it merges layer by layer, and a refusal should leave none of them merged."""
        super()._check_merge_allowed()  # type: ignore[no-untyped-call]
        for layer in self.model.modules():
            if isinstance(layer, SpectralLinear):
                refuse_merging(layer.quantization_backend, layer.key)

    def _refuse_broken_delta(self, adapter_names: list[str] | None) -> None:
        """PEFT merges layer by layer: without this look ahead, a refused merge would leave the first ones merged."""
        for layer in self.model.modules():
            if not isinstance(layer, SpectralLinear):
                continue
            for adapter_name in layer.active_adapters if adapter_names is None else adapter_names:
                if adapter_name in layer.configs and not torch.isfinite(layer.merged_weight(adapter_name)).all():
                    raise ValueError(
                        f"{layer.key}: NaNs detected in the merged weights. The adapter {adapter_name} seems to be "
                        "broken: its update holds NaN or Inf. Nothing was merged."
                    )

    def _refuse_empty_weights(self, merging: list[str] | None) -> None:
        """Raises SpectralError where a freed base weight would come out of the unloading as it is: empty."""
        for layer in self.model.modules():
            if isinstance(layer, SpectralLinear):
                names = layer.active_adapters if merging is None else merging
                if layer.replacing([*names, *layer.merged_adapters]) is None:
                    layer.need_base_weight("`unload`, or merging other adapters than the one in its place,")

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """PEFT's merge; with `safe_merge` all layers are checked before the first one is merged."""
        if safe_merge:
            self._refuse_broken_delta(adapter_names)
        super().merge_adapter(adapter_names, safe_merge)

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> Any:  # the model, although PEFT declares None
        self._refuse_empty_weights(adapter_names if merge else [])
        if merge and safe_merge:
            self._refuse_broken_delta(adapter_names)
        return super()._unload_and_optionally_merge(merge, progressbar, safe_merge, adapter_names)

    # Checkpoints

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        """Takes the adapter name from behind the container, where PEFT's default looks only before the last dot."""
        container = f"{cls.prefix}update."
        pattern = rf"(^|\.){re.escape(container)}{re.escape(adapter_name)}\."
        if not re.search(pattern, key):
            return super()._remove_adapter_name_from_key(key, adapter_name)
        return re.sub(pattern, rf"\g<1>{container}", key)

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: SpectralConfig,  # type: ignore[override]
        adapter_name: str,
        state_dict: dict[str, Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, Tensor]:
        for _, layer, update in adapter_updates(model, adapter_name):
            layer.settle(adapter_name)  # in place: an update that nothing has started yet shows in `state_dict` too
            if not config.save_start:
                refuse_changed_start(layer.key, update)
        own = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)
        left_out = set() if config.save_start else start_keys(model, adapter_name)
        # PEFT looks for the names of its layers, which differ from those of a state dict where layers are wrapped.
        given = {unwrapped(key): value for key, value in state_dict.items()}
        keys = (
            f"{prefix}{k}" for prefix, _, update in adapter_updates(model, adapter_name) for k in update.state_dict()
        )
        own = {**{unwrapped(key): value for key, value in own.items()}, **{k: given[k] for k in keys if k in given}}
        # What a merged adapter has replaced is kept by its layers, and is none of its tensors.
        return {k: v for k, v in own.items() if k not in left_out and not k.endswith(".unmerged_weight")}

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls,
        model: nn.Module,
        config: SpectralConfig,  # type: ignore[override]
        adapter_name: str,
        state_dict: dict[str, Tensor],
    ) -> dict[str, Tensor]:
        state_dict = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        # PEFT saves the base of adapted embeddings too; of one that was freed there is nothing to load.
        state_dict = {k: v for k, v in state_dict.items() if v.numel() or not k.endswith(".base_layer.weight")}
        full = {cls._remove_adapter_name_from_key(key, adapter_name): key for key in tensor_keys(model, adapter_name)}
        state_dict = {full.get(key, key): value for key, value in state_dict.items()}  # what PEFT missed: see above
        try:
            return wrapped_keys(model, complete_state_dict(model, adapter_name, state_dict))
        except SpectralError:
            if is_fresh(model, adapter_name):
                remove_adapter(model, adapter_name)
            raise


def _warn_of_ranks_of_another_model(config: SpectralConfig) -> None:
    if config.was_measured and not config.from_checkpoint:
        warnings.warn(
            f"The ranks that r={config.r!r} stands for were measured when this config was first used, and are kept. "
            "Make a new config to measure them on this model.",
            stacklevel=3,
        )


Config = TypeVar("Config", bound=type[SpectralConfig])


def register(config_cls: Config) -> Config:
    """Class decorator that makes PEFT and transformers know a method by its config.

    The method's PEFT type is ``SPECTRAL_<METHOD>`` and its prefix ``spectral_<method>_``, as transformers expects.
    Registering the same config again does nothing.

    Args:
        config_cls: A subclass of `SpectralConfig` with `method` and `build`. It is returned.

    Raises:
        ValueError: another method is registered under this type, or another type has this prefix.
    """
    peft_type = SpectralPeftType(f"SPECTRAL_{config_cls.method.upper()}")
    prefix = f"{peft_type.value.lower()}_"
    known: type | None = PEFT_TYPE_TO_CONFIG_MAPPING.get(peft_type)  # type: ignore[call-overload]
    if known is config_cls:
        return config_cls
    own = config_cls.__module__, config_cls.__qualname__
    if known is not None and (known.__module__, known.__qualname__) != own:
        raise ValueError(f"The PEFT type {peft_type.value} is taken by {known.__module__}.{known.__qualname__}.")
    if peft_type in PeftType.__members__ or prefix in {
        taken for other, taken in PEFT_TYPE_TO_PREFIX_MAPPING.items() if other.value != peft_type.value
    }:
        raise ValueError(f"The PEFT type {peft_type.value} or its prefix {prefix!r} is taken by PEFT itself.")
    name = config_cls.__name__.removesuffix("Config") + "Model"
    model_cls = type(name, (SpectralModel,), {"prefix": prefix, "__module__": config_cls.__module__})
    setattr(sys.modules[config_cls.__module__], name, model_cls)  # where pickle looks for the class of a model
    PEFT_TYPE_TO_CONFIG_MAPPING[peft_type] = config_cls  # type: ignore[index]
    PEFT_TYPE_TO_TUNER_MAPPING[peft_type] = model_cls  # type: ignore[index]
    PEFT_TYPE_TO_PREFIX_MAPPING[peft_type] = prefix  # type: ignore[index]
    return config_cls
