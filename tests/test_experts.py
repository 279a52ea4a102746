"""The matrices of a stacked parameter are adapted as if each were a layer."""

from __future__ import annotations

import copy
import pickle
import warnings
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from spectral_peft import SpectralError, export_lora, export_merged, hotswap_adapter
from spectral_peft.experts import SpectralExperts
from spectral_peft.stored import open_adapter
from tests.methods import METHODS, PISSA, POOLED_SST, SVFIT, Method, with_starts
from tests.models import batch, layers, logits, tensors, train_, updates
from tests.tolerance import tolerance


FUNCTION = tolerance(torch.float32, 32)
BOTH = ["experts.gate_up_proj", "experts.down_proj"]
REPLACING = [method for method in METHODS if method.replaces]


def moe(seed: int = 0, **fields: object) -> PreTrainedModel:
    """A two-layer Qwen3-MoE with four experts of which two see each token."""
    config = Qwen3MoeConfig(
        hidden_size=32, moe_intermediate_size=24, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=8, vocab_size=64, num_experts=4, num_experts_per_tok=2, initializer_range=0.1,
        tie_word_embeddings=False, **fields,
    )  # fmt: skip
    torch.manual_seed(seed)
    return Qwen3MoeForCausalLM(config).eval()


def mixtral() -> PreTrainedModel:
    config = MixtralConfig(
        hidden_size=32, intermediate_size=24, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=64, num_local_experts=3, num_experts_per_tok=2, initializer_range=0.1,
    )  # fmt: skip
    torch.manual_seed(0)
    return MixtralForCausalLM(config).eval()


def gpt_oss() -> PreTrainedModel:
    """Its stacks hold transposed matrices."""
    config = GptOssConfig(
        hidden_size=32, intermediate_size=24, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        head_dim=8, vocab_size=64, num_local_experts=3, num_experts_per_tok=2, initializer_range=0.1, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    return GptOssForCausalLM(config).eval()


def config_of(method: Method, **fields: object) -> object:
    return method(**{"target_modules": ["q_proj"], "target_parameters": BOTH, **fields})


def adapted(method: Method, base=moe, **fields: object) -> PeftModel:
    return get_peft_model(base(), config_of(method, **fields)).eval()


def trained(method: Method, **fields: object) -> PeftModel:
    model = adapted(method, **fields)
    train_(model, method.lr)
    return model


def by_the_formula(model: PeftModel, method: Method, base: nn.Module) -> nn.Module:
    """`base` with the method's formula added to its weights."""
    for layer in layers(model):
        matrix = method.matrix(tensors(layer.update_of("default"))).float()
        owner, _, last = layer.key.rpartition(".")
        if last.isdigit():
            module, _, name = owner.rpartition(".")
            getattr(base.get_submodule(module), name).data[int(last)] += matrix
        else:
            base.get_submodule(layer.key).weight.data += matrix
    return base


@pytest.mark.parametrize("base", [moe, mixtral, gpt_oss])
def test_the_start_is_the_base_and_training_is_the_formula(thin_method: Method, base) -> None:
    model = adapted(thin_method, base)
    assert torch.equal(logits(model), logits(base()))
    before = {name: value.clone() for name, value in model.named_parameters()}
    train_(model, thin_method.lr)
    assert (logits(model) - logits(base())).abs().max() > 1e-3
    torch.testing.assert_close(
        logits(model), logits(by_the_formula(model, thin_method, base())), rtol=FUNCTION, atol=FUNCTION
    )
    for name, value in model.named_parameters():
        trains = any(f".default.{own}" in name for own in thin_method.trained)
        assert value.requires_grad == trains
        if not trains and not any(f".default.{own}" in name for own in thin_method.moved):
            assert torch.equal(value, before[name])
    moved = [any(bool(value.any()) for _, value in update.trained_parameters()) for update in updates(model)]
    assert all(moved)


class Stacked(nn.Module):
    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, x: Tensor) -> Tensor:  # shape: (rows, n) -> (experts, rows, m)
        return torch.einsum("emn,tn->etm", self.weight, x)


class Apart(nn.Module):
    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(*matrix.shape[::-1], bias=False) for matrix in weight)
        for expert, matrix in zip(self.experts, weight, strict=True):
            expert.weight.data.copy_(matrix)

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([expert(x) for expert in self.experts])


def test_it_trains_as_layers_of_their_own_do(thin_method: Method) -> None:
    """With the method's own gradient too, which is not the derivative of its matrix."""
    weight, x, target = torch.randn(3, 20, 16), torch.randn(7, 16), torch.randn(3, 7, 20)
    fields = {"gradient": "enhanced", "sampling": "top"} if thin_method is POOLED_SST else {}
    stacked = get_peft_model(
        nn.ModuleDict({"experts": Stacked(weight)}),
        thin_method(target_modules=[], target_parameters=["experts.weight"], **fields),
    )
    apart = get_peft_model(
        nn.ModuleDict({"experts": Apart(weight)}), thin_method(target_modules=["0", "1", "2"], **fields)
    )
    for model in (stacked, apart):
        optimizer = torch.optim.SGD([value for value in model.parameters() if value.requires_grad], lr=0.1)
        experts = model.base_model.model["experts"]
        for _ in range(4):
            (experts(x) - target).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    for ours, theirs in zip(updates(stacked), updates(apart), strict=True):
        assert ours.matrix().abs().max() > 1e-4
        torch.testing.assert_close(ours.matrix(), theirs.matrix(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("thin_method", "save_start"), with_starts([method for method in METHODS if not method.replaces]), ids=str
)
def test_a_trained_adapter_reloads_exactly(thin_method: Method, save_start: bool, tmp_path: Path) -> None:
    model = trained(thin_method, save_start=save_start)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(moe(), tmp_path)
    assert torch.equal(logits(again), logits(model))
    with pytest.raises(SpectralError, match=r"another base weight|not those that"):
        logits(PeftModel.from_pretrained(moe(seed=1), tmp_path))
    if save_start:
        assert sum("experts" in name for name in open_adapter(tmp_path).updates) == 16


def test_merging_and_unloading(thin_method: Method) -> None:
    model = trained(thin_method)
    expected, names = logits(model), {name for name, _ in moe().named_parameters()}
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(moe()))
    model.merge_adapter(safe_merge=True)
    torch.testing.assert_close(logits(model), expected, rtol=FUNCTION, atol=FUNCTION)
    weight = model.base_model.model.model.layers[0].mlp.experts.base_layer.down_proj
    assert not torch.equal(weight, moe().model.layers[0].mlp.experts.down_proj)
    model.unmerge_adapter()
    torch.testing.assert_close(weight.data, moe().model.layers[0].mlp.experts.down_proj.data)
    torch.testing.assert_close(logits(model), expected, rtol=FUNCTION, atol=FUNCTION)
    model.merge_adapter()
    with model.disable_adapter():
        torch.testing.assert_close(logits(model), logits(moe()), rtol=FUNCTION, atol=FUNCTION)
    merged = trained(thin_method).merge_and_unload()
    assert {name for name, _ in merged.named_parameters()} == names
    torch.testing.assert_close(logits(merged), expected, rtol=FUNCTION, atol=FUNCTION)
    plain = trained(thin_method).unload()
    assert {name for name, _ in plain.named_parameters()} == names
    assert torch.equal(logits(plain), logits(moe()))


def test_a_broken_update_is_not_merged(thin_method: Method) -> None:
    model = adapted(thin_method)
    before = {name: value.clone() for name, value in model.named_parameters()}
    last = list(updates(model))[-1]
    with torch.no_grad():
        next(value for _, value in last.trained_parameters()).fill_(float("nan"))
    with pytest.raises(ValueError, match=r"experts\.\w+\.3: NaN"):
        model.merge_adapter(safe_merge=True)
    assert all(torch.equal(value, before[name]) for name, value in model.named_parameters() if "base_layer" in name)


def test_several_adapters(thin_method: Method) -> None:
    """They may differ in their parameters."""
    model = get_peft_model(moe(), config_of(thin_method, init_weights=False), "one").eval()
    model.add_adapter("two", config_of(thin_method, init_weights=False, r=4, target_parameters=BOTH[1:]))
    one = logits(model)
    model.set_adapter("two")
    two = logits(model)
    assert min((one - two).abs().max(), (two - logits(moe())).abs().max()) > 1e-3
    model.base_model.set_adapter(["one", "two"])
    layer = next(layer for layer in layers(model) if layer.key.endswith("down_proj.2"))
    base = layer.get_base_weight()
    total = base + layer.get_delta_weight("one") + layer.get_delta_weight("two")
    experts = next(module for module in model.modules() if isinstance(module, SpectralExperts))
    torch.testing.assert_close(experts._changed("down_proj")[2], total)
    model.set_adapter("one")
    assert torch.equal(logits(model), one)
    model.delete_adapter("one")
    model.set_adapter("two")
    assert torch.equal(logits(model), two)


def test_adapters_of_two_methods_share_a_model(tmp_path: Path) -> None:
    for number, method in enumerate((SVFIT, PISSA)):
        get_peft_model(moe(), config_of(method, init_weights=False)).save_pretrained(tmp_path / str(number))
    model, alone = moe(), []
    for number in range(2):
        alone.append(logits(PeftModel.from_pretrained(moe(), tmp_path / str(number))))
        model.load_adapter(tmp_path / str(number), adapter_name=f"a{number}")
    for number in range(2):
        model.set_adapter(f"a{number}")
        assert torch.equal(logits(model), alone[number])


def test_copies_pickles_and_swaps(thin_method: Method, tmp_path: Path) -> None:
    model = trained(thin_method)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(twin), logits(model))
        twin.merge_adapter()
        torch.testing.assert_close(logits(twin), logits(model), rtol=FUNCTION, atol=FUNCTION)
    model.save_pretrained(tmp_path)
    other = adapted(thin_method)
    hotswap_adapter(other, tmp_path)
    assert torch.equal(logits(other), logits(model))


def test_gradient_checkpointing_gives_the_same_gradients(thin_method: Method) -> None:
    gradients = []
    for checkpointing in (False, True):
        model = adapted(thin_method).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
            model.enable_input_require_grads()
        model(input_ids=batch(), labels=batch()).loss.backward()
        gradients.append([value.grad for value in model.parameters() if value.requires_grad])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


def test_the_merged_model_loads_without_adapters(thin_method: Method, tmp_path: Path) -> None:
    model = trained(thin_method)
    expected = logits(model)
    export_merged(model, tmp_path)
    torch.testing.assert_close(
        logits(AutoModelForCausalLM.from_pretrained(tmp_path)), expected, rtol=FUNCTION, atol=FUNCTION
    )
    assert torch.equal(logits(model), expected)


def test_a_bfloat16_base_keeps_its_dtype(thin_method: Method) -> None:
    model = get_peft_model(moe().bfloat16(), config_of(thin_method))
    assert torch.equal(logits(model), logits(moe().bfloat16()))
    train_(model, thin_method.lr)
    assert {value.dtype for value in model.parameters() if value.requires_grad} == {torch.float32}
    experts = next(module for module in model.modules() if isinstance(module, SpectralExperts))
    computed = experts._changed("down_proj").detach()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(experts._changed("down_proj"), computed)
    model.merge_adapter()
    assert computed.dtype == torch.bfloat16
    torch.testing.assert_close(computed, experts.base_layer.down_proj.data, rtol=2**-7, atol=1e-6)


def test_ranks_by_matrix_and_energy(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)  # PEFT's, about patterns that match nothing
        model = adapted(SVFIT, r="energy=0.5", rank_pattern={r"down_proj\.[01]": 3}, init_weights=False)
    ranks = {layer.key: layer.update_of("default").r for layer in layers(model)}
    assert {rank for key, rank in ranks.items() if key.endswith(("down_proj.0", "down_proj.1"))} == {3}
    assert len(set(ranks.values())) > 2
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(moe(), tmp_path)
    assert torch.equal(logits(again), logits(model))
    with pytest.raises(ValueError, match=r"rank_pattern.*down_proj\\\\.9"):
        adapted(SVFIT, rank_pattern={r"down_proj\.9": 3})


def check_refused(error: type[Exception], message: str, base: nn.Module, config: object) -> None:
    before = str(base)
    with pytest.raises(error, match=message):
        get_peft_model(base, config)
    assert str(base) == before


@pytest.mark.parametrize("method", REPLACING, ids=str)
def test_methods_that_replace_the_weight_are_refused(method: Method) -> None:
    check_refused(TypeError, r"gate_up_proj\.0 .*cannot replace", moe(), config_of(method))


def test_what_is_not_possible_says_so_and_changes_nothing(thin_method: Method, tmp_path: Path) -> None:
    check_refused(ValueError, "`dropout` should be 0", moe(), config_of(thin_method, dropout=0.1))
    check_refused(
        TypeError,
        r"norm\.weight is .* \(32,\)",
        moe(),
        config_of(thin_method, target_parameters=["model.norm.weight"]),
    )
    check_refused(ValueError, "shared out", moe(), config_of(thin_method, r="budget=0.5", target_modules=[]))
    model = adapted(thin_method, init_weights=False)
    model.add_adapter("two", config_of(thin_method))
    with pytest.raises(ValueError, match="`adapter_names` needs adapters of modules"):
        model(input_ids=batch(), adapter_names=["default", "two"])
    with pytest.raises(ValueError, match="cannot be added up"):
        model.add_weighted_adapter(["default", "two"], [1.0, 1.0], "sum")
    with pytest.raises(SpectralError, match="Use `export_merged`"):
        export_lora(model, tmp_path / "lora")
    assert not (tmp_path / "lora").exists()
    broken = moe()
    with torch.no_grad():
        broken.model.layers[1].mlp.experts.down_proj[2].fill_(float("nan"))
    check_refused(SpectralError, r"layers\.1\.mlp\.experts\.down_proj\.2", broken, config_of(thin_method))


def test_a_failing_second_adapter_leaves_the_first_alone(thin_method: Method) -> None:
    model = get_peft_model(moe(), config_of(thin_method, init_weights=False, target_parameters=BOTH[:1])).eval()
    expected = logits(model)
    with torch.no_grad():
        model.base_model.model.model.layers[1].mlp.experts.base_layer.down_proj[2].fill_(float("nan"))
    with pytest.raises(SpectralError):
        model.add_adapter("two", config_of(thin_method))
    with torch.no_grad():
        weight = moe().model.layers[1].mlp.experts.down_proj[2]
        model.base_model.model.model.layers[1].mlp.experts.base_layer.down_proj[2].copy_(weight)
    assert torch.equal(logits(model), expected)
    assert list(model.peft_config) == ["default"]
