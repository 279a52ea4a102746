"""The held-out figures, as metrics of Hugging Face evaluate that need no download.

`Accuracy` and `MacroF1` compute what `evaluate.load("accuracy")` and `evaluate.load("f1")` with `average="macro"` do.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import evaluate
import numpy as np
from datasets import Features, Value


class OfflineMetric(evaluate.Metric):
    """A metric whose values stay in memory."""

    columns: ClassVar[dict[str, str]]

    def __init__(self) -> None:
        super().__init__(keep_in_memory=True)

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=self.__doc__ or "",
            citation="",
            inputs_description=", ".join(self.columns),
            features=Features({name: Value(dtype) for name, dtype in self.columns.items()}),
        )


class Accuracy(OfflineMetric):
    """The share of predictions that equal their reference."""

    columns: ClassVar = {"predictions": "int64", "references": "int64"}

    def _compute(self, predictions: Sequence[int], references: Sequence[int]) -> dict[str, Any]:
        return {"accuracy": float(np.mean(np.asarray(predictions) == np.asarray(references)))}


class MacroF1(OfflineMetric):
    """The mean over the classes of the harmonic mean of precision and recall; 0 for one that is never right."""

    columns: ClassVar = {"predictions": "int64", "references": "int64"}

    def _compute(self, predictions: Sequence[int], references: Sequence[int]) -> dict[str, Any]:
        found, truth = np.asarray(predictions), np.asarray(references)
        scores = []
        for label in np.union1d(found, truth):
            hits = np.sum((found == label) & (truth == label))
            scores.append(2 * hits / (np.sum(found == label) + np.sum(truth == label)))
        return {"macro_f1": float(np.mean(scores))}


class Perplexity(OfflineMetric):
    """The mean of the negative log-likelihoods of tokens, and its exponential."""

    columns: ClassVar = {"predictions": "float64"}

    def _compute(self, predictions: Sequence[float]) -> dict[str, Any]:
        loss = float(np.mean(predictions))
        return {"loss": loss, "perplexity": math.exp(loss) if loss < 700 else math.inf}
