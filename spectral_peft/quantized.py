"""Base weights that another library holds in 8 or 4 bits, read through PEFT's own seam to them."""

from __future__ import annotations

import warnings
from typing import Any

from peft.utils import resolve_quantization_backend
from peft.utils.quantization_utils import QuantizationBackend
from torch import Tensor, nn

from spectral_peft.errors import SpectralError
from spectral_peft.linalg import same_matrix
from spectral_peft.update import SAME_BASE


SAME_QUANTIZED_BASE = 0.3
"""SAME_BASE where one of the two is quantized: rounding to 4 bits stays below it, unrelated weights do not."""


def quantization_of(module: nn.Module, key: str) -> QuantizationBackend | None:
    """PEFT's access to the weight of a quantized module, or None for a plain one.

    Keeps bitsandbytes from repacking a 4-bit weight for inference on CPUs with AVX512-BF16, at the first call in eval
    mode: a repacked weight cannot be read back. The function is the same without.

    Raises:
        TypeError: the weight cannot be read back.
        SpectralError: it could have been, before bitsandbytes repacked it.
    """
    backend = resolve_quantization_backend(module, get_apply_tensor_subclass=_never)
    if backend is None:
        return None
    refuse_unreadable(backend, key)
    if getattr(getattr(getattr(module, "weight", None), "quant_state", None), "packing_format_for_cpu", False):
        raise SpectralError(
            f"{key}: bitsandbytes has repacked the weight for inference on this CPU, when the model was called in "
            "eval mode, and it cannot be read back. Load the base model again, and add the adapter before its first "
            "call."
        )
    if hasattr(module, "support_avx512bf16_for_cpu"):
        module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
    return backend


def _never() -> Any:
    """In place of torchao's recipe to quantize a merged weight, which PEFT asks for: nothing is quantized here."""
    raise NotImplementedError("spectral_peft does not quantize weights.")


def name_of(backend: QuantizationBackend | None) -> str | None:
    """The name of a way to quantize, or None."""
    return None if backend is None else backend.backend_name


def refuse_unreadable(backend: QuantizationBackend, key: str) -> None:
    """Raises TypeError for a backend that does not give weights back."""
    if not backend.supports_merge:
        raise TypeError(
            f"The weight of target module {key} is quantized by {backend.backend_name}, which cannot dequantize it: "
            "there is no weight to decompose. Load the base without quantization, or quantized by bitsandbytes or "
            "torchao."
        )


def refuse_replacing(backend: QuantizationBackend | None, key: str) -> None:
    """Raises TypeError if the weight is quantized, for a method that replaces it."""
    if backend is not None:
        raise TypeError(
            f"The weight of target module {key} is quantized ({backend.backend_name}), and this method would put "
            "float32 factors in its place. Load the base without quantization, or choose a method that adds to the "
            "weight: SVFit, PiSSA, or SST with `pool`."
        )


def refuse_merging(backend: QuantizationBackend | None, key: str) -> None:
    """Raises SpectralError if the weight is quantized: the merged one would be rounded again, its change with it."""
    if backend is not None:
        raise SpectralError(
            f"{key}: the base weight is quantized ({backend.backend_name}). Merging would quantize the sum again, and "
            "a change that is smaller than its steps would be lost. `export_merged` writes the merged model without "
            "quantization; or load the adapter on the base without quantization and merge it there."
        )


def is_same_base(
    sketch1: Tensor, sketch2: Tensor, trained_on: str | None, loaded_on: QuantizationBackend | None
) -> bool:
    """Whether the sketches of two base weights agree, up to what quantization may change, with a warning then.

    Args:
        sketch1: That of the weight that an adapter was trained on.
        sketch2: That of the weight that it is loaded on.
        trained_on: How the first was quantized, or None.
        loaded_on: How the second is.
    """
    if same_matrix(sketch1, sketch2, SAME_BASE):
        return True
    if not (trained_on or loaded_on) or not same_matrix(sketch1, sketch2, SAME_QUANTIZED_BASE):
        return False
    warnings.warn(
        f"An adapter that was trained on weights of one kind ({trained_on or 'not quantized'}) is loaded on those of "
        f"another ({name_of(loaded_on) or 'not quantized'}). They agree up to what quantization may change; the "
        "function is not exactly that of the training.",
        stacklevel=2,
    )
    return True
