"""PEFT's test_hub_features.py."""

from tests.peft_suites.harness import peft_tests


theirs = peft_tests("test_hub_features")

from peft_tests.test_hub_features import *  # noqa: E402, F403
