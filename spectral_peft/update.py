"""What one adapter makes of one weight, as a torch module that knows nothing of PEFT."""

from __future__ import annotations

import warnings
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spectral_peft.errors import SpectralError
from spectral_peft.linalg import SKETCH_SIZE, Factors, same_matrix, sketch
from spectral_peft.unsupported import refuse_flattened


if TYPE_CHECKING:
    from typing_extensions import Self


SAME_BASE = 1e-2
"""Relative difference up to which a base weight counts as the same: rounding to 16 or 8 bits stays below it."""
SAME_START = 1e-4
"""The same for singular vectors in float32: rounding stays below it, another basis does not."""


class Size(NamedTuple):
    """What an update is built from: the shape of its weight, its rank, dtype and device of its parameters, and the
    name of its module, from which an update that draws random numbers seeds them.
    """

    out_features: int
    in_features: int
    r: int
    dtype: torch.dtype = torch.float32
    device: torch.device | None = None
    key: str = ""

    def factor(self, rows: int, columns: int, dtype: torch.dtype | None = None) -> Factor:
        """A zero matrix of this dtype and device."""
        return Factor(rows, columns, dtype or self.dtype, self.device)

    def diagonal(self, entries: int) -> Diagonal:
        """A zero diagonal matrix of this dtype and device."""
        return Diagonal(entries, self.dtype, self.device)


def compute_dtype(x: Tensor, parameter: Tensor) -> torch.dtype:
    """The dtype that autocast asks for, or that of the parameter; autocast leaves a lookup of indices alone."""
    device = x.device.type
    autocast = x.is_floating_point() and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if autocast else parameter.dtype


def in_float32(value: Tensor) -> Tensor:
    """In float32 at least: in 16 bits a small change of a number is lost when it is added to it."""
    return value.to(torch.promote_types(value.dtype, torch.float32))


class Factor(nn.Module):
    """A matrix M (out_features, in_features) as the map x -> x M^T.

    An integer ``x`` stands for the one-hot vectors of its entries: the map then looks up columns of M, which is how
    the update of an embedding is computed. A leaf module with a ``weight`` is what FSDP's wrapping policies look for.
    """

    weight: nn.Parameter

    def __init__(self, out_features: int, in_features: int, dtype: torch.dtype, device: torch.device | None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(out_features, in_features, dtype=dtype, device=device))

    def forward(self, x: Tensor) -> Tensor:  # shape: (..., in_features) or integer (...) -> (..., out_features)
        if not x.is_floating_point():
            return F.embedding(x, self.weight.mT)
        if not torch.is_autocast_enabled(x.device.type):
            x = x.to(self.weight.dtype)
        return F.linear(x, self.weight)

    def extra_repr(self) -> str:
        return "{}, {}".format(*self.weight.shape)


class Diagonal(nn.Module):
    """A diagonal matrix with entries d (r,) as the map x -> x * d."""

    weight: nn.Parameter

    def __init__(self, r: int, dtype: torch.dtype, device: torch.device | None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(r, dtype=dtype, device=device))

    def forward(self, x: Tensor) -> Tensor:  # shape: (..., r) -> (..., r)
        return x * self.weight

    def extra_repr(self) -> str:
        return str(len(self.weight))


class SpectralUpdate(nn.Module, ABC):
    """A matrix (out_features, in_features) that changes one weight W, or replaces it.

    A subclass creates its `Factor` and `Diagonal` children (all zero) from the shape of W, names in ``trained`` those
    that an optimizer moves, fills them in `start_`, and computes `forward` and `matrix` so that for every x

        update(x) == x @ update.matrix().T

    With ``replaces`` false, this is added to x @ W.T: the matrix is the change of W, and zero at the start. With
    ``replaces`` true it stands in the place of x @ W.T, which is then not computed: the matrix is W at the start.
    Either way an adapter that was just added leaves the model's function as it is, but for methods that say what they
    give up. What is not trained is frozen:
    parameters without gradient, so that FSDP shards them and copies by name find them.

    Among the trained children, ``orthonormal`` names the factors whose longer side holds the entries of unit vectors,
    and ``spectrum`` the singular values: an optimizer gives each their own learning rate (`parameter_groups`).

    Where ``takes_indices`` holds, x may also hold the indices of one-hot vectors, as an embedding's input does. Where
    ``is_linear`` holds, the matrix is linear in the trained parameters: adapters of one start are added up by them. An
    update with a schedule sets ``scheduled``, names what it depends on with `keep_schedule`, and does its work in
    `after_optimizer_step`.
    """

    trained: ClassVar[tuple[str, ...]]
    orthonormal: ClassVar[tuple[str, ...]] = ()
    spectrum: ClassVar[tuple[str, ...]] = ()
    replaces: ClassVar[bool] = False
    scheduled: ClassVar[bool] = False
    takes_indices: ClassVar[bool] = True
    is_linear: ClassVar[bool] = False

    fingerprint: Tensor

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.r = size.r
        self.frees_base = False
        self._schedule_fields: dict[str, object] = {}
        self.dropout: nn.Module = nn.Identity()
        self.register_buffer("fingerprint", torch.zeros(2, SKETCH_SIZE, dtype=torch.int32))

    def keep_schedule(self, **fields: object) -> None:
        """Notes the fields of the config on which the schedule depends: a resumed run is compared with them.

        As a buffer of one number for each, because not every loader sees the config that a checkpoint was saved with.
        """
        self._schedule_fields = fields
        self.register_buffer("schedule_digest", self._digest())

    def _digest(self) -> Tensor:  # shape: (fields,), int64
        return torch.tensor([zlib.crc32(repr(value).encode()) for value in self._schedule_fields.values()])

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """torch's, which warns where a checkpoint comes from a run with another schedule than this update has."""
        key = f"{prefix}schedule_digest"
        if key in state_dict and self._schedule_fields:
            self._compare_schedule(state_dict[key].tolist())
            state_dict[key] = self._digest()  # what is saved next was trained with this schedule
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _compare_schedule(self, stored: list[int]) -> None:
        pairs = zip(self._schedule_fields.items(), stored, self._digest().tolist(), strict=False)
        differing = [f"{name}={value!r}" for (name, value), theirs, own in pairs if theirs != own]
        if differing:
            warnings.warn(
                f"The checkpoint was trained with another schedule: this adapter has {', '.join(differing)}, the "
                "checkpoint other values. Training goes on with those of this adapter, and will not be what the "
                "interrupted run would have been. To resume that run, add the adapter with its config (that of its "
                "adapter_config.json).",
                stacklevel=2,
            )

    @abstractmethod
    def start_(self, factors: Factors) -> None:
        """Sets the start, in place, from the factors of W that the method asked for."""

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """Returns x @ matrix().T without building the matrix; x is (..., in_features) or integer (...)."""

    def thin_change(self) -> tuple[Tensor, Tensor] | None:
        """Returns B (out_features, s) and A (s, in_features) with matrix() = B A, or None if no small s has them.

        From them an exact LoRA is exported.
        """
        return None

    def take_change_(self, change: Factors) -> None:
        """Sets matrix() to a given change U diag(S) Vh of rank r, in place; the start holds its vectors.

        Raises:
            SpectralError: the method has no update for it.
        """
        raise SpectralError(
            f"{type(self).__name__} does not implement `take_change_`, with which an update becomes a given change. "
            "Merge the adapters into copies of the model and average those, or export each as a LoRA (`export_lora`) "
            "and combine the LoRAs."
        )

    def matrix(self) -> Tensor:
        """Returns the change of W, or the weight that replaces W, shape (out_features, in_features).

        B A of `thin_change`; a method without one overrides this.
        """
        thin = self.thin_change()
        if thin is None:
            raise NotImplementedError(f"{type(self).__name__} should override `matrix` or `thin_change`.")
        B, A = thin
        return B @ A

    def singular_values(self) -> Tensor | None:  # shape: (r,)
        """The singular values as they are now, in no order and of either sign; None if the method has none."""
        return None

    def steps_to_turn(self) -> int:
        """Optimizer steps up to the next one after which the schedule changes something."""
        return 1

    def statistics(self) -> dict[str, float]:
        """The method's own figures for logs, by name, such as how often its vectors were swapped."""
        return {}

    def check_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Raises SpectralError where tensors of the right names and shapes cannot be a state of this update."""

    def before_optimizer_step(self) -> None:
        """Called before every optimizer step of the trained parameters, if ``scheduled``."""

    def after_optimizer_step(self) -> Iterable[nn.Parameter]:
        """Called after every optimizer step of the trained parameters, if ``scheduled``.

        Changes data in place: optimizers, DDP and FSDP hold on to the Parameters.

        Returns:
            The parameters whose optimizer state no longer fits what they hold now.
        """
        return ()

    @classmethod
    def after_optimizer_step_of(cls, updates: Sequence[Self]) -> list[nn.Parameter]:
        """`after_optimizer_step` for all updates of this class that one optimizer step moved.

        One after the other; a method that works faster on many matrices at once overrides this.
        """
        return [stale for update in updates for stale in update.after_optimizer_step()]

    def trained_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The parameters that an optimizer moves, by their name in the state dict."""
        for child, module in self.named_children():
            if child in self.trained:  # the others are not looked at: where they are sharded, that gathers them
                yield from module.named_parameters(prefix=child)

    def frozen(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The parameters that hold the start, by their name in the state dict."""
        return ((name, value) for name, value in self.named_parameters() if name.split(".")[0] not in self.trained)

    def freeze_start_(self) -> None:
        """Takes the frozen start out of training."""
        for _, weight in self.frozen():
            if weight.is_leaf:  # during a pass FSDP1 has views in the place of parameters
                weight.requires_grad_(False)

    def train(self, mode: bool = True) -> Self:
        """torch's; what trains is looked at with `restore_dtype_` when training begins.

        Not in a process group, where buckets for gradients of the dtype that is there may have been laid out already.

        Raises:
            SpectralError: the schedule could not work on the parameters (FSDP1).
        """
        if mode:
            self.freeze_start_()
        if mode and self.scheduled:
            refuse_flattened(self)
        if mode and self._was_cast():
            if torch.distributed.is_available() and torch.distributed.is_initialized():
                warnings.warn(
                    "What trains in the adapters was cast to 16 bits, and small steps of it will be lost. Call "
                    "`restore_dtype_()` of every SpectralUpdate in the model before it is distributed.",
                    stacklevel=2,
                )
            else:
                self.restore_dtype_()
                warnings.warn(
                    "What trains in the adapters had been cast to 16 bits, where small steps are lost, and is in "
                    "the dtype of its frozen start again. To train in 16 bits, add the adapter with "
                    "`autocast_adapter_dtype=False`.",
                    stacklevel=2,
                )
        return super().train(mode)

    def _was_cast(self) -> bool:
        return any(value.dtype.itemsize < self._start_dtype.itemsize for _, value in self.trained_parameters())

    @property
    def _start_dtype(self) -> torch.dtype:
        return max(
            (value.dtype for _, value in self.frozen()), key=lambda dtype: dtype.itemsize, default=torch.bfloat16
        )

    @torch.no_grad()
    def restore_dtype_(self) -> None:
        """Gives what trains the dtype of the frozen start again, if it alone was cast to 16 bits.

        TRL's trainers do that to every parameter that trains, where the base is quantized.
        """
        dtype = self._start_dtype
        for name, value in self.trained_parameters():
            if value.dtype.itemsize < dtype.itemsize:
                value.data = self.restored(name, value.detach(), dtype)

    def restored(self, name: str, value: Tensor, dtype: torch.dtype) -> Tensor:
        """The trained tensor of this name in `dtype`, from a copy that was rounded."""
        return value.to(dtype)

    @property
    def is_meta(self) -> bool:
        """Whether the parameters have no data yet, as PEFT creates them when it loads with low_cpu_mem_usage."""
        return any(parameter.is_meta for parameter in self.parameters())

    def is_started(self) -> bool:
        """Whether the start was set, by `start_` or by a checkpoint: what is frozen has an entry that is not zero.

        A method of which all that is frozen can be zero overrides this.
        """
        return any(bool(weight.any()) for _, weight in self.frozen())

    def has_moved(self) -> bool:
        """Whether a trained parameter differs from zero."""
        return not self.is_meta and any(bool(weight.any()) for _, weight in self.trained_parameters())

    def start_vector(self) -> Tensor:
        """The entries of the frozen start, one after the other, then zeros, in rows of 1024, which sketch quickly."""
        entries = torch.cat([weight.detach().flatten() for _, weight in self.frozen()])
        return F.pad(entries, (0, -len(entries) % 1024)).view(-1, 1024)

    def take_fingerprint_(self, weight: Tensor) -> None:
        """Notes what this update belongs to: the sketches of W and of the start, shape (2, 9).

        As the bits of float32 numbers, because a module that is cast to bfloat16 casts its floating point buffers.
        """
        rows = [sketch(weight).cpu(), sketch(self.start_vector()).cpu()]
        self.fingerprint.copy_(torch.stack(rows).view(torch.int32))

    def has_noted_start(self) -> bool:
        """Whether the frozen start is the one that the fingerprint was taken of, up to the rounding of its dtype."""
        start = self.start_vector()
        limit = SAME_START if start.dtype in (torch.float32, torch.float64) else SAME_BASE
        return same_matrix(self.fingerprint[1].cpu().view(torch.float32), sketch(start).cpu(), limit)

    def perturb_(self) -> None:
        """Moves the trained parameters at random: a change instead of none, for tests."""
        for _, weight in self.trained_parameters():
            weight.data.add_(torch.randn_like(weight), alpha=0.1)
