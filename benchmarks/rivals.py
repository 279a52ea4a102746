"""The methods whose costs are compared: for each, what becomes of a model whose linear layers it adapts.

PEFT's, those of this package, the code published with SCT, and the training of the weights themselves.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator

import torch
from peft import LoraConfig, OSFConfig, PeftConfig, get_peft_model
from torch import Tensor, nn
from torch.optim import Optimizer

from spectral_peft import PiSSAConfig, SCTConfig, SSTConfig, SVFitConfig


Method = Callable[[nn.Module, int], nn.Module]
"""Changes a causal language model, in place or not, so that it trains with rank r."""


def linear_layers(model: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """What PEFT calls "all-linear": all but the head."""
    head = model.get_output_embeddings()
    return (
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head
    )


def adapter(config: Callable[..., PeftConfig]) -> Method:
    return lambda base, r: get_peft_model(base, config(r=r, target_modules="all-linear", task_type="CAUSAL_LM"))


def osf(base: nn.Module, r: int) -> nn.Module:
    """PEFT's OSF, whose rank is that of what is frozen: r singular triplets of each weight are left to train."""
    ranks = {f"^{re.escape(name)}$": min(layer.weight.shape) - r for name, layer in linear_layers(base)}
    config = OSFConfig(target_modules="all-linear", rank_pattern=ranks, task_type="CAUSAL_LM")
    return get_peft_model(base, config)


def pooled_sst(base: nn.Module, r: int) -> nn.Module:
    return adapter(functools.partial(SSTConfig, pool=2 * r, warmup_steps=0))(base, r)


def full(base: nn.Module, r: int) -> nn.Module:
    """Trains the weights of the linear layers."""
    base.requires_grad_(False)
    for _, layer in linear_layers(base):
        layer.weight = nn.Parameter(layer.weight.detach().clone())
    return base


class ReferenceSCT(nn.Module):
    """The layer of the code published with SCT (Kohlberger, 2026), restated with its names: y = ((x U) * s) V^T."""

    def __init__(self, weight: Tensor, r: int) -> None:
        super().__init__()
        U, S, Vh = torch.linalg.svd(weight.detach().float(), full_matrices=False)
        self.U = nn.Parameter(Vh[:r].T.contiguous())  # shape: (in_features, r)
        self.s = nn.Parameter(S[:r].clone())
        self.V = nn.Parameter(U[:, :r].contiguous())  # shape: (out_features, r)

    def forward(self, x: Tensor) -> Tensor:
        return ((x @ self.U) * self.s) @ self.V.T

    @torch.no_grad()
    def retract_(self) -> None:
        """What is done after every step of the optimizer: the Q factor of each, with signs."""
        for factor in (self.U, self.V):
            Q, R = torch.linalg.qr(factor)
            factor.copy_(Q * torch.sign(torch.diagonal(R)))


def reference_sct(base: nn.Module, r: int) -> nn.Module:
    base.requires_grad_(False)
    for name, layer in list(linear_layers(base)):
        parent, _, child = name.rpartition(".")
        setattr(base.get_submodule(parent), child, ReferenceSCT(layer.weight, r))
    return base


def retract_after_steps(optimizer: Optimizer, model: nn.Module) -> None:
    """Has the reference layers of a model, if there are any, retracted within `optimizer.step()`."""
    layers = [module for module in model.modules() if isinstance(module, ReferenceSCT)]

    def retract(*_: object) -> None:
        for layer in layers:
            layer.retract_()

    optimizer.register_step_post_hook(retract)


# SST without its warm-up, which takes 20 of 200 steps, and in the place of the weights, as for pre-training.
METHODS: dict[str, Method] = {
    "LoRA": adapter(LoraConfig),
    "PEFT's PiSSA": adapter(functools.partial(LoraConfig, init_lora_weights="pissa_niter_4")),
    "PEFT's OSF": osf,
    "SVFit": adapter(SVFitConfig),
    "PiSSA": adapter(PiSSAConfig),
    "SST on a pool": pooled_sst,
    "SST": adapter(functools.partial(SSTConfig, warmup_steps=0, keep_base_weight=False)),
    "SCT": adapter(SCTConfig),
    "SCT, reference code": reference_sct,
    "full rank": full,
}
