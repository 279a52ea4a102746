"""An experiment is a folder: which adapter is trained, how, and at which learning rates. A run of it is one JSON file.

experiments/<task>/default_training_params.json       what holds for every experiment of the task
experiments/<task>/quick_training_params.json         what --quick puts over everything else
experiments/<task>/<name>/adapter_config.json         as PEFT saves it; without it everything trains
experiments/<task>/<name>/training_params.json        what is different for this experiment (optional)
results/<task>/<name>/lr<learning rate>-seed<seed>.json
"""

from __future__ import annotations

import fcntl
import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from peft import PeftConfig


HERE = Path(__file__).parent
EXPERIMENTS, RESULTS = HERE / "experiments", HERE / "results"
ADAPTER, TRAINING = "adapter_config.json", "training_params.json"


class ExperimentError(ValueError):
    """An experiment or a result that cannot be used as it is."""


class DivergenceError(ArithmeticError):
    """A training whose loss or weights are no numbers any more; a result, and not an error of the harness."""


@dataclass(frozen=True)
class Experiment:
    """What one folder says.

    Attributes:
        task: The name of a module in `benchmarks.tasks`.
        name: The name of the folder.
        adapter: The content of adapter_config.json, or None for full fine-tuning.
        training: The task's parameters of training, with the folder's own over them. `learning_rate` is the grid and
            `seeds` are the seeds; the first one searches the grid, the others run at the rate that is best there.
    """

    task: str
    name: str
    adapter: dict[str, Any] | None
    training: dict[str, Any]

    def config(self, **fields: Any) -> PeftConfig | None:
        """The adapter's config, with `fields` over those of the file; None for full fine-tuning.

        Raises:
            ExperimentError: a key that the config does not have; PEFT itself only warns of it.
        """
        if self.adapter is None:
            return None
        config = PeftConfig.from_peft_type(**self.adapter, **fields)
        if unknown := sorted(set(self.adapter) - set(config.to_dict())):
            raise ExperimentError(f"{self.task}/{self.name}/{ADAPTER} has {unknown}, which is no field of its config.")
        return config


def read_json(file: Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ExperimentError(f"{file} is no JSON: {error}. Correct it, or delete it if it is a result.") from error


def find(task: str, pattern: str = "*", *, quick: bool = False, folder: Path = EXPERIMENTS) -> list[Experiment]:
    """The experiments of a task whose name fits one of the comma-separated patterns, by name.

    With `quick`, each has the middle rate of its grid alone, and the parameters of quick_training_params.json.

    Raises:
        ExperimentError: there is no such task or experiment.
    """
    room = folder / task
    if not room.is_dir():
        known = ", ".join(sorted(path.name for path in folder.iterdir() if path.is_dir()))
        raise ExperimentError(f"There are no experiments of the task {task!r}; there are some of {known}.")
    names = sorted(path.name for path in room.iterdir() if path.is_dir())
    chosen = [name for name in names if any(fnmatchcase(name, part.strip()) for part in pattern.split(","))]
    if not chosen:
        raise ExperimentError(f"No experiment of {task} is called {pattern!r}; there are {', '.join(names)}.")
    common = read_json(room / f"default_{TRAINING}")
    return [_read(room / name, common, quick) for name in chosen]


def _read(folder: Path, common: Mapping[str, Any], quick: bool) -> Experiment:
    own = read_json(folder / TRAINING) if (folder / TRAINING).is_file() else {}
    training = {**common, **own}
    if quick:
        grid = training["learning_rate"]
        training |= {"learning_rate": [grid[len(grid) // 2]], **read_json(folder.parent / f"quick_{TRAINING}")}
    if unknown := sorted(set(training) - set(common)):
        raise ExperimentError(f"{folder.name}/{TRAINING} has {unknown}, which the defaults of the task do not know.")
    adapter = read_json(folder / ADAPTER) if (folder / ADAPTER).is_file() else None
    return Experiment(folder.parent.name, folder.name, adapter, training)


def result_file(experiment: Experiment, learning_rate: float, seed: int, *, results: Path = RESULTS) -> Path:
    return results / experiment.task / experiment.name / f"lr{learning_rate:g}-seed{seed}.json"


def write_json(file: Path, content: Mapping[str, Any]) -> None:
    """Writes the file whole or not at all; numbers that are not finite become null."""
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_name(f"{file.name}.{os.getpid()}.tmp")
    unfinished.write_text(json.dumps(_finite(content), indent=2, allow_nan=False) + "\n", encoding="utf-8")
    unfinished.replace(file)


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@contextmanager
def claim(file: Path) -> Iterator[bool]:
    """Whether this process may write the result `file`: False while another one is at it.

    The claim is a lock of the operating system on a file next to it, which ends with the process that has it.
    """
    lock = file.with_suffix(".lock")
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True
