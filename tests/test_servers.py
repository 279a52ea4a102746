"""What is exported is what servers read: their rules, stated here a second time, without their code or ours.

vLLM reads a LoRA by `PEFTHelper` and `parse_fine_tuned_lora_name`; llama.cpp by convert_lora_to_gguf.py, and dense
models by convert_hf_to_gguf.py.
"""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from spectral_peft import PiSSAConfig, SVFitConfig, export_lora, export_merged
from tests.methods import Method
from tests.models import gpt2, llama, logits, train_, updates
from tests.test_cli import run
from tests.tolerance import tolerance


FUNCTION = tolerance(torch.float32, 64)


def trained(config: object, lr: float, base: nn.Module | None = None) -> PeftModel:
    model = get_peft_model(llama() if base is None else base, config)
    train_(model, lr)
    return model


def vllm_reads(folder: Path) -> dict[str, tuple[Tensor, Tensor, float]]:
    """Module name: (A, B, scaling). One rank and one scaling for all; rank and alpha patterns are never looked at."""
    config = json.loads((folder / "adapter_config.json").read_text())
    assert isinstance(config["target_modules"], list)
    assert config["bias"] == "none"
    assert not config["modules_to_save"]
    assert not config["use_dora"]
    assert not config["use_rslora"]
    assert config["r"] <= 512
    found: dict[str, dict[str, Tensor]] = {}
    for name, value in load_file(folder / "adapter_model.safetensors").items():
        match = re.fullmatch(r"base_model\.model\.(.+)\.(lora_A|lora_B)\.weight", name)
        assert match, f"unsupported LoRA weight {name}"
        assert match[1].rpartition(".")[2] in config["target_modules"]
        found.setdefault(match[1], {})[match[2]] = value
    for pair in found.values():
        assert pair["lora_A"].shape[0] == pair["lora_B"].shape[1] == config["r"]
    scaling = config["lora_alpha"] / config["r"]
    return {name: (pair["lora_A"], pair["lora_B"], scaling) for name, pair in found.items()}


def llama_cpp_reads(folder: Path) -> dict[str, tuple[Tensor, Tensor, float]]:
    """Name of a base tensor: (A, B, scaling); any tensor but a pair of a LoRA ends the conversion."""
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    pairs: dict[str, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        side = next(side for side in ("lora_A", "lora_B") if f".{side}.weight" in name)
        base = name.replace("base_model.model.", "").replace(f".{side}.weight", ".weight")
        pairs.setdefault(base, {})[side] = value
    return {
        name: (pair["lora_A"], pair["lora_B"], float(config["lora_alpha"]) / len(pair["lora_A"]))
        for name, pair in pairs.items()
    }


def served(read: dict[str, tuple[Tensor, Tensor, float]], base: nn.Module) -> nn.Module:
    for name, (A, B, scaling) in read.items():
        base.get_parameter(f"{name.removesuffix('.weight')}.weight").data += scaling * B @ A
    return base


@pytest.mark.parametrize("reads", [vllm_reads, llama_cpp_reads])
def test_servers_compute_what_the_adapter_computes(thin_method: Method, reads, tmp_path: Path) -> None:
    fields = {} if thin_method.fields else {"rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 5}}
    model = trained(thin_method(**fields), thin_method.lr)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        export_lora(model, tmp_path)
    read = reads(tmp_path)
    assert len(read) == len(list(updates(model)))
    torch.testing.assert_close(logits(served(read, llama())), logits(model), rtol=FUNCTION, atol=FUNCTION)


def test_scaling_of_pissa_is_in_the_factors(tmp_path: Path) -> None:
    model = trained(PiSSAConfig(r=4, alpha=12, target_modules="all-linear"), 1e-2)
    export_lora(model, tmp_path)
    torch.testing.assert_close(
        logits(served(vllm_reads(tmp_path), llama())), logits(model), rtol=FUNCTION, atol=FUNCTION
    )


def test_the_base_model_is_named(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    export_lora(get_peft_model(base, SVFitConfig(r=4, target_modules=["q_proj"])), tmp_path / "lora")
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert AutoConfig.from_pretrained(config["base_model_name_or_path"]).architectures == ["LlamaForCausalLM"]


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"modules_to_save": ["lm_head"]}, "lm_head"),
        ({"trainable_token_indices": [1, 2]}, "embed_tokens"),
        ({"bias": "spectral_only", "target_modules": ["c_attn"]}, "bias"),
    ],
)
def test_what_servers_refuse_is_said(fields: dict[str, object], named: str, tmp_path: Path) -> None:
    base = gpt2() if "bias" in fields else llama()
    model = get_peft_model(base, SVFitConfig(**{"r": 4, "target_modules": ["q_proj"], **fields}))
    with pytest.warns(UserWarning, match=rf"vLLM and llama.cpp refuse .*{named}.*export_merged"):
        export_lora(model, tmp_path)
    with pytest.raises(AssertionError):
        vllm_reads(tmp_path)
    with pytest.raises(StopIteration):
        llama_cpp_reads(tmp_path)
    assert PeftModel.from_pretrained(gpt2() if "bias" in fields else llama(), tmp_path)


def test_a_rank_beyond_vllm_s_is_said(tmp_path: Path) -> None:
    model = get_peft_model(nn.Sequential(nn.Linear(600, 600)), SVFitConfig(r=513, target_modules=["0"], svd="exact"))
    with pytest.warns(UserWarning, match="above 512, and this one is 513"):
        export_lora(model, tmp_path / "large")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        export_lora(model, tmp_path / "small", rank=512)


def converter_reads(folder: Path) -> dict[str, Tensor]:
    """The tensors of a dense folder, by the files that its index names, if it has one."""
    index, tensors = folder / "model.safetensors.index.json", {}
    files = sorted(folder.glob("model*.safetensors"))
    if index.is_file():
        weight_map = json.loads(index.read_text())["weight_map"]
        files = [folder / name for name in sorted(set(weight_map.values()))]
    for file in files:
        with safe_open(file, framework="pt") as part:
            tensors.update({name: part.get_tensor(name) for name in part.keys()})  # noqa: SIM118
    if index.is_file():
        assert set(weight_map) == set(tensors)
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert "quantization_config" not in config
    if config["tie_word_embeddings"]:
        assert "lm_head.weight" not in tensors
    return tensors


@pytest.mark.parametrize("shard_bytes", [20_000, 2**30])
@pytest.mark.parametrize("tied", [False, True])
def test_converters_find_a_dense_model(method: Method, tied: bool, shard_bytes: int, tmp_path: Path) -> None:
    config = llama().config
    config.tie_word_embeddings = tied
    model = trained(method(), method.lr, LlamaForCausalLM(config))
    export_merged(model, tmp_path, shard_bytes=shard_bytes)
    tensors, expected = converter_reads(tmp_path), model.merge_and_unload().state_dict()
    assert set(tensors) == set(expected) - ({"lm_head.weight"} if tied else set())
    for name, value in tensors.items():
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, expected[name], rtol=FUNCTION, atol=FUNCTION)


def test_config_and_generation_config_are_those_of_the_model(tmp_path: Path) -> None:
    base = llama()
    base.generation_config = GenerationConfig(temperature=0.3, do_sample=True, eos_token_id=5)
    base.save_pretrained(tmp_path / "base")
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(tmp_path / "base"), SVFitConfig(r=4, target_modules=["q_proj"])
    )
    export_merged(model, tmp_path / "half", dtype=torch.bfloat16)
    export_merged(model, tmp_path / "whole")
    for name, dtype in (("half", torch.bfloat16), ("whole", torch.float32)):
        dense = AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype="auto")
        assert dense.dtype == dtype
        assert dense.config.dtype == dtype
        assert (dense.generation_config.temperature, dense.generation_config.eos_token_id) == (0.3, 5)
    assert model.get_base_model().config.dtype == torch.float32


def test_the_command_brings_the_tokenizer(tmp_path: Path) -> None:
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    llama().save_pretrained(base)
    words = Tokenizer(WordLevel({"a": 0, "b": 1}, unk_token="a"))
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="a").save_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base)
    get_peft_model(model, SVFitConfig(r=4, target_modules=["q_proj"])).save_pretrained(adapter)
    run("export", adapter, tmp_path / "dense", "--to", "merged")
    assert AutoTokenizer.from_pretrained(tmp_path / "dense")("b").input_ids == [1]
    assert converter_reads(tmp_path / "dense")
