"""The PEFT layer around an nn.Embedding."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from spectral_peft.config import SpectralConfig
from spectral_peft.layer import SpectralLinear
from spectral_peft.update import SpectralUpdate


class SpectralEmbedding(SpectralLinear):
    """`SpectralLinear` for nn.Embedding, whose inputs are indices: one-hot vectors."""

    def new_update(self, config: SpectralConfig, r: int) -> SpectralUpdate:
        update = super().new_update(config, r)
        if not update.takes_indices:
            raise TypeError(
                f"Target module {self.key} is an nn.Embedding, on which {type(config).__name__} is not possible. "
                "Leave it out with `exclude_modules`."
            )
        update.dropout = nn.Identity()  # indices cannot be dropped; PEFT's LoRA does not drop here either
        return update

    def change(self, adapter_name: str, x: Tensor) -> Tensor | None:
        change = super().change(adapter_name, x)
        padding = getattr(self.get_base_layer(), "padding_idx", None)
        if change is not None and padding is not None:  # as nn.Embedding does: this row does not train
            change = torch.where((x == padding).unsqueeze(-1), change.detach(), change)
        scale = self._get_embed_scale()  # type: ignore[no-untyped-call]
        # Some embeddings (Gemma's) multiply their output by a constant; the weight's change passes through it too.
        return change if change is None or scale is None else change * scale
