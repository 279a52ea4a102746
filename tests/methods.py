"""The table of methods under test: one row each, with everything that a law needs to know about a method."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from spectral_peft import PiSSAConfig, SpectralConfig, SVFitConfig


@dataclass(frozen=True)
class Method:
    """A method as its paper defines it, stated here a second time, without the package's own code.

    Attributes:
        config: The configuration class.
        trained: Names of the tensors that train, within the update of a layer.
        start: Names of the frozen tensors; a checkpoint leaves them out with `save_start=False`.
        delta: The change of the weight from the tensors of an update in float64, as a plain formula.
        lr: A learning rate at which five AdamW steps move the function clearly.
    """

    name: str
    config: type[SpectralConfig]
    trained: frozenset[str]
    start: frozenset[str]
    delta: Callable[[dict[str, Tensor]], Tensor]
    lr: float

    def __call__(self, **kwargs: Any) -> SpectralConfig:
        return self.config(**{"r": 8, "target_modules": "all-linear", **kwargs})

    def __str__(self) -> str:
        return self.name


METHODS = [
    Method(
        name="svfit",
        config=SVFitConfig,
        trained=frozenset({"dS.weight"}),
        start=frozenset({"U.weight", "S.weight", "Vh.weight"}),
        delta=lambda t: t["U.weight"] @ torch.diag(t["dS.weight"]) @ t["Vh.weight"],
        lr=1e-1,
    ),
    Method(
        name="pissa",
        config=PiSSAConfig,
        trained=frozenset({"dA.weight", "dB.weight"}),
        start=frozenset({"A0.weight", "B0.weight"}),
        delta=lambda t: (
            (t["B0.weight"] + t["dB.weight"]) @ (t["A0.weight"] + t["dA.weight"]) - t["B0.weight"] @ t["A0.weight"]
        ),
        lr=1e-2,
    ),
]
