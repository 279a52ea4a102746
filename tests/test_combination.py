"""The change by a combined adapter is the weighted sum of the changes."""

from __future__ import annotations

import pytest
import torch
from peft import PeftConfig, PeftModel, get_peft_model
from torch import Tensor

from spectral_peft import PiSSAConfig, SpectralError
from tests.methods import METHODS, POOLED_SST, Method
from tests.models import gpt2, layers, llama, logits, train_


ADDED = [method for method in METHODS if method.adds_up]
OTHERS = [method for method in METHODS if not method.adds_up]
WEIGHTS = [0.7, -1.5]


@pytest.fixture(params=ADDED, ids=str)
def added_method(request: pytest.FixtureRequest) -> Method:
    return request.param


def two_adapters(method: Method, base=llama, second: dict | None = None, **fields: object) -> PeftModel:
    model = get_peft_model(base(), method(init_weights=False, **fields), "one").eval()
    model.add_adapter("two", method(init_weights=False, **{**fields, **(second or {})}))
    return model


def change(layer, name: str) -> Tensor:
    return layer.get_delta_weight(name).double() if layer.update_of(name) is not None else 0.0


def check_sum(model: PeftModel, name: str = "sum") -> None:
    for layer in layers(model):
        expected = WEIGHTS[0] * change(layer, "one") + WEIGHTS[1] * change(layer, "two")
        assert expected.abs().max() > 1e-3
        torch.testing.assert_close(change(layer, name), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("base", [llama, gpt2])
def test_cat_is_exact(added_method: Method, base) -> None:
    model = two_adapters(added_method, base, second={"r": 3}, target_modules=["q_proj", "down_proj", "c_attn"])
    model.add_weighted_adapter(["one", "two"], WEIGHTS, "sum", combination_type="cat")
    check_sum(model)


@pytest.mark.parametrize("added_method", [method for method in ADDED if method.embeddings], ids=str)
def test_embeddings_add_up(added_method: Method) -> None:
    model = two_adapters(
        added_method, target_modules=["embed_tokens", "v_proj"], second={"target_modules": ["v_proj"]}
    )
    model.add_weighted_adapter(["one", "two"], WEIGHTS, "sum", combination_type="cat")
    check_sum(model)


def test_scaling_is_kept() -> None:
    model = get_peft_model(llama(), PiSSAConfig(r=4, alpha=8, init_weights=False, target_modules=["q_proj"]), "one")
    model.add_adapter("two", PiSSAConfig(r=8, alpha=2, init_weights=False, target_modules=["q_proj"]))
    model.add_weighted_adapter(["one", "two"], WEIGHTS, "sum", combination_type="cat")
    check_sum(model)


@pytest.mark.parametrize("method", [method for method in METHODS if method.linear], ids=str)
def test_linear_keeps_rank_and_start(method: Method) -> None:
    model = two_adapters(method)
    model.add_weighted_adapter(["one", "two"], WEIGHTS, "sum", combination_type="linear")
    check_sum(model)
    for layer in layers(model):
        one, total = (dict(layer.update_of(name).named_parameters()) for name in ("one", "sum"))
        assert all(torch.equal(total[name], one[name]) for name in method.start)


def test_svd_is_the_best_approximation(added_method: Method) -> None:
    model = two_adapters(added_method)
    model.add_weighted_adapter(["one", "two"], WEIGHTS, "sum", combination_type="cat")
    model.add_weighted_adapter(["one", "two"], WEIGHTS, "small", combination_type="svd", svd_rank=2)
    for layer in layers(model):
        U, S, Vh = torch.linalg.svd(change(layer, "sum"), full_matrices=False)
        torch.testing.assert_close(change(layer, "small"), (U[:, :2] * S[:2]) @ Vh[:2], rtol=1e-4, atol=1e-5)


def test_one_adapter_is_scaled(added_method: Method) -> None:
    model = two_adapters(added_method)
    model.add_weighted_adapter(["one"], [-2.0], "scaled")
    for layer in layers(model):
        torch.testing.assert_close(change(layer, "scaled"), -2 * change(layer, "one"), rtol=1e-4, atol=1e-5)


def test_the_sum_is_an_adapter_like_others(added_method: Method, tmp_path) -> None:
    model = two_adapters(added_method, save_start=not added_method.recomputable)
    active = model.active_adapter
    model.add_weighted_adapter(["one", "two"], WEIGHTS, "sum", combination_type="svd", svd_rank=5)
    assert model.active_adapter == active
    assert not any(p.requires_grad for name, p in model.named_parameters() if ".sum." in name)
    model.set_adapter("sum")
    expected = logits(model)
    model.save_pretrained(tmp_path, selected_adapters=["sum"])
    again = PeftModel.from_pretrained(llama(), tmp_path / "sum", is_trainable=True)
    assert torch.equal(logits(again), expected)
    train_(again, added_method.lr)
    assert (logits(again) - expected).abs().max() > 1e-4
    model.set_adapter("two")
    assert (logits(model) - expected).abs().max() > 1e-3


@pytest.mark.parametrize("method", OTHERS, ids=str)
@pytest.mark.parametrize("kind", ["svd", "linear", "cat"])
def test_what_has_no_sum_says_so(method: Method, kind: str) -> None:
    model = two_adapters(method)
    with pytest.raises(SpectralError, match=r"layers\.0\.self_attn\.q_proj"):
        model.add_weighted_adapter(["one", "two"], WEIGHTS, "sum", combination_type=kind)
    assert sorted(model.peft_config) == ["one", "two"]


@pytest.mark.parametrize(
    "fields",
    [
        {"exclude_modules": ["layers.0.self_attn.q_proj"]},
        {"layers_to_transform": [1]},
        {"dense_modules": ["model.layers.0.self_attn.q_proj"]},
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_what_the_first_adapter_leaves_out_is_not_left_out_of_the_sum(
    added_method: Method, fields: dict[str, object], tmp_path
) -> None:
    targets = {"target_modules": ["q_proj"], "init_weights": False}
    model = get_peft_model(llama(), added_method(**targets, **fields), "one").eval()
    model.add_adapter("two", added_method(**targets))
    model.add_weighted_adapter(["one", "two"], WEIGHTS, "sum", combination_type="cat")
    check_sum(model)
    assert sum(layer.update_of("sum") is not None for layer in layers(model)) == 2
    model.set_adapter("sum")
    model.save_pretrained(tmp_path, selected_adapters=["sum"])
    assert torch.equal(logits(PeftModel.from_pretrained(llama(), tmp_path / "sum")), logits(model))


def test_an_adapter_that_nothing_has_started_yet_is_started(added_method: Method, tmp_path) -> None:
    """That of a checkpoint's config alone starts at its first use."""
    get_peft_model(llama(), added_method(target_modules=["q_proj"])).save_pretrained(tmp_path)
    model = get_peft_model(llama(), PeftConfig.from_pretrained(tmp_path), "one")
    assert not any(layer.update_of("one").is_started() for layer in layers(model))
    model.add_weighted_adapter(["one"], [1.0], "sum", combination_type="cat")
    assert all(layer.update_of("one").is_started() for layer in layers(model))


def test_merged_adapters_are_not_added_up(added_method: Method) -> None:
    model = two_adapters(added_method, target_modules=["q_proj"])
    model.merge_adapter()
    with pytest.raises(ValueError, match="unmerge_adapter"):
        model.add_weighted_adapter(["one", "two"], WEIGHTS, "sum")
    assert sorted(model.peft_config) == ["one", "two"]


def test_the_pool_of_a_sum_holds_its_triplets() -> None:
    """Also on layers where fewer adapters than elsewhere add up, and the trained ones stay as many as they were."""
    model = two_adapters(
        POOLED_SST, target_modules=["q_proj", "up_proj"], second={"target_modules": ["q_proj"]}, pool=6, r=4
    )
    model.add_weighted_adapter(["one", "two"], WEIGHTS, "sum", combination_type="cat")
    check_sum(model)
    assert (model.peft_config["sum"].pool, model.peft_config["sum"].r) == (24, 4)
    for layer in layers(model):
        update = layer.update_of("sum")
        assert (len(update.S.weight), update.U.weight.shape[1]) == (24, 4)
        U, _, Vh = update.factors()
        for factor in (U, Vh.mT):
            torch.testing.assert_close(factor.mT @ factor, torch.eye(24), rtol=1e-4, atol=1e-4)


def test_linear_needs_one_start_and_a_linear_change(method: Method) -> None:
    model = two_adapters(method, second={"r": 4})
    needed = "different singular vectors" if method.linear else "product of what it trains"
    with pytest.raises(SpectralError, match=rf"layers\.0\..*{needed}"):
        model.add_weighted_adapter(["one", "two"], WEIGHTS, "sum", combination_type="linear")


def test_wrong_arguments_change_nothing(added_method: Method) -> None:
    model = two_adapters(added_method, modules_to_save=["lm_head"], target_modules=["q_proj"])
    for arguments, message in [
        ((["one", "x"], WEIGHTS, "sum"), "Adapter x does not exist"),
        ((["one"], WEIGHTS, "sum"), "one weight for each adapter"),
        ((["one", "two"], WEIGHTS, "two"), "already"),
        ((["one", "two"], WEIGHTS, "sum", "ties"), "combination_type"),
        ((["one", "two"], WEIGHTS, "sum", "cat", 4), "svd_rank"),
        ((["one", "two"], WEIGHTS, "sum"), "modules_to_save"),
    ]:
        with pytest.raises(ValueError, match=message):
            model.add_weighted_adapter(*arguments)
    assert sorted(model.peft_config) == ["one", "two"]
