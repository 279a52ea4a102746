"""PiSSA (Meng, Wang & Zhang, 2024, arXiv 2404.02948): train the principal singular triplets as two factors."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from spectral_peft.config import SpectralConfig
from spectral_peft.linalg import Factors, svd_of_product
from spectral_peft.model import register
from spectral_peft.update import Size, SpectralUpdate


class PiSSA(SpectralUpdate):
    """delta = c (B A - B0 A0), A = A0 + dA, B = B0 + dB, with c B0 A0 = U diag(S) Vh the principal part of W.

    A0 = sqrt(S / c) Vh (r, in_features) and B0 = U sqrt(S / c) (out_features, r) as in Meng et al. (2024), eq. 2-3;
    c is the scaling. W keeps the principal part, unlike in the paper, where W is replaced by the residual: the
    function and its gradients are the same, and W stays what it was. The difference of the products is computed as

        dB (A x) + B0 (dA x)

    whose error is relative to the change; that of B A x - B0 A0 x is relative to W, which loses a small change in
    bfloat16. dA and dB start at 0 and receive the gradients of A and B, so every optimizer whose step does not
    depend on the parameter's value moves them alike; weight decay pulls to the pretrained weight instead of to 0.
    """

    trained: ClassVar[tuple[str, ...]] = ("dA", "dB")

    def __init__(self, size: Size, *, scaling: float) -> None:
        super().__init__(size)
        m, n, r = size[:3]
        self.scaling = scaling
        self.A0 = size.factor(r, n)
        self.B0 = size.factor(m, r)
        self.dA = size.factor(r, n)
        self.dB = size.factor(m, r)

    @torch.no_grad()
    def start_(self, factors: Factors) -> None:
        root = (factors.S / self.scaling).sqrt()
        self.A0.weight.copy_(root[:, None] * factors.Vh)
        self.B0.weight.copy_(factors.U * root)
        self.dA.weight.zero_()
        self.dB.weight.zero_()

    @torch.no_grad()
    def take_change_(self, change: Factors) -> None:
        """B0 = U and dA = diag(S) Vh / c, while A0 and dB are 0."""
        self.A0.weight.zero_()
        self.B0.weight.copy_(change.U)
        self.dA.weight.copy_((change.S / self.scaling)[:, None] * change.Vh)
        self.dB.weight.zero_()

    def forward(self, x: Tensor) -> Tensor:
        x = self.dropout(x)
        dAx = self.dA(x)
        Ax = self.A0(x) + dAx
        if self.scaling != 1:  # here, where the tensors are r wide, it costs next to nothing
            Ax, dAx = Ax * self.scaling, dAx * self.scaling
        return self.dB(Ax) + self.B0(dAx)

    def singular_values(self) -> Tensor:  # shape: (r,)
        """Those of c B A, the principal part as it is now."""
        A, B = self.A0.weight + self.dA.weight, self.B0.weight + self.dB.weight
        return svd_of_product(B * self.scaling, A).S

    def thin_change(self) -> tuple[Tensor, Tensor]:
        B = torch.cat([self.dB.weight, self.B0.weight], dim=1) * self.scaling
        return B, torch.cat([self.A0.weight + self.dA.weight, self.dA.weight])


@register
@dataclass
class PiSSAConfig(SpectralConfig):
    """Configuration of PiSSA (Meng, Wang & Zhang, 2024, arXiv 2404.02948), with the base weight left as it is.

    Trains as PEFT's ``LoraConfig(init_lora_weights="pissa")`` does without dropout, but `disable_adapter`, `unload`
    and several adapters side by side work exactly, because the base weight is never changed. On a weight of zeros both
    factors are zero, and so are their gradients: it does not train.

    Args:
        alpha: The update is scaled by alpha / r, as LoRA's is; `None` means r, a scaling of 1, as in the paper.
            Further fields are those of `SpectralConfig`.
    """

    method: ClassVar[str] = "pissa"
    function_fields: ClassVar[tuple[str, ...]] = ("alpha",)
    paper: ClassVar[str] = (
        "Fanxu Meng, Zhaohui Wang and Muhan Zhang, *PiSSA: Principal Singular Values and Singular Vectors Adaptation "
        "of Large Language Models*, [arXiv 2404.02948](https://arxiv.org/abs/2404.02948), 2024"
    )

    alpha: float | None = field(
        default=None, metadata={"help": "The update is scaled by alpha / r. None means r: a scaling of 1."}
    )

    def _check_fields(self) -> None:
        super()._check_fields()
        self._check_positive("alpha", "a scaling of 1")

    def build(self, size: Size) -> PiSSA:
        return PiSSA(size, scaling=1.0 if self.alpha is None else self.alpha / size.r)
