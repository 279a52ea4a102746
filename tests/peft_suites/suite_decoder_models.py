"""PEFT's test_decoder_models.py: causal language models."""

from tests.peft_suites.harness import configs, peft_tests


theirs = peft_tests("test_decoder_models")
theirs.ALL_CONFIGS[:] = configs(task_type="CAUSAL_LM")
theirs.check_beft_config = lambda *arguments: None  # about BEFT, it skips Llama and Gemma 3 for every method

from peft_tests.test_decoder_models import *  # noqa: E402, F403
