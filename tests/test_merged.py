"""A merged export is an ordinary checkpoint with the function of the adapter, written shard by shard."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    BartConfig,
    BertConfig,
    MixtralConfig,
    MixtralForCausalLM,
    T5Config,
)

import spectral_peft.merged
from spectral_peft import SCTConfig, SpectralError, SSTConfig, SVFitConfig, build_factored, export_merged
from tests.methods import Method
from tests.models import batch, gpt2, layers, llama, logits, train_
from tests.test_factored import GPT2, LLAMA, sct
from tests.tolerance import tolerance


FUNCTION = tolerance(torch.float32, 64)


@pytest.mark.parametrize("base", [llama, gpt2])
def test_transformers_loads_the_merged_model(method: Method, base: type, tmp_path: Path) -> None:
    targets = ["c_attn", "c_fc"] if base is gpt2 else "all-linear"
    model = get_peft_model(
        base(), method(target_modules=targets, modules_to_save=["lm_head"] if base is llama else None)
    )
    train_(model, method.lr)
    expected = logits(model)
    export_merged(model, tmp_path)
    assert torch.equal(logits(model), expected)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(logits(merged), expected, rtol=FUNCTION, atol=FUNCTION)


def test_a_merged_adapter_is_not_merged_twice(tmp_path: Path) -> None:
    model = get_peft_model(llama(), SVFitConfig(r=8, target_modules="all-linear"))
    model.merge_adapter()
    with pytest.raises(ValueError, match="call `unmerge_adapter` before a merged model is exported"):
        export_merged(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_merged_adapter_is_saved_as_it_is(method: Method, tmp_path: Path) -> None:
    model = get_peft_model(llama(), method())
    train_(model, method.lr)
    model.save_pretrained(tmp_path / "before")
    model.merge_adapter()
    model.save_pretrained(tmp_path / "merged")
    before, merged = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("before", "merged"))
    assert before.keys() == merged.keys()
    assert all(torch.equal(before[key], merged[key]) for key in before)


def test_autocast_does_not_round_what_is_merged(method: Method) -> None:
    model = get_peft_model(llama(), method())
    train_(model, method.lr)
    layer = next(layers(model))
    expected = layer.merged_weight("default")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(layer.merged_weight("default"), expected)


def test_a_merged_weight_is_no_base(method: Method, tmp_path: Path) -> None:
    """Neither does another adapter start from it, nor is the merged one loaded anew: it could not be taken out."""
    model = get_peft_model(llama(), method(target_modules=["up_proj"]))
    train_(model, method.lr)
    model.save_pretrained(tmp_path)
    before = logits(model)
    model.merge_adapter()
    merged = logits(model)
    with pytest.raises(SpectralError, match=r"up_proj: an adapter starts from the base weight, into which"):
        model.add_adapter("other", method(target_modules=["up_proj"]))
    with pytest.raises(SpectralError, match=r"up_proj: 'default' is merged; call `unmerge_adapter`"):
        model.load_adapter(tmp_path, "default")
    assert torch.equal(logits(model), merged)
    model.unmerge_adapter()
    torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-4)


def test_an_adapter_that_replaces_is_not_merged_over_another(tmp_path: Path) -> None:
    model = get_peft_model(llama(), SSTConfig(r=4, pool=8, target_modules="all-linear"))
    model.add_adapter("whole", SSTConfig(r=4, target_modules="all-linear"))
    train_(model, 1e-2)
    model.merge_adapter(["default"])
    before = {layer.key: layer.base_parameter.clone() for layer in layers(model)}
    with pytest.raises(ValueError, match=r"'whole' replaces the weight, into which .*default.* would be lost"):
        model.merge_adapter(["whole"])
    assert all(torch.equal(layer.base_parameter, before[layer.key]) for layer in layers(model))


def test_a_head_that_was_trained_apart_from_its_embedding_is_not_tied_again(tmp_path: Path) -> None:
    model = get_peft_model(gpt2(), SVFitConfig(r=4, target_modules=["c_attn"], modules_to_save=["lm_head"]))
    train_(model, 1e-2)
    export_merged(model, tmp_path)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert not merged.config.tie_word_embeddings
    torch.testing.assert_close(logits(merged), logits(model), rtol=FUNCTION, atol=FUNCTION)


SIZES = {"vocab_size": 64, "d_model": 32}
BART = BartConfig(
    **SIZES,
    encoder_layers=1,
    decoder_layers=1,
    encoder_attention_heads=2,
    decoder_attention_heads=2,
    encoder_ffn_dim=48,
    decoder_ffn_dim=48,
    max_position_embeddings=32,
)
T5 = T5Config(**SIZES, d_kv=8, d_ff=48, num_layers=1, num_heads=4, decoder_start_token_id=0)
HIDDEN = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
BERT = BertConfig(vocab_size=64, num_hidden_layers=1, **HIDDEN)
TIES = [(BART, "lm_head"), (BART, "shared"), (T5, "lm_head"), (T5, "shared")]
TIES += [(BERT, "predictions.decoder"), (BERT, "word_embeddings")]


@pytest.mark.parametrize(("config", "trained"), [*TIES, (BART, None), (T5, None), (BERT, None)])
def test_of_several_ties_one_may_be_broken(config: Any, trained: str | None, tmp_path: Path) -> None:
    model_cls = AutoModelForMaskedLM if config is BERT else AutoModelForSeq2SeqLM
    base = model_cls.from_config(config).eval()
    for name, value in base.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(value)
    saved = None if trained is None else [trained]
    model = get_peft_model(base, SVFitConfig(r=4, target_modules=["q_proj", "q", "query"], modules_to_save=saved))
    train_(model, 1e-2)
    export_merged(model, tmp_path)
    merged = model_cls.from_pretrained(tmp_path).eval()
    inputs = {"input_ids": batch(), "labels": batch()}
    with torch.no_grad():
        expected, found = model.eval()(**inputs).logits, merged(**inputs).logits
    torch.testing.assert_close(found, expected, rtol=FUNCTION, atol=FUNCTION * float(expected.abs().max()))


@pytest.mark.parametrize("shard_bytes", [10**9, 20_000])
def test_experts_have_the_names_of_published_checkpoints(shard_bytes: int, tmp_path: Path) -> None:
    config = MixtralConfig(vocab_size=64, num_local_experts=4, num_key_value_heads=2, num_hidden_layers=2, **HIDDEN)
    base = MixtralForCausalLM(config).eval()
    base.save_pretrained(tmp_path / "base")
    published = load_file(tmp_path / "base" / "model.safetensors").keys()
    model = get_peft_model(base, SVFitConfig(r=4, target_modules=["q_proj", "v_proj"]))
    train_(model, 1e-2)
    export_merged(model, tmp_path / "dense", shard_bytes=shard_bytes)
    files = [load_file(file) for file in sorted((tmp_path / "dense").glob("*.safetensors"))]
    assert (len(files) > 1) == (shard_bytes < 10**9)
    assert {name for file in files for name in file} == published
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    torch.testing.assert_close(logits(merged), logits(model), rtol=FUNCTION, atol=FUNCTION)


@pytest.mark.parametrize("model_config", [LLAMA, GPT2])
def test_a_factored_model_becomes_dense(model_config: object, tmp_path: Path) -> None:
    targets = ["q_proj", "up_proj", "embed_tokens", "lm_head"] if model_config is LLAMA else ["c_attn", "c_fc"]
    model = build_factored(model_config, sct(target_modules=targets))
    train_(model, 1e-2)
    export_merged(model, tmp_path)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(logits(merged), logits(model), rtol=FUNCTION, atol=FUNCTION)


def test_it_is_written_in_shards_and_memory_holds_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = get_peft_model(llama(), SCTConfig(r=8, target_modules="all-linear"))
    written = []
    save_file = spectral_peft.merged.save_file
    monkeypatch.setattr(
        spectral_peft.merged,
        "save_file",
        lambda tensors, *rest, **kw: (written.append(tensors), save_file(tensors, *rest, **kw)),
    )
    export_merged(model, tmp_path, shard_bytes=20_000)
    assert len(written) > 3
    assert all(sum(value.nbytes for value in tensors.values()) <= 20_000 for tensors in written)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(llama().state_dict())
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in llama().state_dict().values())
    torch.testing.assert_close(
        logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(model), rtol=FUNCTION, atol=FUNCTION
    )


def test_another_dtype(tmp_path: Path) -> None:
    export_merged(
        get_peft_model(llama(), SVFitConfig(r=4, target_modules="all-linear")), tmp_path, dtype=torch.bfloat16
    )
    merged = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    assert {value.dtype for value in merged.parameters()} == {torch.bfloat16}


def test_a_full_disk_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = get_peft_model(llama(), SVFitConfig(r=4, target_modules="all-linear"))

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(spectral_peft.merged, "save_file", full)
    with pytest.raises(SpectralError, match=r"could not be written to .*No space left"):
        export_merged(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    torch.testing.assert_close(logits(model), logits(llama()))


def test_what_is_there_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("yes")
    model = get_peft_model(llama(), SVFitConfig(r=4, target_modules="all-linear"))
    with pytest.raises(SpectralError, match="is not empty"):
        export_merged(model, tmp_path)
    with pytest.raises(ValueError, match="no spectral adapter named 'other'"):
        export_merged(model, tmp_path / "out", "other")
    assert [path.name for path in tmp_path.iterdir()] == ["precious"]
