"""The table of a task: every experiment at its best rate, and where this project's methods lose.

python -m benchmarks.table      # writes those of the documentation, docs/results/tables/TASK.md
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scipy.stats import ttest_1samp

from benchmarks.experiment import RESULTS, Experiment, find, read_json, result_file


TABLES = Path(__file__).parents[1] / "docs" / "results" / "tables"
SHOWN = ("causal", "classification", "pretraining")
FALLING = frozenset({"loss", "perplexity"})  # qualities of which less is better; of all others more is
OWN_TYPES = "SPECTRAL_"
REFERENCE = "lora"
NOT_MEASURED = "not measured"
SIGNIFICANT = 0.05
MIB = 2**20


@dataclass(frozen=True)
class Row:
    """The runs of one experiment at the rate that is best with its first seed.

    Attributes:
        rates: Those that were run with the first seed.
        rate: The best of them, or None if all diverged.
        runs: By seed those at this rate that have an end.
        diverged: The number of those at this rate that have none.
    """

    experiment: Experiment
    rates: list[float]
    rate: float | None
    runs: list[dict[str, Any]]
    diverged: int = 0

    @property
    def name(self) -> str:
        return self.experiment.name

    @property
    def is_own(self) -> bool:
        return (self.experiment.adapter or {}).get("peft_type", "").startswith(OWN_TYPES)

    def values(self, group: str, key: str) -> dict[int, float]:
        """By seed."""
        return {run["run"]["seed"]: run[group][key] for run in self.runs if run[group].get(key) is not None}

    def mean(self, group: str, key: str) -> float:
        values = self.values(group, key).values()
        return statistics.fmean(values) if values else math.nan

    def spread(self, group: str, key: str) -> float:
        values = self.values(group, key).values()
        return statistics.stdev(values) if len(values) > 1 else math.nan

    def cost(self, key: str) -> float:
        return self.mean("cost", key)


def row_of(experiment: Experiment, results: Path) -> Row | None:
    """None if nothing of it has been run."""
    grid, seeds = experiment.training["learning_rate"], experiment.training["seeds"]
    first = {rate: result_file(experiment, rate, seeds[0], results=results) for rate in grid}
    found = {rate: read_json(file) for rate, file in first.items() if file.exists()}
    finished = {rate: run for rate, run in found.items() if run["validation"] is not None}
    if not finished:
        return Row(experiment, list(found), None, []) if found else None
    best = min(finished, key=lambda rate: finished[rate]["validation"])
    files = [result_file(experiment, best, seed, results=results) for seed in seeds[1:]]
    others = [read_json(file) for file in files if file.exists()]
    ended = [run for run in others if run["validation"] is not None]
    return Row(experiment, list(found), best, [finished[best], *ended], len(others) - len(ended))


def table(experiments: Iterable[Experiment], results: Path) -> str:
    """Markdown: the experiments by quality, what is still to be run, and where this project's methods lose.

    Only what has the same budget stands in one table: the same architecture and as many steps.
    """
    groups: dict[str, list[Experiment]] = {}
    for experiment in experiments:
        groups.setdefault(_budget(experiment), []).append(experiment)
    parts = [(budget, _group(group, results)) for budget, group in groups.items()]
    if len(parts) == 1:
        return parts[0][1]
    return "\n\n".join(f"**{budget}**\n\n{part}" for budget, part in parts)


def _budget(experiment: Experiment) -> str:
    steps = experiment.training.get("steps") or experiment.training.get("max_steps", 0)
    return f"{experiment.training.get('architecture', '')}, {steps:,} steps".removeprefix(", ")


def _group(experiments: Sequence[Experiment], results: Path) -> str:
    found = {experiment.name: row_of(experiment, results) for experiment in experiments}
    rows = [row for row in found.values() if row and row.runs]
    lines = []
    if rows:
        metrics = list(rows[0].runs[0]["quality"])
        rows.sort(key=lambda row: row.mean("quality", metrics[0]) * (1 if metrics[0] in FALLING else -1))
        lines += [*_table(rows, metrics), "", *_losses(rows, metrics[0])]
    if diverged := [name for name, row in found.items() if row and not row.runs]:
        lines += ["", f"Diverged at every rate: {', '.join(diverged)}."]
    if missing := [f"{name} ({count})" for name, count in _missing(experiments, found, results).items() if count]:
        lines += ["", f"Runs that are still to be made: {', '.join(missing)}."]
    return "\n".join(lines).strip()


def _missing(experiments: Iterable[Experiment], found: dict[str, Row | None], results: Path) -> dict[str, int]:
    missing = {}
    for experiment in experiments:
        row, (first, *others) = found[experiment.name], experiment.training["seeds"]
        rates = [
            result_file(experiment, rate, first, results=results) for rate in experiment.training["learning_rate"]
        ]
        diverged = row is not None and not row.runs
        seeds = 0 if diverged else len(others) - (0 if row is None else len(row.runs) - 1 + row.diverged)
        missing[experiment.name] = sum(not file.exists() for file in rates) + seeds
    return missing


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Without the columns that say nothing in any row."""
    columns = [column for column in zip(head, *rows, strict=True) if set(column[1:]) - {"", NOT_MEASURED}]
    lines = list(zip(*columns, strict=True))
    return [f"| {' | '.join(line)} |" for line in [lines[0], ["---"] * len(columns), *lines[1:]]]


def _table(rows: list[Row], metrics: list[str]) -> list[str]:
    references = [row for row in rows if REFERENCE in row.name.split("-")]
    reference = min(references, key=lambda row: len(row.name), default=None)  # "lora" rather than "lora-r1"
    head = [
        "method", "learning rate", "seeds", *(metric.replace("_", " ") for metric in metrics), "forgetting",
        "peak memory, MiB", f"train time / {REFERENCE}", "init, s", "checkpoint, MiB", "trained",
    ]  # fmt: skip
    return markdown(head, [_cells(row, metrics, reference) for row in rows])


def _cells(row: Row, metrics: list[str], reference: Row | None) -> list[str]:
    relative = row.cost("train_cpu_seconds") / reference.cost("train_cpu_seconds") if reference else math.nan
    return [
        f"**{row.name}**" if row.is_own else row.name,
        _grid(row),
        str(len(row.runs)) + (f", {row.diverged} diverged" if row.diverged else ""),
        *(_with_spread(row, "quality", metric) for metric in metrics),
        _with_spread(row, "forgetting", "loss_rise", sign="+"),
        _number(row.cost("peak_memory_bytes") / MIB, ",.0f"),
        _number(relative, ".1f"),
        _number(row.cost("init_cpu_seconds"), ".1f"),
        _number(row.cost("checkpoint_bytes") / MIB, ",.2f"),
        _number(row.cost("trainable_parameters"), ",.0f"),
    ]


def _number(value: float, form: str) -> str:
    """Nothing for what was not measured."""
    return "" if math.isnan(value) else f"{value:{form}}"


def _grid(row: Row) -> str:
    """The rates that were run, the chosen one in bold, and a mark where a wider grid may hold a better one."""
    grid = sorted(row.rates)
    edge = " (edge)" if len(grid) > 1 and row.rate in (grid[0], grid[-1]) else ""
    return ", ".join(f"**{rate:g}**" if rate == row.rate else f"{rate:g}" for rate in grid) + edge


def _with_spread(row: Row, group: str, key: str, sign: str = "") -> str:
    mean, spread = row.mean(group, key), row.spread(group, key)
    if math.isnan(mean):
        return ""
    return f"{mean:{sign}.3f}" + ("" if math.isnan(spread) else f" ± {spread:.3f}")


def _losses(rows: list[Row], metric: str) -> list[str]:
    """For each method of this project: which of the others are better at what."""
    own, others = [row for row in rows if row.is_own], [row for row in rows if not row.is_own]
    if not own or not others:
        return []
    measures = [
        (metric.replace("_", " "), "quality", metric, 1 if metric in FALLING else -1),
        ("forgetting", "forgetting", "loss_rise", 1),
        ("peak memory", "cost", "peak_memory_bytes", 1),
        ("train time", "cost", "train_cpu_seconds", 1),
        ("init", "cost", "init_cpu_seconds", 1),
        ("checkpoint", "cost", "checkpoint_bytes", 1),
    ]
    body = [
        [f"**{row.name}**", *(_better(row, others, group, key, sign) for _, group, key, sign in measures)]
        for row in own
    ]
    return [
        "Where this project loses: the methods that are better than each of its own, in bold where the difference in "
        "runs of the same seed is significant at 5 % by Student's t-test.",
        "",
        *markdown(["", *(name for name, *_ in measures)], body),
    ]


def _better(row: Row, others: list[Row], group: str, key: str, sign: int) -> str:
    measured = [other for other in others if other.values(group, key)]
    if not row.values(group, key) or not measured:
        return NOT_MEASURED
    better = [other for other in measured if sign * (row.mean(group, key) - other.mean(group, key)) > 0]
    names = [f"**{other.name}**" if _is_significant(row, other, group, key) else other.name for other in better]
    text = "all" if len(names) == len(others) and len(names) > 3 else ", ".join(names) or "none"
    left = len(others) - len(measured)
    return f"{text} ({left} {NOT_MEASURED})" if left else text


def _is_significant(row: Row, other: Row, group: str, key: str) -> bool:
    """Whether the difference between two experiments is beyond that between the seeds, which have the same batches."""
    own, theirs = row.values(group, key), other.values(group, key)
    differences = [own[seed] - theirs[seed] for seed in own.keys() & theirs.keys()]
    if len(differences) < 2:
        return False
    if statistics.stdev(differences) == 0:  # sizes, which are the same in every run
        return differences[0] != 0
    return bool(ttest_1samp(differences, 0).pvalue < SIGNIFICANT)


def main() -> None:
    TABLES.mkdir(parents=True, exist_ok=True)
    for task in SHOWN:
        (TABLES / f"{task}.md").write_text(f"{table(find(task), RESULTS)}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
