"""The smallest method that puts factors in the place of a weight, for tests of what such methods share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from spectral_peft import CalibratedConfig, Size, SpectralUpdate, register
from spectral_peft.linalg import Factors


class Truncated(SpectralUpdate):
    """U diag(S) Vh in the place of W; S trains."""

    trained = ("S",)
    replaces = True

    def __init__(self, size: Size) -> None:
        super().__init__(size)
        self.U = size.factor(size.out_features, size.r)
        self.S = size.diagonal(size.r)
        self.Vh = size.factor(size.r, size.in_features)

    @torch.no_grad()
    def start_(self, factors: Factors) -> None:
        for name, value in factors._asdict().items():
            self.get_submodule(name).weight.copy_(value)

    def forward(self, x: Tensor) -> Tensor:
        return self.U(self.S(self.Vh(self.dropout(x))))

    def matrix(self) -> Tensor:
        return Factors(self.U.weight, self.S.weight, self.Vh.weight).matrix()


@register
@dataclass
class TruncatedConfig(CalibratedConfig):
    method: ClassVar[str] = "truncated"

    def build(self, size: Size) -> Truncated:
        return Truncated(size)
