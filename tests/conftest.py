from __future__ import annotations

import os

import peft
import pytest
import torch

from tests.methods import METHODS, Method


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--expect-peft", help="fail unless this version of PEFT is the one under test")


def pytest_configure(config: pytest.Config) -> None:
    expected = config.getoption("--expect-peft")
    if expected and peft.__version__ != expected:
        raise pytest.UsageError(f"PEFT {expected} should be under test, found {peft.__version__} in {peft.__path__}.")


@pytest.fixture(autouse=True)
def _seed() -> None:
    """The same random numbers in every run; UNLOCK_SEED=1 draws new ones."""
    torch.manual_seed(int.from_bytes(os.urandom(4), "big") if os.environ.get("UNLOCK_SEED") else 0)


@pytest.fixture(params=[method for method in METHODS if method.free_rank], ids=str)
def free_rank_method(request: pytest.FixtureRequest) -> Method:
    return request.param


@pytest.fixture(params=[method for method in METHODS if method.embeddings], ids=str)
def embedding_method(request: pytest.FixtureRequest) -> Method:
    return request.param


@pytest.fixture(params=[method for method in METHODS if not method.replaces], ids=str)
def thin_method(request: pytest.FixtureRequest) -> Method:
    return request.param


@pytest.fixture(params=METHODS, ids=str)
def method(request: pytest.FixtureRequest) -> Method:
    return request.param
