"""One batch for several adapters: which sample goes through which."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import Tensor, nn


BASE = "__base__"
"""PEFT's name, in a list of one adapter for each sample, for none."""


def by_sample(adapter_names: Sequence[str], samples: int, output: Callable[[str, Tensor], Tensor]) -> Tensor:
    """Returns what `output(name, rows)` gives for the samples of each adapter, in the order of the batch.

    Raises:
        ValueError: there is not one name for each sample.
    """
    if len(adapter_names) != samples:
        raise ValueError(
            "Length of `adapter_names` should be the same as the number of inputs, but got "
            f"{len(adapter_names)} and {samples} respectively."
        )
    groups = [
        (name, torch.tensor([row for row, own in enumerate(adapter_names) if own == name]))
        for name in dict.fromkeys(adapter_names)
    ]
    outputs = torch.cat([output(name, rows) for name, rows in groups])
    return outputs[torch.cat([rows for _, rows in groups]).argsort()]


@contextmanager
def adapter_per_sample(
    tuner: nn.Module, adapter_names: Sequence[str], num_beams: int = 1, encoder: nn.Module | None = None
) -> Iterator[None]:
    """Within it, every layer of `tuner` that has adapters is called with `adapter_names`, as PEFT's LoRA does it.

    Beam search repeats every sample `num_beams` times, but not in the `encoder`.

    Raises:
        ValueError: the model is in training mode, has merged adapters, or has no adapter of one of these names.
    """
    layers = [layer for layer in tuner.modules() if isinstance(layer, (BaseTunerLayer, AuxiliaryTrainingWrapper))]
    _check(tuner, layers, adapter_names)
    repeated = [name for name in adapter_names for _ in range(num_beams)]
    encoding = set() if encoder is None else set(encoder.modules())

    def names_for(layer: nn.Module) -> Callable[..., Any]:
        names = list(adapter_names) if layer in encoding else repeated
        return lambda module, args, kwargs: (args, {**kwargs, "adapter_names": names})

    with ExitStack() as hooks:
        for layer in layers:
            hooks.callback(layer.register_forward_pre_hook(names_for(layer), with_kwargs=True).remove)
        yield


def _check(tuner: nn.Module, layers: Sequence[nn.Module], adapter_names: Sequence[str]) -> None:
    if isinstance(adapter_names, str):
        raise TypeError(f"`adapter_names` should be a list with one name for each sample, got {adapter_names!r}.")
    if tuner.training:
        raise ValueError("Cannot pass `adapter_names` when the model is in training mode.")
    tuned = [layer for layer in layers if isinstance(layer, BaseTunerLayer)]
    if any(layer.merged and not layer.disable_adapters for layer in tuned):
        raise ValueError(
            "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first."
        )
    known = {BASE, *(name for layer in tuned for name in layer._get_available_adapters())}
    if unknown := set(adapter_names) - known:
        raise ValueError(f"Trying to infer with non-existing adapter(s): {', '.join(sorted(unknown))}")
