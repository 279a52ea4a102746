"""Opt-in cache of factors on disk: the SVD of a large model is the same at every start."""

from __future__ import annotations

import hashlib
import os
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from spectral_peft.linalg import Factors


ENVIRONMENT_VARIABLE = "SPECTRAL_PEFT_CACHE"


def cached_factors(weight: Tensor, key_parts: tuple[str, ...], compute: Callable[[], Factors]) -> Factors:
    """`compute()`, or what an earlier call with the same weight and `key_parts` computed.

    Off unless the environment variable SPECTRAL_PEFT_CACHE names a directory, which is created if missing. Files are
    replaced atomically, so several processes may share it.

    Args:
        weight: what is decomposed; the key covers its shape, dtype and bytes. Cached factors go to its device.
        key_parts: everything else the result depends on, such as the algorithm and the rank.
        compute: called where nothing usable is stored.
    """
    directory = os.environ.get(ENVIRONMENT_VARIABLE)
    if not directory or weight.is_meta:
        return compute()
    path = Path(directory) / f"{_key(weight, key_parts)}.safetensors"
    factors = _load(path, weight.device)
    if factors is None:
        factors = compute()
        _store(path, factors)
    return factors


def _key(weight: Tensor, key_parts: tuple[str, ...]) -> str:
    header = repr((tuple(weight.shape), str(weight.dtype), key_parts))
    digest = hashlib.sha256(header.encode())
    # As bytes: NumPy has no bfloat16.
    digest.update(weight.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _load(path: Path, device: torch.device) -> Factors | None:
    if not path.exists():
        return None
    try:
        stored = load_file(path)
        return Factors(*(stored[name].to(device) for name in Factors._fields))
    except (OSError, KeyError, SafetensorError) as error:
        warnings.warn(f"The cached factors in {path} cannot be read and are computed anew: {error!r}", stacklevel=3)
        return None


def _store(path: Path, factors: Factors) -> None:
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in factors._asdict().items()}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # In the same directory, because a file can be replaced atomically only within a file system.
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            save_file(tensors, Path(folder) / path.name)
            os.replace(Path(folder) / path.name, path)
    except (OSError, SafetensorError) as error:
        warnings.warn(f"The factors could not be cached in {path}: {error!r}", stacklevel=3)
