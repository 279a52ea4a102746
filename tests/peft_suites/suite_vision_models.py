"""PEFT's test_vision_models.py: a small ResNet, whose classifier takes the adapter and whose normalizations train."""

from tests.peft_suites.harness import METHODS, peft_tests


theirs = peft_tests("test_vision_models")
targets = {"target_modules": ["classifier.1"], "modules_to_save": ["normalization"]}
theirs.CONFIGS.clear()
theirs.CONFIGS.update({method: config_cls(**given, **targets) for method, (config_cls, given) in METHODS.items()})

from peft_tests.test_vision_models import *  # noqa: E402, F403
