"""Which modules can have adapters, and the layer that each of them gets."""

from __future__ import annotations

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers.pytorch_utils import Conv1D

from spectral_peft.embedding import SpectralEmbedding
from spectral_peft.layer import SpectralLinear
from spectral_peft.quantized import quantization_of
from spectral_peft.unsupported import refuse_split_weight


FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def wrap(base_layer: nn.Module, key: str) -> SpectralLinear:
    """Returns a layer without adapters around `base_layer`, whose module name is `key`.

    Raises:
        TypeError: `base_layer` is not an nn.Linear, a Conv1D or an nn.Embedding with floating point weights, nor an
            nn.Linear whose quantized weight can be read back.
        SpectralError: its weight is on the meta device.
    """
    inner = base_layer.get_base_layer() if isinstance(base_layer, BaseTunerLayer) else base_layer
    backend = quantization_of(inner, key)
    if not isinstance(inner, (nn.Linear, Conv1D, nn.Embedding)):
        raise TypeError(
            f"Target module {key} is a {type(inner).__name__}; supported are nn.Linear, transformers' Conv1D and "
            "nn.Embedding. Leave it out with `exclude_modules`, or name others in `target_modules`."
        )
    refuse_split_weight(inner.weight, key)
    _check_weight(inner, key, backend is not None)
    return SpectralEmbedding(base_layer, key) if isinstance(inner, nn.Embedding) else SpectralLinear(base_layer, key)


UNCALLED_IN_MAMBA = {"x_proj", "dt_proj", "out_proj", "conv1d"}


def refuse_fused(parent: nn.Module, key: str) -> None:
    """Raises TypeError for a layer whose parent computes with its weight without calling it.

    nn.TransformerEncoderLayer does so in evaluation; Mamba's mixers, which are known by their parameters `A_log` and
    `D`, on a GPU, and with some layers everywhere. (The gated delta nets, which have no `D`, call theirs.)
    """
    in_mamba = hasattr(parent, "A_log") and hasattr(parent, "D") and key.rpartition(".")[2] in UNCALLED_IN_MAMBA
    if in_mamba or isinstance(parent, nn.TransformerEncoderLayer):
        raise TypeError(
            f"Target module {key} belongs to a {type(parent).__name__}, which computes with the weight of this layer "
            "without calling it: an adapter there would have no effect. Leave it out with `exclude_modules`."
        )


def _check_weight(inner: nn.Module, key: str, is_quantized: bool) -> None:
    weight = inner.weight
    if weight.dtype not in FLOAT_DTYPES and not is_quantized:
        raise TypeError(
            f"The weight of target module {key} ({type(inner).__name__}) is {weight.dtype}; supported are float16, "
            "bfloat16, float32 and float64, and weights quantized by bitsandbytes or torchao."
        )
    if isinstance(inner, NonDynamicallyQuantizableLinear):
        raise TypeError(
            f"Target module {key} is the output projection of an nn.MultiheadAttention, which never calls it: an "
            "adapter there would have no effect. Leave it out with `exclude_modules`."
        )
    if getattr(inner, "max_norm", None) is not None:
        raise TypeError(f"Target module {key} is an nn.Embedding that renormalizes its weight (`max_norm`).")
