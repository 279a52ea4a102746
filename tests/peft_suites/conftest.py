"""Chooses what runs of PEFT's tests, and where."""

from __future__ import annotations

from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
from peft import PeftConfig
from torch import nn

from spectral_peft import SpectralConfig, SpectralUpdate
from spectral_peft.layer import SpectralLinear
from spectral_peft.model import SpectralModel
from tests.peft_suites.harness import METHODS, peft_tests
from tests.peft_suites.inapplicable import FROZEN_STARTS_EXEMPT, GUARDED_FOR_LORA, INAPPLICABLE
from tests.peft_suites.models import save_models
from tests.peft_suites.translation import (
    flat,
    globals_of,
    in_names_of,
    in_place_of_lora,
    is_written_for_lora,
    translated,
)


SUITES = Path(__file__).parent


def pytest_configure(config: pytest.Config) -> None:
    for marker in ("bitsandbytes", "multi_gpu_tests", "single_gpu_tests", "skipf"):
        config.addinivalue_line("markers", f"{marker}: in PEFT's sources")


@pytest.fixture(scope="package", autouse=True)
def _downloaded_models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A cache of the Hub that has the models of PEFT's tests, and no network."""
    cache = tmp_path_factory.mktemp("hub")
    save_models(cache)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
        patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        yield


@pytest.fixture(autouse=True)
def instead_of_lora(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a test that is written for LoRA: the method that takes its place."""
    if not hasattr(request, "param"):
        return
    names, test = globals_of(request.function), getattr(request.function, "__func__", request.function)
    monkeypatch.setattr(test, "__code__", in_names_of(request.param, test.__code__))
    monkeypatch.setitem(names, "LoraConfig", in_place_of_lora(request.param))
    if "LoraLayer" in names:
        monkeypatch.setitem(names, "LoraLayer", SpectralLinear)
    create_and_replace = SpectralModel._create_and_replace

    def skipping(self: Any, config: Any, adapter_name: str, target: nn.Module, *args: Any, **kwargs: Any) -> None:
        try:
            create_and_replace(self, config, adapter_name, target, *args, **kwargs)
        except TypeError as error:
            if isinstance(target, nn.Linear):
                raise
            pytest.skip(f"a layer that neither OSF nor PSOFT adapts: {error}")

    monkeypatch.setattr(SpectralModel, "_create_and_replace", skipping)


@pytest.fixture
def taken_for_lora(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets a test's config pass where PEFT asks whether its class is LoRA's, and skips the test if not."""
    for names in (globals_of(request.function), vars(peft_tests("testing_common"))):
        monkeypatch.setitem(names, "LoraConfig", request.node.callspec.params["config_cls"])


@pytest.fixture
def frozen_starts_exempt(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves the frozen starts out of what `named_parameters` and `parameters` of every module return."""
    everything = nn.Module.named_parameters

    def frozen(update: SpectralUpdate) -> Iterator[tuple[str, nn.Parameter]]:
        return ((name, value) for name, value in everything(update) if name.split(".")[0] not in update.trained)

    def named_parameters(module: nn.Module, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        updates = [child for child in module.modules() if isinstance(child, SpectralUpdate)]
        starts = {id(value) for update in updates for _, value in frozen(update)}
        return ((name, value) for name, value in everything(module, *args, **kwargs) if id(value) not in starts)

    monkeypatch.setattr(SpectralUpdate, "frozen", frozen)
    monkeypatch.setattr(nn.Module, "named_parameters", named_parameters)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if metafunc.definition.path.parent == SUITES and is_written_for_lora(metafunc):
        metafunc.parametrize("instead_of_lora", METHODS, indirect=True)


def is_ours(item: pytest.Item) -> bool:
    """Whether a test runs a config of this package; those of PEFT's own methods, and of none, are PEFT's business."""
    if not hasattr(item, "callspec"):
        return False
    parameters = item.callspec.params
    method = parameters.get("instead_of_lora")
    if method:
        parameters.update({name: translated(value, method) for name, value in parameters.items()})
    kinds = {value if isinstance(value, type) else type(value) for value in flat(list(parameters.values()))}
    configs = {kind for kind in kinds if issubclass(kind, PeftConfig)}
    return all(issubclass(kind, SpectralConfig) for kind in configs) and bool(method or configs)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    suites = [item for item in items if item.path.parent == SUITES]
    chosen = [item for item in suites if is_ours(item)]
    config.hook.pytest_deselected(items=[item for item in suites if item not in set(chosen)])
    items[:] = [item for item in items if item not in set(suites)] + chosen
    for suite in {item.path.stem for item in chosen}:
        own = [item for item in chosen if item.path.stem == suite]
        for pattern, reason in INAPPLICABLE.get(suite, {}).items():
            for item in matching(pattern, own, config):
                item.add_marker(pytest.mark.xfail(reason=reason, strict=True))
        use("frozen_starts_exempt", FROZEN_STARTS_EXEMPT.get(suite, ()), own, config)
        use("taken_for_lora", GUARDED_FOR_LORA.get(suite, ()), own, config)


def use(fixture: str, patterns: tuple[str, ...], items: list[pytest.Item], config: pytest.Config) -> None:
    """Has the tests whose id fits one of the patterns use a fixture."""
    for pattern in patterns:
        for item in matching(pattern, items, config):
            item.fixturenames.append(fixture)


def matching(pattern: str, items: list[pytest.Item], config: pytest.Config) -> list[pytest.Item]:
    """The tests whose id fits the pattern; at least one, where a whole suite runs."""
    found = [item for item in items if fnmatchcase(item.nodeid.partition("::")[2], pattern.replace("[", "[[]"))]
    if not found and not any("::" in argument for argument in config.args):
        raise pytest.UsageError(f"{pattern!r} in inapplicable.py matches no test.")
    return found
