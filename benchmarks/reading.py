"""The JSON files of results, as the figures need them."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.experiment import read_json


Run = dict[str, Any]


class MissingError(Exception):
    """There are no results for a figure."""


def best_runs(results: Path, task: str) -> dict[str, list[Run]]:
    """By experiment the runs of all seeds at the learning rate with the least validation figure of the first seed."""
    found: dict[str, list[Run]] = {}
    for folder in sorted(path for path in (results / task).glob("*") if path.is_dir()):
        runs = [run for run in map(read_json, sorted(folder.glob("lr*-seed*.json"))) if run["validation"] is not None]
        if runs:
            first = min(run["run"]["seed"] for run in runs)
            search = [run for run in runs if run["run"]["seed"] == first]
            best = min(search, key=lambda run: run["validation"])["run"]["learning_rate"]
            found[folder.name] = [run for run in runs if run["run"]["learning_rate"] == best]
    if not found:
        raise MissingError(f"no runs in {task}")
    return found


def spread_of(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard deviation; NaN, which is not drawn, for one value."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else math.nan


def read(results: Path, pattern: str) -> dict[str, Any]:
    """The JSON files of this pattern, by their name without the ending."""
    found = {file.stem: read_json(file) for file in sorted(results.glob(pattern))}
    if not found:
        raise MissingError(f"no {pattern}")
    return found


def curves(runs: Iterable[Run], key: str) -> tuple[list[int], list[float], list[float], list[float]]:
    """Steps with the mean, the least and the largest value over the seeds."""
    by_step: defaultdict[int, list[float]] = defaultdict(list)
    for run in runs:
        for point in run["curve"]:
            by_step[point["step"]].append(point[key])
    steps = sorted(by_step)
    values = [by_step[step] for step in steps]
    return steps, [statistics.fmean(own) for own in values], [min(own) for own in values], [max(own) for own in values]
