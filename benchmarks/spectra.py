"""Singular values of pre-trained models next to those of full rank and of the start (figure 4 of the SST paper).

    python -m benchmarks.spectra

The models are those that runs of the task `pretraining` kept. Per run one JSON file with the singular values of every
projection, and a line with means over the projections: the largest value, its effective rank, and how far its values
are from those of full rank of the same seed, ||S - S_full|| / ||S_full||.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from benchmarks.experiment import RESULTS, write_json
from benchmarks.tasks.pretraining import kept_models, projections
from spectral_peft.linalg import effective_rank, singular_values


Spectra = dict[str, Tensor]


def spectra(model: nn.Module) -> Spectra:
    """The singular values of each projection, descending."""
    chosen = {id(layer) for layer in projections(model)}
    return {name: singular_values(part.weight.data) for name, part in model.named_modules() if id(part) in chosen}


def figures(found: Spectra, full: Spectra, leading: int) -> dict[str, float]:
    """Means over the projections."""

    def mean(values: Mapping[str, Tensor]) -> float:
        return statistics.fmean(float(value) for value in values.values())

    distance = {name: (S - full[name]).norm() / full[name].norm() for name, S in found.items()}
    tops = {name: S[:leading].sum() / full[name][:leading].sum() for name, S in found.items()}
    rests = {name: S[leading:].sum() / full[name][leading:].sum() for name, S in found.items()}
    return {
        "largest": mean({name: S[0] for name, S in found.items()}),
        "effective_rank": mean({name: effective_rank(S) for name, S in found.items()}),
        "distance_to_full": mean(distance),
        f"leading_{leading}_to_full": mean(tops),
        "others_to_full": mean(rests),
    }


def main(line: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, default=Path("benchmark-out"), help="where the runs kept their models")
    parser.add_argument("--full", default="full/lr0.003-*", help="experiment/run of full rank, with wildcards")
    parser.add_argument("--models", default="lora-r4/lr0.003-*,sst-r4/lr0.01-*", help="likewise, of the others")
    parser.add_argument("--leading", type=int, default=4, help="the rank of the adapters")
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args(line)
    full = {seed_of(name): folder for name, folder in kept_models(arguments.full, arguments.cache).items()}
    for name, folder in kept_models(f"{arguments.full},{arguments.models}", arguments.cache).items():
        if seed_of(name) in full:
            reference = spectra(LlamaForCausalLM.from_pretrained(full[seed_of(name)]))
            found = spectra(LlamaForCausalLM.from_pretrained(folder))
            report(name.replace("/", "-"), found, reference, arguments)
    for seed, folder in full.items():
        trained = LlamaForCausalLM.from_pretrained(folder)
        torch.manual_seed(seed)
        report(f"start-seed{seed}", spectra(LlamaForCausalLM(trained.config)), spectra(trained), arguments)


def seed_of(name: str) -> int:
    return int(name.rpartition("-seed")[2])


def report(name: str, found: Spectra, full: Spectra, arguments: argparse.Namespace) -> None:
    means = figures(found, full, arguments.leading)
    print(name, *(f"{value:.3f} {key}" for key, value in means.items()), sep="  ", flush=True)
    lists = {module: [round(float(value), 6) for value in S] for module, S in found.items()}
    write_json(arguments.results / "analysis" / "spectra" / f"{name}.json", {**means, "singular_values": lists})


if __name__ == "__main__":
    main()
