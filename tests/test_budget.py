"""Ranks that a budget stands for, from the config to the checkpoint."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model, inject_adapter_in_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from spectral_peft import SpectralError, SVFitConfig
from spectral_peft.linalg import allocate_ranks
from tests.methods import METHODS, Method
from tests.models import batch, gpt2, layers, llama, logits, train_
from tests.truncated import TruncatedConfig


def ranks(model: nn.Module, adapter_name: str = "default") -> dict[str, int]:
    return {layer.key: update.r for layer in layers(model) if (update := layer.update_of(adapter_name)) is not None}


def shares(model: nn.Module, base: nn.Module) -> tuple[int, int]:
    """Numbers in the factors of all targeted modules, or the weight where it stays dense; and in their weights."""
    config = model.peft_config["default"]
    spent = sum(r * (sum(base.get_submodule(key).weight.shape) + 1) for key, r in ranks(model).items())
    kept = sum(base.get_submodule(key).weight.numel() for key in config.dense_modules)
    return spent + kept, kept + sum(base.get_submodule(key).weight.numel() for key in ranks(model))


def steep(model: nn.Module, scale: float = 4.0) -> nn.Module:
    """With spectra that fall off faster than those of random matrices, and not all alike."""
    with torch.no_grad():
        for number, layer in enumerate(
            module for module in model.modules() if isinstance(module, (nn.Linear, Conv1D))
        ):
            U, S, Vh = torch.linalg.svd(layer.weight, full_matrices=False)
            layer.weight.copy_((U * S * torch.exp(-torch.arange(len(S)) / (scale + number % 3))) @ Vh)
    return model


@pytest.mark.parametrize("base", [llama, gpt2])
def test_a_budget_is_shared_by_the_spectra(free_rank_method: Method, base: type) -> None:
    model = get_peft_model(steep(base()), free_rank_method(r="budget=0.4"))
    config, adapted = model.peft_config["default"], list(layers(model))
    spent, dense = shares(model, base())
    assert 0.4 * dense - 161 < spent <= 0.4 * dense
    assert config.rank_pattern == ranks(model)
    assert config.dense_modules == []
    spectra = [torch.linalg.svdvals(layer.effective_weight()) for layer in adapted]
    shapes = [(layer.out_features, layer.in_features) for layer in adapted]
    assert list(ranks(model).values()) == allocate_ranks(spectra, shapes, int(0.4 * dense))
    assert len(set(ranks(model).values())) > 2


def half_flat_llama() -> nn.Module:
    """With flat spectra in two projections, which costs them more than factors can save."""
    model = steep(llama(), 1.0)
    for name in ("q_proj", "o_proj"):
        nn.init.orthogonal_(model.get_submodule(f"model.layers.0.self_attn.{name}").weight)
    return model


def test_modules_that_would_not_shrink_stay_dense(free_rank_method: Method, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"2 modules stay dense and get no adapter, .*: .*q_proj, .*o_proj\.$"):
        model = get_peft_model(half_flat_llama(), free_rank_method(r="budget=0.4"))
    dense = ["model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.o_proj"]
    assert model.peft_config["default"].dense_modules == dense
    assert not set(dense) & set(ranks(model))
    spent, total = shares(model, llama())
    assert 0.4 * total - 81 < spent <= 0.4 * total
    train_(model, free_rank_method.lr)
    model.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "2 modules")
        reloaded = PeftModel.from_pretrained(half_flat_llama(), tmp_path)
    assert ranks(reloaded) == ranks(model)
    assert torch.equal(logits(reloaded), logits(model))


def test_loading_computes_no_spectrum(
    free_rank_method: Method, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = get_peft_model(llama(), free_rank_method(r="budget=0.5"))
    model.save_pretrained(tmp_path)
    monkeypatch.setattr(torch.linalg, "svdvals", None)
    assert ranks(PeftModel.from_pretrained(llama(), tmp_path)) == ranks(model)


def test_the_modules_of_a_pattern_share_their_own_budget(free_rank_method: Method) -> None:
    config = free_rank_method(r=3, rank_pattern={r".*layers\.0\.mlp.*": "budget=0.3", r".*mlp.*": "budget=0.6"})
    found = ranks(get_peft_model(llama(), config))
    assert {rank for key, rank in found.items() if "mlp" not in key} == {3}
    for layer, share in ((0, 0.3), (1, 0.6)):
        spent = sum(rank * 81 for key, rank in found.items() if f"{layer}.mlp" in key)
        assert share * 3 * 48 * 32 - 81 < spent <= share * 3 * 48 * 32


def test_a_second_adapter_has_its_own_budget(free_rank_method: Method) -> None:
    model = get_peft_model(steep(llama()), free_rank_method(r="budget=0.2"))
    first = ranks(model)
    model.add_adapter("other", free_rank_method(r="budget=0.4"))
    assert ranks(model) == first
    assert ranks(model, "other").keys() == first.keys()
    assert all(rank > first[key] for key, rank in ranks(model, "other").items())


def test_a_budget_below_one_triplet_of_each_is_refused(free_rank_method: Method) -> None:
    model, config = llama(), free_rank_method(r="budget=0.01")
    message = r"'budget=0\.01' of 15,360 parameters in 14 modules\. `budget` should be at least 942, .* got 153\."
    with pytest.raises(ValueError, match=f"`r` is too small: {message}"):
        get_peft_model(model, config)
    assert not list(layers(model))
    assert (config.rank_pattern, config.dense_modules) == ({}, [])
    assert torch.equal(logits(model), logits(llama()))


def test_a_failure_leaves_the_config_as_it_was(free_rank_method: Method) -> None:
    other = next(method for method in METHODS if method.config is not free_rank_method.config)
    model = inject_adapter_in_model(other(r=4, target_modules=["up_proj"]), llama(), "taken")
    config = free_rank_method(r="budget=0.5", target_modules="all-linear")
    before = copy.deepcopy(vars(config))
    with pytest.raises(ValueError, match="there is an adapter 'taken'"):
        inject_adapter_in_model(config, model, "taken")
    assert vars(config) == before
    assert not config.rank_pattern


def test_a_broken_weight_is_named(free_rank_method: Method) -> None:
    model = llama()
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = torch.nan
    with pytest.raises(SpectralError, match=r"^model\.layers\.1\.mlp\.up_proj: .* 1 NaN"):
        get_peft_model(model, free_rank_method(r="budget=0.5"))
    assert not list(layers(model))


class Nested(nn.Module):
    """The name of one module is the ending of another's."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up = nn.Linear(8, 8)
        self.block = nn.Sequential()
        self.block.up = nn.Linear(8, 24)
        self.tokens = nn.Embedding(20, 8)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.block(self.up(self.tokens(ids)))


@pytest.mark.parametrize("r", ["budget=0.6", "energy=0.8"])
def test_a_full_name_means_one_module(r: str) -> None:
    model = get_peft_model(Nested(), SVFitConfig(r=r, target_modules=["up"]))
    assert model.peft_config["default"].rank_pattern == ranks(model)
    alone = {
        name: ranks(get_peft_model(Nested(), SVFitConfig(r=r, target_modules=rf"{name}"))).popitem()[1]
        for name in ("up", r"block\.up")
    }
    if r.startswith("energy"):
        assert ranks(model) == {"up": alone["up"], "block.up": alone[r"block\.up"]}


def test_embeddings_share_a_budget_too() -> None:
    model = get_peft_model(Nested(), TruncatedConfig(r="budget=0.6", target_modules=["block.up", "tokens"]))
    assert set(ranks(model)) == {"block.up", "tokens"}
    spent, dense = shares(model, Nested())
    assert spent <= 0.6 * dense
    assert model(batch() % 20).isfinite().all()


def test_a_budget_means_nothing_for_one_weight() -> None:
    with pytest.raises(ValueError, match=r"up: 'budget=0\.5' was not shared out"):
        TruncatedConfig(r="budget=0.5").resolve_rank(torch.ones(8, 8), "up")
