"""This project's methods in PEFT's own MetaMathQA comparison, unmodified: for a GPU with 24 GB, with the network.

    git clone https://github.com/huggingface/peft && pip install --editable peft math-verify
    python -m benchmarks.metamathqa --peft peft                     # all of benchmarks/metamathqa/experiments
    python -m benchmarks.metamathqa --peft peft --only 'spectral_pissa/*'

PEFT's `run.py` is run by `python -m spectral_peft`, which registers the methods. It needs PEFT as an editable
checkout, since it asks git for the branch, and writes its results there, next to those of PEFT's methods. What has a
result is not run again.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path


EXPERIMENTS = Path(__file__).parent / "metamathqa" / "experiments"


def has_result(harness: Path, experiment: Path) -> bool:
    """Results of a checkout that is not on the main branch are temporary ones to PEFT; they count too."""
    return any(harness.glob(f"*results/{experiment.parent.name}--{experiment.name}*.json"))


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.metamathqa", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--peft", type=Path, required=True, help="the root of a checkout of PEFT")
    parser.add_argument("--only", default="*", metavar="PATTERN", help="<method>/<name>, with *")
    arguments = parser.parse_args(argv)
    harness = arguments.peft.resolve() / "method_comparison" / "MetaMathQA"
    if not (harness / "run.py").is_file():
        parser.error(f"--peft should be a checkout of PEFT, and {harness} has no run.py.")
    for experiment in sorted(EXPERIMENTS.glob("*/*")):
        name = f"{experiment.parent.name}/{experiment.name}"
        if fnmatchcase(name, arguments.only) and not has_result(harness, experiment):
            print(name, flush=True)
            command = [sys.executable, "-m", "spectral_peft", "run.py", "-v", str(experiment)]
            subprocess.run(command, cwd=harness, check=True)


if __name__ == "__main__":
    main()
