"""Two processes do what one does on their joint batch, and keep their updates equal."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from spectral_peft import SpectralError
from tests.methods import METHODS, POOLED_SST, SST, Method
from tests.models import batch, llama, logits, trainable, updates
from tests.processes import Pair


STEPS = 6
TARGETS = ["q_proj", "k_proj", "down_proj"]  # square, and wide, and wide again with rows that do not divide by two
NAMED = {method.name: method for method in METHODS}  # the formulas of a method cannot be sent to a process


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    pair = Pair(tmp_path_factory.mktemp("pair"))
    yield pair
    pair.kill()


# What the processes run


def adapted(name: str, **fields: Any) -> nn.Module:
    return get_peft_model(llama(torch.float64), NAMED[name](target_modules=TARGETS, r=5, **fields))


def train(model: nn.Module, name: str, rows: slice, first: int = 0, optimizer: Any = None) -> list[float]:
    """The losses of the steps on these rows of the batch."""
    model.train()
    optimizer = optimizer or torch.optim.AdamW(trainable(model), lr=NAMED[name].lr, weight_decay=0.0)
    losses = []
    for step in range(first, first + STEPS):
        ids = batch(seed=step)[rows]
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def own_rows() -> slice:
    return slice(dist.get_rank(), dist.get_rank() + 1)


def mean_over_processes(losses: list[float]) -> Tensor:
    mean = torch.tensor(losses, dtype=torch.float64)
    dist.all_reduce(mean)
    return mean / dist.get_world_size()


def gathered(model: nn.Module) -> dict[str, Tensor]:
    """All tensors of a model, whole, on every process."""
    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))


def same_as_one_process(name: str, model: nn.Module, losses: list[float], **fields: Any) -> None:
    alone = adapted(name, **fields)
    expected = torch.tensor(train(alone, name, slice(None)), dtype=torch.float64)
    torch.testing.assert_close(mean_over_processes(losses), expected, rtol=1e-5, atol=0)
    state = gathered(model)
    assert state.keys() == alone.state_dict().keys()
    for key, value in alone.state_dict().items():
        torch.testing.assert_close(state[key], value, rtol=1e-3, atol=1e-4, msg=lambda text, key=key: key + text)


def sharded(model: nn.Module) -> nn.Module:
    for layer in model.get_submodule("base_model.model.model.layers"):
        fully_shard(layer)
    return fully_shard(model)


def ddp(name: str, folder: Path, find_unused: bool) -> None:
    model = adapted(name)
    parallel = DistributedDataParallel(model, find_unused_parameters=find_unused)
    losses = train(parallel, name, own_rows())
    for key, value in model.state_dict().items():
        first = value.clone()
        dist.broadcast(first, 0)
        assert torch.equal(first, value), key
    same_as_one_process(name, model, losses)
    if dist.get_rank() == 0:
        model.save_pretrained(folder)
    dist.barrier()
    assert torch.equal(logits(PeftModel.from_pretrained(llama(torch.float64), folder)), logits(model))


def fsdp2(name: str, folder: Path, fields: dict[str, Any]) -> None:
    model = sharded(adapted(name, **fields))
    losses = train(model, name, own_rows())
    same_as_one_process(name, model, losses, **fields)
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if dist.get_rank() == 0:  # the others have no state
        model.save_pretrained(folder, state_dict=state)
    expected = logits(model)
    dist.barrier()
    reloaded = PeftModel.from_pretrained(llama(torch.float64), folder)
    torch.testing.assert_close(logits(reloaded), expected, rtol=1e-12, atol=1e-12)


# The laws


@pytest.mark.parametrize("find_unused", [False, True], ids=["bare", "find_unused_parameters"])
def test_ddp_is_one_process_on_the_joint_batch(pair, tmp_path, method, find_unused):
    pair.run(ddp, method.name, tmp_path, find_unused)


def test_fsdp2_is_one_process_on_the_joint_batch(pair, tmp_path, method):
    pair.run(fsdp2, method.name, tmp_path, {})
