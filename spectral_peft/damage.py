"""What may be wrong with a config that comes from a file, and with the file of tensors beside it."""

from __future__ import annotations

import logging
import re
from dataclasses import Field
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from peft.utils import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors import SafetensorError, safe_open

from spectral_peft.errors import SpectralError


logger = logging.getLogger(__name__)


_SIMPLE_TYPES: dict[str, tuple[type, ...]] = {
    "bool": (bool,),
    "int": (Integral,),
    "float": (Real,),
    "str": (str,),
    "dict[str, Rank]": (dict,),
}


def check_type(entry: Field[Any], value: object) -> None:
    """Raises TypeError unless a field of a simple type holds one: a config may come from a file that is damaged."""
    wanted = str(entry.type).removesuffix(" | None")
    optional = wanted != entry.type and value is None
    if not optional and not isinstance(value, _SIMPLE_TYPES.get(wanted, object)):
        raise TypeError(f"`{entry.name}` should be of type {entry.type}, got {value!r:.200}.")


def check_patterns(config: Any) -> None:
    """Raises ValueError for a regular expression that is none; lists of modules hold endings of their names."""
    for name in ("rank_pattern", "layers_pattern", "target_modules", "exclude_modules"):
        value = getattr(config, name)
        patterns = [value] if isinstance(value, str) else value if name.endswith("pattern") else None
        for pattern in patterns or ():
            try:
                re.compile(str(pattern))
            except re.error as error:
                raise ValueError(f"{pattern!r} in `{name}` is no regular expression: {error}.") from error


def look_at_tensors(folder: Path) -> None:
    """Says in the log if there is no file of tensors beside a config; raises SpectralError if it is damaged."""
    file = folder / SAFETENSORS_WEIGHTS_NAME
    if not file.is_file() and not (folder / WEIGHTS_NAME).is_file():
        # Only in the log: a config may be saved and loaded alone. What PEFT raises when it looks for the tensors
        # speaks of Hub repositories.
        logger.warning("%s holds an adapter's config but no %s: no adapter to load.", folder, file.name)
        return
    try:
        if file.is_file():
            safe_open(file, framework="pt")
    except SafetensorError as error:
        raise SpectralError(
            f"The adapter file {file} cannot be read ({error}): it is truncated or damaged. Copy or download it "
            "again, or save the adapter again."
        ) from error
