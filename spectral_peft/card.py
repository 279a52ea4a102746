"""The part of a model card that tells what a spectral adapter is, and how to load it."""

from __future__ import annotations

import json
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils._validators import validate_repo_id
from peft import MODEL_TYPE_TO_PEFT_MODEL_MAPPING, PeftModel
from peft.config import PeftConfig

from spectral_peft.update import Size


CARD_NAME = "README.md"
BEGIN, END = "<!-- spectral_peft: begin -->", "<!-- spectral_peft: end -->"
"""What stands between is written anew with every save; the rest of a card is left alone."""


def complete_card(folder: str | Path, config: Any, *, loading: str | None = None) -> None:
    """Brings the card of the adapter in `folder` up to date, or writes it.

    Args:
        folder: Where the adapter lies.
        config: Its configuration.
        loading: Code that loads it; None is that of `loading_code` with the name of the folder.
    """
    file = Path(folder, CARD_NAME)
    card = ModelCard.load(file) if file.is_file() else ModelCard("")
    _complete_metadata(card.data, config)
    part = _part(config, loading or loading_code(config, Path(folder).name))
    card.text = _with_part(card.text, f"{BEGIN}\n{part}\n{END}")
    card.save(file)


def base_id(config: Any) -> str | None:
    """The Hub id of the base model of `config`, or None if it is a folder of this machine or is not known."""
    name = config.base_model_name_or_path
    try:
        validate_repo_id(name or "")
    except HFValidationError:
        return None
    return None if Path(name).exists() else name


def tags_of(config: Any) -> list[str]:
    """The tags by which the Hub finds adapters of this method."""
    return ["spectral-peft", config.method]


def _complete_metadata(data: Any, config: Any) -> None:
    data["library_name"] = "peft"
    base = base_id(config)
    # The Hub refuses a card whose base model is a path, and the tag would publish that path.
    if base is None:
        data["base_model"] = None
    else:
        data["base_model"] = data.get("base_model") or base
    kept = [tag for tag in data.get("tags") or [] if base or not tag.startswith("base_model:")]
    data["tags"] = sorted({*kept, *tags_of(config)})


def _with_part(text: str, part: str) -> str:
    """The text with the part in the place of its old one, or of PEFT's blank template, or in front of it."""
    if BEGIN in text and END in text:
        before, _, rest = text.partition(BEGIN)
        after = rest.partition(END)[2]
    else:
        blank = ModelCard.from_template(ModelCardData()).text.strip()
        before, after = "", f"\n\n{text.strip().removeprefix(blank).strip()}"
    whole = f"{before}{part}{after}".strip()
    return f"\n{whole}\n"


def loading_code(config: Any, source: str, subfolder: str | None = None) -> str:
    """Python code that loads an adapter of `config` from `source`, a folder or a Hub id."""
    # The type may have been set to a plain string.
    needed = f"import spectral_peft  # needed, or PEFT raises KeyError: {config.peft_type!r}"
    if base_id(config) is None or subfolder:  # PEFT's Auto classes would look for the base in the subfolder too
        where = f', subfolder="{subfolder}"' if subfolder else ""
        base = base_id(config) or "the model that the adapter was trained on"
        lines = ["from peft import PeftModel", "", needed, "", f"base = ...  # {base}"]
        return "\n".join([*lines, f'model = PeftModel.from_pretrained(base, "{source}"{where})'])
    peft_model = MODEL_TYPE_TO_PEFT_MODEL_MAPPING.get(config.task_type, PeftModel).__name__
    return f'from peft import Auto{peft_model}\n\n{needed}\n\nmodel = Auto{peft_model}.from_pretrained("{source}")'


def _part(config: Any, loading: str) -> str:
    name = type(config).__name__.removesuffix("Config")
    base = base_id(config)
    based = f" of [{base}](https://huggingface.co/{base})" if base else ""
    paper = f" Paper: {config.paper}." if config.paper else ""
    return f"""# {name} adapter

Adapter{based}, trained with {name}, a method of `spectral_peft` (a plugin for PEFT).{paper}

## Load it

With `spectral_peft` installed:

```python
{loading}
```

## Use it without spectral_peft

Load it once as above, and save the model in a form that needs no plugin: {_ways_out(config)}

## Hyper-parameters

{_hyper_parameters(config)}

`adapter_config.json` has the others."""


def _ways_out(config: Any) -> str:
    update = config.build(Size(4, 4, 1))
    if update.replaces and update.frees_base:
        return """`spectral_peft.export_merged(model, "my-model")` writes
dense weights. A plain LoRA is not possible: the base weight was given up."""
    return """`spectral_peft.export_lora(model, "my-lora")`
for a plain LoRA (`rank=...` approximates a change of full rank), or `spectral_peft.export_merged(model, "my-model")`
for dense weights."""


def _hyper_parameters(config: Any) -> str:
    """The rank and what differs from the defaults, without the ranks of single modules."""
    told = {*PeftConfig.__dataclass_fields__, "rank_pattern", "dense_modules", "format_version"}
    values, lines = config.to_dict(), []
    for entry in fields(config):
        default = entry.default if entry.default_factory is MISSING else entry.default_factory()
        value = values.get(entry.name, default)
        if entry.name not in told and (entry.name == "r" or value != default):
            lines.append(f"- `{entry.name}`: {_shortened(value)}")
    return "\n".join(lines)


def _shortened(value: Any) -> str:
    """As JSON; of many names, such as those of "all-linear", only their endings."""
    if not isinstance(value, (set, list)):
        return f"`{json.dumps(value, default=str)}`"
    ends = sorted({str(name).rpartition(".")[2] for name in value})
    if len(value) > 8:
        return f"{len(value)}, with the endings `{json.dumps(ends)}`"
    return f"`{json.dumps(sorted(value, key=str), default=str)}`"
