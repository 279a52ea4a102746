"""SVFit (Sun et al., 2024, arXiv 2409.05926): train the leading singular values, keep the singular vectors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from spectral_peft.config import SpectralConfig
from spectral_peft.linalg import Factors
from spectral_peft.model import register
from spectral_peft.update import Size, SpectralUpdate, in_float32


class SVFit(SpectralUpdate):
    """delta = U diag(dS) Vh, with the r leading singular vectors U, Vh of W frozen and dS (r,) trained from 0.

    The singular values of the adapted weight are S + dS. The difference is what is stored, because absolute singular
    values do not move in bfloat16 under steps of 1e-4. The residual W - U diag(S) Vh stays in W.
    """

    trained: ClassVar[tuple[str, ...]] = ("dS",)
    spectrum: ClassVar[tuple[str, ...]] = ("dS",)
    is_linear: ClassVar[bool] = True

    def __init__(self, size: Size) -> None:
        super().__init__(size)
        m, n, r = size[:3]
        self.U = size.factor(m, r)
        self.S = size.diagonal(r)
        self.Vh = size.factor(r, n)
        self.dS = size.diagonal(r)

    @torch.no_grad()
    def start_(self, factors: Factors) -> None:
        self.U.weight.copy_(factors.U)
        self.S.weight.copy_(factors.S)
        self.Vh.weight.copy_(factors.Vh)
        self.dS.weight.zero_()

    @torch.no_grad()
    def take_change_(self, change: Factors) -> None:
        """U and Vh are the vectors of the change and not of W, S is 0, and dS holds the values."""
        self.start_(change)
        self.S.weight.zero_()
        self.dS.weight.copy_(change.S)

    def singular_values(self) -> Tensor:  # shape: (r,)
        """Those of the adapted weight that belong to the r leading singular vectors, in float32 at least."""
        return in_float32(self.S.weight) + self.dS.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.U(self.dS(self.Vh(self.dropout(x))))

    def thin_change(self) -> tuple[Tensor, Tensor]:
        return in_float32(self.U.weight) * in_float32(self.dS.weight), in_float32(self.Vh.weight)


@register
@dataclass
class SVFitConfig(SpectralConfig):
    """Configuration of SVFit (Sun et al., 2024, arXiv 2409.05926): W' = U diag(S + dS) Vh + residual, dS trained.

    One number per singular triplet is trained, so the learning rate is much larger than LoRA's: 1e-3 to 1e-1. `r`
    may be as large as min(out_features, in_features). All fields are those of `SpectralConfig`.
    """

    method: ClassVar[str] = "svfit"
    paper: ClassVar[str] = (
        "Chengwei Sun, Jiwei Wei, Yujia Wu, Yiming Shi, Shiyuan He, Zeyu Ma, Ning Xie and Yang Yang, *SVFit: "
        "Parameter-Efficient Fine-Tuning of Large Pre-Trained Models Using Singular Values*, "
        "[arXiv 2409.05926](https://arxiv.org/abs/2409.05926), 2024"
    )

    def build(self, size: Size) -> SVFit:
        return SVFit(size)
