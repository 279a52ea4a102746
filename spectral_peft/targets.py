"""Which modules of a model a config targets: PEFT's rule, asked before PEFT applies it."""

from __future__ import annotations

import re
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
