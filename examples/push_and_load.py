"""Push a trained adapter to the Hub with its model card, and load it back by its id, as anybody else would.

    hf auth login
    python examples/push_and_load.py --repo me/my-adapter --base HuggingFaceTB/SmolLM2-135M

The adapter, SVFit's, gets three steps of training here; push yours with the one call of `push_to_hub`. With
`--lora-repo` a LoRA with the same function goes there, for servers that do not know this package.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from tempfile import TemporaryDirectory

import torch
from huggingface_hub import HfApi
from peft import AutoPeftModelForCausalLM, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, HfArgumentParser
from transformers.hf_argparser import HfArg

from spectral_peft import SVFitConfig, export_lora, push_to_hub


@dataclass
class Arguments:
    """What goes where."""

    repo: str = HfArg(help="where the adapter goes, user/name")
    base: str = HfArg(help="Hub id of the base model, which the model card will name")
    lora_repo: str | None = HfArg(default=None, help="where a LoRA with the same function goes")
    public: bool = HfArg(default=False, help="make new repositories public")


def train(base_id: str, tokens: torch.Tensor) -> PeftModel:
    """Three steps of SVFit on some tokens, in the place of a training."""
    base = AutoModelForCausalLM.from_pretrained(base_id)
    model = get_peft_model(base, SVFitConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM"))
    optimizer = torch.optim.AdamW([value for value in model.parameters() if value.requires_grad], lr=3e-2)
    for _ in range(3):
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


@torch.no_grad()
def largest_difference(one: torch.nn.Module, other: torch.nn.Module, tokens: torch.Tensor) -> float:
    """The largest difference of a logit between two models."""
    return (one.eval()(input_ids=tokens).logits - other.eval()(input_ids=tokens).logits).abs().max().item()


def push_lora(model: PeftModel, repo_id: str, private: bool) -> None:
    """The adapter as a plain LoRA, in a repository of its own."""
    api = HfApi()
    api.create_repo(repo_id, private=private, exist_ok=True)
    with TemporaryDirectory() as folder:
        export_lora(model, folder)
        api.upload_folder(repo_id=repo_id, folder_path=folder)


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Push, load back by the id, and return how far the logits are from those of the trained model."""
    (arguments,) = HfArgumentParser(Arguments, description=__doc__.splitlines()[0]).parse_args_into_dataclasses(argv)

    tokens = torch.arange(1, 17)[None]
    model = train(arguments.base, tokens)
    commit = push_to_hub(model, arguments.repo, private=not arguments.public)
    print(f"pushed: {commit.commit_url}")
    repos = [arguments.repo]
    if arguments.lora_repo:
        push_lora(model, arguments.lora_repo, private=not arguments.public)
        repos.append(arguments.lora_repo)

    differences = {}
    for repo in repos:
        loaded = AutoPeftModelForCausalLM.from_pretrained(repo)  # with `import spectral_peft` above; a LoRA without
        differences[repo] = largest_difference(model, loaded, tokens)
        print(f"{repo}: loaded by its id, logits differ by {differences[repo]:.1e} at most")
    return differences


if __name__ == "__main__":
    main()
