"""PEFT's test_config.py: what every config class can do."""

import shutil
from functools import wraps
from pathlib import Path
from typing import Any

import huggingface_hub
import peft.config
import pytest

from spectral_peft import PiSSAConfig, SCTConfig, SSTConfig, SVFitConfig
from tests.peft_suites.harness import peft_tests


theirs = peft_tests("test_config")
CLASSES = [(config_cls, {}) for config_cls in (PiSSAConfig, SCTConfig, SSTConfig, SVFitConfig)]


def with_our_classes(mark: pytest.Mark) -> pytest.Mark:
    """The same parametrization, over the configs of this package; PEFT's list of them is a tuple."""
    lists = (theirs.ALL_CONFIG_CLASSES, theirs.LAYER_INDEXING_CONFIG_CLASSES)
    return pytest.mark.parametrize(mark.args[0], CLASSES).mark if mark.args[1] in lists else mark


for test in vars(theirs.TestPeftConfig).values():
    if hasattr(test, "pytestmark"):
        test.pytestmark = [with_our_classes(mark) for mark in test.pytestmark]

from peft_tests.test_config import *  # noqa: E402, F403


class TestPeftConfig(theirs.TestPeftConfig):
    @pytest.fixture(autouse=True)
    def _downloads_into_other_caches(self, monkeypatch: pytest.MonkeyPatch) -> None:
        @wraps(huggingface_hub.hf_hub_download)  # PEFT asks for its parameters
        def download(name: str, file: str, cache_dir: str | None = None, **kwargs: Any) -> str:
            if cache_dir:
                folder = f"models--{name.replace('/', '--')}"
                here = Path(huggingface_hub.constants.HF_HUB_CACHE)
                shutil.copytree(here / folder, Path(cache_dir) / folder, dirs_exist_ok=True)
            return huggingface_hub.hf_hub_download(name, file, cache_dir=cache_dir, **kwargs)

        monkeypatch.setattr(peft.config, "hf_hub_download", download)
