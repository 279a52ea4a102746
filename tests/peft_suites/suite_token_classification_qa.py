"""PEFT's test_token_classification_qa.py: heads for tokens and spans, which are trained in full."""

from tests.peft_suites.harness import configs, peft_tests


theirs = peft_tests("test_token_classification_qa")
theirs.TOKEN_CLS_CONFIGS[:] = configs(task_type="TOKEN_CLS")
theirs.QA_CONFIGS[:] = configs(task_type="QUESTION_ANS")

from peft_tests.test_token_classification_qa import *  # noqa: E402, F403
