"""Second moments of the inputs, and the start that they give to factors."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import T5Config, T5ForConditionalGeneration
from transformers.pytorch_utils import Conv1D

from spectral_peft import Calibration, SpectralError, calibrate
from spectral_peft.linalg import singular_values, truncated_svd, whiten
from tests.models import batch, gpt2, layers, llama, logits, train_
from tests.truncated import TruncatedConfig


class Tower(nn.Module):
    """A module of every kind that can be calibrated, a module that is used twice, and one that is not used."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.tokens = nn.Embedding(20, 8)
        self.up = nn.Linear(8, 12)
        self.conv1d = Conv1D(8, 12)
        self.twice = nn.Linear(8, 8)
        self.unused = nn.Linear(8, 8)
        self.norm = nn.LayerNorm(8)
        self.seen: dict[str, list[Tensor]] = {"up": [], "conv1d": [], "twice": []}

    def forward(self, ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        x = self.tokens(ids)
        for name in ("up", "conv1d", "twice", "twice"):
            self.seen[name].append(x.detach() if attention_mask is None else x.detach()[attention_mask.bool()])
            x = torch.nn.functional.dropout(self.get_submodule(name)(x), 0.5, self.training)
        return x


USED = ["up", "conv1d", "twice"]
BATCHES = [torch.arange(10).reshape(2, 5), torch.arange(6).reshape(3, 2)]


def direct(tower: Tower, name: str) -> Tensor:
    x = torch.cat([x.reshape(-1, x.shape[-1]) for x in tower.seen[name]]).double()
    return x.T @ x / len(x)


@pytest.mark.parametrize("as_mapping", [False, True])
def test_moments_are_the_means_of_x_x_t(as_mapping: bool) -> None:
    tower = Tower()
    calibration = calibrate(tower, [{"ids": ids} for ids in BATCHES] if as_mapping else BATCHES, USED)
    for name in USED:
        moment = calibration.moment(name)
        assert moment.dtype == torch.float32
        torch.testing.assert_close(moment.double(), direct(tower, name), rtol=1e-5, atol=1e-6)
    assert calibration.tokens == {"up": 16, "conv1d": 16, "twice": 32}


def test_the_moment_of_an_embedding_is_its_token_frequencies() -> None:
    calibration = calibrate(Tower(), BATCHES, ["tokens"])
    expected = torch.tensor([2.0] * 6 + [1.0] * 4 + [0.0] * 10) / 16
    torch.testing.assert_close(calibration.moment("tokens"), expected)


def test_wide_inputs_keep_the_diagonal_only() -> None:
    tower = Tower()
    calibration = calibrate(tower, BATCHES, USED, diagonal_above=8)
    assert calibration.moment("up").shape == (8, 8)
    assert calibration.moment("conv1d").shape == (12,)
    expected = direct(tower, "conv1d").diagonal().float()
    torch.testing.assert_close(calibration.moment("conv1d"), expected, rtol=1e-5, atol=1e-6)


def test_positions_that_the_mask_excludes_are_not_counted() -> None:
    tower = Tower()
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 0, 0, 0, 0]])
    calibration = calibrate(tower, [{"ids": BATCHES[0], "attention_mask": mask}], [*USED, "tokens"])
    assert calibration.tokens == {"tokens": 4, "up": 4, "conv1d": 4, "twice": 8}
    for name in USED:
        torch.testing.assert_close(calibration.moment(name).double(), direct(tower, name), rtol=1e-5, atol=1e-6)
    assert calibration.moment("tokens").nonzero().flatten().tolist() == [0, 1, 2, 5]


@pytest.mark.parametrize("base", [llama, gpt2])
def test_all_linear_means_the_modules_of_an_adapter(base: type) -> None:
    calibration = calibrate(base(), [batch()])
    model = get_peft_model(base(), TruncatedConfig(r=4, target_modules="all-linear"))
    assert set(calibration.moments) == {layer.key for layer in layers(model)}
    for layer in layers(model):
        assert calibration.moment(layer.key).shape == (layer.in_features, layer.in_features)


def test_excluded_modules_and_patterns() -> None:
    assert set(calibrate(Tower(), BATCHES, "up|twice|unused", "unused").moments) == {"up", "twice"}


def test_a_model_with_adapters_has_the_names_of_its_base() -> None:
    model = llama()
    before = calibrate(model, [batch()], ["q_proj"])
    get_peft_model(model, TruncatedConfig(r=16, target_modules=["q_proj"]))
    after = calibrate(model, [batch()], ["q_proj"])
    assert set(after.moments) == set(before.moments)


def test_half_precision_under_autocast_is_counted_in_float32() -> None:
    exact = calibrate(llama(), [batch()], ["down_proj"])
    with torch.autocast("cpu", torch.bfloat16):
        rounded = calibrate(llama(), [batch()], ["down_proj"])
    for key, moment in rounded.moments.items():
        assert moment.dtype == torch.float32
        assert (moment - exact.moment(key)).norm() <= 0.05 * exact.moment(key).norm()


# The model is left as it was


def assert_untouched(model: nn.Module) -> None:
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_modes_hooks_and_gradients_are_as_before() -> None:
    tower = Tower().train()
    tower.norm.eval()
    modes = [module.training for module in tower.modules()]
    first, second = calibrate(tower, BATCHES, USED), calibrate(tower, BATCHES, USED)
    assert [module.training for module in tower.modules()] == modes
    assert_untouched(tower)
    assert torch.equal(first.moment("twice"), second.moment("twice"))  # nothing was dropped


@pytest.mark.parametrize(
    ("batches", "targets", "error", "message"),
    [
        ([], USED, ValueError, "`batches` should hold at least one batch"),
        (BATCHES, ["missing"], ValueError, r"`target_modules` should name modules of the model, got \['missing'\]"),
        (BATCHES, ["up", "norm"], TypeError, "norm is a LayerNorm; supported are"),
        (BATCHES, ["up", "unused"], SpectralError, r"1 targeted modules had no inputs in 2 batches.*: unused\."),
        ([{"ids": BATCHES[0], "attention_mask": torch.zeros(2, 5)}], ["up"], SpectralError, "no inputs in 1 batches"),
        ({"ids": BATCHES[0]}, USED, TypeError, "mapping of keyword arguments, got a str"),
        ([BATCHES], USED, TypeError, "got a list"),
    ],
)
def test_what_cannot_be_calibrated(batches: object, targets: list[str], error: type, message: str) -> None:
    tower = Tower().train()
    with pytest.raises(error, match=message):
        calibrate(tower, batches, targets)
    assert tower.training
    assert_untouched(tower)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_broken_inputs_are_named(value: float) -> None:
    tower = Tower().train()
    tower.up.weight.data[0, 0] = value
    with pytest.raises(SpectralError, match="The inputs of the module conv1d hold NaN or Inf"):
        calibrate(tower, BATCHES, USED)
    assert tower.training
    assert_untouched(tower)


# Files and copies


def test_a_calibration_survives_its_file(tmp_path: Path) -> None:
    calibration = calibrate(Tower(), BATCHES, [*USED, "tokens"])
    calibration.save(tmp_path / "moments.safetensors")
    loaded = Calibration.load(tmp_path / "moments.safetensors")
    assert loaded.tokens == calibration.tokens
    assert loaded.moments.keys() == calibration.moments.keys()
    assert all(torch.equal(loaded.moment(key), moment) for key, moment in calibration.moments.items())
    assert repr(loaded) == "Calibration(4 modules, 32 tokens)"


def test_files_that_are_no_calibration(tmp_path: Path) -> None:
    path = tmp_path / "moments.safetensors"
    with pytest.raises(FileNotFoundError):
        Calibration.load(path)
    save_file({"weight": torch.ones(2)}, path)
    with pytest.raises(SpectralError, match="damaged or not a calibration"):
        Calibration.load(path)
    path.write_bytes(b"damaged")
    with pytest.raises(SpectralError, match="damaged or not a calibration"):
        Calibration.load(path)


def test_copies_share_the_moments_and_configs_do_not_save_them(tmp_path: Path) -> None:
    calibration = calibrate(Tower(), BATCHES, USED)
    config = TruncatedConfig(r=4, target_modules=USED, calibration=calibration)
    assert copy.deepcopy(config).calibration is calibration
    assert torch.equal(pickle.loads(pickle.dumps(config)).calibration.moment("up"), calibration.moment("up"))
    config.save_pretrained(tmp_path)
    assert "calibration" not in json.loads((tmp_path / "adapter_config.json").read_text())
    assert TruncatedConfig.from_pretrained(tmp_path).calibration is None


# The start


def calibrated(**fields: object) -> TruncatedConfig:
    return TruncatedConfig(**{"r": 6, "target_modules": "all-linear", **fields})


def test_a_calibrated_start_is_nearer_to_the_model_on_what_it_has_seen() -> None:
    ids = torch.randint(0, 8, (4, 16))  # eight of 64 tokens: the inputs are far from isotropic
    expected = logits(llama(), ids)
    plain = get_peft_model(llama(), calibrated())
    aware = get_peft_model(llama(), calibrated(calibration=calibrate(llama(), [ids])))
    errors = [float((logits(model, ids) - expected).norm() / expected.norm()) for model in (plain, aware)]
    assert errors[1] < 0.5 * errors[0]


def test_energies_and_budgets_count_outputs() -> None:
    calibration = calibrate(llama(), [batch()])
    config = calibrated(calibration=calibration, r="energy=0.9")
    for layer in layers(get_peft_model(llama(), config)):
        S = singular_values(whiten(layer.effective_weight(), calibration.moment(layer.key)))
        held = S.double().square().cumsum(0) / S.double().square().sum()
        r = layer.update_of("default").r
        assert held[r - 1] >= 0.9 > (held[r - 2] if r > 1 else 0)
    by_outputs = get_peft_model(llama(), calibrated(calibration=calibration, r="budget=0.5")).peft_config["default"]
    by_weights = get_peft_model(llama(), calibrated(r="budget=0.5")).peft_config["default"]
    assert by_outputs.rank_pattern != by_weights.rank_pattern


def test_a_calibrated_adapter_reloads_without_its_calibration(tmp_path: Path) -> None:
    model = get_peft_model(llama(), calibrated(calibration=calibrate(llama(), [batch()]), r="budget=0.5"))
    train_(model, lr=1e-1)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(llama(), tmp_path)), logits(model))


def test_an_embedding_starts_from_its_token_frequencies() -> None:
    calibration = calibrate(Tower(), [torch.arange(5)[None]], ["tokens"])
    model = get_peft_model(Tower(), TruncatedConfig(r=5, target_modules=["tokens"], calibration=calibration))
    ids = torch.arange(5)[None]
    torch.testing.assert_close(model.tokens(ids), Tower().tokens(ids), rtol=1e-3, atol=1e-3)
    plain = truncated_svd(Tower().tokens.weight, 5).matrix()
    assert (plain[:5] - Tower().tokens.weight[:5]).norm() > 0.1


def test_modules_without_moments_are_named_and_the_model_is_left_as_it_was() -> None:
    model, calibration = llama(), calibrate(llama(), [batch()], ["q_proj"])
    with pytest.raises(
        SpectralError, match=r"no moments of the module 'model\.layers\.0\.self_attn\.k_proj'; it has 2"
    ):
        get_peft_model(model, calibrated(calibration=calibration))
    assert not list(layers(model))


def test_a_start_that_could_not_be_recomputed_is_refused() -> None:
    with pytest.raises(ValueError, match="`save_start` should be True with a calibration"):
        calibrated(calibration=calibrate(llama(), [batch()]), save_start=False)


# Gradients


def gradient_moments(model: nn.Module, names: list[str], batches: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """E[g g^T], by torch's own hooks for gradients at the output of a module."""
    seen: dict[str, list[Tensor]] = {name: [] for name in names}
    handles = [
        model.get_submodule(name).register_full_backward_hook(
            lambda module, grad_input, grad_output, name=name: seen[name].append(grad_output[0])
        )
        for name in names
    ]
    masks = []
    for inputs in batches:
        (model(**inputs).loss * (inputs["labels"][:, 1:] != -100).sum()).backward()
        masks.append(inputs["attention_mask"].bool().flatten())
    for handle in handles:
        handle.remove()
    model.zero_grad()
    rows = {
        name: torch.cat([g.reshape(len(mask), -1)[mask] for g, mask in zip(found, masks, strict=True)]).double()
        for name, found in seen.items()
    }
    return {name: g.T @ g / len(g) for name, g in rows.items()}


@pytest.mark.parametrize("frozen", [False, True])
def test_gradients_are_those_at_the_outputs(frozen: bool) -> None:
    model = llama().eval()
    names = ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"]
    mask = torch.ones_like(batch())
    mask[0, -3:] = 0
    batches = [{"input_ids": batch(seed), "attention_mask": mask, "labels": batch(seed)} for seed in (0, 1)]
    batches[1]["labels"][:, 4:] = -100  # of fewer labels the mean is larger, and each counts alike all the same
    expected = gradient_moments(model, names, batches)
    model.requires_grad_(not frozen)
    calibration = calibrate(model, batches, ["q_proj", "down_proj"], gradients=True)
    for name in names:
        found = calibration.gradients[name]
        torch.testing.assert_close(found.double(), expected[name], rtol=1e-4, atol=1e-6 * float(expected[name].max()))
    assert all(value.grad is None and value.requires_grad is not frozen for value in model.parameters())
    assert calibrate(model, batches, ["q_proj"]).gradients == {}


class Regression(nn.Module):
    """Its labels are one number a row, in a column."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(8, 8), nn.Linear(8, 1)

    def forward(self, x: Tensor, labels: Tensor) -> SimpleNamespace:
        return SimpleNamespace(loss=(self.down(self.up(x)) - labels).square().mean())


def t5() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2, "decoder_start_token_id": 0}
    return T5ForConditionalGeneration(T5Config(vocab_size=32, **sizes)).eval()


def rows_of(kind: str) -> tuple[nn.Module, str, dict[str, Tensor]]:
    """A model, what is calibrated, and four rows with their labels, of which some have few."""
    torch.manual_seed(1)
    if kind == "regression":
        return Regression(), "up", {"x": torch.randn(4, 8), "labels": torch.randn(4, 1)}
    ids = torch.randint(1, 32, (4, 6))
    labels = ids.clone()
    labels[2:, 3:] = -100
    return (llama().eval(), "up_proj", {"input_ids": ids, "labels": labels}) if kind == "causal" else (
        t5(), "wo", {"input_ids": ids, "labels": labels}
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["regression", "causal", "sequence to sequence"])
def test_it_does_not_matter_how_rows_are_batched(kind: str) -> None:
    model, target, rows = rows_of(kind)
    parts = [{name: value[part] for name, value in rows.items()} for part in (slice(3), slice(3, None))]
    whole, split = (calibrate(model, batches, [target], gradients=True) for batches in ([rows], parts))
    assert whole.gradients
    for name, moment in whole.gradients.items():
        torch.testing.assert_close(split.gradients[name], moment, rtol=1e-4, atol=1e-6 * float(moment.abs().max()))


@pytest.mark.parametrize("length", [6, 5])
def test_the_mask_of_an_encoder_is_not_that_of_its_decoder(length: int) -> None:
    ids = torch.randint(1, 32, (2, 6))
    mask = torch.ones_like(ids)
    mask[0, 3:] = 0
    rows = {"input_ids": ids, "attention_mask": mask, "labels": ids[:, :length].contiguous()}
    tokens = calibrate(t5(), [rows], ["wo", "wi"]).tokens
    assert {name: count for name, count in tokens.items() if name.startswith("encoder.")} == {
        "encoder.block.0.layer.1.DenseReluDense.wi": 9,
        "encoder.block.0.layer.1.DenseReluDense.wo": 9,
    }
    assert {count for name, count in tokens.items() if name.startswith("decoder.")} == {2 * length}


def test_a_tensor_is_its_own_labels() -> None:
    model, ids = llama().eval(), batch()
    one, other = (calibrate(model, [b], ["up_proj"], gradients=True) for b in (ids, {"input_ids": ids, "labels": ids}))
    assert all(torch.equal(one.gradients[name], value) for name, value in other.gradients.items())


def test_what_follows_may_work_in_place() -> None:
    class Rectified(nn.Module):
        def __init__(self, inplace: bool) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.up, self.relu, self.down = nn.Linear(8, 16), nn.ReLU(inplace), nn.Linear(16, 1)

        def forward(self, x: Tensor) -> SimpleNamespace:
            return SimpleNamespace(loss=self.down(self.relu(self.up(x))).square().mean())

    x = torch.randn(5, 8)
    found = [calibrate(Rectified(inplace), [{"x": x}], ["up"], gradients=True) for inplace in (False, True)]
    assert torch.equal(found[0].gradients["up"], found[1].gradients["up"])


def test_gradients_need_a_loss() -> None:
    with pytest.raises(ValueError, match=r"`gradients` needs a loss.*add the labels"):
        calibrate(llama(), [{"input_ids": batch()}], ["q_proj"], gradients=True)


def test_gradients_give_another_start_and_come_back_from_a_file(tmp_path: Path) -> None:
    calibration = calibrate(llama().eval(), [batch()], ["up_proj"], gradients=True)
    calibration.save(tmp_path / "moments")
    loaded = Calibration.load(tmp_path / "moments")
    assert "with gradients" in repr(loaded)
    without = Calibration(calibration.moments, calibration.tokens)
    starts = []
    for used in (calibration, loaded, without):
        model = get_peft_model(llama(), TruncatedConfig(r=4, target_modules=["up_proj"], calibration=used))
        starts.append(logits(model))
    assert torch.equal(starts[0], starts[1])
    assert not torch.allclose(starts[0], starts[2])
