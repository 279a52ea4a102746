"""SCT (Kohlberger, 2026, arXiv 2604.00733): thin factors in place of a weight, kept orthonormal by a retraction."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from spectral_peft.config import CalibratedConfig
from spectral_peft.errors import SpectralError, diverged
from spectral_peft.linalg import Factors, svd_of_product, tangent_projection
from spectral_peft.linalg.precision import working_copy
from spectral_peft.linalg.sampling import seed_of
from spectral_peft.model import register
from spectral_peft.retraction import RETRACTIONS, Point, measured, retract_
from spectral_peft.schedule import Count
from spectral_peft.update import Size, SpectralUpdate, in_float32


if TYPE_CHECKING:
    from typing_extensions import Self


class RetractionRule(NamedTuple):
    """How SCT keeps its factors orthonormal, and when.

    Attributes:
        retraction: "polar", "qr" or "cholesky_qr".
        every: Optimizer steps from one retraction to the next.
        tolerance: None, or the largest entry of |X^T X - I| that is left alone.
        absorb: Whether W stays what it is: its SVD gives new factors.
        riemannian: Whether gradients and steps are projected onto the tangent spaces of the factors.
    """

    retraction: str = "polar"
    every: int = 1
    tolerance: float | None = None
    absorb: bool = False
    riemannian: bool = False


class SCT(SpectralUpdate):
    """W = U diag(S + dS) Vh of rank r in the place of the base weight, U (m, r) and Vh (r, n) kept orthonormal.

    U, dS and Vh train with their plain derivatives; S is the start, and S + dS may become negative. After optimizer
    steps, as `rule` says, U and Vh are retracted to orthonormal columns and rows. Moments of the optimizer are left as
    they are, as in the paper, but for `absorb`, which turns the factors and has their state reset.

    The paper's U is the input side and its V the output side; here U is the output side, as in an SVD.
    """

    trained: ClassVar[tuple[str, ...]] = ("U", "dS", "Vh")
    orthonormal: ClassVar[tuple[str, ...]] = ("U", "Vh")
    spectrum: ClassVar[tuple[str, ...]] = ("dS",)
    replaces: ClassVar[bool] = True
    scheduled: ClassVar[bool] = True

    step: Tensor

    def __init__(self, size: Size, rule: RetractionRule, *, seed: int = 0) -> None:
        super().__init__(size)
        m, n, r = size[:3]
        self.rule, self.key, self.seed = rule, size.key, seed
        self.retractions = 0
        self.U = size.factor(m, r)
        self.S = size.diagonal(r)
        self.dS = size.diagonal(r)
        self.Vh = size.factor(r, n)
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))
        self._count = Count()
        self.keep_schedule(
            retraction=rule.retraction,
            retract_every=rule.every,
            retract_tolerance=rule.tolerance,
            absorb=rule.absorb,
            gradient="riemannian" if rule.riemannian else "euclidean",
        )
        self._before: list[Tensor] = []

    @torch.no_grad()
    def start_(self, factors: Factors) -> None:
        self.U.weight.copy_(factors.U)
        self.S.weight.copy_(factors.S)
        self.Vh.weight.copy_(factors.Vh)
        self.dS.weight.zero_()
        self.step.zero_()

    @torch.no_grad()
    def start_random_(self, std: float) -> None:
        """Starts without a weight: random orthonormal U and Vh, and all singular values equal to std sqrt(m n / r).

        ||W||_F is then that of a dense matrix whose entries have the standard deviation `std`. The random numbers
        depend on the seed and the name of the module alone.
        """
        generator = torch.Generator().manual_seed(seed_of(f"{self.seed} {self.key}"))
        for X, _ in self.points():
            X.copy_(torch.randn(X.shape, generator=generator, dtype=torch.promote_types(X.dtype, torch.float32)))
        retract_(self.points(), "cholesky_qr")
        m, n = len(self.U.weight), self.Vh.weight.shape[1]
        self.S.weight.fill_(std * math.sqrt(m * n / self.r))
        self.dS.weight.zero_()
        self.step.zero_()

    def is_started(self) -> bool:
        """By U: all singular values of a zero weight are zero."""
        return bool(self.U.weight.any())

    # The function

    def singular_values(self) -> Tensor:  # shape: (r,)
        """The singular values as they are now, in no order, and of either sign; in float32 at least."""
        return in_float32(self.S.weight) + self.dS.weight

    def factors(self) -> Factors:
        """The triplets as they are now, in float32 at least."""
        S = self.singular_values()
        return Factors(self.U.weight.to(S.dtype), S, self.Vh.weight.to(S.dtype))

    def steps_to_turn(self) -> int:
        return self.rule.every - self._count.of(self.step) % self.rule.every

    def statistics(self) -> dict[str, float]:
        """`retractions`: steps of this process after which U or Vh was made orthonormal."""
        return {"retractions": self.retractions}

    def forward(self, x: Tensor) -> Tensor:
        return self.U(self.Vh(self.dropout(x)) * self.singular_values())

    def matrix(self) -> Tensor:
        return self.factors().matrix()

    def check_state(self, tensors: Mapping[str, Tensor]) -> None:
        if int(tensors["step"]) < 0:
            raise SpectralError(f"step should count optimizer steps, got {int(tensors['step'])}.")

    # The schedule

    def points(self) -> list[Point]:
        """The factors as matrices with orthonormal columns, by name."""
        return [Point(self.U.weight, f"U of {self.key}"), Point(self.Vh.weight.mT, f"Vh of {self.key}")]

    @torch.no_grad()
    def before_optimizer_step(self) -> None:
        """In Riemannian mode: projects the gradients of U and Vh in place, and notes where the step starts."""
        if not self.rule.riemannian:
            return
        self._before = [X.clone() for X, _ in self.points()]
        U, Vh = self.U.weight.grad, self.Vh.weight.grad
        for X, G in zip(self._before, (U, None if Vh is None else Vh.mT), strict=True):
            if G is not None:
                G.copy_(tangent_projection(X, G))

    def after_optimizer_step(self) -> list[nn.Parameter]:
        return self.after_optimizer_step_of([self])

    @classmethod
    @torch.no_grad()
    def after_optimizer_step_of(cls, updates: Sequence[Self]) -> list[nn.Parameter]:
        """Retracts the factors of the updates whose turn it is, those of equal rank together.

        Returns:
            U, dS and Vh of every update that `absorb` gave new factors; nothing without it.

        Raises:
            SpectralError: NaN or Inf in a factor, before any that follows the same rule is retracted.
        """
        by_rule: defaultdict[RetractionRule, list[Self]] = defaultdict(list)
        for update in updates:
            by_rule[update.rule].append(update)
        return [stale for rule, group in by_rule.items() for stale in cls._follow(rule, group)]

    @classmethod
    def _follow(cls, rule: RetractionRule, updates: Sequence[Self]) -> list[nn.Parameter]:
        if rule.riemannian:
            for update in updates:
                update._project_step_()
        due = [update for update in updates if update._is_due()]
        stale: list[nn.Parameter] = []
        if rule.absorb:
            drifts = [update._drift() for update in due]  # all of them, before anything changes
            for update, drift in zip(due, drifts, strict=True):
                if rule.tolerance is None or drift > rule.tolerance:
                    stale += update._absorb_()
        else:
            cls._retract_(rule, due)
        if rule.every > 1:  # otherwise nothing depends on the count
            for update in updates:
                update._count.add_one_(update.step)
        return stale

    def _is_due(self) -> bool:
        every = self.rule.every
        return every == 1 or (self._count.of(self.step) + 1) % every == 0

    @staticmethod
    def _retract_(rule: RetractionRule, updates: Sequence[SCT]) -> None:
        points = {update: update.points() for update in updates}
        every = [point for own in points.values() for point in own]
        retracted = {id(point) for point in retract_(every, rule.retraction, rule.tolerance)}
        for update, own in points.items():
            update.retractions += any(id(point) in retracted for point in own)

    def _project_step_(self) -> None:
        """Takes out of the optimizer's step what leaves the tangent spaces where it started, if that was noted."""
        for before, (X, _) in zip(self._before, self.points(), strict=False):
            X.copy_(before + tangent_projection(before, X - before))
        self._before = []

    def _drift(self) -> float:
        """The largest entry of |X^T X - I| of both factors; raises SpectralError for NaN or Inf."""
        if not torch.isfinite(self.dS.weight).all():
            raise diverged(f"dS of {self.key}")
        return max(error for stack in measured(self.points()) for error in stack.errors)

    def _absorb_(self) -> list[nn.Parameter]:
        """Makes the factors orthonormal and leaves W as it is: they become those of its SVD.

        With U = Q_u R_u and Vh^T = Q_v R_v, W = Q_u (R_u diag(S) R_v^T) Q_v^T; the SVD of the r x r core in the middle
        has all that changes.
        """
        U, S, Vh = self.factors()
        U, S, Vh = svd_of_product(U * S, Vh)
        self.U.weight.copy_(U)
        self.Vh.weight.copy_(Vh)
        self.dS.weight.copy_(S - self.S.weight)
        self.retractions += 1
        return [value for _, value in self.trained_parameters()]


@register
@dataclass
class SCTConfig(CalibratedConfig):
    """Configuration of SCT, Spectral Compact Training (Kohlberger, 2026, arXiv 2604.00733).

    The base weight is given up: memory for weights, gradients and optimizer state is that of the factors. Unless `r`
    is min(out_features, in_features), the start is an approximation of the weight, and the model has to be trained to
    make up for it.

    Args:
        retraction: How the factors become orthonormal again: "polar", the nearest orthonormal matrix; "qr", the Q
            factor with signs fixed, which depends on the order of the columns; "cholesky_qr", the same matrix, faster.
        gradient: "euclidean", as in the paper; or "riemannian": gradients before the optimizer's step, and the step
            after it, are projected onto the tangent spaces, which takes a copy of the factors during the step.
        retract_every: Optimizer steps from one retraction to the next.
        retract_tolerance: A number retracts a factor X only where an entry of |X^T X - I| is larger; None always.
        absorb: Whether a retraction leaves the weight W = U diag(S) Vh as it is: the new factors are those of its SVD,
            whatever `retraction` says. They are turned against the old ones, so the optimizer state of the layer is
            reset each time: only sensible with a large `retract_every` or a `retract_tolerance`.
        init: "svd", the leading triplets of the weight, or with a `calibration` the factors that serve its inputs
            best; or "random": random orthonormal U and Vh, and equal singular values with which the Frobenius norm is
            that of the weight, for training from scratch.
        init_std: Standard deviation that the entries of the dense weight would have, for a random start; None means
            that of the base weight.
        keep_base_weight: False frees the base weight. True keeps it, unused, so that `disable_adapter`, `unload` and
            other adapters work.
        seed: Seed of the random start.
            Further fields are those of `CalibratedConfig` and `SpectralConfig`.
    """

    method: ClassVar[str] = "sct"
    paper: ClassVar[str] = (
        "Björn R. Kohlberger, *Spectral Compact Training: Pre-Training Large Language Models via Permanent Truncated "
        "SVD and Stiefel QR Retraction*, [arXiv 2604.00733](https://arxiv.org/abs/2604.00733), 2026"
    )

    retraction: str = field(default="polar", metadata={"help": f"One of {', '.join(RETRACTIONS)}."})
    gradient: str = field(default="euclidean", metadata={"help": "'euclidean' or 'riemannian'."})
    retract_every: int = field(default=1, metadata={"help": "Optimizer steps from one retraction to the next."})
    retract_tolerance: float | None = field(
        default=None, metadata={"help": "Retract only where an entry of |X^T X - I| is larger; None always."}
    )
    absorb: bool = field(default=False, metadata={"help": "Whether a retraction leaves the weight as it is."})
    init: str = field(default="svd", metadata={"help": "'svd' or 'random'."})
    init_std: float | None = field(default=None, metadata={"help": "Scale of a random start; None: the weight's."})
    keep_base_weight: bool = field(default=False, metadata={"help": "False frees the base weight that SCT replaces."})
    seed: int = field(default=0, metadata={"help": "Seed of the random start."})

    def _check_fields(self) -> None:
        super()._check_fields()
        self._check_choice("retraction", tuple(RETRACTIONS))
        self._check_choice("gradient", ("euclidean", "riemannian"))
        self._check_choice("init", ("svd", "random"))
        self._check_least("retract_every", 1)
        self._check_positive("init_std", "that of the weight")
        self._check_positive("retract_tolerance", "a retraction every time")
        if self.init == "svd" and self.init_std is not None:
            raise ValueError(f'`init_std` is for `init="random"`, and has no effect otherwise; got {self.init_std}.')
        measured = any(isinstance(r, str) for r in (self.r, *self.rank_pattern.values()))
        if self.init == "random" and self.calibration is not None and not measured:
            raise ValueError(
                '`calibration` is for `init="svd"`, or for ranks by energy or budget: a random start looks at no '
                "inputs."
            )
        if not self.save_start:
            raise ValueError("`save_start` should be True: the factors of SCT change, they cannot be recomputed.")

    def start_(self, update: SpectralUpdate, weight: Tensor, key: str = "") -> None:
        if self.init == "svd":
            super().start_(update, weight, key)
            return
        assert isinstance(update, SCT)
        update.start_random_(root_mean_square(weight) if self.init_std is None else self.init_std)

    def build(self, size: Size) -> SCT:
        riemannian = self.gradient == "riemannian"
        rule = RetractionRule(self.retraction, self.retract_every, self.retract_tolerance, self.absorb, riemannian)
        update = SCT(size, rule, seed=self.seed)
        update.frees_base = not self.keep_base_weight
        return update


def root_mean_square(weight: Tensor) -> float:
    """||W||_F / sqrt(m n), for entries of mean zero their standard deviation.

    Raises:
        SpectralError: `weight` is on the meta device, or has NaN or Inf entries.
    """
    return float(torch.linalg.vector_norm(working_copy(weight))) / math.sqrt(weight.numel())
