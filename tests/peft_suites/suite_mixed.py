"""PEFT's test_mixed.py: adapters of several types in one model."""

from tests.peft_suites.harness import peft_tests


theirs = peft_tests("test_mixed")

# pytest parametrizes no unittest.TestCase; the tests use nothing of it.
TestMixedAdapterTypes = type("TestMixedAdapterTypes", (), dict(vars(theirs.TestMixedAdapterTypes)))
