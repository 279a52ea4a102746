"""Which modules an adapter goes on, and everything around the update that PEFT users expect."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding
from transformers.pytorch_utils import Conv1D

from spectral_peft import SpectralError
from spectral_peft.embedding import SpectralEmbedding
from tests.methods import METHODS, Method
from tests.models import approximated_, batch, gpt2, layers, llama, logits, tensors, train_, updates
from tests.tolerance import tolerance


FUNCTION = tolerance(torch.float32, 64)


class Mixer(nn.Module):
    """The parts of a Mamba block by which it is known."""

    def __init__(self) -> None:
        super().__init__()
        self.A_log, self.D = nn.Parameter(torch.zeros(8)), nn.Parameter(torch.zeros(8))
        self.dt_proj = nn.Linear(8, 8, bias=False)


class DeltaNet(nn.Module):
    """The parts of a gated delta net, which calls all of its layers."""

    def __init__(self) -> None:
        super().__init__()
        self.A_log = nn.Parameter(torch.zeros(8))
        self.out_proj = nn.Linear(8, 8, bias=False)


class Tower(nn.Module):
    """One module of every kind that may or may not take an adapter."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 8)
        self.up = nn.Linear(8, 12)
        self.conv1d = Conv1D(8, 12)
        self.norm = nn.LayerNorm(8)
        self.conv = nn.Conv2d(3, 3, 1)
        self.attention = nn.MultiheadAttention(8, 2)
        self.quantized = nn.Linear(8, 8)
        self.renormalized = nn.Embedding(20, 8, max_norm=1.0)
        self.encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.mixer = Mixer()
        self.head = nn.Linear(8, 4)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.conv1d(torch.relu(self.up(self.embed(ids))))))


def tower() -> Tower:
    torch.manual_seed(0)
    model = Tower()
    model.quantized.weight = nn.Parameter(torch.ones(8, 8, dtype=torch.int8), requires_grad=False)
    return model.eval()


IDS = torch.arange(10).reshape(2, 5)


def adapted_names(model: nn.Module) -> set[str]:
    return {layer.key for layer in layers(model)}


@pytest.mark.parametrize("name", ["embed", "up", "conv1d"])
def test_every_kind_of_layer_computes_its_merged_weight(method: Method, name: str) -> None:
    if name == "embed" and not method.embeddings:
        with pytest.raises(TypeError, match=r"embed is an nn\.Embedding, on which"):
            get_peft_model(tower(), method(r=4, target_modules=[name]))
        return
    model = get_peft_model(tower(), method(r=4, target_modules=[name]))
    for update in updates(model):
        for _, parameter in update.trained_parameters():
            parameter.data.add_(torch.randn_like(parameter), alpha=0.3)
    expected = model(IDS)
    assert (expected - tower()(IDS)).abs().max() > 0.01
    layer = next(layers(model))
    weight = layer.effective_weight().double()
    delta = method.matrix(tensors(layer.update_of("default"))) - (weight if method.replaces else 0)
    delta = delta if name == "up" else delta.T
    torch.testing.assert_close(layer.get_delta_weight("default").double(), delta, rtol=FUNCTION, atol=FUNCTION)
    merged = model.merge_and_unload()
    expected_weight = tower().get_submodule(name).weight + delta
    torch.testing.assert_close(
        merged.get_submodule(name).weight.double(), expected_weight, rtol=FUNCTION, atol=FUNCTION
    )
    torch.testing.assert_close(merged(IDS), expected, rtol=FUNCTION, atol=FUNCTION)


def test_indices_are_never_dropped(embedding_method: Method) -> None:
    model = get_peft_model(tower(), embedding_method(r=4, target_modules=["embed"], dropout=0.5)).train()
    expected = approximated_(tower(), model, embedding_method).embed(IDS)
    rounding = FUNCTION if embedding_method.replaces else 0
    torch.testing.assert_close(model.embed(IDS), expected, rtol=rounding, atol=rounding)


def test_conv1d_is_found_by_all_linear_without_a_flag(method: Method) -> None:
    model = get_peft_model(gpt2(), method())
    assert {type(layer.base_layer) for layer in layers(model)} == {Conv1D}
    assert sum(1 for _ in layers(model)) == 8


def test_an_embedding_scale_scales_the_update(embedding_method: Method) -> None:
    base = tower()
    base.embed = Gemma3TextScaledWordEmbedding(20, 8, padding_idx=None, embed_scale=3.0)
    model = get_peft_model(base, embedding_method(r=4, target_modules=["embed"]))
    layer = next(layers(model))
    assert isinstance(layer, SpectralEmbedding)
    for _, parameter in next(updates(model)).trained_parameters():
        parameter.data.normal_()
    change = layer(IDS) - layer.base_layer(IDS)
    expected = 3 * layer.get_delta_weight("default")[IDS]
    torch.testing.assert_close(change, expected, rtol=FUNCTION, atol=FUNCTION)


def test_the_row_of_padding_does_not_train(embedding_method: Method) -> None:
    base = tower()
    base.embed = nn.Embedding(20, 8, padding_idx=3)
    model = get_peft_model(base, embedding_method(r=4, target_modules=["embed"])).train()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(3):
        (model(IDS) ** 2).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    layer, weight = next(layers(model)), tower().embed.weight
    # Zero up to the rounding of the SVD.
    assert layer(torch.tensor([3])).abs().max() < FUNCTION
    assert layer.merged_weight("default")[3].abs().max() < FUNCTION
    assert not torch.equal(layer(torch.tensor([4])), weight[4:5])


def test_a_name_is_that_of_one_method(method: Method) -> None:
    model = tower()
    other = next(each for each in METHODS if each.config is not method.config)
    inject_adapter_in_model(method(r=4, target_modules=["up"]), model, "mine")
    before = model(IDS)
    with pytest.raises(ValueError, match=r"up: there is an adapter 'mine' of the method .* already"):
        inject_adapter_in_model(other(r=4, target_modules=["up"]), model, "mine")
    assert torch.equal(model(IDS), before)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("conv", r"conv is a Conv2d; supported are .*exclude_modules"),
        ("norm", r"norm is a LayerNorm; supported are"),
        ("quantized", r"quantized \(Linear\) is torch\.int8; supported are float16"),
        ("attention.out_proj", r"out_proj is the output projection of an nn\.MultiheadAttention, .* no effect"),
        ("mixer.dt_proj", r"mixer\.dt_proj belongs to a Mixer.* no effect.*exclude_modules"),
        ("encoder.linear1", r"encoder\.linear1 belongs to a TransformerEncoderLayer.* no effect"),
        ("renormalized", r"renormalized is an nn\.Embedding that renormalizes"),
    ],
)
def test_what_cannot_take_an_adapter_is_named(method: Method, name: str, message: str) -> None:
    model = tower()
    with pytest.raises(TypeError, match=message):
        get_peft_model(model, method(r=4, target_modules=["up", name]))
    assert not list(layers(model))
    assert torch.equal(model(IDS), tower()(IDS))


def test_a_delta_net_is_no_mamba(method: Method) -> None:
    model = nn.ModuleDict({"mixer": DeltaNet()})
    get_peft_model(model, method(r=4, target_modules=["out_proj"]))
    assert adapted_names(model) == {"mixer.out_proj"}


def test_a_weight_without_data_is_refused(method: Method) -> None:
    with torch.device("meta"):
        model = Tower()
    with pytest.raises(
        SpectralError, match=r"up: The weight of shape .* is on the meta device and has no data; load it first"
    ):
        get_peft_model(model, method(r=4, target_modules=["up"]))


def test_a_target_that_matches_nothing_raises(method: Method) -> None:
    with pytest.raises(ValueError, match="not found in the base model"):
        get_peft_model(llama(), method(target_modules=["nothing"]))


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"target_modules": ["q_proj"]}, {"0.self_attn.q_proj", "1.self_attn.q_proj"}),
        ({"target_modules": r".*\.1\..*(up|down)_proj"}, {"1.mlp.up_proj", "1.mlp.down_proj"}),
        (
            {"target_modules": ["q_proj", "v_proj"], "exclude_modules": ["q_proj"]},
            {f"{i}.self_attn.v_proj" for i in "01"},
        ),
        ({"target_modules": ["q_proj"], "layers_to_transform": [1]}, {"1.self_attn.q_proj"}),
        ({"target_modules": ["q_proj"], "layers_to_transform": 0, "layers_pattern": "layers"}, {"0.self_attn.q_proj"}),
        ({"target_modules": None}, {f"{i}.self_attn.{n}_proj" for i in "01" for n in "qv"}),
    ],
)
def test_targets(method: Method, fields: dict[str, object], expected: set[str]) -> None:
    model = get_peft_model(llama(), method(**fields))
    assert adapted_names(model) == {f"model.layers.{name}" for name in expected}


def test_modules_that_were_excluded_are_not_called_unmatched(method: Method) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*no modules were excluded")
        get_peft_model(llama(), method(target_modules=["q_proj", "k_proj"], exclude_modules=["q_proj"]))


def test_all_linear_leaves_the_head_out(method: Method) -> None:
    names = adapted_names(get_peft_model(llama(), method(target_modules="all-linear")))
    assert "lm_head" not in names
    assert len(names) == 14


@pytest.mark.parametrize(("bias", "expected"), [("none", 0), ("spectral_only", 2), ("all", 12)])
def test_bias(method: Method, tmp_path: Path, bias: str, expected: int) -> None:
    model = get_peft_model(tower(), method(r=2, target_modules=["up", "conv1d"], bias=bias))
    trained = [name for name, value in model.named_parameters() if value.requires_grad and name.endswith("bias")]
    assert len(trained) == expected
    for name, value in model.named_parameters():
        if name in trained:
            value.data += 1
    model.save_pretrained(tmp_path)
    assert torch.equal(PeftModel.from_pretrained(tower(), tmp_path)(IDS), model(IDS))


def test_modules_to_save_train_and_reload(method: Method, tmp_path: Path) -> None:
    def classifier() -> nn.Module:
        torch.manual_seed(0)
        config = LlamaConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=1,
            num_attention_heads=4,
            vocab_size=64,
            num_labels=3,
            pad_token_id=0,
        )
        return LlamaForSequenceClassification(config).eval()

    model = get_peft_model(classifier(), method(task_type="SEQ_CLS"))
    optimizer = torch.optim.AdamW([value for value in model.parameters() if value.requires_grad], lr=method.lr)
    model(input_ids=batch(), labels=torch.tensor([0, 2])).loss.backward()
    optimizer.step()
    assert not torch.equal(logits(model), logits(classifier()))
    model.save_pretrained(tmp_path)
    assert any("score.weight" in name for name in load_file(tmp_path / "adapter_model.safetensors"))
    torch.manual_seed(7)
    assert torch.equal(logits(PeftModel.from_pretrained(classifier(), tmp_path)), logits(model))


def test_trainable_tokens_train_and_reload(method: Method, tmp_path: Path) -> None:
    model = get_peft_model(llama(), method(trainable_token_indices=[1, 2, 3]))
    train_(model, method.lr)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(llama(), tmp_path)), logits(model))


@pytest.mark.parametrize("tied", [False, True])
def test_trained_tokens_are_merged_with_the_adapters(method: Method, tied: bool) -> None:
    config = llama().config
    config.tie_word_embeddings = tied
    torch.manual_seed(0)
    base = LlamaForCausalLM(config)
    tokens = batch().unique().tolist()[:3]
    model = get_peft_model(copy.deepcopy(base), method(trainable_token_indices=tokens))
    train_(model, method.lr)
    expected, unloaded = logits(model), copy.deepcopy(model).unload()
    merged = model.merge_and_unload(safe_merge=True)
    torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-4)
    for dense in (merged, unloaded):
        assert {name: value.shape for name, value in dense.named_parameters()} == {
            name: value.shape for name, value in base.named_parameters()
        }
        assert not any(isinstance(module, BaseTunerLayer) for module in dense.modules())
    assert torch.equal(logits(unloaded), logits(base))
    assert (merged.lm_head.weight is merged.model.embed_tokens.weight) == tied
    moved = (merged.model.embed_tokens.weight - base.model.embed_tokens.weight).abs().amax(1) > 1e-4
    assert moved.nonzero().flatten().tolist() == tokens


def test_tokens_of_an_adapted_embedding_are_refused(embedding_method: Method) -> None:
    """By PEFT, for LoRA too; the model is given back as it was."""
    model = llama()
    before = str(model)
    with pytest.raises(TypeError, match="trainable_token_indices cannot be applied"):
        get_peft_model(model, embedding_method(target_modules=["embed_tokens"], trainable_token_indices=[1]))
    assert str(model) == before


# Ranks


def ranks(model: nn.Module) -> dict[str, int]:
    return {layer.key.rpartition(".")[2]: layer.update_of("default").r for layer in layers(model)}


def test_a_rank_pattern_that_matches_nothing_is_refused(method: Method) -> None:
    model = llama()
    with pytest.raises(
        ValueError, match=r"match none of the 4 targeted modules, such as .*_proj': 'gate_prj', 'o_proj'"
    ):
        get_peft_model(
            model, method(target_modules=["q_proj", "v_proj"], rank_pattern={"gate_prj": 2, "q_proj": 4, "o_proj": 2})
        )
    assert not list(layers(model))


def test_rank_pattern_and_fractions(free_rank_method: Method) -> None:
    model = get_peft_model(llama(), free_rank_method(r=0.25, rank_pattern={"q_proj": 3, "mlp.*_proj": 0.5}))
    assert ranks(model) == {
        "q_proj": 3, "k_proj": 4, "v_proj": 4, "o_proj": 8, "gate_proj": 16, "up_proj": 16, "down_proj": 16,
    }  # fmt: skip


def test_an_energy_is_the_smallest_rank_that_holds_it(free_rank_method: Method, tmp_path: Path) -> None:
    model = get_peft_model(llama(), free_rank_method(r="energy=0.8"))
    for layer in layers(model):
        energy = torch.linalg.svdvals(layer.get_base_weight()).double().square()
        held = energy.cumsum(0) / energy.sum()
        r = layer.update_of("default").r
        assert held[r - 1] >= 0.8 > (held[r - 2] if r > 1 else 0)
    train_(model, free_rank_method.lr)
    model.save_pretrained(tmp_path)
    reloaded = PeftModel.from_pretrained(llama(), tmp_path)
    assert torch.equal(logits(reloaded), logits(model))
    assert len(reloaded.peft_config["default"].rank_pattern) == 14


@pytest.mark.parametrize("method", [method for method in METHODS if method.clamps], ids=str)
def test_a_rank_beyond_the_weight_is_clamped_with_one_warning(method: Method) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = get_peft_model(llama(), method(r=20))
    messages = [str(warning.message) for warning in caught if "clamped" in str(warning.message)]
    assert len(messages) == 1
    assert "of 4 modules" in messages[0]
    assert "model.layers.0.self_attn.k_proj (to 16)" in messages[0]
    assert ranks(model)["k_proj"] == 16
    assert ranks(model)["q_proj"] == 20


@pytest.mark.parametrize("method", [method for method in METHODS if not method.clamps and method.free_rank], ids=str)
def test_a_rank_beyond_the_weight_is_refused_and_the_model_is_left_as_it_was(method: Method) -> None:
    model = llama()
    with pytest.raises(ValueError, match=r"k_proj: `r` should be at most min\(.*\) = 16, got 20.*`rank_pattern`"):
        get_peft_model(model, method(r=20))
    assert not list(layers(model))
    assert ranks(get_peft_model(model, method(r=20, rank_pattern={"k_proj": 8, "v_proj": 8})))["k_proj"] == 8


# Beside other PEFT methods


def test_it_wraps_a_layer_of_another_peft_method(method: Method) -> None:
    from peft import LoraConfig

    model = llama()
    model.add_adapter(LoraConfig(target_modules=["q_proj"], init_lora_weights=False), "lora")
    with_lora = logits(model)
    if method.replaces:
        with pytest.raises(TypeError, match="already has an adapter of another PEFT method"):
            model.add_adapter(method(target_modules=["q_proj"]), "spectral")
        return
    model.add_adapter(method(target_modules=["q_proj"]), "spectral")
    model.set_adapter(["lora", "spectral"])
    assert torch.equal(logits(model), with_lora)


def test_a_base_in_float64(method: Method) -> None:
    model = get_peft_model(llama(torch.float64), method())
    assert {value.dtype for update in updates(model) for value in update.parameters()} == {torch.float64}
    before = logits(model)
    train_(model, method.lr)
    trained = logits(model)
    assert not torch.allclose(trained, before)
    torch.testing.assert_close(logits(model.merge_and_unload()), trained, rtol=1e-10, atol=1e-10)


def tied() -> nn.Module:
    config = llama().config
    config.tie_word_embeddings = True
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval()


def test_a_tied_head_has_an_adapter_of_its_own(method: Method) -> None:
    """PEFT warns. What replaces the weight is untied by a merge; what adds to it would be merged into both."""
    with pytest.warns(UserWarning, match="tie_word_embeddings"):
        model = get_peft_model(tied(), method(r=4, target_modules=["lm_head"]))
    embedding = model.get_input_embeddings().weight.clone()
    train_(model, method.lr)
    assert torch.equal(model.get_input_embeddings().weight, embedding)
    expected = logits(model)
    with warnings.catch_warnings(record=True):
        merged = model.merge_and_unload()
    same = torch.allclose(logits(merged), expected, rtol=FUNCTION, atol=FUNCTION)
    assert same == method.replaces, "the support matrix says otherwise"
