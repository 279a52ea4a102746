"""PEFT's test_config.py: what every config class can do."""

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
