"""Singular value pruning of pre-trained models: held-out perplexity when a share of the singular values' sum is kept.

    python -m benchmarks.pruning --data corpus.txt.gz

The models are those that runs of the task `pretraining` kept. As in appendix G of the SST paper (figure 3), the
projections of every layer lose their smallest singular values, and nothing is trained afterwards.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from peft import PeftModel, get_peft_model
from torch import Tensor
from transformers import LlamaForCausalLM

from benchmarks.experiment import RESULTS, write_json
from benchmarks.tasks.pretraining import kept_models, perplexity, split
from spectral_peft import SSTConfig
from spectral_peft.pruning import prune
from spectral_peft.stored import open_adapter


PERCENT = (100, 99, 98, 97, 96, 95, 94, 93, 92, 91, 90, 85, 80)


def pruned(
    folder: Path,
    rows: Tensor,  # shape: (number, length)
    percent: Sequence[int] = PERCENT,
) -> Iterator[dict[str, float]]:
    """The share of the sum that was kept, the share of the values that this takes, and the perplexity."""
    with tempfile.TemporaryDirectory() as scratch:
        # An SST adapter that was never trained is the weights' own SVD, whoever trained them.
        whole = Path(scratch, "whole")
        config = SSTConfig(r=1, target_modules="all-linear")
        get_peft_model(LlamaForCausalLM.from_pretrained(folder), config).save_pretrained(str(whole))
        for part in percent:
            smaller = Path(scratch, str(part))
            kept = prune(open_adapter(whole), smaller, part / 100).values()
            model = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(folder), str(smaller))
            yield {
                "percent_of_sum": part,
                "percent_of_values": 100 * sum(one.kept for one in kept) / sum(one.values for one in kept),
                "perplexity": perplexity(model, rows),
            }


def main(line: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="the text file of the runs")
    parser.add_argument("--cache", type=Path, default=Path("benchmark-out"), help="where the runs kept their models")
    parser.add_argument("--models", default="full/lr0.003-*,sst-r4/lr0.01-*", help="experiment/run, with wildcards")
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args(line)
    for name, folder in kept_models(arguments.models, arguments.cache).items():
        config = LlamaForCausalLM.from_pretrained(folder).config
        _, rows = split(arguments.data, config.vocab_size, config.max_position_embeddings, arguments.cache)
        points = []
        for point in pruned(folder, rows):
            points.append(point)
            print(name, *(f"{value:.2f} {key}" for key, value in point.items()), sep="  ", flush=True)
        write_json(arguments.results / "analysis" / "pruning" / f"{name.replace('/', '-')}.json", {"points": points})


if __name__ == "__main__":
    main()
