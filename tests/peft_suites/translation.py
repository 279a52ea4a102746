"""Tests that PEFT wrote with LoRA, run with the configs of this package in its place.

Most of PEFT's tests of what all methods share name `LoraConfig`, in their body, a fixture, a helper or a parameter.
Each of them runs once for every method, with a class of configs in the place of `LoraConfig` that takes LoRA's fields.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import fields
from functools import cache
from types import CodeType, FunctionType
from typing import Any

import peft
import pytest
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING

from spectral_peft import SpectralConfig
from tests.peft_suites.harness import METHODS


# The rank is that of the table: one that the smallest weights have. Updates have no scaling. The base weight is not
# checked: some of these tests build the base model anew, with other random weights.
RENAMED = {"init_lora_weights": "init_weights", "lora_dropout": "dropout"}
# What tests look for in the names of parameters; and a device that one of them means for any.
PARTS = {"lora": "spectral", "lora_": "spectral_", "cuda": "cpu"}
WITHOUT_EQUIVALENT = {"r", "lora_alpha", "alpha_pattern", "use_rslora"}
COMMON = {field.name for config in (peft.OSFConfig, peft.PsoftConfig) for field in fields(config)}


@cache
def in_place_of_lora(method: str) -> type[SpectralConfig]:
    """A config class that takes LoRA's fields.

    A test is skipped that asks for what LoRA alone has: a field that neither OSF, PSOFT nor this package has, such as
    `use_dora`, or an initialization by name. Neither OSF nor PSOFT has `target_parameters` either; LoRA's tests give
    it single matrices, where this package takes stacks of them, and tests/test_experts.py has the laws.
    """
    config_cls, given = METHODS[method]
    own = {field.name for field in fields(config_cls)}

    class Config(config_cls):  # type: ignore[misc,valid-type]
        def __new__(cls, **values: Any) -> SpectralConfig:
            kept = {RENAMED.get(name, name): v for name, v in values.items() if name not in WITHOUT_EQUIVALENT}
            if kept.get("target_parameters"):
                pytest.skip("`target_parameters` of single matrices, which OSF and PSOFT lack; here they are stacks")
            if lacking := sorted(kept.keys() - own - COMMON):
                pytest.skip(f"asks for what neither OSF, PSOFT nor a spectral method has: {', '.join(lacking)}")
            if not isinstance(kept.get("init_weights", True), bool):
                pytest.skip(f"an initialization of LoRA: {kept['init_weights']}")
            if kept.get("bias") == "lora_only":
                kept["bias"] = "spectral_only"
            return config_cls(**{**given, "check_base": False, **kept})

    return Config


def translated(value: Any, method: str) -> Any:
    """A parameter of a test, with the configs of LoRA in it replaced."""
    if value is peft.LoraConfig:
        return in_place_of_lora(method)
    if type(value) is peft.LoraConfig:
        changed = {
            field.name: getattr(value, field.name)
            for field in fields(value)
            if field.init and getattr(value, field.name) != getattr(peft.LoraConfig(), field.name)
        }
        return in_place_of_lora(method)(**changed)
    if value == "lora":  # a tag of model cards
        return METHODS[method][0].method
    if type(value) in (list, tuple):
        return type(value)(translated(entry, method) for entry in value)
    return value


def in_names_of(method: str, code: CodeType) -> CodeType:
    """The code of a test whose strings name the classes, containers and type of the method instead of LoRA's."""
    config_cls, given = METHODS[method]
    config = config_cls(**given)
    names = {
        "lora_A": config.container,
        "lora_B": config.container,
        "lora.Linear": "SpectralLinear",
        "peft.tuners.lora.layer.Embedding": "spectral_peft.embedding.SpectralEmbedding",
        "peft.tuners.lora.layer.": "spectral_peft.layer.Spectral",
        "LoraModel": PEFT_TYPE_TO_TUNER_MAPPING[config.peft_type].__name__,
        "LORA": config.peft_type.value,
    }
    pattern = "|".join(rf"\b{re.escape(name)}\b" for name in names)

    def renamed(constant: Any) -> Any:
        if isinstance(constant, str):
            if constant in PARTS:
                return PARTS[constant]
            return re.sub(pattern, lambda found: names[found[0]], constant)
        if isinstance(constant, tuple):
            return tuple(map(renamed, constant))
        return in_names_of(method, constant) if isinstance(constant, CodeType) else constant

    return code.replace(co_consts=tuple(map(renamed, code.co_consts)))


def is_written_for_lora(metafunc: pytest.Metafunc) -> bool:
    """Whether a test uses `LoraConfig`: itself, in a parameter, or in a fixture or helper of its module.

    Those that go through the configs of all methods are not, although they name LoRA where it is an exception.
    """
    parameters = [value for mark in metafunc.definition.iter_markers("parametrize") for value in flat(mark.args[1])]
    if any(isinstance(value, type) and issubclass(value, SpectralConfig) for value in parameters):
        return False
    fixtures = [definition.func for found in metafunc._arg2fixturedefs.values() for definition in found]
    test, seen = getattr(metafunc.function, "__func__", metafunc.function), set()
    modules = {test.__module__, getattr(metafunc.cls, "__module__", test.__module__)}
    return any(map(_is_lora, parameters)) or any(
        _names_lora(function, modules, metafunc.cls, seen) for function in [test, *fixtures, *parameters]
    )


def flat(value: Any) -> Iterator[Any]:
    """The entries of nested lists and tuples, or the value itself."""
    if isinstance(value, (list, tuple)):
        for entry in value:
            yield from flat(entry)
    else:
        yield value


def _is_lora(value: Any) -> bool:
    return value is peft.LoraConfig or type(value) is peft.LoraConfig


def _names_lora(function: Any, modules: set[str], cls: type | None, seen: set[Any]) -> bool:
    function = getattr(function, "__func__", function)
    if not isinstance(function, FunctionType) or function.__module__ not in modules or function in seen:
        return False
    seen.add(function)
    names = {name for code in _codes(function.__code__) for name in code.co_names}
    helpers = [
        *(cell.cell_contents for cell in function.__closure__ or ()),
        *(getattr(cls, name, None) or function.__globals__.get(name) for name in names),
    ]
    return "LoraConfig" in names or any(_names_lora(helper, modules, cls, seen) for helper in helpers)


def _codes(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes(constant)


def globals_of(test: Callable[..., None]) -> dict[str, Any]:
    """Where the names in a test's body are looked up."""
    return getattr(test, "__func__", test).__globals__
