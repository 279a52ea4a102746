"""Adapters on quantized base weights: read through PEFT's seam, added to, and never quantized again."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from bitsandbytes.functional import _convert_weight_packed_for_cpu
from bitsandbytes.nn import Linear4bit
from datasets import Dataset
from peft import PeftModel, get_peft_model, prepare_model_for_kbit_training
from peft.utils.quantization_utils import Bnb4bitBackend, ForwardOnlyQuantizationBackend
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import nn
from torchao import quantization as torchao
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    TorchAoConfig,
)
from trl import SFTConfig, SFTTrainer

from spectral_peft import PiSSAConfig, SpectralError, SVFitConfig, export_lora, export_merged
from spectral_peft.linalg import sketch
from spectral_peft.quantized import is_same_base, refuse_unreadable
from tests.methods import METHODS, Method
from tests.models import batch, layers, logits, tensors, train_, trainable, updates
from tests.tolerance import tolerance


FUNCTION = tolerance(torch.float32, 64)


def bits4(kind: str, double: bool = False) -> BitsAndBytesConfig:
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=kind,
        bnb_4bit_use_double_quant=double,
        bnb_4bit_compute_dtype=torch.float32,
    )


def intx(bits: int) -> TorchAoConfig:
    group = torchao.PerGroup(32)
    return TorchAoConfig(torchao.IntxWeightOnlyConfig(weight_dtype=getattr(torch, f"int{bits}"), granularity=group))


KINDS: dict[str, Callable[[], object]] = {
    "nf4": lambda: bits4("nf4"),
    "nf4-double": lambda: bits4("nf4", double=True),
    "fp4": lambda: bits4("fp4"),
    "bnb-int8": lambda: BitsAndBytesConfig(load_in_8bit=True),
    "torchao-int8": lambda: TorchAoConfig(torchao.Int8WeightOnlyConfig()),
    "torchao-int4": lambda: intx(4),
}
kinds = pytest.mark.parametrize("kind", KINDS)
one_of_each = pytest.mark.parametrize("kind", ["nf4-double", "bnb-int8", "torchao-int8"])
additive = pytest.mark.parametrize("method", [method for method in METHODS if not method.replaces], ids=str)
replacing = pytest.mark.parametrize("method", [method for method in METHODS if method.replaces], ids=str)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved model; sizes are multiples of 64, the block of bitsandbytes."""
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=64,
        tie_word_embeddings=False,
        initializer_range=0.1,
    )
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("base")
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture
def load(folder: Path) -> Callable[..., nn.Module]:
    def load(kind: str | None = None, dtype: torch.dtype = torch.float32) -> nn.Module:
        quantization = {} if kind is None else {"quantization_config": KINDS[kind](), "device_map": "cpu"}
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **quantization).eval()
        for module in model.modules():
            if hasattr(module, "support_avx512bf16_for_cpu"):  # else the first call would change the 4-bit function
                module.support_avx512bf16_for_cpu = False
        return model

    return load


def trained(base: nn.Module, method: Method, **fields: object) -> PeftModel:
    model = get_peft_model(base, method(**fields))
    train_(model, method.lr)
    return model


@additive
@kinds
def test_it_starts_as_the_base_trains_and_leaves_the_base_alone(method: Method, kind: str, load: Callable) -> None:
    expected = logits(load(kind))
    model = get_peft_model(load(kind), method())
    assert torch.equal(logits(model), expected)
    train_(model, method.lr)
    assert (logits(model) - expected).abs().max() > 0.1
    with model.disable_adapter():
        assert torch.equal(logits(model), expected)
    assert torch.equal(logits(model.unload()), expected)


@additive
@one_of_each
def test_the_factors_are_those_of_the_dequantized_weight(method: Method, kind: str, load: Callable) -> None:
    """In float32, and those that the same weight without quantization has."""
    model = get_peft_model(load(kind), method(target_modules=["up_proj"]))
    plain = load()
    for layer in layers(model):
        plain.get_submodule(layer.key).weight.data.copy_(layer.effective_weight())
    plain = get_peft_model(plain, method(target_modules=["up_proj"]))
    for quantized, update in zip(updates(model), updates(plain), strict=True):
        assert {value.dtype for value in quantized.parameters()} == {torch.float32}
        for name, value in update.named_parameters():
            assert torch.equal(quantized.get_parameter(name), value)


@additive
@kinds
def test_the_output_is_that_of_the_base_plus_the_formula(method: Method, kind: str, load: Callable) -> None:
    layer = next(layers(trained(load(kind), method)))
    x = torch.randn(3, layer.in_features)
    change = method.matrix(tensors(layer.update_of("default")))
    with torch.no_grad():
        actual = (layer(x) - layer.base_layer(x)).double()
    torch.testing.assert_close(actual, x.double() @ change.T, rtol=FUNCTION, atol=FUNCTION)


@additive
@one_of_each
@pytest.mark.parametrize("save_start", [True, False])
def test_a_trained_adapter_reloads_exactly(
    method: Method, kind: str, save_start: bool, load: Callable, tmp_path: Path
) -> None:
    if not save_start and not method.recomputable:
        return
    model = trained(load(kind), method, save_start=save_start)
    model.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*quantiz")
        for low_cpu_mem_usage in (False, True):
            reloaded = PeftModel.from_pretrained(load(kind), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
            assert torch.equal(logits(reloaded), logits(model))
    assert reloaded.peft_config["default"].base_quantization == next(layers(model)).quantization_backend.backend_name


@additive
@pytest.mark.parametrize(("there", "here"), [("nf4", None), (None, "nf4"), ("fp4", "torchao-int4")])
def test_a_base_of_another_kind_is_accepted_with_a_warning(
    method: Method, there: str | None, here: str | None, load: Callable, tmp_path: Path
) -> None:
    """The change that was learned is kept exactly; what it is added to differs."""
    model = trained(load(there), method)
    model.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match=r"trained on weights of one kind \(.*is loaded on those of another \("):
        reloaded = PeftModel.from_pretrained(load(here), tmp_path)
    for first, second in zip(layers(model), layers(reloaded), strict=True):
        assert torch.equal(first.get_delta_weight("default"), second.get_delta_weight("default"))


def test_another_model_is_refused_all_the_same(load: Callable, tmp_path: Path) -> None:
    get_peft_model(load("nf4"), SVFitConfig(r=4, target_modules=["up_proj"])).save_pretrained(tmp_path)
    for kind in (None, "nf4"):
        other = load(kind)
        for name, module in other.named_modules():
            if name.endswith("up_proj"):
                module.weight.data.copy_(module.weight.data.flip(0))
        with pytest.raises(SpectralError, match="another base weight"):
            PeftModel.from_pretrained(other, tmp_path)


@pytest.mark.parametrize("kind", ["nf4", "fp4", "torchao-int4"])
def test_rounding_to_4_bits_is_within_the_tolerance_and_another_matrix_is_not(kind: str, load: Callable) -> None:
    plain = load()
    for layer in layers(get_peft_model(load(kind), SVFitConfig(r=2, target_modules="all-linear"))):
        weight, rounded = plain.get_submodule(layer.key).weight, sketch(layer.effective_weight())
        with pytest.warns(UserWarning, match="of another"):
            assert is_same_base(sketch(weight), rounded, None, layer.quantization_backend)
        assert not is_same_base(sketch(weight), rounded, None, None)
        other = sketch(torch.randn_like(weight) * weight.std())
        assert not is_same_base(other, rounded, None, layer.quantization_backend)


# Merging


@additive
@one_of_each
def test_a_merge_is_refused_and_nothing_is_merged(method: Method, kind: str, load: Callable) -> None:
    plain = "embed_tokens" if method.embeddings else "lm_head"  # the embedding would be merged first
    model = trained(load(kind), method, target_modules=["up_proj", plain])
    expected = logits(model)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(SpectralError, match=r"up_proj: .*quantized .*export_merged"):
            merge()
    assert not any(layer.merged for layer in layers(model))
    assert torch.equal(logits(model), expected)


@additive
@kinds
def test_the_merged_export_is_plain_and_has_the_function(
    method: Method, kind: str, load: Callable, tmp_path: Path
) -> None:
    model = trained(load(kind), method, target_modules=["up_proj", "q_proj"])  # others stay, quantized
    expected = logits(model)
    export_merged(model, tmp_path)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert not hasattr(merged.config, "quantization_config")
    assert {value.dtype for value in merged.parameters()} == {torch.float32}
    assert {type(module) for name, module in merged.named_modules() if name.endswith("proj")} == {nn.Linear}
    # The 8-bit product of bitsandbytes rounds its input to 8 bits too.
    rounding = 0.1 if kind == "bnb-int8" else FUNCTION
    torch.testing.assert_close(logits(merged), expected, rtol=rounding, atol=rounding)
    assert torch.equal(logits(model), expected)


@additive
def test_a_dequantized_base_merges(method: Method, load: Callable, tmp_path: Path) -> None:
    model = trained(load("nf4"), method)
    model.save_pretrained(tmp_path)
    merged = PeftModel.from_pretrained(load("nf4").dequantize(), tmp_path).merge_and_unload()
    torch.testing.assert_close(logits(merged), logits(model), rtol=FUNCTION, atol=FUNCTION)


@additive
def test_a_lora_for_the_same_quantized_base(method: Method, load: Callable, tmp_path: Path) -> None:
    model = trained(load("nf4"), method)
    export_lora(model, tmp_path)
    lora = PeftModel.from_pretrained(load("nf4"), tmp_path)
    torch.testing.assert_close(logits(lora), logits(model), rtol=10 * FUNCTION, atol=10 * FUNCTION)


# What is refused


@replacing
@one_of_each
def test_what_replaces_the_weight_is_refused(method: Method, kind: str, load: Callable) -> None:
    base = load(kind)
    with pytest.raises(
        TypeError, match=r"q_proj is quantized .* adds to the weight: SVFit, PiSSA, or SST with `pool`"
    ):
        get_peft_model(base, method())
    assert not list(layers(base))


def test_a_backend_that_keeps_its_weights_to_itself_is_named() -> None:
    with pytest.raises(TypeError, match="q_proj is quantized by gptq, which cannot dequantize it"):
        refuse_unreadable(ForwardOnlyQuantizationBackend("gptq"), "q_proj")


def test_a_weight_that_bitsandbytes_has_repacked_is_refused(load: Callable) -> None:
    """As the first call in eval mode leaves it on a CPU with AVX512-BF16."""
    base = load("nf4")
    for module in base.modules():
        if isinstance(module, Linear4bit):
            module.weight.data, _ = _convert_weight_packed_for_cpu(module.weight.data, module.weight.quant_state)
    with pytest.raises(SpectralError, match=r"q_proj: bitsandbytes has repacked .* add the adapter before its first"):
        get_peft_model(base, SVFitConfig(r=4, target_modules=["q_proj"]))


def test_an_evaluation_does_not_repack_a_weight_with_an_adapter(folder: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(folder, quantization_config=KINDS["nf4"](), device_map="cpu")
    model = get_peft_model(base, SVFitConfig(r=4, target_modules="all-linear"))
    before = [layer.effective_weight() for layer in layers(model)]
    logits(model)
    assert all(torch.equal(one, layer.effective_weight()) for one, layer in zip(before, layers(model), strict=True))


# Memory, and training as users do


def test_one_dequantized_weight_at_a_time(load: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    read, alive, most = Bnb4bitBackend.get_base_weight, weakref.WeakSet(), 0

    def counted(self: Bnb4bitBackend, layer: nn.Module) -> torch.Tensor:
        nonlocal most
        weight = read(self, layer)
        alive.add(weight)
        most = max(most, len(alive))
        return weight

    monkeypatch.setattr(Bnb4bitBackend, "get_base_weight", counted)
    model = get_peft_model(load("nf4"), PiSSAConfig(r=4, target_modules="all-linear"))
    train_(model, 1e-3, steps=1)
    assert most == 1
    assert not alive


@additive
@one_of_each
def test_prepare_model_for_kbit_training(method: Method, kind: str, load: Callable) -> None:
    """Gradient checkpointing, which it switches on, gives the gradients of the plain run."""
    gradients = []
    for prepared in (False, True):
        base = prepare_model_for_kbit_training(load(kind)) if prepared else load(kind)
        model = get_peft_model(base, method()).train()
        model(input_ids=batch(), labels=batch()).loss.backward()
        assert len(trainable(model)) == 14 * len(method.trained)
        gradients.append([value.grad for value in trainable(model)])
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(checkpointed, plain)


@additive
@pytest.mark.parametrize("kind", ["nf4", "torchao-int8"])
def test_over_a_bfloat16_base(method: Method, kind: str, load: Callable, tmp_path: Path) -> None:
    model = get_peft_model(load(kind, torch.bfloat16), method())
    assert torch.equal(logits(model), logits(load(kind, torch.bfloat16)))
    assert {value.dtype for value in trainable(model)} == {torch.float32}
    train_(model, method.lr)
    model.save_pretrained(tmp_path / "adapter")
    reloaded = PeftModel.from_pretrained(load(kind, torch.bfloat16), tmp_path / "adapter")
    assert torch.equal(logits(reloaded), logits(model))
    export_merged(model, tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto")
    assert next(merged.parameters()).dtype == torch.bfloat16
    exact, rounded = logits(model).float(), logits(merged).float()
    assert (rounded - exact).norm() < 0.02 * exact.norm()


def test_trl_casts_what_trains_and_it_trains_in_float32_all_the_same(
    thin_method: Method, load: Callable, tmp_path: Path
) -> None:
    """At a learning rate at which steps on entries of bfloat16 would be lost."""
    words = Tokenizer(WordLevel({str(number): number for number in range(64)}, unk_token="0"))
    rows = torch.randint(2, 64, (8, 12)).tolist()
    trainer = SFTTrainer(
        model=load("nf4"),
        args=SFTConfig(
            output_dir=str(tmp_path), max_steps=2, learning_rate=1e-5, report_to=[], use_cpu=True, bf16=False
        ),
        train_dataset=Dataset.from_list([{"input_ids": row} for row in rows]),
        peft_config=thin_method(task_type="CAUSAL_LM"),
        processing_class=PreTrainedTokenizerFast(tokenizer_object=words, eos_token="1", pad_token="0"),
    )
    assert {value.dtype for value in trainable(trainer.model)} == {torch.bfloat16}
    assert torch.equal(logits(trainer.model), logits(load("nf4")))
    before = get_peft_model(load("nf4"), thin_method())
    with pytest.warns(UserWarning, match="had been cast to 16 bits"):
        trainer.train()
    moved, entries = 0, 0
    for value, start in zip(trainable(trainer.model), trainable(before), strict=True):
        assert value.dtype == torch.float32
        moved, entries = moved + int((value != start).sum()), entries + value.numel()
    assert moved > 0.99 * entries
