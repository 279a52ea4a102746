"""Runs a program that does not import this package, with the methods registered.

    python -m spectral_peft program.py its arguments
    python -m spectral_peft -m some_tool its arguments

As `python program.py` and `python -m some_tool` do. Launchers take it too: `torchrun -m spectral_peft program.py`.
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path


def main(argv: list[str]) -> None:
    """Runs the program as `__main__`, with the arguments behind it as `sys.argv`.

    Raises:
        SystemExit: no program is named, or it ends so.
    """
    if argv in ([], ["-m"], ["-h"], ["--help"]):
        sys.exit(__doc__)
    if argv[0] == "-m":
        sys.argv = argv[1:]
        runpy.run_module(argv[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = argv
        sys.path[0] = str(Path(argv[0]).resolve().parent)
        runpy.run_path(argv[0], run_name="__main__")


if __name__ == "__main__":
    main(sys.argv[1:])
