"""What goes into a model's layers, and what its loss asks of them: second moments over a few batches."""

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
        gradients: Second moments E[g g^T] of the gradients g of the loss with respect to the outputs, in the same
            form, (out_features, out_features) or (out_features,); none unless `calibrate` was asked for them.
    """

    def __init__(
        self, moments: Mapping[str, Tensor], tokens: Mapping[str, int], gradients: Mapping[str, Tensor] | None = None
    ) -> None:
        self.moments = dict(moments)
        self.tokens = dict(tokens)
        self.gradients = dict(gradients or {})

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
        tensors = {f"inputs {key}": moment.contiguous() for key, moment in self.moments.items()}
        tensors.update({f"gradients {key}": moment.contiguous() for key, moment in self.gradients.items()})
        save_file(tensors, path, metadata={"tokens": json.dumps(self.tokens)})

    @classmethod
    def load(cls, path: str | Path) -> Calibration:
        """Reads what `save` wrote.

        Raises:
            FileNotFoundError: there is no such file.
            SpectralError: it is damaged, or not a calibration.
        """
        try:
            with safe_open(path, framework="pt") as file:
                tokens = json.loads((file.metadata() or {})["tokens"])
                kinds: dict[str, dict[str, Tensor]] = {"inputs": {}, "gradients": {}}
                for name in file.keys():  # noqa: SIM118  # it is no dictionary
                    kind, _, key = name.partition(" ")
                    kinds[kind][key] = file.get_tensor(name)
                return cls(kinds["inputs"], tokens, kinds["gradients"])
        except (SafetensorError, KeyError, json.JSONDecodeError) as error:
            raise SpectralError(f"{path} is damaged or not a calibration ({error!r}): calibrate again.") from error

    def __deepcopy__(self, memo: dict[int, Any]) -> Calibration:
        return self

    def __repr__(self) -> str:
        with_gradients = ", with gradients" if self.gradients else ""
        tokens = max(self.tokens.values(), default=0)
        return f"Calibration({len(self.moments)} modules, {tokens} tokens{with_gradients})"


def calibrate(
    model: nn.Module,
    batches: Iterable[Batch],
    target_modules: Sequence[str] | str = "all-linear",
    exclude_modules: Sequence[str] | str | None = None,
    *,
    gradients: bool = False,
    diagonal_above: int = 16384,
) -> Calibration:
    """Runs `batches` through `model` and returns the second moments of what goes into the targeted modules.

    With `gradients` also those of the gradients of the loss with respect to what comes out of them: a start then keeps
    what the loss needs, and not only what is large. That takes a backward pass, and the memory of its activations;
    the parameters get no gradients. The loss is taken as the sum over a batch's labels, of which the model returns the
    mean, so that a label counts alike in a batch of few.

    The model runs in eval mode, and is left as it was. Inputs at positions that an `attention_mask`
    of the batch excludes are not counted, where the module's input still has the shape of the mask. It is the mask of
    the encoder, if there is one: where the texts of a decoder are as long, all of its inputs count. The inputs of an
    nn.Embedding are one-hot vectors; its moment is a diagonal of token frequencies.

    Args:
        model: The base model that an adapter is going to be added to.
        batches: Tensors, which are passed as the first argument, or mappings of keyword arguments, such as those that
            a data collator makes. They are moved to the device of the model. Several thousand tokens are few for
            layers with several thousand inputs.
        target_modules: As in `SpectralConfig`.
        exclude_modules: As in `SpectralConfig`.
        gradients: Whether gradients are measured too. The model must then return a loss for every batch; a tensor is
            taken as its own labels, as for a causal language model.
        diagonal_above: Number of inputs, or outputs, of a module above which only the diagonal is kept: a matrix of
            16,384 takes 1 GiB.

    Raises:
        TypeError: a targeted module or a batch is of a kind that is not supported.
        ValueError: no module is targeted, there are no batches, or gradients are wanted and the model returns no
            loss.
        SpectralError: an input or a gradient holds NaN or Inf, or a module had no inputs.
    """
    modules = _calibrated_modules(model, target_modules, exclude_modules)
    totals, slopes = {}, {}
    for key, module in modules.items():
        out_features, in_features, one_hot = _sizes(key, module)
        totals[key] = _Total("inputs", key, in_features, one_hot or in_features > diagonal_above)
        slopes[key] = _Total("gradients at the output", key, out_features, out_features > diagonal_above)
    outputs: list[tuple[str, Tensor]] = []
    encoder = _encoder(model)
    with _observed(model, modules, totals, outputs if gradients else None), torch.set_grad_enabled(gradients):
        number = 0
        for batch in tqdm(batches, desc="Calibrating", unit=" batches", delay=2, leave=False):
            mask = _mask(batch)
            is_shared = _decodes_as_long(batch, mask)
            for total in (*totals.values(), *slopes.values()):
                total.mask = None if is_shared and not total.key.startswith(encoder) else mask
            result = _run(model, batch, gradients)
            if gradients:
                _add_gradients(result, _labels(batch, model), outputs, slopes)
                outputs.clear()
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
        {key: slope.sum / slope.tokens for key, slope in slopes.items() if gradients},
    )


class _Total:
    """The running sum of x x^T over the inputs of one module, or over the gradients of its outputs.

    In float32, which takes half the memory of float64: over thousands of batches rounding reaches 1e-5 of an entry,
    far below what other batches would change.
    """

    def __init__(self, what: str, key: str, size: int, diagonal: bool) -> None:
        self.what, self.key, self.size, self.diagonal = what, key, size, diagonal
        self.sum: Tensor = torch.zeros(())  # gets its shape and device from the first input
        self.tokens = 0
        self.mask: Tensor | None = None

    def add(self, x: Tensor) -> None:
        """Counts `x`: (..., size), or indices (...)."""
        positions = x.shape if not x.is_floating_point() else x.shape[:-1]
        if self.mask is not None and self.mask.shape == positions:
            x = x[self.mask.to(x.device)]
        if x.is_floating_point():
            x = x.reshape(-1, self.size).float()
            tokens, moment = len(x), self._moment(x)
        else:
            tokens, moment = x.numel(), torch.bincount(x.flatten(), minlength=self.size).float()
        if not torch.isfinite(moment.sum()):
            raise SpectralError(f"The {self.what} of the module {self.key} hold NaN or Inf, or overflow float32.")
        self.sum = moment if self.tokens == 0 else self.sum.to(moment.device).add_(moment)
        self.tokens += tokens

    def _moment(self, x: Tensor) -> Tensor:
        if self.diagonal:
            return x.square().sum(0)
        with factorizing(x):
            return x.T @ x


def _sizes(key: str, module: nn.Module) -> tuple[int, int, bool]:
    """Numbers of outputs and inputs of a module, and whether the inputs are one-hot vectors."""
    inner = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
    if not isinstance(inner, (nn.Linear, Conv1D, nn.Embedding)):
        raise TypeError(
            f"Target module {key} is a {type(inner).__name__}; supported are nn.Linear, transformers' Conv1D and "
            "nn.Embedding. Leave it out with `exclude_modules`."
        )
    sizes = inner.weight.shape if isinstance(inner, nn.Linear) else inner.weight.shape[::-1]
    return sizes[0], sizes[1], isinstance(inner, nn.Embedding)


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
def _observed(
    model: nn.Module,
    modules: Mapping[str, nn.Module],
    totals: Mapping[str, _Total],
    outputs: list[tuple[str, Tensor]] | None,
) -> Iterator[None]:
    """Inside, the model is in eval mode and every module adds its inputs to its total; its outputs are collected."""
    training = [module for module in model.modules() if module.training]
    handles = []
    try:
        for key, module in modules.items():
            handles.append(module.register_forward_pre_hook(_adding_to(totals[key]), with_kwargs=True))
            if outputs is not None:
                handles.append(module.register_forward_hook(_collecting(key, outputs)))
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


def _collecting(key: str, outputs: list[tuple[str, Tensor]]) -> Any:
    def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        # Where all before it is frozen, autograd would not see the output.
        outputs.append((key, output if output.requires_grad else output.requires_grad_(True)))
        return output.clone()  # what follows may work in place, on what is then another tensor

    return hook


def _mask(batch: Batch) -> Tensor | None:
    if not isinstance(batch, (Tensor, Mapping)):
        raise TypeError(
            f"A batch should be a tensor or a mapping of keyword arguments, got a {type(batch).__name__}; `batches` "
            "is a list of them, or a data loader."
        )
    mask = None if isinstance(batch, Tensor) else batch.get("attention_mask")
    return mask.bool() if isinstance(mask, Tensor) and mask.ndim == 2 else None


def _encoder(model: Any) -> str:
    """The beginning of the names of the modules that an `attention_mask` is for."""
    if not getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return ""
    encoder = model.get_encoder()
    return next(f"{name}." for name, module in model.named_modules() if module is encoder)


def _decodes_as_long(batch: Batch, mask: Tensor | None) -> bool:
    """Whether the shape of the mask, were there a decoder, would be that of its inputs too."""
    decoded = batch.get("labels", batch.get("decoder_input_ids")) if isinstance(batch, Mapping) else None
    return mask is not None and isinstance(decoded, Tensor) and decoded.shape == mask.shape


def _run(model: nn.Module, batch: Batch, with_loss: bool) -> Any:
    device = next(model.parameters()).device
    if isinstance(batch, Tensor):
        batch = batch.to(device)
        return model(batch, labels=batch) if with_loss else model(batch)
    return model(**{name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()})


def _labels(batch: Batch, model: Any) -> int:
    """The number of labels whose mean the loss of a batch is; 1 if it names none.

    The first label of a text is not counted where a causal language model does not predict it.
    """
    labels = batch if isinstance(batch, Tensor) else batch.get("labels")
    if not isinstance(labels, Tensor):
        return 1
    generates = hasattr(model, "can_generate") and model.can_generate()
    if generates and not model.config.is_encoder_decoder:
        labels = labels[:, 1:]
    return max(1, int((labels != -100).sum()))


def _add_gradients(
    result: Any, labels: int, outputs: Sequence[tuple[str, Tensor]], slopes: Mapping[str, _Total]
) -> None:
    loss = getattr(result, "loss", None)
    if loss is None:
        raise ValueError("`gradients` needs a loss of every batch, and the model returned none: add the labels.")
    # With respect to the outputs alone: parameters that require gradients get none. Of the sum over the labels: in a
    # batch of few of them each has a large part in the mean.
    found = torch.autograd.grad(loss * labels, [output for _, output in outputs], allow_unused=True)
    for (key, output), gradient in zip(outputs, found, strict=True):
        slopes[key].add(torch.zeros_like(output) if gradient is None else gradient)
