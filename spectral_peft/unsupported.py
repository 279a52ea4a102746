"""Ways to spread a model over processes that adapters do not survive, told before anything trains."""

from __future__ import annotations

import os

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from spectral_peft.errors import SpectralError
from spectral_peft.sharded import parameters_within


def refuse_split_weight(weight: Tensor, key: str) -> None:
    """Raises SpectralError if this process has not the whole of a base weight, which an adapter starts from."""
    name = f"The weight of target module {key}"
    if isinstance(weight, DTensor):
        raise SpectralError(
            f"{name} is sharded already (a DTensor). Add the adapter first and call `fully_shard`, or "
            "`accelerator.prepare`, after it. Tensor parallelism (`tp_plan`) is not supported: shard with FSDP2."
        )
    if hasattr(weight, "ds_id"):
        raise SpectralError(f"{name} is partitioned by DeepSpeed ZeRO-3, which is not supported: shard with FSDP2.")
    if _is_flattened(weight):
        raise SpectralError(
            f"{name} was flattened by FullyShardedDataParallel (FSDP1). Add the adapter first, and shard with FSDP2: "
            "`fully_shard`, or in accelerate `fsdp_version: 2`."
        )
    if _first_process_loads_alone():
        raise SpectralError(
            f"{name} is zero on all processes but the first, since `cpu_ram_efficient_loading` of accelerate's FSDP "
            "is on. Set it to false: an adapter starts from the weight."
        )


def refuse_flattened(update: nn.Module) -> None:
    """Raises SpectralError if FSDP1 holds the parameters of an update that has work to do after optimizer steps."""
    if any(_is_flattened(parameter) for parameter in parameters_within(update)):
        raise SpectralError(
            f"{type(update).__name__} works on its factors after optimizer steps, and FullyShardedDataParallel "
            "(FSDP1) makes pieces of a flat parameter of them. Shard with FSDP2: `fully_shard`, or in accelerate "
            "`fsdp_version: 2`."
        )


def refuse_processes(what: str) -> None:
    """Raises SpectralError if gradients are shared between processes."""
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        raise SpectralError(
            f"{what} uses the gradients of one process before they are averaged over the {dist.get_world_size()} "
            "processes. Step an optimizer over all parameters after `backward`."
        )


def _is_flattened(parameter: Tensor | None) -> bool:
    return getattr(parameter, "_fsdp_flattened", False)


def _first_process_loads_alone() -> bool:
    several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    return several and _is_set("ACCELERATE_USE_FSDP") and _is_set("FSDP_CPU_RAM_EFFICIENT_LOADING")


def _is_set(variable: str) -> bool:
    return os.environ.get(variable, "").lower() in ("1", "true", "yes", "on", "y", "t")
