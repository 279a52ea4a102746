"""A factored model is built from a config without any dense weight."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    GPT2Config,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    Qwen2Config,
    Qwen2ForCausalLM,
    Trainer,
    TrainingArguments,
)

from spectral_peft import (
    SCTConfig,
    SpectralError,
    SSTConfig,
    build_factored,
    create_spectral_optimizer,
    estimate_memory,
    load_factored,
    parameter_report,
    save_factored,
    step_in_backward,
)
from spectral_peft.linalg import orthonormality_error
from spectral_peft.stored import load_config
from tests.models import batch, layers, logits, train_, updates
from tests.tolerance import tolerance


SIZES = {"hidden_size": 96, "intermediate_size": 160, "num_hidden_layers": 2, "num_attention_heads": 4}
LLAMA = LlamaConfig(vocab_size=200, num_key_value_heads=2, tie_word_embeddings=False, **SIZES)
OPT = OPTConfig(vocab_size=200, ffn_dim=160, word_embed_proj_dim=96, tie_word_embeddings=False, **SIZES)
GPT2 = GPT2Config(vocab_size=200, n_embd=96, n_layer=2, n_head=4, n_positions=64, tie_word_embeddings=False)
QWEN2 = Qwen2Config(vocab_size=200, num_key_value_heads=2, tie_word_embeddings=False, **SIZES)
TIED = LlamaConfig(vocab_size=200, tie_word_embeddings=True, **SIZES)
EVERYTHING = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "embed_tokens", "lm_head"]


class Allocations(TorchDispatchMode):
    """The bytes of the largest tensor that any operation gives on a real device."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and not out.is_meta:
            self.largest = max(self.largest, out.untyped_storage().nbytes())
        return out


def sct(**fields: Any) -> SCTConfig:
    return SCTConfig(**{"r": 4, "target_modules": EVERYTHING, "init": "random", **fields})


def test_no_dense_weight_is_ever_allocated(tmp_path: Path) -> None:
    with Allocations() as allocations:
        model = build_factored(LLAMA, sct())
    assert allocations.largest == 200 * 4 * 4
    train_(model, lr=1e-3, steps=1)
    save_factored(model, tmp_path)
    with Allocations() as allocations:
        load_factored(tmp_path)
    assert allocations.largest == 200 * 4 * 4


@pytest.mark.parametrize(
    ("model_config", "targets"), [(LLAMA, "all-linear"), (OPT, ["q_proj", "fc1", "fc2"]), (GPT2, ["c_attn", "c_fc"])]
)
def test_everything_is_there_trains_and_comes_back(model_config: Any, targets: Any, tmp_path: Path) -> None:
    model = build_factored(model_config, sct(target_modules=targets))
    assert not any(value.is_meta for value in (*model.parameters(), *model.buffers()))
    model.to("cpu")
    start = {name: value.detach().clone() for name, value in model.named_parameters() if value.requires_grad}
    train_(model, lr=1e-2)
    moved = {name for name, value in model.named_parameters() if name in start and not torch.equal(value, start[name])}
    assert set(start) - moved <= {name for name in start if "bias" in name}
    save_factored(model, tmp_path)
    with Allocations() as allocations:
        reloaded = load_factored(tmp_path)
    assert torch.equal(logits(reloaded), logits(model))
    assert {name for name, value in reloaded.named_parameters() if value.requires_grad} == set(start)
    if model_config is LLAMA:
        assert allocations.largest == 200 * 96 * 4  # the embedding, which was not targeted
    train_(reloaded, lr=1e-3)


def test_a_converted_model_can_be_saved_again_and_again(tmp_path: Path) -> None:
    """Its factors started from weights, and no scale of a random start belongs to them."""
    norms = ["norm", "input_layernorm", "post_attention_layernorm"]
    config = SCTConfig(r=4, target_modules=EVERYTHING[:-2], modules_to_save=[*EVERYTHING[-2:], *norms])
    save_factored(get_peft_model(LlamaForCausalLM(LLAMA), config), tmp_path / "once")
    save_factored(load_factored(tmp_path / "once"), tmp_path / "twice")
    assert torch.equal(logits(load_factored(tmp_path / "twice")), logits(load_factored(tmp_path / "once")))


def biased() -> nn.Module:
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(QWEN2)
    for name, value in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(value)
    return model


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": "all-linear"},
        {"target_modules": ["gate_proj", "up_proj"], "modules_to_save": ["lm_head"]},
        {"target_modules": ["down_proj"], "keep_base_weight": True},
    ],
)
def test_a_converted_model_is_saved_with_what_does_not_train(fields: dict[str, Any], tmp_path: Path) -> None:
    model = get_peft_model(biased(), SCTConfig(r=4, **fields))
    train_(model, lr=1e-2)
    model.get_base_model().generation_config.eos_token_id = [2, 5]
    save_factored(model, tmp_path)
    reloaded = load_factored(tmp_path)
    assert torch.equal(logits(reloaded), logits(model))
    names = [{name for name, value in each.named_parameters() if value.requires_grad} for each in (model, reloaded)]
    assert names[0] == names[1]
    assert reloaded.get_base_model().generation_config.eos_token_id == [2, 5]
    assert load_config(tmp_path).base_model_name_or_path is None


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": "all-linear", "modules_to_save": ["lm_head"]},
        {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [0]},
        {"target_modules": r".*layers\.0.*q_proj"},
        {"target_modules": "all-linear", "exclude_modules": r".*layers\.1.*"},
    ],
)
def test_a_part_of_the_model_may_be_factored(fields: dict[str, Any], tmp_path: Path) -> None:
    model = build_factored(LLAMA, sct(**fields))
    train_(model, lr=1e-2)
    save_factored(model, tmp_path)
    assert torch.equal(logits(load_factored(tmp_path)), logits(model))


def test_an_adapter_alone_is_no_factored_model(tmp_path: Path) -> None:
    """PEFT leaves out what does not train, and that would be as good as random."""
    model = get_peft_model(biased(), SCTConfig(r=4, target_modules=["gate_proj", "up_proj"]))
    model.save_pretrained(tmp_path)
    QWEN2.save_pretrained(tmp_path / "base")
    with pytest.raises(
        SpectralError, match=r"lacks 23 tensors of the model, such as base_model\.model\.lm_head\.weight"
    ):
        load_factored(tmp_path)


def test_what_is_not_factored_starts_as_transformers_starts_it() -> None:
    torch.manual_seed(3)
    model = build_factored(LLAMA, sct(target_modules=["q_proj"])).base_model.model
    dense = LlamaForCausalLM(LLAMA)
    for name, module in dense.named_modules():
        if isinstance(module, nn.Linear) and "q_proj" not in name:
            weight = model.get_submodule(name).weight if "lm_head" not in name else model.lm_head.weight
            assert float(weight.std()) == pytest.approx(float(module.weight.std()), rel=0.05)
    assert torch.equal(model.model.rotary_emb.inv_freq, dense.model.rotary_emb.inv_freq)
    assert torch.equal(model.model.norm.weight, dense.model.norm.weight)


def test_outputs_have_the_scale_of_the_dense_initialization() -> None:
    model = build_factored(LLAMA, sct(r=32))
    x = torch.randn(500, 96)
    for update in updates(model):
        matrix = update.matrix()
        assert float(matrix.square().mean().sqrt()) == pytest.approx(LLAMA.initializer_range, rel=1e-3)
        if matrix.shape[1] == 96:
            dense = torch.randn_like(matrix) * LLAMA.initializer_range
            assert float((x @ matrix.T).std()) == pytest.approx(float((x @ dense.T).std()), rel=0.2)
        assert orthonormality_error(update.U.weight) < tolerance(torch.float32, 200)


def test_it_does_not_depend_on_the_global_seed_but_on_its_own() -> None:
    first, second, other = (build_factored(LLAMA, sct(seed=seed)) for seed in (0, 0, 1))
    one, two, three = (
        torch.cat([update.U.weight.flatten() for update in updates(model)]) for model in (first, second, other)
    )
    assert torch.equal(one, two)
    assert not torch.equal(one, three)


def test_the_trainer_trains_it(tmp_path: Path) -> None:
    model = build_factored(LLAMA, sct())
    rows = [{"input_ids": ids, "labels": ids} for ids in batch().repeat(8, 1)]
    arguments = TrainingArguments(str(tmp_path), max_steps=30, learning_rate=1e-2, report_to="none", use_cpu=True)
    before = float(model(input_ids=batch(), labels=batch()).loss)
    Trainer(model, arguments, train_dataset=rows).train()
    assert float(model(input_ids=batch(), labels=batch()).loss) < before - 1
    assert all(orthonormality_error(update.U.weight) < tolerance(torch.float32, 200) for update in updates(model))


def test_the_report_counts_what_never_was() -> None:
    model = build_factored(LLAMA, sct())
    report = parameter_report(model)
    assert report.dense == sum(value.numel() for value in LlamaForCausalLM(LLAMA).parameters())
    assert report.trained == sum(value.numel() for value in model.parameters() if value.requires_grad)


def test_a_step_in_backward_is_the_same_step() -> None:
    """Layer by layer, as soon as its gradients are there, and none is left behind."""
    one, other = build_factored(LLAMA, sct()), build_factored(LLAMA, sct())
    other.load_state_dict(one.state_dict())
    optimizers = step_in_backward(other, torch.optim.AdamW, lr=1e-2)
    optimizer = create_spectral_optimizer(one, torch.optim.AdamW, lr=1e-2)
    assert len(optimizers) > len(list(layers(other)))
    for step in range(3):
        ids = batch(seed=step)
        one(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        other(input_ids=ids, labels=ids).loss.backward()
        assert all(value.grad is None for value in other.parameters())
    for (name, expected), value in zip(one.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(value, expected, msg=name)


@pytest.mark.parametrize(
    ("model_config", "config", "error", "message"),
    [
        (LLAMA, sct(init="svd"), SpectralError, r"embed_tokens.*meta device"),
        (LLAMA, SSTConfig(r=4, target_modules="all-linear"), SpectralError, r"q_proj.*meta device"),
        (TIED, sct(target_modules=["q_proj"]), ValueError, r"lm_head\.weight and model\.embed_tokens\.weight"),
        (LLAMA, sct(target_modules=["nothing"]), ValueError, "No modules were targeted"),
    ],
)
def test_what_cannot_be_built_is_refused(model_config: Any, config: Any, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        build_factored(model_config, config)


def test_a_folder_without_a_factored_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no factored model.*save_factored"):
        load_factored(tmp_path)


def test_a_large_checkpoint_is_in_several_files(tmp_path: Path) -> None:
    model = build_factored(LLAMA, sct())
    train_(model, lr=1e-2)
    save_factored(model, tmp_path / "one")
    save_factored(model, tmp_path / "several", shard_bytes=20_000)
    files = {path.name for path in (tmp_path / "several").glob("*.safetensors")}
    assert len(files) > 3
    assert "adapter_model.safetensors" not in files
    assert all(torch.equal(logits(load_factored(tmp_path / name)), logits(model)) for name in ("one", "several"))
    save_factored(model, tmp_path / "several")
    assert [path.name for path in (tmp_path / "several").glob("*.safetensors*")] == ["adapter_model.safetensors"]


def test_an_incomplete_checkpoint_is_refused(tmp_path: Path) -> None:
    model = build_factored(LLAMA, sct(target_modules=["q_proj"]))
    save_factored(model, tmp_path, shard_bytes=20_000)
    index = tmp_path / "adapter_model.safetensors.index.json"
    places = json.loads(index.read_text())["weight_map"]

    def written(changed: dict[str, str]) -> None:
        index.write_text(json.dumps({"metadata": {}, "weight_map": changed}))

    for name in ("q_proj.spectral_sct_update.U.weight", "v_proj.weight"):
        lost = next(file for key, file in places.items() if name in key)
        written({key: file for key, file in places.items() if file != lost})
        with pytest.raises(SpectralError, match="has no tensor"):
            load_factored(tmp_path)
    written({**places, "x": "../elsewhere.safetensors"})
    with pytest.raises(SpectralError, match=r"'../elsewhere\.safetensors', which is not in its folder"):
        load_factored(tmp_path)
    written({**places, "x": "adapter_model-00099-of-00099.safetensors"})
    with pytest.raises(FileNotFoundError, match="00099"):
        load_factored(tmp_path)


def test_memory_is_estimated_without_allocating_any() -> None:
    with Allocations() as allocations:
        planned = build_factored(LLAMA, sct(), device="meta")
    assert allocations.largest < 1000
    estimate, real = estimate_memory(planned, tokens=64), build_factored(LLAMA, sct())
    assert estimate == estimate_memory(real, tokens=64)
    trained = sum(value.nbytes for value in real.parameters() if value.requires_grad)
    assert estimate.gradients == trained
    assert estimate.optimizer == 2 * trained
    assert estimate_memory(real, tokens=64, in_backward=True).gradients == 200 * 4 * 4
    assert estimate_memory(real, tokens=128).activations == 2 * estimate.activations
    assert estimate_memory(real, tokens=64, on_disk=True).activations == 2 * 64 * 200 * 4


def test_llama_3_70b_at_rank_32() -> None:
    """424.3 million numbers in factors, norms and nothing else: 6.79 GB with gradients and two moments."""
    sizes = {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64}
    config = LlamaConfig(vocab_size=128256, num_key_value_heads=8, tie_word_embeddings=False, **sizes)
    model = build_factored(config, sct(r=32), device="meta")
    assert sum(value.numel() for value in model.parameters() if value.requires_grad) == 424_257_088
    estimate = estimate_memory(model, tokens=1)
    assert (estimate.weights + estimate.gradients + estimate.optimizer) / 1e9 == pytest.approx(6.79, abs=0.005)
