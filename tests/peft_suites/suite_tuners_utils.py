"""PEFT's test_tuners_utils.py."""

from tests.peft_suites.harness import peft_tests


theirs = peft_tests("test_tuners_utils")

from peft_tests.test_tuners_utils import *  # noqa: E402, F403
