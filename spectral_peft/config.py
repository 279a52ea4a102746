"""The configuration that every spectral method shares, and the types under which PEFT knows the methods."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from peft.config import PeftConfig
from peft.utils.other import get_pattern_key
from torch import Tensor

from spectral_peft.cache import cached_factors
from spectral_peft.calibration import Calibration
from spectral_peft.card import complete_card
from spectral_peft.damage import check_patterns, check_type, look_at_tensors
from spectral_peft.errors import SpectralError
from spectral_peft.linalg import (
    ALGORITHMS,
    Factors,
    allocate_ranks,
    energy_rank,
    singular_values,
    truncated_svd,
    whiten,
    whitened_svd,
)
from spectral_peft.ranks import Rank, check_rank, parse_share
from spectral_peft.update import Size, SpectralUpdate


if TYPE_CHECKING:
    from typing_extensions import Self


FORMAT_VERSION = 1
"""Version of the adapter checkpoint; it rises when an older release would read a checkpoint wrongly."""


class SpectralPeftType(str):
    """A PEFT type, open to new methods where `peft.PeftType` is a closed enumeration.

    PEFT and transformers look types up by their string and ask for ``.value`` and ``.name``.
    """

    @property
    def value(self) -> str:
        return str.__str__(self)

    name = value

    def __str__(self) -> str:  # PEFT's model status prints what follows the dot, as it does for its own enumeration
        return f"SpectralPeftType.{self.value}"


@dataclass
class SpectralConfig(PeftConfig, ABC):
    """Fields and behaviour that every spectral method has.

    Args:
        r: Number of singular triplets per weight: an integer (more than min(out_features, in_features) is clamped to
            it, with a warning), a fraction of min(out_features, in_features) in (0, 1], "energy=0.9" for the
            smallest rank that holds this share of the sum of squared singular values, or "budget=0.5" for ranks that
            differ from weight to weight, with factors that hold at most half of the parameters of the weights.
        target_modules: As in `peft.LoraConfig`: list of name endings, a regular expression, or "all-linear"; `None`
            takes LoRA's default for the architecture. nn.Linear, transformers' Conv1D and nn.Embedding.
        exclude_modules: List of name endings, or a regular expression, of modules that are left out.
        layers_to_transform: Indices of the layers that get an adapter; with `target_modules` as a list.
        layers_pattern: Name of the list of layers, where it is not one that PEFT knows.
        rank_pattern: Ranks of single modules, in any form that `r` takes, by name ending or regular expression. The
            modules that ask for the same budget share it. Ranks that an energy or a budget stands for are entered
            here, with the full module name, when the adapter is added.
        dense_modules: Filled in; full names of the targeted modules that a budget leaves without an adapter, because
            their factors would not be smaller than the weight.
        dropout: Probability with which the input of the update is dropped (not that of the base layer).
        bias: "none", "all", or "spectral_only" to train the biases of the adapted layers too.
        modules_to_save: Further modules that are trained in full and saved with the adapter, such as a classifier.
        trainable_token_indices: Token embeddings that are trained too, as in `peft.LoraConfig`.
        target_parameters: Names, or their endings, of parameters that are stacks of matrices (experts, rows, columns),
            such as "experts.down_proj": each matrix gets an update of its own. For methods that add to the weight.
        svd: "randomized", "exact", or "auto": randomized where r is small against min(out_features, in_features).
        save_start: Whether checkpoints hold the frozen singular vectors. True reloads exactly on every machine.
            False stores only what was trained, and recomputes the vectors from the base weight with a deterministic
            float64 algorithm when it is loaded; a fingerprint proves that they are the same.
        check_base: Whether loading compares the base weight with the one that the adapter was trained on (up to
            rounding to 16 bits) and raises `SpectralError` where they differ.
        init_weights: False starts from a small random change instead of none; for tests only.
        base_quantization: Filled in; how the base weights that the adapter was trained on were quantized, or None.
        format_version: Written by `save_pretrained`; the version of the checkpoint format.
    """

    method: ClassVar[str]
    paper: ClassVar[str] = ""
    """What to cite, in Markdown; the model card says it."""
    clamps_rank: ClassVar[bool] = True
    function_fields: ClassVar[tuple[str, ...]] = ()
    """Fields on which the function depends beside the tensors: adapters that differ in one cannot be swapped."""

    r: Rank = field(default=64, metadata={"help": "Triplets: an integer, a fraction, 'energy=0.9' or 'budget=0.5'."})
    target_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Module names to adapt: a list of endings, a regex, or 'all-linear'."}
    )
    exclude_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Module names that are left out: a list of endings, or a regex."}
    )
    layers_to_transform: list[int] | int | None = field(
        default=None, metadata={"help": "Indices of the layers that get an adapter."}
    )
    layers_pattern: list[str] | str | None = field(
        default=None, metadata={"help": "Name of the list of layers that `layers_to_transform` counts."}
    )
    rank_pattern: dict[str, Rank] = field(
        default_factory=dict, metadata={"help": "Ranks of single modules, by name ending or regex."}
    )
    dense_modules: list[str] = field(
        default_factory=list, metadata={"help": "Modules that a budget leaves dense; filled in."}
    )
    dropout: float = field(default=0.0, metadata={"help": "Dropout probability on the input of the update."})
    bias: str = field(default="none", metadata={"help": "Biases to train: 'none', 'all' or 'spectral_only'."})
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Further modules that are trained in full and saved, such as a classifier."}
    )
    trainable_token_indices: list[int] | dict[str, list[int]] | None = field(
        default=None, metadata={"help": "Token embeddings that are trained too, as in LoraConfig."}
    )
    target_parameters: list[str] | None = field(
        default=None, metadata={"help": "Names of parameters that are stacks of matrices, one for each expert."}
    )
    svd: str = field(default="auto", metadata={"help": "SVD algorithm: 'auto', 'exact' or 'randomized'."})
    save_start: bool = field(
        default=True, metadata={"help": "Whether checkpoints hold the frozen singular vectors, or recompute them."}
    )
    check_base: bool = field(
        default=True, metadata={"help": "Whether loading checks that the base weight is the one trained on."}
    )
    init_weights: bool = field(
        default=True, metadata={"help": "False starts from a small random change instead of none; for tests."}
    )
    base_quantization: str | None = field(
        default=None, metadata={"help": "How the base weights were quantized; filled in."}
    )
    format_version: int | None = field(default=None, metadata={"help": "Version of the checkpoint; filled in."})

    def __post_init__(self) -> None:
        super().__post_init__()  # type: ignore[no-untyped-call]
        self.peft_type = SpectralPeftType(f"SPECTRAL_{self.method.upper()}")
        for entry in fields(self):
            check_type(entry, getattr(self, entry.name))
        self._take_format_version()
        self._check_fields()
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)  # type: ignore[assignment]  # as PEFT's own configs do
        if isinstance(self.exclude_modules, list):
            self.exclude_modules = set(self.exclude_modules)  # type: ignore[assignment]

    def _take_format_version(self) -> None:
        """A version that is there was written by `save_pretrained`: this config belongs to a checkpoint."""
        self.from_checkpoint = self.format_version is not None
        self.was_measured = False
        if self.format_version is not None and self.format_version > FORMAT_VERSION:
            raise SpectralError(
                f"This adapter has format version {self.format_version}; the installed spectral_peft reads up to "
                f"{FORMAT_VERSION}. Update spectral_peft from where you installed it."
            )

    def _check_fields(self) -> None:
        check_rank(self.r)
        for r in self.rank_pattern.values():
            check_rank(r)
        check_patterns(self)
        if not 0 <= self.dropout < 1:
            raise ValueError(f"`dropout` should be in [0, 1), got {self.dropout}.")
        self._check_choice("bias", ("none", "all", "spectral_only"))
        self._check_choice("svd", tuple(ALGORITHMS))
        for name in ("layers_to_transform", "layers_pattern"):
            if isinstance(self.target_modules, str) and getattr(self, name) is not None:
                raise ValueError(
                    f"`{name}` cannot be used when `target_modules` is a str. Give a list of names, got "
                    f"{self.target_modules!r}."
                )
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError(
                "When `layers_pattern` is specified, `layers_to_transform` must also be specified, got "
                f"layers_pattern={self.layers_pattern!r} alone."
            )

    def _check_choice(self, name: str, allowed: tuple[str | None, ...]) -> None:
        value = getattr(self, name)
        if value not in allowed:
            raise ValueError(f"`{name}` should be one of {', '.join(map(repr, allowed))}, got {value!r}.")

    def _check_positive(self, name: str, none_means: str) -> None:
        value = getattr(self, name)
        if value is not None and not value > 0:
            raise ValueError(f"`{name}` should be positive, or None for {none_means}, got {value}.")

    def _check_least(self, name: str, least: int) -> None:
        value = getattr(self, name)
        if value is not None and value < least:
            raise ValueError(f"`{name}` should be at least {least}, got {value}.")

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any) -> Self:
        """PEFT's, which also looks at the tensors beside a local config, before any model is changed.

        Raises:
            SpectralError: the adapter file is truncated or is not a safetensors file.
        """
        config: Self = super().from_pretrained(pretrained_model_name_or_path, subfolder, **kwargs)
        folder = Path(pretrained_model_name_or_path, subfolder or "")
        if folder.is_dir():
            look_at_tensors(folder)
        return config

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """PEFT's, which also brings the model card beside the config up to date."""
        super().save_pretrained(save_directory, **kwargs)
        complete_card(save_directory, self)

    def to_dict(self) -> dict[str, Any]:
        """All fields, as they are saved: with the version of the format, which a config that was made here lacks."""
        return {**super().to_dict(), "format_version": FORMAT_VERSION}

    @property
    def container(self) -> str:
        """Name of the ModuleDict that holds a layer's updates of this method: the method's prefix and "update"."""
        return f"spectral_{self.method}_update"

    def rank_of(self, key: str) -> Rank:
        """The rank asked for the module `key`: its entry in `rank_pattern`, its full name before others; or `r`."""
        if key in self.rank_pattern:
            return self.rank_pattern[key]
        return self.rank_pattern.get(get_pattern_key(list(self.rank_pattern), key), self.r)

    def resolve_rank(self, weight: Tensor, key: str) -> int:
        """Returns the rank that `rank_of(key)` means for this weight; integers are not clamped.

        Raises:
            ValueError: it is a budget, which means nothing for one weight alone.
        """
        r = self.rank_of(key)
        if isinstance(r, str):
            kind, share = parse_share(r)
            if kind == "budget":
                raise ValueError(f"{key}: {r!r} was not shared out, since `target_modules` does not name this module.")
            return energy_rank(self.spectrum(weight, key), share)
        if isinstance(r, float):
            return max(1, round(r * min(weight.shape)))
        return r

    def spectrum(self, weight: Tensor, key: str = "") -> Tensor:
        """Returns the values that energies and budgets count, descending: the singular values of `weight`."""
        return singular_values(weight)

    def allocate(self, spectra: Sequence[Tensor], shapes: Sequence[tuple[int, int]], budget: int) -> list[int | None]:
        """Returns the ranks of modules with these spectra and weights of these shapes; see `allocate_ranks`."""
        return allocate_ranks(spectra, shapes, budget)

    def decompose(self, weight: Tensor, r: int, key: str = "") -> Factors:
        """Returns the triplets of `weight` that an update of rank `r` starts from: the leading ones.

        In float64 where checkpoints leave the vectors out, so that another machine finds the same ones. `key` is the
        name of the module.
        """
        matrix = weight if self.save_start else weight.double()
        parts = (self.svd, str(r), str(matrix.dtype))
        return cached_factors(weight, parts, lambda: truncated_svd(matrix, r, self.svd))

    def start_(self, update: SpectralUpdate, weight: Tensor, key: str = "") -> None:
        """Starts an update that `build` returned from its weight; `key` is the name of the module."""
        update.start_(self.decompose(weight, update.r, key))

    def for_changes(self, triplets: int) -> SpectralConfig:
        """The config of updates that are set to given changes, of at most so many triplets."""
        return self

    def rank_for_change(self, triplets: int, r: int) -> int:
        """The rank of an update that is set to a change of so many triplets, in the place of one of rank `r`."""
        return triplets

    @abstractmethod
    def build(self, size: Size) -> SpectralUpdate:
        """Returns an update of this size whose parameters are all zero."""


@dataclass
class CalibratedConfig(SpectralConfig):
    """Base of the configs of methods that put factors in the place of the weight, and may know its inputs.

    Without a calibration the factors are the leading triplets, the best approximation for inputs of which nothing is
    known. With one they are the best for inputs like those it has seen, and energies and budgets count the singular
    values of W C^(1/2), whose squares are the parts of E||W x||^2; with gradients, those of G^(1/2) W C^(1/2),
    which are compared between modules as they are, being all in the units of the loss.

    Args:
        calibration: What `calibrate` has seen of the inputs of the targeted modules; needed when the adapter is added,
            and not saved with it. Further fields are those of `SpectralConfig`.
    """

    calibration: Calibration | None = field(
        default=None, metadata={"help": "Second moments of the inputs, from `calibrate`; not saved."}
    )

    def to_dict(self) -> dict[str, Any]:
        """All fields but the calibration."""
        fields: dict[str, Any] = super().to_dict()
        del fields["calibration"]
        return fields

    def _check_fields(self) -> None:
        super()._check_fields()
        if self.calibration is not None and not self.save_start:
            raise ValueError(
                "`save_start` should be True with a calibration: the start cannot be recomputed from the weight alone."
            )

    def spectrum(self, weight: Tensor, key: str = "") -> Tensor:
        if self.calibration is None:
            return super().spectrum(weight, key)
        moments, gradients = self.calibration.moment(key), self.calibration.gradients.get(key)
        return singular_values(whiten(weight, moments, G=gradients))

    def allocate(self, spectra: Sequence[Tensor], shapes: Sequence[tuple[int, int]], budget: int) -> list[int | None]:
        if self.calibration is None or not self.calibration.gradients:
            return super().allocate(spectra, shapes, budget)
        # Squared, these values are the mean square change of one and the same loss, whichever module they are of.
        return allocate_ranks(spectra, shapes, budget, power=2, comparable=True)

    def decompose(self, weight: Tensor, r: int, key: str = "") -> Factors:
        if self.calibration is None:
            return super().decompose(weight, r, key)
        moments, gradients = self.calibration.moment(key), self.calibration.gradients.get(key)
        return whitened_svd(weight, moments, r, self.svd, G=gradients)
