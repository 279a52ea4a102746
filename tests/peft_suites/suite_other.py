"""PEFT's test_other.py."""

from tests.peft_suites.harness import peft_tests


theirs = peft_tests("test_other")

from peft_tests.test_other import *  # noqa: E402, F403
