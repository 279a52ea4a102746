"""An exported LoRA computes what the adapter computes, and stock PEFT loads it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn

from spectral_peft import SpectralError, SSTConfig, SVFitConfig, export_lora
from tests.methods import Method
from tests.models import gpt2, layers, llama, logits, train_
from tests.tolerance import tolerance


FUNCTION = tolerance(torch.float32, 32)
WITHOUT_THE_PACKAGE = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
base, lora, out = sys.argv[1:]
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), lora).eval()
with torch.no_grad():
    torch.save(model(torch.arange(9)[None]).logits, out)
assert "spectral_peft" not in sys.modules
"""


def trained(config: object, base: nn.Module, lr: float) -> PeftModel:
    model = get_peft_model(base, config)
    train_(model, lr)
    return model


@pytest.mark.parametrize("base", [llama, gpt2])
def test_thin_changes_export_exactly(thin_method: Method, base: type, tmp_path: Path) -> None:
    model = trained(
        thin_method(target_modules=["c_attn", "c_fc"] if base is gpt2 else "all-linear"), base(), thin_method.lr
    )
    expected = logits(model)
    errors = export_lora(model, tmp_path)
    assert torch.equal(logits(model), expected)
    assert max(errors.values()) == 0
    assert len(errors) == sum(1 for _ in layers(model))
    lora = PeftModel.from_pretrained(base(), tmp_path)
    torch.testing.assert_close(logits(lora), expected, rtol=FUNCTION, atol=FUNCTION)


def test_a_merged_adapter_exports_the_same(method: Method, tmp_path: Path) -> None:
    model = trained(method(), llama(), method.lr)
    rank = 8 if method.replaces else None
    export_lora(model, tmp_path / "before", rank=rank)
    model.merge_adapter()
    errors = export_lora(model, tmp_path / "merged", rank=rank)
    before, merged = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("before", "merged"))
    assert before.keys() == merged.keys()
    assert all(torch.equal(before[key], merged[key]) for key in before)
    assert not method.replaces or max(errors.values()) > 0


def test_servers_find_one_rank_and_one_scale(thin_method: Method, tmp_path: Path) -> None:
    fields = {} if thin_method.fields else {"rank_pattern": {"q_proj": 2}}
    model = trained(thin_method(**fields), llama(), thin_method.lr)
    export_lora(model, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"]
    assert config["peft_type"] == "LORA"
    assert not config["rank_pattern"]
    assert not config["alpha_pattern"]
    assert not config["use_rslora"]
    assert not config["use_dora"]
    assert sorted(config["target_modules"]) == sorted(
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    )


def test_it_loads_in_a_process_without_this_package(tmp_path: Path) -> None:
    base = llama()
    base.save_pretrained(tmp_path / "base")
    model = trained(SVFitConfig(r=8, target_modules="all-linear"), base, 0.1)
    export_lora(model, tmp_path / "lora")
    command = [sys.executable, "-c", WITHOUT_THE_PACKAGE, *(str(tmp_path / name) for name in ("base", "lora", "out"))]
    subprocess.run(command, check=True)
    expected = logits(model, torch.arange(9)[None])
    torch.testing.assert_close(torch.load(tmp_path / "out"), expected, rtol=FUNCTION, atol=FUNCTION)


def test_the_factors_share_the_size_of_the_change(tmp_path: Path) -> None:
    """Served in bfloat16, large factors that cancel would lose a small change."""
    model = trained(SSTConfig(r=4, pool=12, target_modules="all-linear"), llama(), 1e-3)
    export_lora(model, tmp_path)
    lora = PeftModel.from_pretrained(llama(), tmp_path).bfloat16()
    for layer in layers(model):
        delta = layer.get_delta_weight("default")
        exported = lora.get_submodule(f"base_model.model.{layer.key}").get_delta_weight("default").float()
        assert (exported - delta).norm() < 0.02 * delta.norm()


def test_a_smaller_rank_gives_the_best_approximation_and_says_its_error(method: Method, tmp_path: Path) -> None:
    model = trained(method(), llama(), method.lr)
    errors = export_lora(model, tmp_path, rank=2)
    lora = PeftModel.from_pretrained(llama(), tmp_path)
    assert {value.shape[0] for name, value in lora.named_parameters() if "lora_A" in name} == {2}
    for layer in layers(model):
        delta = layer.get_delta_weight("default").detach()
        exported = lora.get_submodule(f"base_model.model.{layer.key}").get_delta_weight("default").detach()
        optimal = float(torch.linalg.svdvals(delta)[2:].norm() / delta.norm())
        assert float((exported - delta).norm() / delta.norm()) == pytest.approx(optimal, rel=1e-2)
        assert errors[layer.key] == pytest.approx(optimal, rel=1e-2)


def test_embeddings_and_what_trains_in_full_come_along(tmp_path: Path) -> None:
    config = SVFitConfig(r=8, target_modules=["embed_tokens", "q_proj"], modules_to_save=["lm_head"])
    model = trained(config, llama(), 0.1)
    export_lora(model, tmp_path)
    lora = PeftModel.from_pretrained(llama(), tmp_path)
    torch.testing.assert_close(logits(lora), logits(model), rtol=FUNCTION, atol=FUNCTION)


def test_trained_biases_come_along(tmp_path: Path) -> None:
    targets = {"target_modules": ["c_attn", "c_fc"], "bias": "spectral_only"}
    model = trained(SVFitConfig(r=8, **targets), gpt2(), 0.05)
    export_lora(model, tmp_path)
    lora = PeftModel.from_pretrained(gpt2(), tmp_path)
    torch.testing.assert_close(logits(lora), logits(model), rtol=FUNCTION, atol=FUNCTION)


def test_modules_are_named_in_full_where_short_names_would_mean_others(tmp_path: Path) -> None:
    model = trained(SVFitConfig(r=8, target_modules=["q_proj"], layers_to_transform=[1]), llama(), 0.1)
    export_lora(model, tmp_path)
    lora = PeftModel.from_pretrained(llama(), tmp_path)
    assert sum("lora_A" in name for name, _ in lora.named_parameters()) == 1
    torch.testing.assert_close(logits(lora), logits(model), rtol=FUNCTION, atol=FUNCTION)


def test_a_change_of_full_rank_asks_for_a_rank(tmp_path: Path) -> None:
    model = get_peft_model(llama(), SSTConfig(r=4, target_modules="all-linear"))
    with pytest.raises(SpectralError, match=r"q_proj: the change by the adapter 'default' has full rank.*`rank`"):
        export_lora(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_untrained_adapter_exports_as_nothing(tmp_path: Path) -> None:
    export_lora(get_peft_model(llama(), SVFitConfig(r=4, target_modules="all-linear")), tmp_path)
    torch.testing.assert_close(logits(PeftModel.from_pretrained(llama(), tmp_path)), logits(llama()))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"adapter_name": "other"}, "no spectral adapter named 'other'"), ({"rank": 0}, "`rank` should be positive")],
)
def test_wrong_arguments_are_refused(arguments: dict[str, object], message: str, tmp_path: Path) -> None:
    model = get_peft_model(llama(), SVFitConfig(r=4, target_modules="all-linear"))
    with pytest.raises(ValueError, match=message):
        export_lora(model, tmp_path, **arguments)


def test_another_method_s_adapter_is_refused(tmp_path: Path) -> None:
    model = get_peft_model(llama(), LoraConfig(r=4, target_modules="all-linear"))
    with pytest.raises(ValueError, match="no spectral adapter named 'default'"):
        export_lora(model, tmp_path)
