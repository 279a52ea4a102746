"""The table of methods under test: one row each, with everything that a law needs to know about a method."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from spectral_peft import PiSSAConfig, SCTConfig, SpectralConfig, SSTConfig, SVFitConfig


@dataclass(frozen=True)
class Method:
    """A method as its paper defines it, stated here a second time, without the package's own code.

    Attributes:
        config: The configuration class.
        fields: Fields beside r and target_modules.
        trained: Names of the tensors that train, within the update of a layer.
        start: Names of the frozen tensors; a checkpoint leaves them out with `save_start=False`.
        counters: Names of what else a checkpoint holds of a layer.
        matrix: The change of the weight, or the weight, from the tensors of an update in float64, as a plain formula.
        lr: A learning rate at which five AdamW steps move the function clearly.
        replaces: Whether `matrix` is the weight itself; the function then starts as the base model's up to rounding.
        at_start: The weight that the function has at the start at rank r, of a base weight: the same, or for a method
            that is exact at full rank only its best approximation.
        moved: Names of the frozen tensors and counters that a schedule changes.
        recomputable: Whether `save_start=False` is possible.
        embeddings: Whether it can be put on an nn.Embedding.
        free_rank: Whether `r` may be as large as the weight allows.
        clamps: Whether an `r` beyond the size of a weight is clamped, or refused.
        adds_up: Whether `add_weighted_adapter` has an adapter for a sum of changes.
        linear: Whether it has one for a sum of what was trained from the same start.
        has_values: Whether an update tells its singular values, in logs and reports.
        derivative: Fields with which the gradients are the derivatives of the function.
        counting: Fields with which an update with a schedule counts its steps.
        at_rest: Fields with which a schedule leaves the singular values to the optimizer for 100 steps.
    """

    name: str
    config: type[SpectralConfig]
    trained: frozenset[str]
    start: frozenset[str]
    matrix: Callable[[dict[str, Tensor]], Tensor]
    lr: float
    fields: tuple[tuple[str, Any], ...] = ()
    counters: frozenset[str] = frozenset({"fingerprint"})
    replaces: bool = False
    at_start: Callable[[Tensor, int], Tensor] = lambda weight, r: weight
    moved: frozenset[str] = frozenset()
    recomputable: bool = True
    embeddings: bool = True
    free_rank: bool = True
    clamps: bool = True
    adds_up: bool = True
    linear: bool = False
    has_values: bool = True
    derivative: tuple[tuple[str, Any], ...] = ()
    counting: tuple[tuple[str, Any], ...] = ()
    at_rest: tuple[tuple[str, Any], ...] = ()

    def __call__(self, **kwargs: Any) -> SpectralConfig:
        return self.config(**{"r": 8, "target_modules": "all-linear", **dict(self.fields), **kwargs})

    def __str__(self) -> str:
        return self.name


def segmented(t: dict[str, Tensor]) -> Tensor:
    S = t["S.weight"] + t["dS.weight"]
    U, Vh = torch.cat([t["U.weight"], t["U_rest.weight"]], 1), torch.cat([t["Vh.weight"], t["Vh_rest.weight"]])
    return U @ torch.diag(S) @ Vh


def best_approximation(weight: Tensor, r: int) -> Tensor:
    U, S, Vh = torch.linalg.svd(weight.double(), full_matrices=False)
    return ((U[:, :r] * S[:r]) @ Vh[:r]).to(weight.dtype)


SVFIT = Method(
    name="svfit",
    config=SVFitConfig,
    trained=frozenset({"dS.weight"}),
    start=frozenset({"U.weight", "S.weight", "Vh.weight"}),
    matrix=lambda t: t["U.weight"] @ torch.diag(t["dS.weight"]) @ t["Vh.weight"],
    lr=1e-1,
    linear=True,
)
PISSA = Method(
    name="pissa",
    config=PiSSAConfig,
    trained=frozenset({"dA.weight", "dB.weight"}),
    start=frozenset({"A0.weight", "B0.weight"}),
    matrix=lambda t: (
        (t["B0.weight"] + t["dB.weight"]) @ (t["A0.weight"] + t["dA.weight"]) - t["B0.weight"] @ t["A0.weight"]
    ),
    lr=1e-2,
)
SST = Method(
    name="sst",
    config=SSTConfig,
    fields=(("steps_per_iteration", 2), ("iterations_per_round", 2), ("warmup_steps", 1)),
    trained=frozenset({"U.weight", "dS.weight", "Vh.weight"}),
    start=frozenset({"S.weight", "U_rest.weight", "Vh_rest.weight"}),
    counters=frozenset({"fingerprint", "step", "order", "schedule_digest"}),
    matrix=segmented,
    moved=frozenset({"S.weight", "U_rest.weight", "Vh_rest.weight", "step", "order", "fingerprint"}),
    lr=1e-2,
    replaces=True,
    recomputable=False,
    embeddings=False,
    clamps=False,
    adds_up=False,
    derivative=(("gradient", "default"),),
    at_rest=(("steps_per_iteration", 100), ("warmup_steps", 0)),
)
POOLED_SST = replace(
    SST,
    name="sst-pool",
    fields=(*SST.fields, ("pool", 12)),
    start=SST.start | {"U0.weight", "S0.weight", "Vh0.weight"},
    matrix=lambda t: segmented(t) - t["U0.weight"] @ torch.diag(t["S0.weight"]) @ t["Vh0.weight"],
    replaces=False,
    adds_up=True,
    free_rank=False,
)
SCT = Method(
    name="sct",
    config=SCTConfig,
    fields=(("keep_base_weight", True),),
    trained=frozenset({"U.weight", "dS.weight", "Vh.weight"}),
    start=frozenset({"S.weight"}),
    counters=frozenset({"fingerprint", "step", "schedule_digest"}),
    matrix=lambda t: t["U.weight"] @ torch.diag(t["S.weight"] + t["dS.weight"]) @ t["Vh.weight"],
    lr=1e-2,
    replaces=True,
    at_start=best_approximation,
    recomputable=False,
    adds_up=False,
    counting=(("retract_every", 2),),
)

METHODS = [SVFIT, PISSA, SST, POOLED_SST, SCT]
SCHEDULED = [method for method in METHODS if "step" in method.counters]


def counted(method: Method, **fields: Any) -> SpectralConfig:
    """A config with which the updates of every scheduled method count their steps."""
    return method(**{"r": 4, **dict(method.counting), **fields})


def with_starts(methods: list[Method]) -> list[tuple[Method, bool]]:
    """Each method with its start in the checkpoint, and without it where it can be recomputed."""
    return [
        (method, save_start) for method in methods for save_start in (True, False) if save_start or method.recomputable
    ]
