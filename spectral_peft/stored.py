"""An adapter as it lies in its folder: config, tensors and updates, without the base model."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from itertools import product
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from peft import PeftConfig
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from spectral_peft.config import SpectralConfig
from spectral_peft.errors import SpectralError
from spectral_peft.update import Size, SpectralUpdate


__all__ = ["StoredAdapter", "open_adapter"]


MOST_TENSORS = 64
"""No update has as many."""
PATTERN = SAFETENSORS_WEIGHTS_NAME.replace(".", "*.")


@dataclass
class StoredAdapter:
    """What `open_adapter` found.

    Attributes:
        folder: Where it lies.
        config: Its configuration.
        updates: The update of each module, by the module's name, with the tensors of the checkpoint. None where the
            checkpoint leaves out what tells the shape of the weight (`save_start=False`).
        tensors: All tensors by their name in the file.
    """

    folder: Path
    config: SpectralConfig
    updates: dict[str, SpectralUpdate | None]
    tensors: dict[str, Tensor]

    def tensors_of(self, module: str) -> dict[str, Tensor]:
        """The tensors of the update of a module, by their name in the update."""
        return dict(_by_module(self.tensors, self.config)[module])


def open_adapter(source: str | Path) -> StoredAdapter:
    """Reads an adapter from a folder, or from the Hub if there is no such folder.

    Args:
        source: A folder, or the id of a repository.

    Raises:
        FileNotFoundError: the folder, or a file that belongs to an adapter, is not there.
        SpectralError: it is not an adapter of a spectral method, a file is damaged, or tensors do not fit the config.
    """
    folder = adapter_folder(source)
    if not (folder / CONFIG_NAME).is_file():
        raise FileNotFoundError(f"{folder} holds no adapter: there is no {CONFIG_NAME}.")
    config = load_config(folder)
    tensors = load_tensors(folder)
    updates = {module: _rebuilt(config, module, own) for module, own in _by_module(tensors, config).items()}
    if not updates:
        raise SpectralError(f"{folder} holds no tensor of an adapter of type {config.method!r}.")
    return StoredAdapter(folder, config, updates, tensors)


def adapter_folder(source: str | Path) -> Path:
    """`source` itself if it is a folder; otherwise where the adapter of this Hub id was downloaded to."""
    if Path(source).is_dir():
        return Path(source)
    if str(source).count("/") > 1 or str(source).startswith((".", "/")):
        raise FileNotFoundError(f"There is no folder {source}.")
    return Path(snapshot_download(str(source), allow_patterns=["adapter_*", "base/*.json"]))


def new_folder(folder: str | Path) -> Path:
    """The path of a folder to write to.

    Raises:
        SpectralError: it holds something.
    """
    folder = Path(folder)
    if folder.exists() and any(folder.iterdir()):
        raise SpectralError(f"{folder} is not empty. Name a new folder, so that nothing there is lost.")
    return folder


def load_config(folder: Path) -> SpectralConfig:
    """The config of an adapter.

    Raises:
        SpectralError: it is damaged, or not that of a spectral method.
    """
    try:
        config = PeftConfig.from_pretrained(str(folder))
    except (KeyError, ValueError, TypeError, RecursionError) as error:
        raise SpectralError(f"{folder / CONFIG_NAME} cannot be read: {error!r}.") from error
    if not isinstance(config, SpectralConfig):
        raise SpectralError(f"{folder} holds an adapter of type {config.peft_type}, not of a spectral method.")
    return config


def load_tensors(folder: Path) -> dict[str, Tensor]:
    """The tensors of an adapter, from one file or from those that its index names.

    Raises:
        FileNotFoundError: there is no such file.
        SpectralError: a file is truncated or damaged, or the index names one outside the folder.
    """
    return {name: tensor for file in _files(folder) for name, tensor in _load(file).items()}


def _files(folder: Path) -> list[Path]:
    index = folder / f"{SAFETENSORS_WEIGHTS_NAME}.index.json"
    if not index.is_file():
        return [folder / SAFETENSORS_WEIGHTS_NAME]
    try:
        names = {str(name) for name in json.loads(index.read_text())["weight_map"].values()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise SpectralError(f"{index} cannot be read: {error!r}.") from error
    for name in names:
        # By the name alone: in the cache of the Hub every file of a folder is a link to another place.
        if Path(name).name != name or not fnmatch(name, PATTERN):
            raise SpectralError(f"{index} names the file {name!r}, which is not in its folder or not of an adapter.")
    return [folder / name for name in sorted(names)]


def _load(file: Path) -> dict[str, Tensor]:
    if not file.is_file():  # a named pipe would wait for its writer
        raise FileNotFoundError(f"There is no file {file}.")
    try:
        return load_file(file)
    except SafetensorError as error:
        raise SpectralError(f"{file} cannot be read ({error}): it is truncated or damaged.") from error


def _by_module(tensors: Mapping[str, Tensor], config: SpectralConfig) -> dict[str, dict[str, Tensor]]:
    container = f".{config.container}."
    found: defaultdict[str, dict[str, Tensor]] = defaultdict(dict)
    for key, tensor in tensors.items():
        module, inside, name = key.partition(container)
        if inside:
            found[module.removeprefix("base_model.model.")][name] = tensor
    return found


def _rebuilt(config: SpectralConfig, module: str, tensors: Mapping[str, Tensor]) -> SpectralUpdate | None:
    """The update with these tensors. No file says how large the weight was, but one size alone has their shapes."""
    for size in _sizes(config, module, tensors):
        with torch.device("meta"):
            update = config.build(size)
        shapes = {name: value.shape for name, value in update.state_dict().items()}
        if shapes == {name: value.shape for name, value in tensors.items()}:
            update.load_state_dict(dict(tensors), assign=True)
            return update
    if config.save_start:
        raise SpectralError(f"{module}: the tensors do not fit each other or the config: {_described(tensors)}.")
    return None


def _sizes(config: SpectralConfig, module: str, tensors: Mapping[str, Tensor]) -> Iterator[Size]:
    if len(tensors) > MOST_TENSORS:  # the sizes to try grow with the square of their number
        return
    shapes = [value.shape for name, value in tensors.items() if value.ndim == 2 and name != "fingerprint"]
    wanted = config.rank_of(module)
    for m, n in product({shape[0] for shape in shapes}, {shape[1] for shape in shapes}):
        if isinstance(wanted, float):
            yield Size(m, n, max(1, round(wanted * min(m, n))), key=module)
        elif isinstance(wanted, int):
            yield Size(m, n, min(wanted, m, n), key=module)


def _described(tensors: Mapping[str, Tensor]) -> str:
    first = sorted(tensors.items())[:MOST_TENSORS]
    return ", ".join(f"{name} {tuple(value.shape)}" for name, value in first)
