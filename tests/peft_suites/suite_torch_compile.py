"""PEFT's test_torch_compile.py, compiled without code for a device: by torch's backend "eager"."""

import pytest
import torch
from datasets import Dataset, DatasetDict
from peft import TaskType
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import PreTrainedTokenizerFast

from tests.peft_suites.harness import METHODS, peft_tests


with pytest.MonkeyPatch.context() as patch:
    patch.setenv("PEFT_DEBUG_WITH_TORCH_COMPILE", "1")  # else the module skips itself
    theirs = peft_tests("test_torch_compile")

theirs.SETTINGS.clear()
for method, (config_cls, given) in METHODS.items():
    theirs.SETTINGS[method] = (
        config_cls(**given, task_type=TaskType.CAUSAL_LM),
        {"torch_compile_backend": "eager"},  # for the Trainer
    )

from peft_tests.test_torch_compile import *  # noqa: E402, F403


QUOTES = [f"{subject} {verb} {object_}" for subject in "abcd" for verb in "efg" for object_ in "hijk"]


def quotes() -> DatasetDict:
    """In the form of the data set that PEFT's tests download."""
    columns = {"quote": QUOTES, "author": ["nobody"] * len(QUOTES), "tags": [["letters"]] * len(QUOTES)}
    return DatasetDict({"train": Dataset.from_dict(columns)})


theirs.load_dataset_english_quotes = quotes
# On a CPU, bitsandbytes repacks weights so that nothing can read them; the weights stay as they are.
theirs.BitsAndBytesConfig = lambda **kwargs: None


class TestTorchCompileCausalLM(theirs.TestTorchCompileCausalLM):
    @pytest.fixture(scope="class")
    def tokenizer(self) -> PreTrainedTokenizerFast:
        words = {word: index for index, word in enumerate(["<pad>", *"abcdefghijk"])}
        tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", model_max_length=64)

    def compile(self, model: nn.Module, compile_kwargs: dict[str, str]) -> nn.Module:
        return torch.compile(model, backend="eager")
