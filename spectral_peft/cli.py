"""The command `spectral-peft`: adapters and models looked at, measured and converted."""

from __future__ import annotations

import json
import re
import sys
import warnings
from collections.abc import Iterable, Mapping
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import peft
import torch
import transformers
import typer
from peft import (
    MODEL_TYPE_TO_PEFT_MODEL_MAPPING,
    PeftModel,
    PeftModelForCausalLM,
    get_peft_model,
    get_peft_model_state_dict,
)
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from rich.console import Console
from rich.table import Table
from torch import nn

from spectral_peft.config import SpectralConfig
from spectral_peft.errors import SpectralError
from spectral_peft.export import export_lora
from spectral_peft.factored import BASE, build_factored, load_factored
from spectral_peft.linalg import effective_rank, singular_values
from spectral_peft.memory import estimate_memory
from spectral_peft.merged import export_merged
from spectral_peft.pruning import prune
from spectral_peft.stored import StoredAdapter, adapter_folder, open_adapter
from spectral_peft.suggestions import suggest_ranks
from spectral_peft.update import Size
from spectral_peft.verification import verify


app = typer.Typer(
    no_args_is_help=True, pretty_exceptions_enable=False, help="Inspect, check and convert spectral adapters."
)

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
Adapter = Annotated[str, typer.Argument(help="Folder of an adapter, or its Hub id.")]
Model = Annotated[str, typer.Argument(help="Folder of a model, or its Hub id.")]
AutoClass = Annotated[str, typer.Option(help="The class of transformers that loads the model.")]
Targets = Annotated[
    str, typer.Option(help="`target_modules`: 'all-linear', names with commas, or a regular expression.")
]
Plot = Annotated[Path | None, typer.Option(help="Draw the spectra to this file (.png, .svg, .pdf).")]


class Destination(str, Enum):
    """What `export` writes."""

    lora = "lora"
    merged = "merged"


class Dtype(str, Enum):
    """Of dense weights."""

    bfloat16 = "bfloat16"
    float16 = "float16"
    float32 = "float32"


def methods_by_name() -> dict[str, type[SpectralConfig]]:
    """The configs of the registered methods by the method's name."""
    found = (cls for cls in PEFT_TYPE_TO_CONFIG_MAPPING.values() if issubclass(cls, SpectralConfig))
    return {cls.method: cls for cls in found}


@app.command("methods")
def list_methods(as_json: AsJson = False) -> None:
    """The methods that are registered."""
    rows = []
    for name, config_cls in sorted(methods_by_name().items()):
        update = config_cls(r=2).build(Size(4, 4, 2))
        rows.append(
            {
                "method": name,
                "config": config_cls.__name__,
                "trains": ", ".join(update.trained),
                "base weight": "replaced" if update.replaces else "kept, and added to",
                "schedule": "after optimizer steps" if update.scheduled else "none",
                "about": _first_line(config_cls),
            }
        )
    _print(rows, as_json)


@app.command()
def inspect(adapter: Adapter, as_json: AsJson = False, plot: Plot = None) -> None:
    """What an adapter holds: its config, and rank, spectrum and size of every module. Needs no base model."""
    stored = open_adapter(adapter)
    rows = [_described(stored, module) for module in stored.updates]
    others = sorted(key for key in stored.tensors if "_update." not in key)
    config = {name: _plain(value) for name, value in stored.config.to_dict().items() if value is not None}
    if plot is not None:
        values = {module: update.singular_values() for module, update in stored.updates.items() if update is not None}
        _plot(plot, {module: S for module, S in values.items() if S is not None})
    if as_json:
        _print_json({"config": config, "modules": rows, "other_tensors": others})
        return
    _print([{"field": name, "value": str(value)} for name, value in sorted(config.items())], as_json)
    _print(rows, as_json)
    total = sum(value.nbytes for value in stored.tensors.values())
    Console().print(f"{len(rows)} modules, {len(others)} other tensors, {total / 2**20:,.2f} MiB")


@app.command("suggest-ranks")
def suggest(
    model: Model,
    energy: Annotated[float, typer.Option(help="Share of the squared singular values, in (0, 1].")] = 0.9,
    budget: Annotated[float, typer.Option(help="Share of the parameters of all weights, in (0, 1).")] = 0.5,
    targets: Targets = "all-linear",
    auto_class: AutoClass = "AutoModelForCausalLM",
    as_json: AsJson = False,
    plot: Plot = None,
) -> None:
    """Ranks for the weights of a model: by energy, entropy, noise (Marchenko-Pastur) and a budget of parameters."""
    base = _load(model, auto_class)
    config = methods_by_name()["sct"](target_modules=_targets(targets))
    suggestions = suggest_ranks(base, config, energy=energy, budget=budget)
    if plot is not None:
        weights = {row.module: base.get_parameter(f"{row.module}.weight") for row in suggestions}
        _plot(plot, {name: singular_values(weight) for name, weight in weights.items()})
    rows = [{**row._asdict(), "shape": "x".join(map(str, row.shape))} for row in suggestions]
    if not as_json:
        rows = [{**row, "entropy": round(row["entropy"], 2)} for row in rows]
        rows = [{"effective rank" if name == "entropy" else name: row[name] for name in row} for row in rows]
    _print(rows, as_json)


@app.command("estimate-memory")
def memory(
    model: Model,
    method: Annotated[str, typer.Option(help="Name of the method; see `spectral-peft methods`.")] = "sct",
    r: Annotated[int, typer.Option(help="Rank.")] = 64,
    tokens: Annotated[int, typer.Option(help="Tokens in a batch: rows times length.")] = 2048,
    targets: Targets = "all-linear",
    in_backward: Annotated[
        bool, typer.Option(help="Plan for `step_in_backward`: gradients of one parameter at a time.")
    ] = False,
    on_disk: Annotated[bool, typer.Option(help="Plan for `save_on_disk`: activations in files.")] = False,
    as_json: AsJson = False,
) -> None:
    """Memory of a training step with AdamW and gradient checkpointing, from the config of a model alone."""
    known = methods_by_name()
    if method not in known:
        raise typer.BadParameter(f"{method!r} is none of {', '.join(sorted(known))}.", param_hint="--method")
    model_config = transformers.AutoConfig.from_pretrained(model)
    config = known[method](r=r, target_modules=_targets(targets))
    planned = _planned(model_config, config)
    estimate = estimate_memory(planned, tokens, in_backward=in_backward, on_disk=on_disk)
    rows = {**estimate._asdict(), "total": estimate.total}
    if as_json:
        _print_json(rows)
    else:
        _print([{"part": name, "GB": f"{value / 1e9:,.3f}"} for name, value in rows.items()], as_json)
        Console().print("Python, torch and transformers themselves take about 0.4 GB more.")


@app.command()
def export(
    adapter: Adapter,
    folder: Annotated[Path, typer.Argument(help="Where the export goes: a new folder.")],
    to: Annotated[Destination, typer.Option(help="A plain LoRA, or the dense model.")] = Destination.lora,
    base: Annotated[
        str | None, typer.Option(help="The base model; by default the one that the adapter names.")
    ] = None,
    rank: Annotated[int | None, typer.Option(help="Rank of the LoRA; by default the smallest that is exact.")] = None,
    dtype: Annotated[
        Dtype | None, typer.Option(help="dtype of the dense weights; by default that of the base.")
    ] = None,
    auto_class: Annotated[
        str | None,
        typer.Option(help="The class of transformers that loads the base; by default that of the adapter's task."),
    ] = None,
    num_labels: Annotated[
        int | None, typer.Option(help="Labels of a classifier; by default as many as the config of the base has.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """An adapter as a plain LoRA, or merged into a dense model, for servers without this package."""
    if to is Destination.merged and rank is not None:
        raise typer.BadParameter("is for --to lora.", param_hint="--rank")
    if to is Destination.lora and dtype is not None:
        raise typer.BadParameter("is for --to merged; a LoRA is written in float32.", param_hint="--dtype")
    model = _with_adapter(adapter, base, auto_class, num_labels)
    if to is Destination.merged:
        export_merged(model, folder, dtype=None if dtype is None else getattr(torch, dtype.value))
        _copy_tokenizer(str(model.get_base_model().name_or_path), folder)
        _print([{"written": str(file)} for file in sorted(folder.iterdir())], as_json)
    else:
        errors = export_lora(model, folder, rank=rank)
        _print([{"module": module, "relative error": f"{error:.1e}"} for module, error in errors.items()], as_json)


@app.command("verify")
def verify_adapter(adapter: Adapter, as_json: AsJson = False) -> None:
    """Checks that an adapter is sound: finite, possible, its own start, orthonormal. Exit status 1 if it is not."""
    findings = verify(open_adapter(adapter))
    failed = [finding for finding in findings if not finding.passed]
    if as_json:
        _print_json({"passed": not failed, "findings": [finding._asdict() for finding in findings]})
    else:
        _print([finding._asdict() for finding in failed], as_json)
        Console().print(f"{len(findings) - len(failed)} of {len(findings)} checks passed.")
    raise typer.Exit(int(bool(failed)))


@app.command("prune")
def prune_adapter(
    adapter: Adapter,
    folder: Annotated[Path, typer.Argument(help="Where the pruned adapter goes: a new folder.")],
    share: Annotated[float, typer.Option(help="Share of the sum of singular values to keep, in (0, 1].")] = 0.9,
    as_json: AsJson = False,
) -> None:
    """Drops the small singular values of an adapter that replaces its weights, and their vectors with them."""
    pruned = prune(open_adapter(adapter), folder, share)
    _print([{"module": module, **result._asdict()} for module, result in pruned.items()], as_json)


def main() -> None:
    """Runs the command; errors of the user's input are one line, and exit status 1."""
    with _one_line_errors():
        app()


@contextmanager
def _one_line_errors() -> Any:
    try:
        yield
    except (ValueError, OSError, TypeError) as error:  # SpectralError is a ValueError
        _note(f"error: {error}")
        sys.exit(1)


# Models


def _targets(text: str) -> str | list[str]:
    names = [name.strip() for name in text.split(",")]
    return names if text != "all-linear" and all(re.fullmatch(r"[\w.]+", name) for name in names) else text


def _auto_class(name: str) -> Any:
    found = getattr(transformers, name, None) if name.startswith("AutoModel") else None
    if found is None:
        raise typer.BadParameter(f"{name!r} is no Auto class of transformers for models.", param_hint="--auto-class")
    return found


def _load(model: str, auto_class: str, **fields: Any) -> nn.Module:
    loaded: nn.Module = _auto_class(auto_class).from_pretrained(model, **fields)
    return loaded


def _with_adapter(adapter: str, base: str | None, auto_class: str | None, num_labels: int | None) -> PeftModel:
    stored = open_adapter(adapter)
    config = stored.config
    auto_class = auto_class or _class_of(config)
    if base is None and (stored.folder / BASE).is_dir():
        return load_factored(stored.folder, auto_class=_auto_class(auto_class))
    name = base or config.base_model_name_or_path
    if not name:
        raise typer.BadParameter("is needed: the adapter names no base model.", param_hint="--base")
    fields: dict[str, Any] = {}
    if num_labels is not None:  # the head is that of the adapter
        fields = {"num_labels": num_labels, "ignore_mismatched_sizes": True}
    if base is None and config.revision:
        fields["revision"] = config.revision
    try:
        model = PeftModel.from_pretrained(_load(name, auto_class, **fields), str(adapter_folder(adapter)))
    except RuntimeError as error:  # what torch raises for tensors of other shapes
        raise SpectralError(f"The adapter does not fit {name} as {auto_class} loads it: {error}") from error
    if left := sorted(stored.tensors.keys() - get_peft_model_state_dict(model).keys()):
        raise SpectralError(
            f"{name} as {auto_class} loads it has no place for {len(left)} tensors of the adapter, such as {left[0]}. "
            "Name the class that was trained with --auto-class."
        )
    return model


def _class_of(config: SpectralConfig) -> str:
    """The class of transformers for the task of an adapter."""
    peft_model = MODEL_TYPE_TO_PEFT_MODEL_MAPPING.get(config.task_type or "", PeftModelForCausalLM)
    name: str = getattr(peft, f"Auto{peft_model.__name__}")._target_class.__name__
    return name


def _copy_tokenizer(base: str, folder: Path) -> None:
    """Saves the base model's tokenizer beside the dense model, if it has one: converters want both in one folder."""
    try:
        transformers.AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    except (OSError, ValueError) as error:
        warnings.warn(f"No tokenizer was copied from {base!r}: {error}", stacklevel=2)


def _planned(model_config: Any, config: SpectralConfig) -> nn.Module:
    """The model with the adapter on the meta device: nothing is allocated."""
    with torch.device("meta"):
        update = config.build(Size(4, 4, 1))
        if update.replaces and update.frees_base:
            if getattr(model_config, "tie_word_embeddings", False):
                _note("Embedding and head are tied; the plan has them apart, as a model that exists as factors must.")
                model_config.tie_word_embeddings = False
            return build_factored(model_config, config, device="meta")
        base = transformers.AutoModelForCausalLM.from_config(model_config)
        return get_peft_model(base, config, low_cpu_mem_usage=True)


# Output


def _note(text: str) -> None:
    print(text, file=sys.stderr)  # noqa: T201  # what a command says is printed


def _first_line(config_cls: type[SpectralConfig]) -> str:
    return (config_cls.__doc__ or "").strip().splitlines()[0]


def _described(stored: StoredAdapter, module: str) -> dict[str, Any]:
    update, tensors = stored.updates[module], stored.tensors_of(module)
    row: dict[str, Any] = {"module": module, "r": None, "effective rank": None, "largest": None, "smallest": None}
    values = None if update is None else update.singular_values()
    if update is not None:
        row["r"] = update.r
    if values is not None:
        sizes = values.detach().float().abs()
        row["effective rank"] = round(float(effective_rank(sizes)), 2)
        row["largest"], row["smallest"] = float(f"{sizes.max():.4g}"), float(f"{sizes.min():.4g}")
    row["stored"] = ", ".join(f"{name} {'x'.join(map(str, t.shape)) or 1}" for name, t in sorted(tensors.items()))
    row["KiB"] = round(sum(t.nbytes for t in tensors.values()) / 1024, 1)
    return row


def _plain(value: Any) -> Any:
    return sorted(value) if isinstance(value, set) else value


def _print(rows: Iterable[Mapping[str, Any]], as_json: bool) -> None:
    rows = list(rows)
    if as_json:
        _print_json(rows)
    elif rows:
        table = Table(*map(str, rows[0]))
        for row in rows:
            table.add_row(*("" if value is None else str(value) for value in row.values()))
        Console().print(table)


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=1, default=str))  # noqa: T201


def _plot(file: Path, spectra: Mapping[str, torch.Tensor]) -> None:
    """The singular values of each module, largest first, on a logarithmic axis."""
    try:
        import matplotlib
    except ImportError as error:
        raise ValueError("--plot needs matplotlib: pip install matplotlib") from error
    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    for name, values in spectra.items():
        axes.plot(values.detach().float().abs().sort(descending=True).values.numpy(), label=name, linewidth=0.8)
    axes.set(xlabel="number", ylabel="singular value", yscale="log")
    if len(spectra) <= 12:
        axes.legend(fontsize="small")
    figure.savefig(file)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
