"""PEFT's test_tuners_utils.py."""

import pytest
from peft import PeftModel
from torch import nn

from tests.peft_suites.harness import peft_tests


theirs = peft_tests("test_tuners_utils")

from peft_tests.test_tuners_utils import *  # noqa: E402, F403


class LargeModel(nn.Module):
    """PEFT's, with nn.Linear in the place of its convolutions and of embeddings, which SST does not adapt."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("lin0", "conv0", "emb0", "lin1", "conv1", "emb1"):
            self.add_module(name, nn.Linear(10, 10))


class TestModelAndLayerStatus(theirs.TestModelAndLayerStatus):
    @pytest.fixture
    def large_model(self) -> PeftModel:
        config0 = theirs.LoraConfig(target_modules=["lin0", "conv1", "emb0"])
        model = theirs.get_peft_model(LargeModel(), config0)
        model.add_adapter("other", theirs.LoraConfig(target_modules=["lin0", "lin1"], r=16))
        return model
