from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import BertConfig, BertForMaskedLM

from spectral_peft import SSTConfig, parameter_report, untargeted_modules
from tests.methods import Method
from tests.models import gpt2, layers, llama, logits, train_, trainable


def test_the_counts_are_those_of_torch(method: Method) -> None:
    model = get_peft_model(llama(), method())
    report = parameter_report(model)
    assert report.dense == llama().num_parameters()
    assert report.trained == sum(value.numel() for value in trainable(model))
    assert report.stored == sum(value.numel() for value in model.parameters())
    assert report.gradient_bytes == 4 * report.trained
    optimizer = torch.optim.AdamW(trainable(model))
    train_(model, lr=0, steps=1, optimizer=optimizer)
    moments = (state[name] for state in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq"))
    assert report.adam_bytes == sum(value.numel() * value.element_size() for value in moments)


def test_pre_training_in_the_paper_s_terms() -> None:
    """R (m + n) + min(m, n) per matrix, and all of the rest; a freed weight is counted in the dense model only."""
    base = llama()
    config = SSTConfig(
        r=4, target_modules="all-linear", keep_base_weight=False, modules_to_save=untargeted_modules(base)
    )
    model = get_peft_model(base, config)
    shapes = [(layer.out_features, layer.in_features) for layer in layers(model)]
    rest = llama().num_parameters() - sum(m * n for m, n in shapes)
    report = parameter_report(model)
    assert report.dense == llama().num_parameters()
    assert report.trained == rest + sum(4 * (m + n) + min(m, n) for m, n in shapes)
    stored = sum(min(m, n) * (m + n) + 2 * min(m, n) for m, n in shapes)
    assert report.stored == stored + 2 * rest  # PEFT keeps the originals of what trains in full
    assert f"trained {report.trained:,} of {report.dense:,}" in str(report)


def test_untargeted_modules_are_embeddings_norms_and_head() -> None:
    names = ["embed_tokens", "input_layernorm", "lm_head", "norm", "post_attention_layernorm"]
    assert untargeted_modules(llama()) == names
    assert untargeted_modules(gpt2()) == ["lm_head", "ln_1", "ln_2", "ln_f", "wpe", "wte"]


def test_with_them_everything_trains() -> None:
    base = llama()
    model = get_peft_model(base, SSTConfig(r=4, target_modules="all-linear", modules_to_save=untargeted_modules(base)))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    train_(model, lr=1e-2, steps=1)
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert all(any(part in name for name in moved) for part in untargeted_modules(llama()))


class Mixer(nn.Module):
    """A layer with a parameter of its own beside a linear layer and a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.A_log = nn.Parameter(torch.zeros(4))
        self.in_proj, self.conv1d = nn.Linear(4, 4), nn.Conv1d(4, 4, 1)


def test_a_module_that_holds_others_is_not_named_as_a_whole() -> None:
    model = nn.ModuleDict({"mixer": Mixer(), "norm": nn.LayerNorm(4)})
    with pytest.warns(UserWarning, match="1 parameters stay as they are, such as mixer.A_log: the modules that hold"):
        assert untargeted_modules(model) == ["conv1d", "norm"]


def test_names_whose_ends_others_share_are_whole() -> None:
    head = nn.ModuleDict({"out": nn.LayerNorm(4)})
    model = nn.ModuleDict({"head": head, "layer": nn.ModuleDict({"out": nn.Linear(4, 4), "norm": nn.LayerNorm(4)})})
    assert untargeted_modules(model) == ["head.out", "norm"]


def bert() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return BertForMaskedLM(BertConfig(vocab_size=64, **sizes))


def test_a_masked_language_model_comes_back(tmp_path: Path) -> None:
    """Its head lies in a module that has a parameter of its own, the bias of the head."""
    model = get_peft_model(
        bert(), SSTConfig(r=2, target_modules="all-linear", modules_to_save=untargeted_modules(bert()))
    )
    train_(model, lr=1e-2)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(bert(), tmp_path)), logits(model))
