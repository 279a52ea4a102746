"""PEFT's test_initialization.py, of which what is not about the initialization of one of PEFT's methods."""

from pathlib import Path

import pytest

from spectral_peft import SpectralConfig
from tests.peft_suites.harness import peft_tests


theirs = peft_tests("test_initialization")

from peft_tests.test_initialization import *  # noqa: E402, F403


class TestLowCpuMemUsage(theirs.TestLowCpuMemUsage):
    """With an adapter for each test: those of its class are made before LoRA is replaced."""

    @pytest.fixture
    def lora_config(self) -> SpectralConfig:
        return theirs.LoraConfig(init_lora_weights=False, target_modules="all-linear")

    @pytest.fixture
    def lora_path(self, tmp_path: Path, lora_config: SpectralConfig) -> Path:
        theirs.get_peft_model(self.get_model(), lora_config).save_pretrained(tmp_path)
        return tmp_path
