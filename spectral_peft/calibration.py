"""What the inputs of a model's layers look like: their second moments over a few batches."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm
from transformers.pytorch_utils import Conv1D

from spectral_peft.errors import SpectralError
from spectral_peft.linalg.precision import factorizing
from spectral_peft.targets import targeted_modules


Batch = Tensor | Mapping[str, Any]


class Calibration:
    """Second moments E[x x^T] of the inputs x of modules, by module name; made by `calibrate`.

    A moment is a float32 matrix (in_features, in_features), or its diagonal (in_features,). Copies of a calibration
    are the same object: it is large, and nothing changes it.

    Args:
        moments: The moments, by the module's full name.
        tokens: How many inputs each of them is the mean of.
    """

    def __init__(self, moments: Mapping[str, Tensor], tokens: Mapping[str, int]) -> None:
        self.moments = dict(moments)
        self.tokens = dict(tokens)

    def moment(self, key: str) -> Tensor:
        """The moment of the module `key`.

        Raises:
            SpectralError: the calibration has none.
        """
        if key not in self.moments:
            raise SpectralError(
                f"The calibration has no moments of the module {key!r}; it has {len(self.moments)}, such as "
                f"{next(iter(self.moments), None)!r}. Calibrate the base model with the config's `target_modules`."
            )
        return self.moments[key]

    def save(self, path: str | Path) -> None:
        """Writes the calibration to a safetensors file."""
        moments = {key: moment.contiguous() for key, moment in self.moments.items()}
        save_file(moments, path, metadata={"tokens": json.dumps(self.tokens)})

    @classmethod
    def load(cls, path: str | Path) -> Calibration:
        """Reads what `save` wrote.

        Raises:
            FileNotFoundError: there is no such file.
            SpectralError: it is damaged, or not a calibration.
        """
        try:
            with safe_open(path, framework="pt") as file:
                tokens, keys = json.loads((file.metadata() or {})["tokens"]), file.keys()
                return cls({key: file.get_tensor(key) for key in keys}, tokens)
        except (SafetensorError, KeyError, json.JSONDecodeError) as error:
            raise SpectralError(f"{path} is damaged or not a calibration ({error!r}): calibrate again.") from error

    def __deepcopy__(self, memo: dict[int, Any]) -> Calibration:
        return self

    def __repr__(self) -> str:
        return f"Calibration({len(self.moments)} modules, {max(self.tokens.values(), default=0)} tokens)"


def calibrate(
    model: nn.Module,
    batches: Iterable[Batch],
    target_modules: Sequence[str] | str = "all-linear",
    exclude_modules: Sequence[str] | str | None = None,
    *,
    diagonal_above: int = 16384,
) -> Calibration:
    """Runs `batches` through `model` and returns the second moments of what goes into the targeted modules.

    The model runs in eval mode without gradients, and is left as it was. Inputs at positions that an `attention_mask`
    of the batch excludes are not counted, where the module's input still has the shape of the mask. The inputs of an
    nn.Embedding are one-hot vectors; its moment is a diagonal of token frequencies.

    Args:
        model: The base model that an adapter is going to be added to.
        batches: Tensors, which are passed as the first argument, or mappings of keyword arguments, such as those that
            a data collator makes. They are moved to the device of the model. Several thousand tokens are few for
            layers with several thousand inputs.
        target_modules: As in `SpectralConfig`.
        exclude_modules: As in `SpectralConfig`.
        diagonal_above: Number of inputs of a module above which only the diagonal is kept: a matrix of 16,384 takes
            1 GiB.

    Raises:
        TypeError: a targeted module or a batch is of a kind that is not supported.
        ValueError: no module is targeted, or there are no batches.
        SpectralError: an input holds NaN or Inf, or a module had no inputs.
    """
    modules = _calibrated_modules(model, target_modules, exclude_modules)
    totals = {key: _Total(key, module, diagonal_above) for key, module in modules.items()}
    with _observed(model, modules, totals), torch.no_grad():
        number = 0
        for batch in tqdm(batches, desc="Calibrating", unit=" batches", delay=2, leave=False):
            _run(model, batch, totals)
            number += 1
    if number == 0:
        raise ValueError("`batches` should hold at least one batch, got none.")
    if silent := [key for key, total in totals.items() if total.tokens == 0]:
        raise SpectralError(
            f"{len(silent)} targeted modules had no inputs in {number} batches, and cannot be calibrated: "
            f"{', '.join(silent)}. Leave them out with `exclude_modules`, or give batches that reach them."
        )
    return Calibration(
        {key: total.sum / total.tokens for key, total in totals.items()},
        {key: total.tokens for key, total in totals.items()},
    )


class _Total:
    """The running sum of x x^T over the inputs of one module.

    In float32, which takes half the memory of float64: over thousands of batches rounding reaches 1e-5 of an entry,
    far below what other batches would change.
    """

    def __init__(self, key: str, module: nn.Module, diagonal_above: int) -> None:
        inner = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
        if not isinstance(inner, (nn.Linear, Conv1D, nn.Embedding)):
            raise TypeError(
                f"Target module {key} is a {type(inner).__name__}; supported are nn.Linear, transformers' Conv1D and "
                "nn.Embedding. Leave it out with `exclude_modules`."
            )
        size = inner.weight.shape[1 if isinstance(inner, nn.Linear) else 0]
        self.key, self.size = key, size
        self.diagonal = size > diagonal_above or isinstance(inner, nn.Embedding)
        self.sum: Tensor = torch.zeros(())  # gets its shape and device from the first input
        self.tokens = 0
        self.mask: Tensor | None = None

    def add(self, x: Tensor) -> None:
        """Counts the inputs `x`: (..., in_features), or indices (...)."""
        positions = x.shape if not x.is_floating_point() else x.shape[:-1]
        if self.mask is not None and self.mask.shape == positions:
            x = x[self.mask.to(x.device)]
        if x.is_floating_point():
            x = x.reshape(-1, self.size).float()
            tokens, moment = len(x), self._moment(x)
        else:
            tokens, moment = x.numel(), torch.bincount(x.flatten(), minlength=self.size).float()
        if not torch.isfinite(moment.sum()):
            raise SpectralError(f"The inputs of the module {self.key} hold NaN or Inf, or overflow float32.")
        self.sum = moment if self.tokens == 0 else self.sum.to(moment.device).add_(moment)
        self.tokens += tokens

    def _moment(self, x: Tensor) -> Tensor:
        if self.diagonal:
            return x.square().sum(0)
        with factorizing(x):
            return x.T @ x


def _calibrated_modules(
    model: nn.Module, target_modules: Sequence[str] | str, exclude_modules: Sequence[str] | str | None
) -> dict[str, nn.Module]:
    config = SimpleNamespace(
        target_modules=target_modules if isinstance(target_modules, str) else set(target_modules),
        exclude_modules=exclude_modules,
        dense_modules=(),
        target_parameters=None,
        task_type=None,
    )
    modules = targeted_modules(model, config)
    if not modules:
        raise ValueError(
            f"`target_modules` should name modules of the model, got {target_modules!r}, which names none."
        )
    return modules


@contextmanager
def _observed(model: nn.Module, modules: Mapping[str, nn.Module], totals: Mapping[str, _Total]) -> Iterator[None]:
    """Inside, the model is in eval mode and every module adds its inputs to its total."""
    training = [module for module in model.modules() if module.training]
    handles = []
    try:
        for key, module in modules.items():
            handles.append(module.register_forward_pre_hook(_adding_to(totals[key]), with_kwargs=True))
        model.eval()
        yield
    finally:
        for handle in handles:
            handle.remove()
        for module in training:
            module.training = True


def _adding_to(total: _Total) -> Any:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        total.add(args[0] if args else next(iter(kwargs.values())))

    return hook


def _run(model: nn.Module, batch: Batch, totals: Mapping[str, _Total]) -> None:
    device = next(model.parameters()).device
    if not isinstance(batch, (Tensor, Mapping)):
        raise TypeError(
            f"A batch should be a tensor or a mapping of keyword arguments, got a {type(batch).__name__}; `batches` "
            "is a list of them, or a data loader."
        )
    mask = None if isinstance(batch, Tensor) else batch.get("attention_mask")
    for total in totals.values():
        total.mask = mask.bool() if isinstance(mask, Tensor) and mask.ndim == 2 else None
    if isinstance(batch, Tensor):
        model(batch.to(device))
    else:
        model(**{name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()})
