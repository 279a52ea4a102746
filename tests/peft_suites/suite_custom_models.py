"""PEFT's test_custom_models.py: small models of nn.Linear, Conv1D and nn.Embedding."""

import re

import pytest
from torch import nn

from spectral_peft.layer import SpectralLinear
from tests.peft_suites.harness import METHODS, peft_tests, rows, unchecked


theirs = peft_tests("test_custom_models")

LINEAR = [
    ("Vanilla MLP 1", "MLP", {"target_modules": "lin0"}),
    ("Vanilla MLP 2", "MLP", {"target_modules": ["lin0"]}),
    ("Vanilla MLP 3", "MLP", {"target_modules": ["lin1"]}),
    ("Vanilla MLP 4", "MLP", {"target_modules": ["lin0", "lin1"]}),
    ("Vanilla MLP 5", "MLP", {"target_modules": ["lin0"], "modules_to_save": ["lin1"]}),
    ("Vanilla MLP 6 dropout", "MLP", {"target_modules": ["lin0"], "dropout": 0.1}),
    ("Embedding + Conv1D 1", "EmbConv1D", {"target_modules": ["conv1d"]}),
    (
        "Embedding + Conv1D 2 trainable tokens",
        "EmbConv1D",
        {"target_modules": ["conv1d"], "trainable_token_indices": {"emb": [0, 10]}},
    ),
]
EMBEDDING = [
    ("Embedding + Conv1D 3", "EmbConv1D", {"target_modules": ["emb"]}),
    ("Embedding + Conv1D 4", "EmbConv1D", {"target_modules": ["emb", "conv1d"]}),
    ("Embedding + Conv1D 5", "EmbConv1D", {"target_modules": ["emb", "conv1d"], "modules_to_save": ["lin0"]}),
]
theirs.TEST_CASES[:] = [*rows(LINEAR), *rows(EMBEDDING, ("SVFit", "PiSSA", "SCT"))]
theirs.ALL_PEFT_CONFIG_CLASSES[:] = sorted(
    map(unchecked, {config_cls for config_cls, _ in METHODS.values()}), key=lambda cls: cls.__name__
)
theirs.MULTIPLE_ACTIVE_ADAPTERS_TEST_CASES[:] = [
    (
        f"{method} {name}",
        method,
        config_cls,
        *({**given, "init_weights": False, "target_modules": [target]} for target in targets),
    )
    for method, (config_cls, given) in METHODS.items()
    for name, targets in (("Same", ("lin0", "lin0")), ("Different", ("lin0", "lin1")))
]

from peft_tests.test_custom_models import *  # noqa: E402, F403


@pytest.mark.usefixtures("lora_A")
class TestMultiRankAdapter(theirs.TestMultiRankAdapter):
    """With `lora_A`."""


@pytest.mark.usefixtures("lora_A")
class TestRequiresGrad(theirs.TestRequiresGrad):
    """With what the methods train in the place of LoRA's two matrices."""

    def check_requires_grad(self, model: nn.Module, *params_expected: str) -> None:
        super().check_requires_grad(model, *(name for lora in params_expected for name in in_place_of(lora, model)))


def in_place_of(name: str, model: nn.Module) -> list[str]:
    """The parameters that an adapter trains on the layer where LoRA has a matrix of this name; other names as such."""
    matrix = re.fullmatch(r"(.*)\.(?:spectral_\w+_update|lora_embedding_[AB])\.(\w+)(?:\.weight)?", name)
    if matrix is None:
        return [name]
    layer, adapter = matrix.groups()
    trained = {id(value) for _, value in model.get_submodule(layer).update_of(adapter).trained_parameters()}
    return [name for name, value in model.named_parameters() if id(value) in trained]


@pytest.fixture
def lora_A(monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: N802
    """LoRA's name for a trained matrix with a row for each rank."""

    def by_adapter(layer: SpectralLinear) -> dict[str, nn.Module]:
        updates = {name: layer.update_of(name) for name in layer.configs}
        return {
            name: next(child for child in map(update.get_submodule, update.trained) if len(child.weight) == update.r)
            for name, update in updates.items()
        }

    monkeypatch.setattr(SpectralLinear, "lora_A", property(by_adapter), raising=False)
