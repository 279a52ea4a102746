"""Which modules of a model a config targets: PEFT's rule, asked before PEFT applies it."""

from __future__ import annotations

import re
import warnings
from collections.abc import Collection
from typing import Any

from peft.tuners.tuners_utils import (
    BaseTunerLayer,
    _maybe_include_all_linear_layers,
    check_target_module_exists,
)
from torch import nn


def is_targeted(config: Any, key: str) -> Any:
    """Whether PEFT's fields of `config` name the module `key`, and no budget has left it dense.

    What PEFT answers is passed on as it is: its false values tell an excluded module from one that is not named.
    """
    return key not in config.dense_modules and check_target_module_exists(config, key)


def targeted_modules(model: nn.Module, config: Any) -> dict[str, nn.Module]:
    """The modules that an injection of `config` puts an adapter on, by name; "all-linear" is resolved in `config`.

    A module that already has adapters counts, and the modules inside of it do not.
    """
    config = _maybe_include_all_linear_layers(config, model)
    named = dict(model.named_modules())
    internals = tuple(f"{key}." for key, module in named.items() if isinstance(module, BaseTunerLayer))
    return {
        key: module
        for key, module in named.items()
        if key and not key.startswith(internals) and is_targeted(config, key)
    }


def targeted_matrices(model: nn.Module, config: Any) -> list[str]:
    """Names of the matrices in the parameters that `config` names in `target_parameters`, by PEFT's rule."""
    named = [(name.replace(".base_layer", ""), value) for name, value in model.named_parameters()]
    endings = tuple(f".{target}" for target in config.target_parameters or ())
    return [
        f"{name}.{index}"
        for name, value in named
        if value.ndim == 3 and f".{name}".endswith(endings)
        for index in range(len(value))
    ]


def other_modules(model: nn.Module, targeted: Collection[str]) -> list[str]:
    """Names for `modules_to_save` of what holds parameters and is not targeted: the last parts, where these suffice.

    A module that holds others of them, or targeted ones, cannot be copied as a whole; a warning names its parameters.
    """
    holders = [
        name
        for name, module in model.named_modules()
        if name not in targeted and next(module.parameters(recurse=False), None) is not None
    ]
    nested = {
        name for name in holders if not name or any(other.startswith(f"{name}.") for other in (*holders, *targeted))
    }
    chosen = {name for name in holders if name not in nested}
    reached = {id(value) for name in (*chosen, *targeted) for value in model.get_submodule(name).parameters()}
    left = [
        f"{name}.{parameter}"
        for name in sorted(nested)
        for parameter, value in model.get_submodule(name).named_parameters(recurse=False)
        if id(value) not in reached
    ]
    if left:
        warnings.warn(
            f"{len(left)} parameters stay as they are, such as {left[0]}: the modules that hold them hold others that "
            "train apart from them.",
            stacklevel=3,
        )
    names = [name for name, _ in model.named_modules()]
    ends = {name.rpartition(".")[2] for name in chosen}
    # PEFT takes every module whose name ends so.
    unique = {end for end in ends if all(name in chosen for name in names if name.endswith(end))}
    return sorted({end if (end := name.rpartition(".")[2]) in unique else name for name in chosen})


def refuse_unmatched_patterns(model: nn.Module, config: Any) -> None:
    """Raises ValueError if an entry of `rank_pattern` is for no module that `config` targets."""
    if not config.rank_pattern:
        return
    keys = [*targeted_modules(model, config), *targeted_matrices(model, config)]
    idle = [pattern for pattern in config.rank_pattern if not any(_matches(pattern, key) for key in keys)]
    if keys and idle:
        raise ValueError(
            f"`rank_pattern` has entries that match none of the {len(keys)} targeted modules, such as {keys[0]!r}: "
            f"{', '.join(map(repr, idle))}. Correct or remove them."
        )


def _matches(pattern: str, key: str) -> bool:
    return re.match(rf"(.*\.)?({pattern})$", key) is not None  # as PEFT's `get_pattern_key`
