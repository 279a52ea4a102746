"""What a training step costs, counted and not timed: the same in every run, on every machine."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from peft import PeftModel
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode


def nbytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def saved_bytes(model: nn.Module, forward: Callable[[], Tensor]) -> int:
    """Bytes that autograd keeps for the backward pass, parameters and buffers of the model aside."""
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    saved: list[torch.UntypedStorage] = []  # alive until they are counted: no two have the same address
    keep = lambda tensor: saved.append(tensor.untyped_storage()) or tensor  # noqa: E731
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = forward()
    del loss
    return sum({s.data_ptr(): s.nbytes() for s in saved if s.data_ptr() not in own}.values())


def state_bytes(optimizer: Optimizer) -> int:
    return nbytes(value for entry in optimizer.state.values() for value in entry.values() if torch.is_tensor(value))


def flops(forward: Callable[[], Tensor]) -> int:
    """Multiplications and additions of the matrix products of one forward and backward pass."""
    with FlopCounterMode(display=False) as counter:
        forward().backward()
    return counter.get_total_flops()


class _Calls(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.names.append(str(func.overloadpacket))
        return func(*args, **(kwargs or {}))


def aten_calls(run: Callable[[], object]) -> list[str]:
    """The operations of PyTorch that `run` calls, one after the other: "aten.mm", "aten._linalg_svd", ..."""
    with _Calls() as calls:
        run()
    return calls.names


def save(model: nn.Module, folder: Path) -> None:
    """Writes the adapter as PEFT does, or where there is none what trains."""
    if isinstance(model, PeftModel):
        model.save_pretrained(folder, save_embedding_layers=False)
        return
    folder.mkdir(parents=True, exist_ok=True)
    own = {name: value.detach() for name, value in model.named_parameters() if value.requires_grad}
    save_file(own, folder / "adapter_model.safetensors")


def checkpoint_bytes(model: nn.Module) -> int:
    """The size of adapter_model.safetensors."""
    with tempfile.TemporaryDirectory() as folder:
        save(model, Path(folder))
        return (Path(folder) / "adapter_model.safetensors").stat().st_size
