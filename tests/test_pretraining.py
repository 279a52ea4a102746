"""Pre-training from nothing with the Trainer: the example runs, resumes exactly and leaves a plain model."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path
from types import ModuleType

import pytest
import torch
from transformers import AutoModelForCausalLM


@pytest.fixture
def example() -> ModuleType:
    file = Path(__file__).parent.parent / "examples" / "pretrain_from_scratch.py"
    spec = importlib.util.spec_from_file_location("pretrain_from_scratch", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def arguments(tmp_path: Path) -> list[str]:
    text = tmp_path / "text.txt"
    text.write_text("".join(f"the square of {i} is {i * i}, and its cube is {i**3}\n" for i in range(2000)))
    sizes = "--hidden 32 --layers 1 --r 4 --vocabulary 300 --length 16 --batch 4 --steps-per-iteration 3"
    return ["--text", str(text), *sizes.split()]


def test_a_resumed_run_equals_an_uninterrupted_one(example: ModuleType, arguments: list[str], tmp_path: Path) -> None:
    """Stopped in the middle of an iteration and of a warm-up; the schedule needs no callback."""
    whole = example.main([*arguments, "--steps", "10", "--save-every", "7", "--output-dir", str(tmp_path / "whole")])
    folder = tmp_path / "stopped"
    example.main([*arguments, "--steps", "10", "--save-every", "7", "--output-dir", str(folder)])
    shutil.rmtree(folder / "checkpoint-10")  # as if it had been killed before
    resumed = example.main([*arguments, "--steps", "10", "--resume", "--output-dir", str(folder)])
    assert resumed == whole
    models = [AutoModelForCausalLM.from_pretrained(path / "merged") for path in (tmp_path / "whole", folder)]
    for value, other in zip(*(model.state_dict().values() for model in models), strict=True):
        assert torch.equal(value, other)


def test_it_learns(example: ModuleType, arguments: list[str], tmp_path: Path) -> None:
    assert example.main([*arguments, "--steps", "150", "--output-dir", str(tmp_path / "out")]) < 3.5
