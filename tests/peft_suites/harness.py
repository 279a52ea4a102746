"""PEFT's own test modules, with the configs of this package in the place of PEFT's.

`make peft-tests` unpacks the sources of the locked PEFT version under .venv. Its test modules keep the configs that
they go through in lists, and `pytest.mark.parametrize` keeps the list itself: what is put into it before the tests are
collected is what runs.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import pytest
from PIL import Image

from spectral_peft import PiSSAConfig, SCTConfig, SpectralConfig, SSTConfig, SVFitConfig


@dataclass
class KeptSCTConfig(SCTConfig):
    """SCT that keeps the base weight also where a test names nothing but the config's class."""

    keep_base_weight: bool = True


# The smallest weights of PEFT's toy models have one or two rows, and SST clamps no rank.
# SCT takes the place of the weight: at full rank it starts as the weight itself, which PEFT's tests expect.
METHODS: dict[str, tuple[type[SpectralConfig], dict[str, Any]]] = {
    "SVFit": (SVFitConfig, {"r": 1.0}),
    "PiSSA": (PiSSAConfig, {"r": 0.5}),
    "SST": (SSTConfig, {"r": 0.5}),
    "SST on a pool": (SSTConfig, {"r": 1, "pool": 2}),
    "SCT": (KeptSCTConfig, {"r": 1.0}),
}


def peft_tests(name: str) -> ModuleType:
    """The test module `name` of PEFT's source distribution."""
    if "diffusers" not in sys.modules:  # which some of them import, and no test of ours needs
        stub = ModuleType("diffusers")
        stub.__version__ = "0"
        stub.StableDiffusionPipeline = type("StableDiffusionPipeline", (), {})
        sys.modules["diffusers"] = stub
    try:
        shared = importlib.import_module("peft_tests.testing_utils")
        shared.hub_online_once = nullcontext  # all models are there, and there is no network
        shared.load_cat_image = lambda: Image.linear_gradient("L").convert("RGB")
        common = importlib.import_module("peft_tests.testing_common")
        common._skip_if_conv1d_not_supported = lambda *arguments: None  # every method adapts a Conv1D
        return importlib.import_module(f"peft_tests.{name}")
    except ModuleNotFoundError as error:
        if error.name != "peft_tests":
            raise
        raise pytest.UsageError("PEFT's test sources are not there; run `make peft-tests`.") from error


def rows(cases: Iterable[tuple[str, str, dict[str, Any]]], methods: Iterable[str] = METHODS) -> list[tuple[Any, ...]]:
    """(name, model, config class, fields) for each case and method."""
    return [
        (f"{name} {method}", model, METHODS[method][0], {**METHODS[method][1], **given})
        for method in methods
        for name, model, given in cases
    ]


def configs(task_type: str) -> list[tuple[type[SpectralConfig], dict[str, Any]]]:
    """(config class, fields) for each method, as the suites of transformers' models go through them."""
    return [(config_cls, {"task_type": task_type, **given}) for config_cls, given in METHODS.values()]


def unchecked(config_cls: type[SpectralConfig]) -> type[SpectralConfig]:
    """The class for tests that load an adapter onto a base model with other random weights."""
    members = {"check_base": False, "__annotations__": {"check_base": bool}, "__module__": __name__}
    return dataclass(type(config_cls.__name__, (config_cls,), members))
