"""Runs the experiments of a task: each at every rate of its grid, then with its other seeds at the best one.

    python -m benchmarks.run --task causal --data foldoc_subjects.jsonl.gz --other gcide.txt.gz
    python -m benchmarks.run --task causal --only 'lora,svfit*' --data ...     # some experiments
    python -m benchmarks.run --task causal --quick                             # few steps, one rate, one seed
    python -m benchmarks.run --task causal --table                             # what has been run so far

Every run is a process of its own and writes one JSON file. What is there is not run again, so an interrupted sweep
goes on where it was, and several calls at once share the work. Without --data the entries are those of
chatterbot-corpus, without --other the other text is the language reference that comes with Python.
"""

from __future__ import annotations

import argparse
import importlib
import math
import multiprocessing
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import spectral_peft
from benchmarks.data import described
from benchmarks.experiment import (
    RESULTS,
    DivergenceError,
    Experiment,
    ExperimentError,
    claim,
    find,
    read_json,
    result_file,
    write_json,
)
from benchmarks.table import table


SWEPT = ("learning_rate", "seeds")  # one result has one of each, and stays what it is when a grid grows
OUT = Path("benchmark-out")
SECONDS_BETWEEN_LOOKS = 5.0
PACKAGES = ("torch", "transformers", "peft", "accelerate", "evaluate", "safetensors")

Run = Callable[[Experiment, float, int], dict[str, Any]]


def versions() -> dict[str, str]:
    own = {"python": platform.python_version(), "spectral_peft": spectral_peft.__version__}
    return own | {name: version(name) for name in PACKAGES}


def machine() -> dict[str, Any]:
    found = {"cpus": os.cpu_count(), "threads": torch.get_num_threads(), "architecture": platform.machine()}
    return found | {"device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"}


def described_run(experiment: Experiment, rate: float, seed: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """What a result is the result of."""
    return {
        "task": experiment.task,
        "name": experiment.name,
        "learning_rate": rate,
        "seed": seed,
        "adapter_config": experiment.adapter,
        "training_params": {key: value for key, value in experiment.training.items() if key not in SWEPT},
        "model": arguments.model.name if arguments.model else "default",
        "data": described(arguments.data),
        "other": described(arguments.other),
    }


def validation(result: dict[str, Any]) -> float:
    """Lower is better; infinity for a run that diverged."""
    return math.inf if result["validation"] is None else result["validation"]


class Sweep:
    """All runs of the experiments, each of which `run` makes, but for those whose file is there."""

    def __init__(
        self, experiments: Sequence[Experiment], run: Run, arguments: argparse.Namespace, results: Path
    ) -> None:
        self.experiments, self.run, self.arguments, self.results = experiments, run, arguments, results

    def __call__(self) -> None:
        """Returns when every result is there, by this process or another one.

        Raises:
            ExperimentError: a result that is there is one of other settings.
        """
        self._estimate()
        most = max(len(experiment.training["seeds"]) for experiment in self.experiments)
        # all experiments with one seed before any with the next: an interrupted sweep has something of each
        waiting = [(experiment, seeds) for seeds in range(1, most + 1) for experiment in self.experiments]
        while waiting:
            waiting = [stage for stage in waiting if not self._advance(*stage)]
            if waiting:
                time.sleep(SECONDS_BETWEEN_LOOKS)

    def _estimate(self) -> None:
        """Says how much there is to do, and how long it takes as far as the runs that are there tell."""
        total = sum(
            len(experiment.training["learning_rate"]) + len(experiment.training["seeds"]) - 1
            for experiment in self.experiments
        )
        rooms = [self.results / experiment.task / experiment.name for experiment in self.experiments]
        made = [read_json(file).get("seconds") for room in rooms for file in sorted(room.glob("*.json"))]
        seconds = [value for value in made if value is not None]
        mean = f", {sum(seconds) / len(seconds):.0f} s each so far" if seconds else ""
        print(f"{max(0, total - len(made))} of {total} runs are still to be made{mean}.", flush=True)

    def _advance(self, experiment: Experiment, seeds: int) -> bool:
        """Makes the runs of the first `seeds` seeds that nobody else is at; True if none is missing."""
        grid, (first, *others) = experiment.training["learning_rate"], experiment.training["seeds"][:seeds]
        found = [self._result(experiment, rate, first) for rate in grid]
        if None in found:
            return False
        best = min(found, key=validation)
        if validation(best) == math.inf:
            return True  # it diverged at every rate: the other seeds have nothing to add
        return None not in [self._result(experiment, best["run"]["learning_rate"], seed) for seed in others]

    def _result(self, experiment: Experiment, rate: float, seed: int) -> dict[str, Any] | None:
        file = result_file(experiment, rate, seed, results=self.results)
        expected = described_run(experiment, rate, seed, self.arguments)
        with claim(file) as claimed:
            if not file.exists() and claimed:
                print(f"{experiment.task}/{experiment.name}: learning rate {rate:g}, seed {seed}", flush=True)
                write_json(file, self._new_result(experiment, rate, seed) | {"run": expected})
        if not file.exists():
            return None
        result = read_json(file)
        if changed := [name for name in expected if result["run"].get(name) != expected[name]]:
            raise ExperimentError(
                f"{file} is a result of another {' and '.join(changed)} than this sweep has. Delete it to run it "
                "again, or write to another folder with --results."
            )
        return result

    def _new_result(self, experiment: Experiment, rate: float, seed: int) -> dict[str, Any]:
        try:
            return self.run(experiment, rate, seed)
        except DivergenceError as error:
            print(f"  diverged {error}", flush=True)
            return {
                "validation": math.inf,
                "quality": {},
                "forgetting": {},
                "curve": [],
                "cost": {},
                "diverged": str(error),
            }


def in_own_process(run: Run) -> Run:
    """`run`, in a copy of this process: its peak memory is its own, and no run finds the traces of another one."""
    context = multiprocessing.get_context("fork")

    def child(pipe: Any, *given: Any) -> None:
        started = time.perf_counter()
        try:
            result = run(*given)
            seconds = time.perf_counter() - started
            pipe.send(result | {"seconds": seconds, "versions": versions(), "machine": machine()})
        except DivergenceError as error:
            pipe.send(error)

    def isolated(experiment: Experiment, rate: float, seed: int) -> dict[str, Any]:
        receiving, sending = context.Pipe(duplex=False)
        process = context.Process(target=child, args=(sending, experiment, rate, seed))
        process.start()
        sending.close()
        try:
            answer = receiving.recv()
        except EOFError:
            process.join()
            raise ExperimentError(
                f"{experiment.task}/{experiment.name} at {rate:g} ended with exit code {process.exitcode}: its own "
                "message is above. The runs before it are kept."
            ) from None
        finally:
            process.join()
        if isinstance(answer, DivergenceError):
            raise answer
        return answer

    return isolated


def tasks() -> Iterator[str]:
    return (file.stem for file in sorted((Path(__file__).parent / "tasks").glob("*.py")) if file.stem != "__init__")


def parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.run", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--task", required=True, choices=list(tasks()))
    parser.add_argument(
        "--only", default="*", metavar="PATTERNS", help="names of experiments, comma-separated, with *"
    )
    parser.add_argument("--data", type=Path, help="what is learnt: .jsonl or .jsonl.gz, or text, as the task says")
    parser.add_argument("--other", type=Path, help="text that may be forgotten, of which some paragraphs are taken")
    parser.add_argument("--model", type=Path, help="the folder of a checkpoint of transformers; default: the task's")
    parser.add_argument("--cache", type=Path, default=OUT / "cache", help="for what is made once, such as tokens")
    parser.add_argument("--results", type=Path, help=f"default: benchmarks/{RESULTS.name}; of --quick {OUT / 'quick'}")
    parser.add_argument("--quick", action="store_true", help="a preset of few steps, one rate and one seed")
    parser.add_argument("--table", action="store_true", help="print the table of what has been run, and stop")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parsed(argv)
    results = arguments.results or (OUT / "quick" if arguments.quick else RESULTS)
    try:
        experiments = find(arguments.task, arguments.only, quick=arguments.quick)
        if not arguments.table:
            task = importlib.import_module(f"benchmarks.tasks.{arguments.task}")
            run = in_own_process(lambda *given: task.run(*given, arguments))
            Sweep(experiments, run, arguments, results)()
        print(table(experiments, results))
    except ExperimentError as error:
        sys.exit(f"benchmarks: {error}")


if __name__ == "__main__":
    main()
