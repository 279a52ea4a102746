"""One batch for several adapters: every sample has the output that its own adapter gives it."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import BartConfig, BartForConditionalGeneration

from spectral_peft import SpectralError, SpectralModel
from spectral_peft.layer import SpectralLinear
from tests.methods import SST, Method
from tests.models import batch, gpt2, llama, logits


NAMES = ["two", "__base__", "one", "two", "one"]


def two_adapters(base: nn.Module, method: Method, **fields: object) -> PeftModel:
    model = get_peft_model(base, method(init_weights=False, **fields), "one").eval()
    model.add_adapter("two", method(init_weights=False, **{"r": 4, **fields}))
    return model


def one_by_one(model: PeftModel, ids: Tensor, names: list[str]) -> Tensor:
    rows = []
    for row, name in zip(ids, names, strict=True):
        if name == "__base__":
            with model.disable_adapter():
                rows.append(logits(model, row[None]))
        else:
            model.set_adapter(name)
            rows.append(logits(model, row[None]))
    return torch.cat(rows)


def ids_of(samples: int = 5) -> Tensor:
    return torch.randint(0, 64, (samples, 7), generator=torch.Generator().manual_seed(3))


def check(model: PeftModel) -> None:
    expected = one_by_one(model, ids_of(), NAMES)
    assert (expected[0] - expected[3]).abs().max() > 1e-3  # the samples differ, and so do the adapters
    model.set_adapter("one")
    with torch.no_grad():
        mixed = model(input_ids=ids_of(), adapter_names=NAMES).logits
    torch.testing.assert_close(mixed, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits(model, ids_of()), one_by_one(model, ids_of(), ["one"] * 5), rtol=1e-4, atol=1e-4)


def test_every_sample_goes_through_its_own_adapter(method: Method) -> None:
    check(two_adapters(llama(), method))


def test_conv1d(method: Method) -> None:
    check(two_adapters(gpt2(), method, target_modules=["c_attn", "c_proj"]))


def test_embeddings(embedding_method: Method) -> None:
    check(two_adapters(llama(), embedding_method, target_modules=["embed_tokens", "q_proj"]))


def test_adapters_on_different_layers(method: Method) -> None:
    model = get_peft_model(llama(), method(init_weights=False, target_modules=["q_proj"]), "one").eval()
    model.add_adapter("two", method(init_weights=False, target_modules=["q_proj", "up_proj"]))
    check(model)


def test_modules_trained_in_full_follow(method: Method) -> None:
    model = two_adapters(llama(), method, target_modules=["q_proj"], modules_to_save=["lm_head"])
    with torch.no_grad():
        model.base_model.model.lm_head.modules_to_save["two"].weight.mul_(2)
    check(model)


@pytest.mark.parametrize("beams", [1, 3])
def test_generation(method: Method, beams: int) -> None:
    model = two_adapters(llama(), method)
    config = {"max_new_tokens": 4, "min_new_tokens": 4, "num_beams": beams, "do_sample": False, "pad_token_id": 0}
    together = model.generate(input_ids=ids_of(), adapter_names=NAMES, **config)
    for name in ("one", "two"):
        model.set_adapter(name)
        rows = [row for row, own in enumerate(NAMES) if own == name]
        assert torch.equal(together[rows], model.generate(input_ids=ids_of()[rows], **config))


def test_beams_do_not_reach_the_encoder(thin_method: Method) -> None:
    config = BartConfig(
        vocab_size=64, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=48, decoder_ffn_dim=48, max_position_embeddings=32,
    )  # fmt: skip
    model = two_adapters(BartForConditionalGeneration(config).eval(), thin_method, target_modules=["q_proj", "fc1"])
    settings = {"max_new_tokens": 4, "min_new_tokens": 4, "num_beams": 2, "do_sample": False}
    together = model.generate(input_ids=ids_of(), adapter_names=NAMES, **settings)
    model.set_adapter("one")
    assert torch.equal(together[[2, 4]], model.generate(input_ids=ids_of()[[2, 4]], **settings))


def test_without_a_base_weight_every_sample_needs_an_adapter() -> None:
    model = get_peft_model(llama(), SST(init_weights=False, keep_base_weight=False), "one").eval()
    alone = logits(model)
    mixed = model(input_ids=batch(), adapter_names=["one", "one"]).logits
    assert torch.equal(mixed, alone)
    with pytest.raises(SpectralError, match="needs the base weight"):
        model(input_ids=batch(), adapter_names=["one", "__base__"])


def test_disabled_adapters_stay_disabled(method: Method) -> None:
    model = two_adapters(llama(), method)
    with model.disable_adapter():
        assert torch.equal(model(input_ids=batch(), adapter_names=["one", "two"]).logits, logits(model))
    model.merge_adapter(["one"])
    with model.disable_adapter():
        disabled = model(input_ids=batch(), adapter_names=["one", "two"]).logits
    torch.testing.assert_close(disabled, logits(llama()), rtol=1e-4, atol=1e-4)


def test_peft_finds_the_names_by_which_it_looks_for_mixed_batches() -> None:
    """Its script of capabilities does."""
    assert hasattr(SpectralLinear, "_mixed_batch_forward")
    assert hasattr(SpectralModel, "_enable_peft_forward_hooks")


def test_what_cannot_be_mixed_is_refused(method: Method) -> None:
    model = two_adapters(llama(), method)
    with pytest.raises(ValueError, match=r"non-existing adapter\(s\): x"):
        model(input_ids=batch(), adapter_names=["one", "x"])
    with pytest.raises(ValueError, match="got 1 and 2"):
        model(input_ids=batch(), adapter_names=["one"])
    with pytest.raises(TypeError, match="list"):
        model(input_ids=batch(), adapter_names="one")
    with pytest.raises(ValueError, match="training mode"):
        model.train()(input_ids=batch(), adapter_names=["one", "two"])
    model.eval().merge_adapter(["one"])
    with pytest.raises(ValueError, match="unmerge_adapter"):
        model(input_ids=batch(), adapter_names=["one", "two"])
    model.unmerge_adapter()
    check(model)
