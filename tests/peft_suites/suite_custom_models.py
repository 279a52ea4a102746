"""PEFT's test_custom_models.py: small models of nn.Linear, Conv1D and nn.Embedding."""

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
