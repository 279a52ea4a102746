"""What is kept on disk instead of in memory changes no gradient."""

from __future__ import annotations

import gc
import os
from pathlib import Path

import pytest
import torch

from spectral_peft import build_factored, save_on_disk
from tests.models import batch
from tests.test_factored import LLAMA, sct


def open_files(folder: Path) -> int:
    links = (Path(f"/proc/self/fd/{number}") for number in os.listdir("/proc/self/fd"))
    return sum(str(folder) in str(link.readlink()) for link in links if link.is_symlink())


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_are_the_same_bit_for_bit(checkpointing: bool, tmp_path: Path) -> None:
    model = build_factored(LLAMA, sct()).train()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    ids = batch()
    model(input_ids=ids, labels=ids).loss.backward()
    expected = {name: value.grad.clone() for name, value in model.named_parameters() if value.requires_grad}
    model.zero_grad()
    with save_on_disk(tmp_path, least_bytes=1000):
        loss = model(input_ids=ids, labels=ids).loss
    if os.path.isdir("/proc/self/fd"):
        assert open_files(tmp_path) >= 3
    loss.backward()
    for name, gradient in expected.items():
        assert torch.equal(model.get_parameter(name).grad, gradient), name
    del loss
    gc.collect()
    assert list(tmp_path.iterdir()) == []
    if os.path.isdir("/proc/self/fd"):
        assert open_files(tmp_path) == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_every_dtype_and_layout_comes_back(dtype: torch.dtype, tmp_path: Path) -> None:
    x = torch.randn(6, 5, dtype=dtype).T.requires_grad_(True)
    with save_on_disk(tmp_path, least_bytes=0):
        y = (x * x).sum()
    y.backward()
    assert torch.equal(x.grad, 2 * x.detach())


def test_parameters_and_their_views_stay_in_memory(tmp_path: Path) -> None:
    weight = torch.nn.Parameter(torch.randn(8, 8))
    x = torch.randn(8, 8)
    with save_on_disk(tmp_path, least_bytes=0):
        y = x @ weight.mT
        files = open_files(tmp_path) if os.path.isdir("/proc/self/fd") else 1
    assert files == 1  # x, which the gradient of the weight needs
    y.sum().backward()
