"""Which modules of a model a config targets: PEFT's rule, asked before PEFT applies it."""

from __future__ import annotations

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
