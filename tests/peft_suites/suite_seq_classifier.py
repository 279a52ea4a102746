"""PEFT's test_seq_classifier.py: sequence classifiers, whose heads are trained in full."""

from tests.peft_suites.harness import configs, peft_tests


theirs = peft_tests("test_seq_classifier")
theirs.ALL_CONFIGS[:] = configs(task_type="SEQ_CLS")

from peft_tests.test_seq_classifier import *  # noqa: E402, F403
