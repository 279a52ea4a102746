"""Pre-training from nothing with the Trainer: the example runs, resumes exactly and leaves a plain model."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.scripts import example


main = example("pretrain_from_scratch").main


@pytest.fixture
def arguments(tmp_path: Path) -> list[str]:
    text = tmp_path / "text.txt"
    text.write_text("".join(f"the square of {i} is {i * i}, and its cube is {i**3}\n" for i in range(2000)))
    sizes = "--hidden 32 --layers 1 --r 4 --vocabulary 300 --length 16 --batch 4 --steps-per-iteration 3"
    return ["--text", str(text), *sizes.split()]


@pytest.fixture(params=["sst", "sct"])
def method(request: pytest.FixtureRequest) -> list[str]:
    return ["--method", request.param]


def test_a_resumed_run_equals_an_uninterrupted_one(arguments: list[str], method: list[str], tmp_path: Path) -> None:
    """Stopped in the middle of an iteration and of a warm-up; the schedule needs no callback."""
    arguments = [*arguments, *method]
    whole = main([*arguments, "--steps", "10", "--save-every", "7", "--output-dir", str(tmp_path / "whole")])
    folder = tmp_path / "stopped"
    main([*arguments, "--steps", "10", "--save-every", "7", "--output-dir", str(folder)])
    shutil.rmtree(folder / "checkpoint-10")  # as if it had been killed before
    resumed = main([*arguments, "--steps", "10", "--resume", "--output-dir", str(folder)])
    assert resumed == whole
    models = [AutoModelForCausalLM.from_pretrained(path / "merged") for path in (tmp_path / "whole", folder)]
    for value, other in zip(*(model.state_dict().values() for model in models), strict=True):
        assert torch.equal(value, other)
    tokenizer = AutoTokenizer.from_pretrained(folder / "merged")
    text = "the square of 12 is 144, and its cube is 1728"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_it_learns(arguments: list[str], method: list[str], tmp_path: Path) -> None:
    assert main([*arguments, *method, "--steps", "150", "--output-dir", str(tmp_path / "out")]) < 3.5
