"""PEFT's test_mapping.py."""

from tests.peft_suites.harness import peft_tests


theirs = peft_tests("test_mapping")

from peft_tests.test_mapping import *  # noqa: E402, F403
