"""PEFT's test_low_level_api.py."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.peft_suites.harness import peft_tests


theirs = peft_tests("test_low_level_api")

from peft_tests.test_low_level_api import *  # noqa: E402, F403


class TestInjectAdapterFromStateDict(theirs.TestInjectAdapterFromStateDict):
    @pytest.fixture(autouse=True)
    def _integers_too(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Checkpoints that are drawn at random hold integers too, of which torch has no normal distribution."""
        randn = torch.randn

        def drawn(size: torch.Size, dtype: torch.dtype) -> Tensor:
            values: Any = randn(size) if dtype.is_floating_point else torch.arange(size.numel()).view(size)
            return values.to(dtype)

        monkeypatch.setattr(torch, "randn", drawn)
