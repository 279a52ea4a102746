"""Adapters on the Hub: pushed, and loaded by their id, with huggingface_hub's client and a server of its interface."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import HfApi, ModelCard, constants
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from spectral_peft import (
    SCTConfig,
    SpectralError,
    SVFitConfig,
    build_factored,
    export_lora,
    load_factored,
    push_to_hub,
    save_factored,
)
from spectral_peft.stored import open_adapter
from tests.hub_server import Hub, point_client_at, running_hub
from tests.methods import Method
from tests.models import batch, layers, llama, logits, train_


BASE, ADAPTER = "somebody/base", "somebody/adapter"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    with running_hub() as hub:
        point_client_at(hub, str(tmp_path / "cache"), monkeypatch)
        yield hub


@pytest.fixture
def base(hub: Hub) -> Any:
    """A base model that was pushed, as it loads from there."""
    llama().push_to_hub(BASE)
    return AutoModelForCausalLM.from_pretrained(BASE)


def trained(base: Any, method: Method, **fields: Any) -> PeftModel:
    model = get_peft_model(base, method(task_type="CAUSAL_LM", **fields))
    train_(model, method.lr)
    return model


def card(hub: Hub, repo: str = ADAPTER) -> ModelCard:
    return ModelCard(hub.repos[repo][-1][1]["README.md"].decode())


def test_pushed_and_loaded_by_its_id(
    base: Any, hub: Hub, method: Method, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = trained(base, method)
    push_to_hub(model, ADAPTER, private=True)
    assert len(hub.verified) == 2  # of base and adapter

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "fresh"))
    expected = logits(model)
    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(BASE), ADAPTER)
    assert torch.equal(logits(again), expected)
    assert torch.equal(logits(AutoPeftModelForCausalLM.from_pretrained(ADAPTER)), expected)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(ADAPTER)), expected)
    stored = open_adapter(ADAPTER)
    for layer in layers(model):
        assert torch.equal(stored.updates[layer.key].matrix(), layer.update_of("default").matrix())


def test_pushed_by_peft_itself(base: Any, hub: Hub) -> None:
    model = get_peft_model(base, SVFitConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"))
    train_(model, 0.1)
    model.push_to_hub(ADAPTER)
    assert torch.equal(logits(AutoPeftModelForCausalLM.from_pretrained(ADAPTER)), logits(model))
    assert "import spectral_peft" not in card(hub).text, "PEFT keeps the card now: the guide says otherwise."
    push_to_hub(model, ADAPTER)
    model.push_to_hub(ADAPTER)
    assert "import spectral_peft" in card(hub).text  # a card that is there is kept


def test_a_factored_model_in_shards(hub: Hub, tmp_path: Path) -> None:
    config = SCTConfig(r=8, target_modules="all-linear", init="random", keep_base_weight=False, task_type="CAUSAL_LM")
    model = build_factored(llama().config, config)
    save_factored(model, tmp_path / "factored", shard_bytes=20_000)
    assert "load_factored(" in (tmp_path / "factored" / "README.md").read_text()
    HfApi().create_repo(ADAPTER)
    HfApi().upload_folder(repo_id=ADAPTER, folder_path=tmp_path / "factored")
    assert len(hub.verified) > 1
    stored = open_adapter(ADAPTER)
    assert torch.equal(logits(load_factored(stored.folder)), logits(model))
    assert len(stored.updates) == len(list(layers(model)))


@pytest.mark.parametrize("how", ["path", "module"])
def test_a_program_that_does_not_import_the_package(tmp_path: Path, how: str) -> None:
    (tmp_path / "beside.py").write_text("")
    (tmp_path / "some_tool.py").write_text(
        "import sys, beside\nfrom peft import get_peft_config\n"
        "assert __name__ == '__main__'\n"
        "print(get_peft_config({'peft_type': 'SPECTRAL_SVFIT'}).method, sys.argv[1:])\n"
    )
    program = [str(tmp_path / "some_tool.py")] if how == "path" else ["-m", "some_tool"]
    root = str(Path(__file__).parents[1])
    result = subprocess.run(
        [sys.executable, "-m", "spectral_peft", *program, "--its-options"],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": root if how == "path" else os.pathsep.join([str(tmp_path), root])},
    )
    assert result.stdout.splitlines()[-1] == "svfit ['--its-options']"


# The card


def test_the_card_says_what_it_is_and_how_to_load_it(base: Any, hub: Hub, method: Method) -> None:
    model = trained(base, method)
    push_to_hub(model, ADAPTER)
    found = card(hub)
    assert found.data.library_name == "peft"
    assert found.data.base_model == BASE
    assert {"spectral-peft", method.config.method, f"base_model:adapter:{BASE}"} <= set(found.data.tags)
    assert f"# {method.config.__name__.removesuffix('Config')} adapter" in found.text
    assert "More Information Needed" not in found.text
    assert method.config.paper
    assert method.config.paper in found.text
    assert "- `r`: `8`" in found.text
    for name, value in method.fields:
        assert f"- `{name}`: `{str(value).lower()}`" in found.text
    assert "export_lora" in found.text
    assert "export_merged" in found.text


def test_the_card_offers_no_lora_where_the_base_was_given_up(tmp_path: Path) -> None:
    base = llama()
    model = get_peft_model(base, SCTConfig(r=8, target_modules="all-linear"))
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(SpectralError):
        export_lora(model, tmp_path / "lora", rank=4)
    config = SCTConfig(r=8, target_modules="all-linear", init="random")
    save_factored(build_factored(base.config, config), tmp_path / "factored")
    for folder in ("adapter", "factored"):
        text = (tmp_path / folder / "README.md").read_text()
        assert "export_lora" not in text
        assert 'export_merged(model, "my-model")' in text


def test_the_code_of_the_card_runs(base: Any, hub: Hub, method: Method) -> None:
    model = trained(base, method)
    push_to_hub(model, ADAPTER)
    code = card(hub).text.split("```python\n")[1].split("```")[0]
    assert "import spectral_peft" in code
    namespace: dict[str, Any] = {}
    exec(code, namespace)
    assert torch.equal(logits(namespace["model"]), logits(model))


def test_a_local_base_is_not_published(hub: Hub, tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "private")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "private")
    model = get_peft_model(base, SVFitConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"))
    push_to_hub(model, ADAPTER)
    assert str(tmp_path) not in str(card(hub))
    assert "PeftModel.from_pretrained(base" in card(hub).text


def test_the_card_where_the_type_is_a_plain_string(tmp_path: Path) -> None:
    config = SVFitConfig(r=8, target_modules="all-linear")
    config.peft_type = "SPECTRAL_SVFIT"
    get_peft_model(llama(), config).save_pretrained(tmp_path)
    assert (
        "import spectral_peft  # needed, or PEFT raises KeyError: 'SPECTRAL_SVFIT'\n"
        in (tmp_path / "README.md").read_text()
    )


def test_what_somebody_wrote_is_kept(base: Any, tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    model = get_peft_model(base, SVFitConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"))
    model.save_pretrained(folder)
    first = (folder / "README.md").read_text()
    model.save_pretrained(folder)
    assert (folder / "README.md").read_text() == first
    written = ModelCard(f"{first}\n## Results\n\nPerplexity 5.7\n")
    written.data.license = "mit"
    written.save(folder / "README.md")
    model.peft_config["default"].dropout = 0.5
    model.save_pretrained(folder)
    again = ModelCard.load(folder / "README.md")
    assert "## Results\n\nPerplexity 5.7" in again.text
    assert again.data.license == "mit"
    assert again.text.count("# SVFit adapter") == 1
    assert "- `dropout`: `0.5`" in again.text


def test_the_card_of_a_trainer_is_completed(base: Any, hub: Hub, tmp_path: Path) -> None:
    model = get_peft_model(base, SVFitConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"))
    rows = [{"input_ids": row, "labels": row} for row in batch()]
    arguments = TrainingArguments(str(tmp_path / "out"), max_steps=1, report_to="none", hub_model_id=ADAPTER)
    trainer = Trainer(model, arguments, train_dataset=rows)
    trainer.train()
    trainer.push_to_hub()
    assert {"spectral-peft", "svfit"} <= set(card(hub).data.tags)
    push_to_hub(trainer.model, ADAPTER)
    assert "Training hyperparameters" in card(hub).text
    assert "import spectral_peft" in card(hub).text
    assert {"spectral-peft", "svfit"} <= set(card(hub).data.tags)


def test_several_adapters(base: Any, hub: Hub) -> None:
    config = SVFitConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(base, config, adapter_name="math")
    push_to_hub(model, ADAPTER)
    files = hub.repos[ADAPTER][-1][1]
    assert {"README.md", "math/README.md", "math/adapter_model.safetensors"} <= set(files)
    assert f'PeftModel.from_pretrained(base, "{ADAPTER}", subfolder="math")' in files["README.md"].decode()
    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(BASE), ADAPTER, subfolder="math")
    assert torch.equal(logits(again), logits(model))


def test_other_peft_methods_have_their_own_card(base: Any, tmp_path: Path) -> None:
    get_peft_model(base, LoraConfig(task_type="CAUSAL_LM")).save_pretrained(tmp_path / "lora")
    assert "spectral" not in (tmp_path / "lora" / "README.md").read_text()
