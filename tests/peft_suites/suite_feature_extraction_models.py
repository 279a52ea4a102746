"""PEFT's test_feature_extraction_models.py: encoders."""

from tests.peft_suites.harness import configs, peft_tests


theirs = peft_tests("test_feature_extraction_models")
theirs.ALL_CONFIGS[:] = configs(task_type="FEATURE_EXTRACTION")

from peft_tests.test_feature_extraction_models import *  # noqa: E402, F403
