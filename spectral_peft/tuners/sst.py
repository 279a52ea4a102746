"""SST (Zhao et al., ICML 2025, arXiv 2405.15481): train all singular values and a few sampled singular vectors."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from spectral_peft.config import SpectralConfig
from spectral_peft.enhanced_gradient import segmented_product
from spectral_peft.errors import SpectralError, diverged
from spectral_peft.linalg import Factors, completed, normalize_, same_matrix, sketch, svd_of_product
from spectral_peft.linalg.sampling import PROBABILITIES, draw, in_turn, scrambled, seed_of, top
from spectral_peft.model import register
from spectral_peft.schedule import Count, Schedule
from spectral_peft.update import Size, SpectralUpdate, compute_dtype, in_float32


SAME_REST = 1e-2
"""Relative difference up to which vectors count as the same: rounding to 16 bits stays below it."""
SAMPLING = (*PROBABILITIES, "sequential", "top")


class SST(SpectralUpdate):
    """W = U diag(S) Vh with all k = min(m, n) triplets, in place of the base weight.

    All singular values S + dS train at every step and are clamped at 0. Of the vectors, r pairs train at a time: U
    (m, r) and Vh (r, n); after a step each is normalized. The others are frozen in U_rest and Vh_rest. After
    `steps_per_iteration` optimizer steps other pairs are drawn and swapped in, the optimizer state of U, dS and Vh is
    reset, and the learning rate warms up again; after `iterations_per_round` of these, W is decomposed anew, which
    makes the vectors orthonormal again and leaves W as it is, up to the rounding of the vectors' dtype.

    Chosen where the paper's text is open: one draw for both sides of a matrix; normalizing changes W by the dropped
    norms, as in the paper; the SVD of W takes place before the draw that follows it.

    The triplets lie in slots, the trained ones first; `order` says which triplet of the last SVD lies in which slot.
    """

    trained: ClassVar[tuple[str, ...]] = ("U", "dS", "Vh")
    orthonormal: ClassVar[tuple[str, ...]] = ("U", "Vh")
    spectrum: ClassVar[tuple[str, ...]] = ("dS",)
    replaces: ClassVar[bool] = True
    scheduled: ClassVar[bool] = True
    takes_indices: ClassVar[bool] = False

    step: Tensor
    order: Tensor

    def __init__(
        self, size: Size, k: int, schedule: Schedule, *, sampling: str, enhanced: bool, seed: int, rest: torch.dtype
    ) -> None:
        super().__init__(size)
        m, n, r = size[:3]
        self.schedule, self.sampling, self.enhanced = schedule, sampling, enhanced
        self.key, self.seed = size.key, seed
        self.U = size.factor(m, r)
        self.Vh = size.factor(r, n)
        self.S = size.diagonal(k)
        self.dS = size.diagonal(k)
        self.U_rest = size.factor(m, k - r, rest)
        self.Vh_rest = size.factor(k - r, n, rest)
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))
        self.register_buffer("order", torch.arange(k))
        self._count = Count()
        self.keep_schedule(
            **schedule._asdict(), sampling=sampling, gradient="enhanced" if enhanced else "default", seed=seed
        )
        self._before: list[Tensor] = []
        self._was_loaded = False

    @torch.no_grad()
    def start_(self, factors: Factors) -> None:
        self.step.zero_()
        self._take(factors)
        self._swap(self._next(0))

    def is_started(self) -> bool:
        """By U: all singular values of a zero weight are zero, and all vectors may train."""
        return bool(self.U.weight.any())

    # The function

    def singular_values(self) -> Tensor:  # shape: (k,)
        """The singular values as they are now, by slot, in float32 at least."""
        return in_float32(self.S.weight) + self.dS.weight

    def steps_to_turn(self) -> int:
        return self.schedule.steps_per_iteration - self._count.of(self.step) % self.schedule.steps_per_iteration

    def statistics(self) -> dict[str, float]:
        """`swaps`, changes of the trained vectors since the start, and `decompositions`, SVDs of the weight."""
        step, swap = self._count.of(self.step), self.schedule.steps_per_iteration
        return {"swaps": step // swap, "decompositions": step // (swap * self.schedule.iterations_per_round)}

    def forward(self, x: Tensor) -> Tensor:
        return segmented_product(
            self.dropout(x),
            self.U.weight,
            self.singular_values(),
            self.Vh.weight,
            self.U_rest.weight,
            self.Vh_rest.weight,
            enhanced=self.enhanced,
            dtype=compute_dtype(x, self.U.weight),
        )

    def factors(self) -> Factors:
        """All triplets by slot, in float32 at least."""
        U = torch.cat([in_float32(self.U.weight), in_float32(self.U_rest.weight)], dim=1)
        Vh = torch.cat([in_float32(self.Vh.weight), in_float32(self.Vh_rest.weight)])
        return Factors(U, self.singular_values(), Vh)

    def matrix(self) -> Tensor:
        return self.factors().matrix()

    def check_state(self, tensors: Mapping[str, Tensor]) -> None:
        numbers, step = tensors["order"].tolist(), int(tensors["step"])
        if sorted(numbers) != list(range(len(numbers))):
            raise SpectralError(
                f"order should hold the number of each of the {len(numbers)} triplets once, got {len(set(numbers))} "
                f"different ones from {min(numbers)} to {max(numbers)}."
            )
        if step < 0:
            raise SpectralError(f"step should count optimizer steps, got {step}.")

    # Exchanged vectors belong together

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        trained = {f"{prefix}{name}" for name, _ in self.trained_parameters()}
        others = {f"{prefix}{name}" for name, _ in (*self.frozen(), *self.named_buffers())}
        if trained <= state_dict.keys() and others.isdisjoint(state_dict):  # a file of many may hold some of both
            raise SpectralError(
                f"The vectors of {self.key} that train come without `order`, which says which ones they are, and "
                "without the others. Keep all tensors: `model.state_dict()`, or those of `get_peft_model_state_dict`."
            )
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._was_loaded = True

    def _refuse_other_rest(self) -> None:
        """Raises SpectralError if the frozen vectors are not those that the trained ones were saved with.

        Checkpoints of what requires a gradient leave the frozen ones out, and nobody but their sketch misses them. A
        swap of few small vectors can be below its tolerance.
        """
        of_rest = self.fingerprint[1].cpu().view(torch.float32)
        if of_rest.any() and not same_matrix(of_rest, sketch(self.start_vector()).cpu(), SAME_REST):
            raise SpectralError(
                f"The vectors of {self.key} that do not train are not those that the trained ones "
                "were saved with: the checkpoint holds trainable parameters alone. With Trainer and FSDP2 set "
                "`state_dict_type` to SHARDED_STATE_DICT, or start from the adapter that `save_pretrained` wrote."
            )
        self._was_loaded = False

    def _note_rest_(self) -> None:
        self.fingerprint[1] = sketch(self.start_vector()).view(torch.int32).to(self.fingerprint.device)

    # The schedule

    @torch.no_grad()
    def before_optimizer_step(self) -> None:
        if self._was_loaded:
            self._refuse_other_rest()
        warm = self.schedule.warmup(self._count.of(self.step)) == 1
        self._before = [] if warm else [value.detach().clone() for _, value in self.trained_parameters()]

    @torch.no_grad()
    def after_optimizer_step(self) -> Iterable[nn.Parameter]:
        """Blends, clamps, normalizes; at the end of an iteration swaps, at the end of a round decomposes first.

        Raises:
            SpectralError: NaN or Inf in a singular value or a trained vector, before anything is swapped.
        """
        # An optimizer's step is proportional to its learning rate: taking a part of the step is taking it at a part of
        # the rate, whatever a scheduler sets the rate to.
        part = self.schedule.warmup(self._count.of(self.step))
        for before, (_, value) in zip(self._before, self.trained_parameters(), strict=False):
            value.copy_(torch.lerp(before, value, part))
        self._before = []
        self.dS.weight.clamp_(min=-self.S.weight)
        normalize_(self.U.weight, dim=0)
        normalize_(self.Vh.weight, dim=1)
        step = self._count.add_one_(self.step)
        if not self.schedule.is_swap(step):
            return ()
        self._refuse_non_finite()
        if self.schedule.is_svd(step):
            self._take(self._decomposed())
        self._swap(self._next(step // self.schedule.steps_per_iteration))
        self._note_rest_()
        return [value for _, value in self.trained_parameters()]

    def _refuse_non_finite(self) -> None:
        for name, value in self.trained_parameters():
            if not torch.isfinite(value).all():
                raise diverged(f"{name} of {self.key}", f" after {int(self.step)} steps")

    def _decomposed(self) -> Factors:
        U, S, Vh = self.factors()
        return svd_of_product(U * S, Vh)

    @torch.no_grad()
    def _take(self, factors: Factors) -> None:
        """Puts triplets into the slots in their own order."""
        r = self.r
        self.U.weight.copy_(factors.U[:, :r])
        self.U_rest.weight.copy_(factors.U[:, r:])
        self.Vh.weight.copy_(factors.Vh[:r])
        self.Vh_rest.weight.copy_(factors.Vh[r:])
        self.S.weight.copy_(factors.S)
        self.dS.weight.zero_()
        self.order.copy_(torch.arange(len(self.order)))

    def _next(self, iteration: int) -> Tensor:  # shape: (r,)
        """The triplets, by their number in the last SVD, whose vectors train in this iteration."""
        by_slot = self.singular_values()
        S = torch.empty_like(by_slot).index_copy(0, self.order, by_slot)
        if self.sampling == "sequential":
            return in_turn(len(S), self.r, iteration)
        if self.sampling == "top":
            return top(S, self.r)
        return draw(PROBABILITIES[self.sampling](S), self.r, seed_of(f"{self.seed} {self.key} {iteration}"))

    @torch.no_grad()
    def _swap(self, chosen: Tensor) -> None:
        """Exchanges the trained triplets that were not chosen for the chosen ones that are not trained yet."""
        device, r = self.order.device, self.r
        wanted = torch.isin(self.order, chosen.to(device))
        leaving, coming = (~wanted[:r]).nonzero().squeeze(1), wanted[r:].nonzero().squeeze(1)
        U, U_rest = self.U.weight, self.U_rest.weight
        U[:, leaving], U_rest[:, coming] = U_rest[:, coming].to(U.dtype), U[:, leaving].to(U_rest.dtype)
        Vh, Vh_rest = self.Vh.weight, self.Vh_rest.weight
        Vh[leaving], Vh_rest[coming] = Vh_rest[coming].to(Vh.dtype), Vh[leaving].to(Vh_rest.dtype)
        for values in (self.S.weight, self.dS.weight, self.order):
            values[leaving], values[r + coming] = values[r + coming], values[leaving]


class PooledSST(SST):
    """SST on the K leading triplets of W alone, added to the base weight: U diag(S) Vh - U0 diag(S0) Vh0.

    The difference is computed in float32, under autocast and from factors in bfloat16 too: in bfloat16 the error of
    the two products would be relative to the pool, not to its change. The pool is thin, so this costs little.
    """

    replaces: ClassVar[bool] = False

    def __init__(self, size: Size, k: int, schedule: Schedule, **kwargs: object) -> None:
        super().__init__(size, k, schedule, **kwargs)  # type: ignore[arg-type]
        m, n, _ = size[:3]
        self.U0 = size.factor(m, k)
        self.S0 = size.diagonal(k)
        self.Vh0 = size.factor(k, n)

    @torch.no_grad()
    def start_(self, factors: Factors) -> None:
        super().start_(factors)
        U, S, Vh = self.factors()  # in the order of the slots, so that the difference starts as zero, up to rounding
        self.U0.weight.copy_(U)
        self.S0.weight.copy_(S)
        self.Vh0.weight.copy_(Vh)

    @torch.no_grad()
    def take_change_(self, change: Factors) -> None:
        """The pool is that of the change, with triplets of singular value 0 as far as there are fewer; S0 is 0."""
        self.start_(completed(change, len(self.S.weight)))
        self.S0.weight.zero_()

    def start_segments(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """U0, S0 and Vh0, of the first r and of the rest; the first r rounded as U and Vh are, to cancel them.

        In the order of the arguments of `segmented_product`.
        """
        r, dtype, U0, Vh0 = self.r, self.U.weight.dtype, self.U0.weight, self.Vh0.weight
        return U0[:, :r].to(dtype), in_float32(self.S0.weight), Vh0[:r].to(dtype), U0[:, r:], Vh0[r:]

    def forward(self, x: Tensor) -> Tensor:
        x, S = self.dropout(x), self.singular_values()
        now = self.U.weight, S, self.Vh.weight, self.U_rest.weight, self.Vh_rest.weight
        product = partial(segmented_product, x, enhanced=self.enhanced, dtype=S.dtype)
        return product(*now) - product(*self.start_segments())

    def thin_change(self) -> tuple[Tensor, Tensor]:
        (U, S, Vh), (U0, S0, Vh0, *rest) = self.factors(), self.start_segments()
        U0, Vh0 = torch.cat([in_float32(U0), rest[0]], dim=1), torch.cat([in_float32(Vh0), rest[1]])
        return torch.cat([U * S, -U0 * S0], dim=1), torch.cat([Vh, Vh0])

    def restored(self, name: str, value: Tensor, dtype: torch.dtype) -> Tensor:
        """What still is the rounded start becomes the start: a new adapter keeps the function of the base."""
        start = {"U.weight": self.U0.weight[:, : self.r], "Vh.weight": self.Vh0.weight[: self.r]}.get(name)
        whole = super().restored(name, value, dtype)
        return whole if start is None else torch.where(value == start.to(value.dtype), start, whole)

    def matrix(self) -> Tensor:
        return SpectralUpdate.matrix(self)


@register
@dataclass
class SSTConfig(SpectralConfig):
    """Configuration of SST (Zhao et al., ICML 2025, arXiv 2405.15481).

    Args:
        r: Number of singular vector pairs per weight that train at a time; more than a weight has raises ValueError.
        pool: None trains all min(out_features, in_features) triplets in place of the base weight. An integer K trains
            within the K leading ones, or all where there are fewer, added to the base weight: for fine-tuning. It
            stores twice the numbers of LoRA of rank K; gradients and optimizer state are those of rank r.
        steps_per_iteration: Optimizer steps between changes of the trained vectors.
        iterations_per_round: Iterations between SVDs of the weight; None means ceil(k / r), k the number of triplets.
        warmup_steps: Optimizer steps of linear warm-up after every change of the trained vectors, fewer than
            `steps_per_iteration`; None means a fifth of these, and at most 20.
        sampling: "mixture": p_i = (1/k + S_i / sum S) / 2, as in the paper; or "uniform", "singular_values",
            "sequential", "top".
        gradient: "enhanced", as in the paper, or "default": the derivative.
        init: "svd": the triplets of the weight; "random": random orthonormal vectors with the singular values of the
            weight (an ablation: the function is not kept).
        keep_base_weight: Whether the base weight stays in memory, unused, so that `disable_adapter`, `unload` and
            other adapters work. False frees it. Without a pool only; a pool never touches it.
        frozen_dtype: None, or "bfloat16": the dtype of the vectors that do not train.
        seed: Seed of the draws.
            Further fields are those of `SpectralConfig`.
    """

    method: ClassVar[str] = "sst"
    paper: ClassVar[str] = (
        "Jialin Zhao, Yingtao Zhang, Xinghang Li, Huaping Liu and Carlo Vittorio Cannistraci, *Sparse Spectral "
        "Training and Inference on Euclidean and Hyperbolic Neural Networks*, ICML 2025, "
        "[arXiv 2405.15481](https://arxiv.org/abs/2405.15481)"
    )
    clamps_rank: ClassVar[bool] = False  # with all triplets training there is nothing to sample

    pool: int | None = field(default=None, metadata={"help": "Train within this many leading triplets, additively."})
    steps_per_iteration: int = field(default=200, metadata={"help": "Optimizer steps between swaps of vectors."})
    iterations_per_round: int | None = field(default=None, metadata={"help": "Iterations between SVDs; ceil(k / r)."})
    warmup_steps: int | None = field(default=None, metadata={"help": "Steps of warm-up after every swap; at most 20."})
    sampling: str = field(default="mixture", metadata={"help": f"How vectors are drawn: {', '.join(SAMPLING)}."})
    gradient: str = field(default="enhanced", metadata={"help": "'enhanced' or 'default'."})
    init: str = field(default="svd", metadata={"help": "'svd', or 'random' for an ablation."})
    keep_base_weight: bool = field(default=True, metadata={"help": "False frees the base weight that SST replaces."})
    frozen_dtype: str | None = field(default=None, metadata={"help": "None or 'bfloat16'."})
    seed: int = field(default=0, metadata={"help": "Seed of the draws."})

    def _check_fields(self) -> None:
        super()._check_fields()
        self._check_choice("sampling", SAMPLING)
        self._check_choice("gradient", ("enhanced", "default"))
        self._check_choice("init", ("svd", "random"))
        self._check_choice("frozen_dtype", (None, "bfloat16"))
        for name, least in (("steps_per_iteration", 1), ("iterations_per_round", 1), ("warmup_steps", 0), ("pool", 1)):
            self._check_least(name, least)
        if self.warmup_steps is not None and self.warmup_steps >= self.steps_per_iteration:
            raise ValueError(
                f"`warmup_steps` should be less than `steps_per_iteration` ({self.steps_per_iteration}), or the full "
                f"learning rate is never reached; got {self.warmup_steps}."
            )
        if self.pool is not None and isinstance(self.r, int) and self.r > self.pool:
            raise ValueError(f"`r` should be at most `pool` ({self.pool}), got {self.r}.")
        if self.pool is not None and not self.keep_base_weight:
            raise ValueError("`keep_base_weight` should be True with a `pool`, which is added to the base weight.")
        if not self.save_start:
            raise ValueError("`save_start` should be True: the vectors of SST change, they cannot be recomputed.")

    def _triplets(self, m: int, n: int) -> int:
        return min(m, n, self.pool or m)

    def decompose(self, weight: Tensor, r: int, key: str = "") -> Factors:
        factors = super().decompose(weight, self._triplets(*weight.shape), key)
        return scrambled(factors, f"{self.seed} {key} start") if self.init == "random" else factors

    def for_changes(self, triplets: int) -> SSTConfig:
        """With the triplets of the change as its pool."""
        return replace(self, pool=triplets, r=min(self.r, triplets) if isinstance(self.r, int) else self.r)

    def rank_for_change(self, triplets: int, r: int) -> int:
        return min(r, triplets)

    def build(self, size: Size) -> SST:
        k = self._triplets(size.out_features, size.in_features)
        size = size._replace(r=min(size.r, k))
        iterations = self.iterations_per_round or math.ceil(k / size.r)
        warmup = min(20, self.steps_per_iteration // 5) if self.warmup_steps is None else self.warmup_steps
        update = (SST if self.pool is None else PooledSST)(
            size,
            k,
            Schedule(self.steps_per_iteration, iterations, warmup),
            sampling=self.sampling,
            enhanced=self.gradient == "enhanced",
            seed=self.seed,
            rest=torch.bfloat16 if self.frozen_dtype else size.dtype,
        )
        update.frees_base = update.replaces and not self.keep_base_weight
        return update
