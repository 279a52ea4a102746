"""Chooses what runs of PEFT's tests, and where."""

from __future__ import annotations

from fnmatch import fnmatchcase
from pathlib import Path

import pytest

from spectral_peft import SpectralConfig
from tests.peft_suites.inapplicable import INAPPLICABLE
from tests.peft_suites.models import save_models


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    save_models(folder)
    return folder


@pytest.fixture(autouse=True)
def _in_folder_of_models(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The names of models are paths from here."""
    monkeypatch.chdir(models)


def is_ours(item: pytest.Item) -> bool:
    """Whether a test runs a config of this package; those of PEFT's own methods, and of none, are PEFT's business."""
    parameters = item.callspec.params.values() if hasattr(item, "callspec") else ()
    return any(
        isinstance(value, SpectralConfig) or (isinstance(value, type) and issubclass(value, SpectralConfig))
        for value in parameters
    )


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    suites = [item for item in items if item.path.parent == Path(__file__).parent]
    chosen = [item for item in suites if is_ours(item)]
    config.hook.pytest_deselected(items=[item for item in suites if item not in set(chosen)])
    items[:] = [item for item in items if item not in set(suites)] + chosen
    for suite in {item.path.stem for item in chosen}:
        own = [item for item in chosen if item.path.stem == suite]
        for pattern, reason in INAPPLICABLE.get(suite, {}).items():
            hit = [item for item in own if fnmatchcase(item.nodeid.partition("::")[2], pattern.replace("[", "[[]"))]
            for item in hit:
                item.add_marker(pytest.mark.xfail(reason=reason, strict=True))
            if not hit and not any("::" in argument for argument in config.args):
                raise pytest.UsageError(f"{suite}: {pattern!r} in inapplicable.py matches no test.")
