"""PEFT's test_low_level_api.py."""

from tests.peft_suites.harness import peft_tests


theirs = peft_tests("test_low_level_api")

from peft_tests.test_low_level_api import *  # noqa: E402, F403
