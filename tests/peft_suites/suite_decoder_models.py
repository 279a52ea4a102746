"""PEFT's test_decoder_models.py: causal language models."""

from tests.peft_suites.harness import configs, peft_tests


theirs = peft_tests("test_decoder_models")
theirs.ALL_CONFIGS[:] = configs(task_type="CAUSAL_LM")

from peft_tests.test_decoder_models import *  # noqa: E402, F403
