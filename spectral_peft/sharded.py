"""Parameters that FSDP2 has sharded: whole while an update works on them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate


class _Gathered(dict[str, Any]):
    """The parameters of one module: those that are sharded are gathered when they are first asked for."""

    def __init__(self, shards: dict[str, Any], gradients: bool) -> None:
        super().__init__(shards)
        self.gradients = gradients
        self.shards: dict[str, nn.Parameter] = {}

    def __getitem__(self, name: str) -> Any:
        value = super().__getitem__(name)
        if not isinstance(value, DTensor):
            return value
        self.shards[name] = value  # type: ignore[assignment]  # a parameter, too
        self[name] = parameter = nn.Parameter(_full(value), value.requires_grad)
        if self.gradients and isinstance(value.grad, DTensor):
            parameter.grad = _full(value.grad)
        return parameter

    def items(self) -> Any:
        return {name: self[name] for name in self}.items()

    def values(self) -> Any:
        return {name: self[name] for name in self}.values()

    def pairs(self) -> Iterator[tuple[nn.Parameter, nn.Parameter]]:
        """What was gathered: (the shard, the whole parameter)."""
        return ((shard, super(_Gathered, self).__getitem__(name)) for name, shard in self.shards.items())


@contextmanager
@torch.no_grad()
def whole(update: nn.Module, *, gradients: bool = False) -> Iterator[dict[int, nn.Parameter]]:
    """While it lasts, the sharded parameters of `update` are plain tensors; afterwards their shards hold what they do.

    Every process has to ask for the same parameters in the same order and to compute the same from them. What it does
    not ask for is not gathered. If an exception leaves the block, the shards stay what they were.

    Args:
        update: a module of which FSDP2 shards parameters, or not.
        gradients: Whether the gradients are to be whole too, and written back.

    Yields:
        The sharded parameters, by the identity of the whole ones; filled in at the end.
    """
    kept = {module: module._parameters for module in update.modules() if _is_sharded(module)}
    gathered = {module: _Gathered(shards, gradients) for module, shards in kept.items()}
    shard_of: dict[int, nn.Parameter] = {}
    try:
        for module, parameters in gathered.items():
            module._parameters = parameters
        yield shard_of
        for parameters in gathered.values():
            for shard, parameter in parameters.pairs():
                shard_of[id(parameter)] = shard
                _take(shard, parameter)
                if shard.grad is not None and parameter.grad is not None:
                    _take(shard.grad, parameter.grad)
    finally:
        for module, shards in kept.items():
            module._parameters = shards


def is_sharded(module: nn.Module) -> bool:
    """Whether FSDP2 has sharded parameters of this module, or of one within it, and they are not gathered now."""
    return any(isinstance(value, DTensor) for value in parameters_within(module))


def parameters_within(module: nn.Module) -> Iterator[nn.Parameter | None]:
    """As `parameters()`, for what happens at every step: without keeping account of what it has seen."""
    yield from module._parameters.values()
    for child in module._modules.values():
        if child is not None:
            yield from parameters_within(child)


def _is_sharded(module: nn.Module) -> bool:
    return any(isinstance(value, DTensor) for value in module._parameters.values())


def _full(shard: DTensor) -> Tensor:
    mesh = shard.device_mesh
    # FSDP2 may keep shards on the CPU, where the processes of a GPU mesh do not talk to each other.
    return shard.detach().to(mesh.device_type).full_tensor()  # type: ignore[attr-defined]


def _take(shard: Tensor, value: Tensor) -> None:
    """Sets a shard to its part of `value`, which every process has: nothing is sent."""
    assert isinstance(shard, DTensor)
    mesh = shard.device_mesh
    replicated = DTensor.from_local(value.detach(), mesh, [Replicate()] * mesh.ndim, run_check=False)
    shard.copy_(replicated.redistribute(mesh, shard.placements))
