"""PEFT's test_encoder_decoder_models.py: encoder-decoder models."""

from tests.peft_suites.harness import configs, peft_tests


theirs = peft_tests("test_encoder_decoder_models")
theirs.ALL_CONFIGS[:] = configs(task_type="SEQ_2_SEQ_LM")

from peft_tests.test_encoder_decoder_models import *  # noqa: E402, F403
