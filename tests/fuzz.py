"""Damaged and hostile adapters: valid ones, mutated, and what must hold when they are read.

`python -m tests.fuzz 100000` (`make fuzz`) runs so many and prints what went wrong, with the seed that repeats it.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import shutil
import signal
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import transformers
from peft import PeftConfig, PeftModel, get_peft_model
from safetensors import SafetensorError

from spectral_peft import SCTConfig, build_factored, load_factored, save_factored
from spectral_peft.stored import open_adapter
from tests.methods import METHODS
from tests.models import batch, llama, train_


ALLOWED = (ValueError, TypeError, FileNotFoundError, SafetensorError)  # a SpectralError is a ValueError
SECONDS = 20
BYTES = 4 * 2**30

HOSTILE: list[Any] = [
    *(None, True, False, 0, 1, -1, 2, 7, 10**12, -(10**12), 2**31, 2**60, 2**63, 10**40, 0.5, 1e308, -0.0),
    *(float("nan"), float("inf"), float("-inf")),
    *(
        "",
        "x",
        "../../outside",
        "/etc/passwd",
        "\x00",
        "\ud800",
        "(",
        "[",
        "*",
        "a" * 1000,
        "energy=0.9",
        "energy=nan",
    ),
    *("budget=0.5", "all-linear", "F32", "BF16", "I64", "U8", "F8_E4M3", "C64", "BOOL", "F4", "SPECTRAL_SST", "LORA"),
    *([], {}, [[]], [None], [0], [2**60, 0], [0, 2**60], [2**32, 2**32], [-1], ["x"], {"x": "y"}, {"": 0}, {"(": 8}),
    *({"q_proj": 10**12}, {"q_proj": "energy=0.9"}, {"q_proj": None}, [1] * 70, "__import__('os').system('true')"),
]


# Mutations


def deep(levels: int) -> Any:
    value: Any = 0
    for _ in range(levels):
        value = [value]
    return value


def mutated_bytes(data: bytes, rng: random.Random) -> bytes:
    if not data:
        return rng.randbytes(8)
    at, length = rng.randrange(len(data)), rng.choice([1, 1, 2, 8, 64, 1000])
    kind = rng.randrange(6)
    if kind == 0:
        return data[:at]
    if kind == 1:
        return data[:at] + rng.randbytes(length) + data[at:]
    if kind == 2:
        return data[:at] + data[at + length :]
    if kind == 3:
        return data[:at] + data[at : at + length] + data[at:]
    return data[:at] + rng.randbytes(min(length, len(data) - at)) + data[at + length :]


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every entry of a JSON value: (its container, its key or index)."""
    keys: Any = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    for key in keys:
        yield value, key
        yield from places(value[key])


def mutated_json(value: Any, rng: random.Random) -> Any:
    found = list(places(value))
    if not found or rng.random() < 0.02:
        return rng.choice(HOSTILE)
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        container, key = rng.choice(found)
        kind = rng.randrange(8)
        if kind == 0:
            if isinstance(container, dict):
                container.pop(key, None)
        elif kind == 1 and isinstance(container, dict):
            container[rng.choice([str(h) for h in HOSTILE[:40]])] = container.get(key)
        elif kind == 2:
            container[key] = deep(rng.choice([2, 50, 900]))
        elif kind == 3 and isinstance(container, dict):
            container[key] = container.get(rng.choice(list(container) or [key]))
        else:
            container[key] = rng.choice(HOSTILE)
    return value


def mutated_file(name: str, data: bytes, rng: random.Random) -> bytes:
    if rng.random() < 0.25:
        return mutated_bytes(data, rng)
    if name.endswith(".json"):
        return json.dumps(mutated_json(json.loads(data), rng)).encode()
    length = int.from_bytes(data[:8], "little")
    header = json.dumps(mutated_json(json.loads(data[8 : 8 + length]), rng)).encode()
    told = len(header) if rng.random() < 0.95 else rng.choice([0, 1, length, 2**31, 2**63, 2**64 - 1])
    return told.to_bytes(8, "little") + header + data[8 + length :]


# What is read


@dataclass(frozen=True)
class Sample:
    """A valid adapter: its files, and what reads it."""

    name: str
    files: dict[str, bytes]
    read: Callable[[Path], object]


def read_config(folder: Path) -> None:
    try:
        PeftConfig.from_pretrained(str(folder))
    except ALLOWED:
        raise
    except Exception as error:
        # Before it knows the type PEFT reads the file itself, and raises what it raises.
        if "spectral_peft" in traceback.extract_tb(error.__traceback__)[-1].filename:
            raise
        raise ValueError(f"from PEFT: {error!r}") from error


def read_stored(folder: Path) -> None:
    for update in open_adapter(folder).updates.values():
        if update is not None:
            update.singular_values()


def read_model(folder: Path) -> None:
    try:
        model = PeftModel.from_pretrained(llama(), str(folder))
        model(input_ids=batch())
    except ALLOWED:
        raise
    except (LookupError, AttributeError, RuntimeError) as error:
        if "spectral_peft" in traceback.extract_tb(error.__traceback__)[-1].filename:
            raise
        raise ValueError(f"from PEFT: {error!r}") from error


def files_of(folder: Path) -> dict[str, bytes]:
    found = sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix in (".json", ".safetensors"))
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


def samples(folder: Path) -> list[tuple[int, Sample]]:
    """Adapters of every method with what reads them, and how often each should be run."""
    found = []
    for method in METHODS:
        model = get_peft_model(llama(), method(target_modules=["q_proj"], layers_to_transform=[0]))
        train_(model, method.lr, steps=1)
        model.save_pretrained(folder / method.name)
        files = files_of(folder / method.name)
        found += [
            (60, Sample(f"{method}-stored", files, read_stored)),
            (40, Sample(f"{method}-config", files, read_config)),
        ]
        found += [(1, Sample(f"{method}-model", files, read_model))]
    config = SCTConfig(r=4, target_modules=["q_proj"], init="random", keep_base_weight=False)
    save_factored(build_factored(llama().config, config), folder / "factored", shard_bytes=20_000)
    files = files_of(folder / "factored")
    found += [(40, Sample("sharded-stored", files, read_stored)), (2, Sample("factored-model", files, load_factored))]
    return found


# What must hold


_forbidden: list[str] | None = None
WRITES = {"os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.symlink", "os.link", "os.truncate", "os.chmod"}
RUNS = {"subprocess.Popen", "os.system", "os.exec", "os.fork", "os.posix_spawn", "pickle.find_class", "socket.connect"}


def _audit(event: str, args: tuple[Any, ...]) -> None:
    if _forbidden is None:
        return
    writes = event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
    if writes or event in WRITES or event in RUNS:
        _forbidden.append(f"{event}{args!r}")


@contextmanager
def watched() -> Iterator[list[str]]:
    """Notes every file that is written, process that is started, class that is unpickled and connection."""
    global _forbidden
    _forbidden = []
    try:
        yield _forbidden
    finally:
        _forbidden = None


@contextmanager
def bounded(seconds: int, more_bytes: int) -> Iterator[None]:
    """TimeoutError after this time, and MemoryError or RuntimeError for more memory than there is now and this."""

    def stop(*args: object) -> None:
        raise TimeoutError(f"still running after {seconds} s")

    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limits = resource.getrlimit(resource.RLIMIT_AS)
    previous = signal.signal(signal.SIGALRM, stop)
    resource.setrlimit(resource.RLIMIT_AS, (used + more_bytes, limits[1]))
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)
        resource.setrlimit(resource.RLIMIT_AS, limits)


class Fuzzer:
    """Runs samples one after the other in one folder, and counts what became of them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "adapter"
        self.found = samples(folder / "samples")
        self.outcomes: Counter[str] = Counter()
        self._written: Sample | None = None
        self._changed: list[str] = []
        sys.addaudithook(_audit)

    def run(self, seed: int) -> str | None:
        """One mutated adapter; returns what went wrong."""
        rng = random.Random(seed)
        weights, choices = zip(*self.found, strict=True)
        sample = rng.choices(choices, weights)[0]
        self._restore(sample)
        for name in rng.sample(sorted(sample.files), rng.choice([1, 1, 1, 2])):
            (self.folder / name).write_bytes(mutated_file(name, sample.files[name], rng))
            self._changed.append(name)
        error = self._read(sample)
        return None if error is None else f"seed {seed}, {sample.name}, {self._changed}: {error}"

    def _restore(self, sample: Sample) -> None:
        if self._written is None or self._written.files is not sample.files:
            shutil.rmtree(self.folder, ignore_errors=True)
            self._changed = list(sample.files)
        for name in self._changed:
            (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
            (self.folder / name).write_bytes(sample.files[name])
        self._written, self._changed = sample, []

    def _read(self, sample: Sample) -> str | None:
        outcome = "read"
        try:
            with warnings.catch_warnings(), bounded(SECONDS, BYTES), watched() as forbidden:
                warnings.simplefilter("ignore")
                sample.read(self.folder)
        except ALLOWED as error:
            outcome = type(error).__name__
            if not str(error):
                return f"{outcome} without a message"
        except Exception:
            return traceback.format_exc(limit=-8)
        self.outcomes[f"{sample.read.__name__}: {outcome}"] += 1
        return f"forbidden: {forbidden[:3]}" if forbidden else None


def main() -> int:
    parser = argparse.ArgumentParser(description="Mutated adapters; every one is read or refused with a clear error.")
    parser.add_argument("inputs", type=int)
    parser.add_argument("--seed", type=int, default=0, help="the first of the seeds; one input each")
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    wrong: list[str] = []
    with TemporaryDirectory() as folder:
        fuzzer, start = Fuzzer(Path(folder)), time.monotonic()
        for seed in range(arguments.seed, arguments.seed + arguments.inputs):
            error = fuzzer.run(seed)
            if error is not None:
                wrong.append(error)
                sys.stderr.write(f"{error}\n")
            if len(wrong) >= 100:
                break
        seconds = time.monotonic() - start
    for outcome, count in sorted(fuzzer.outcomes.items()):
        sys.stdout.write(f"{count:8,}  {outcome}\n")
    sys.stdout.write(f"{sum(fuzzer.outcomes.values()):,} inputs in {seconds:.0f} s, {len(wrong)} findings\n")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
