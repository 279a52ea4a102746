"""What training takes in memory, and giving back what was freed."""

from __future__ import annotations

import ctypes
import sys
import tempfile
from contextlib import AbstractContextManager
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks


_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_BYTES = 2**17


def return_freed_memory() -> bool:
    """Has the C library give every freed block of 128 KiB and more back to the system at once, in this process.

    glibc raises its threshold for that by itself, up to 32 MiB, and then keeps freed gradients and activations between
    blocks that live long: a training that needs 7 GB on the CPU takes up to 10. The price is that fresh blocks are
    filled with zeros by the kernel. Call it before the model is built. Without glibc nothing happens.

    Returns:
        Whether the C library took the setting.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and all(mallopt(name, _BYTES) for name in (_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD))


class _OnDisk(NamedTuple):
    file: IO[bytes]  # without a name: gone when the graph forgets it
    dtype: torch.dtype
    shape: torch.Size
    device: torch.device


def save_on_disk(folder: str | Path | None = None, least_bytes: int = 2**20) -> AbstractContextManager[Any]:
    """Has the forward pass inside keep in files what the backward pass needs; compare torch's `save_on_cpu`.

    With gradient checkpointing these are the inputs of the layers and what the loss needs: 0.4 GB of the 70B
    architecture at 128 tokens. The gradients are the same, bit for bit. Use it around the forward pass alone: what a
    layer keeps while it is computed again should stay in memory.

    Args:
        folder: Where the files are; by default where `tempfile` puts them. A folder that is in memory itself (tmpfs)
            saves nothing.
        least_bytes: Smaller tensors stay in memory, and so do parameters.
    """

    def pack(tensor: Tensor) -> Tensor | _OnDisk:
        source = tensor if tensor._base is None else tensor._base
        if isinstance(source, nn.Parameter) or tensor.nbytes < least_bytes:
            return tensor
        file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115  # open for as long as the graph needs it
        file.write(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
        return _OnDisk(file, tensor.dtype, tensor.shape, tensor.device)

    def unpack(saved: Tensor | _OnDisk) -> Tensor:
        if isinstance(saved, Tensor):
            return saved
        saved.file.seek(0)
        stored = torch.from_numpy(np.fromfile(saved.file, dtype=np.uint8))
        return stored.view(saved.dtype).view(saved.shape).to(saved.device)

    return saved_tensors_hooks(pack, unpack)


class MemoryEstimate(NamedTuple):
    """Bytes that training takes at its peak, by what they are for.

    The backward pass frees activations while gradients come into being, so that only the larger of the two counts in
    `total`.

    Attributes:
        weights: Parameters and buffers.
        gradients: Those of all trained parameters; with the step in backward those of the largest one.
        optimizer: Two moments of each trained parameter, in its dtype.
        activations: What the forward pass keeps with gradient checkpointing: the input of each layer, and the logits
            with their softmax and gradient; on disk, no more than two of these last at a time.
        layer: What one layer keeps while it is computed again.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    layer: int

    @property
    def total(self) -> int:
        return self.weights + self.optimizer + self.layer + max(self.gradients, self.activations)

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {value / 1e9:,.2f}" for name, value in self._asdict().items())
        return f"{self.total / 1e9:,.2f} GB: {parts}"


def estimate_memory(
    model: nn.Module, tokens: int, *, in_backward: bool = False, on_disk: bool = False
) -> MemoryEstimate:
    """What a step of training will take with gradient checkpointing and AdamW, from the shapes alone.

    A model on the meta device will do: ``build_factored(..., device="meta")``. What the process itself takes, about
    0.4 GB for Python, torch and transformers, comes on top.

    Args:
        model: A transformers model, with or without an adapter.
        tokens: Tokens in a batch: rows times length.
        in_backward: Whether `step_in_backward` is used.
        on_disk: Whether the forward pass runs within `save_on_disk`.
    """
    gradients = [value.numel() * value.element_size() for value in model.parameters() if value.requires_grad]
    stored = sum(value.numel() * value.element_size() for value in (*model.parameters(), *model.buffers()))
    config: Any = model.config.get_text_config()  # type: ignore[operator, union-attr]
    width, inner = config.hidden_size, getattr(config, "intermediate_size", 4 * config.hidden_size)
    inputs = config.num_hidden_layers * width
    return MemoryEstimate(
        weights=stored,
        gradients=max(gradients, default=0) if in_backward else sum(gradients),
        optimizer=2 * sum(gradients),
        activations=4 * tokens * (2 * config.vocab_size if on_disk else inputs + 3 * config.vocab_size),
        layer=4 * tokens * (4 * inner + 8 * width),
    )
