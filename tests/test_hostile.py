"""Adapters that are damaged or mean harm are refused with a clear error, and nothing else happens."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftConfig, get_peft_model

from spectral_peft import SCTConfig, SpectralError, SVFitConfig, build_factored, load_factored, save_factored
from spectral_peft.stored import open_adapter
from tests import fuzz
from tests.models import llama


INPUTS = 400


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    config = SVFitConfig(r=4, target_modules=["q_proj"], layers_to_transform=[0])
    get_peft_model(llama(), config).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.fixture
def factored(tmp_path: Path) -> Path:
    config = SCTConfig(r=4, target_modules=["q_proj"], init="random", keep_base_weight=False)
    save_factored(build_factored(llama().config, config), tmp_path / "factored", shard_bytes=20_000)
    return tmp_path / "factored"


def edit(file: Path, **values: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def edit_header(file: Path, change: Callable[[dict[str, Any]], None]) -> None:
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    change(header)
    written = json.dumps(header).encode()
    file.write_bytes(len(written).to_bytes(8, "little") + written + data[8 + length :])


# Many mutated ones


@pytest.fixture(scope="module")
def fuzzer(tmp_path_factory: pytest.TempPathFactory) -> fuzz.Fuzzer:
    return fuzz.Fuzzer(tmp_path_factory.mktemp("fuzz"))


def test_mutated_adapters_are_read_or_refused(fuzzer: fuzz.Fuzzer) -> None:
    first = int.from_bytes(os.urandom(4), "big") if os.environ.get("UNLOCK_SEED") else 0
    assert [error for error in map(fuzzer.run, range(first, first + INPUTS)) if error] == []
    assert {f"{reader}: read" for reader in ("read_config", "read_stored")} <= set(fuzzer.outcomes)


def test_the_samples_are_valid(fuzzer: fuzz.Fuzzer) -> None:
    for _, sample in fuzzer.found:
        fuzzer._written = None
        fuzzer._restore(sample)
        sample.read(fuzzer.folder)


def test_the_watch_sees_what_is_forbidden(fuzzer: fuzz.Fuzzer, tmp_path: Path) -> None:
    with fuzz.watched() as forbidden:
        (tmp_path / "outside").write_text("x")
        os.system("true")
    assert [entry.split("(")[0] for entry in forbidden] == ["open", "os.system"]
    with pytest.raises(RuntimeError, match="memory"), fuzz.bounded(fuzz.SECONDS, fuzz.BYTES):
        torch.empty(2 * fuzz.BYTES, dtype=torch.uint8)
    with pytest.raises(TimeoutError), fuzz.bounded(1, fuzz.BYTES):
        signal.pause()


# Single ones


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("rank_pattern", "q_proj", "`rank_pattern` should be of type"),
        ("rank_pattern", {"(": 8}, "'\\(' in `rank_pattern` is no regular expression"),
        ("target_modules", "[", "'\\[' in `target_modules` is no regular expression"),
        ("exclude_modules", "*", "'\\*' in `exclude_modules` is no regular expression"),
        ("layers_pattern", ["x", "("], "'\\(' in `layers_pattern` is no regular expression"),
        ("rank_pattern", {"q_proj": -1}, "`r` should be"),
        ("dropout", "0.5", "`dropout` should be of type float"),
        ("save_start", "yes", "`save_start` should be of type bool"),
        ("format_version", "new", "`format_version` should be of type int"),
        ("r", [8], "`r` should be"),
    ],
)
def test_a_field_of_the_config_is_damaged(adapter: Path, field: str, value: Any, message: str) -> None:
    edit(adapter / "adapter_config.json", **{field: value})
    with pytest.raises((TypeError, ValueError), match=message):
        PeftConfig.from_pretrained(str(adapter))
    with pytest.raises(SpectralError, match=message):
        open_adapter(adapter)


def test_a_declared_rank_allocates_nothing(adapter: Path) -> None:
    edit(adapter / "adapter_config.json", r=10**12)
    with fuzz.bounded(fuzz.SECONDS, fuzz.BYTES), pytest.raises(SpectralError, match="do not fit"):
        open_adapter(adapter)


def test_a_declared_shape_allocates_nothing(adapter: Path) -> None:
    def enlarge(header: dict[str, Any]) -> None:
        header["x.spectral_svfit_update.U.weight"] = {"dtype": "F32", "shape": [2**60, 0], "data_offsets": [0, 0]}

    edit_header(adapter / "adapter_model.safetensors", enlarge)
    with fuzz.bounded(fuzz.SECONDS, fuzz.BYTES), pytest.raises(SpectralError):
        open_adapter(adapter)


def test_many_tensors_in_one_module_take_no_time(adapter: Path) -> None:
    def add(header: dict[str, Any]) -> None:
        first = next(key for key in header if key.endswith("U.weight")).removesuffix("U.weight")
        for number in range(3000):
            entry = {"dtype": "F32", "shape": [0, number], "data_offsets": [0, 0]}
            header[f"{first}x{number}"] = entry

    edit_header(adapter / "adapter_model.safetensors", add)
    with fuzz.bounded(fuzz.SECONDS, fuzz.BYTES), pytest.raises(SpectralError):
        open_adapter(adapter)


@pytest.mark.parametrize(
    "name", ["../outside.safetensors", "/etc/passwd", "..", "", "training_args.bin", "adapter_model\x00.safetensors"]
)
def test_a_shard_elsewhere(factored: Path, name: str) -> None:
    (factored.parent / "outside.safetensors").write_bytes((next(factored.glob("*.safetensors"))).read_bytes())
    edit(factored / "adapter_model.safetensors.index.json", weight_map={"x": name})
    for read in (open_adapter, load_factored):
        with pytest.raises((SpectralError, FileNotFoundError), match=r"not in its folder|no file|null byte"):
            read(factored)


def test_a_pipe_does_not_wait_for_its_writer(adapter: Path) -> None:
    (adapter / "adapter_model.safetensors").unlink()
    os.mkfifo(adapter / "adapter_model.safetensors")
    with fuzz.bounded(fuzz.SECONDS, fuzz.BYTES), pytest.raises(FileNotFoundError):
        open_adapter(adapter)


@pytest.mark.parametrize(
    "values", [{"num_hidden_layers": 10**9}, {"hidden_size": 10**8}, {"vocab_size": 10**15}, {"model_type": "none"}]
)
def test_a_factored_model_of_impossible_size(factored: Path, values: dict[str, Any]) -> None:
    edit(factored / "base" / "config.json", **values)
    with fuzz.bounded(fuzz.SECONDS, fuzz.BYTES), pytest.raises(SpectralError):
        load_factored(factored)


@pytest.mark.parametrize("peft_type", ["BF16", "LORA"])
def test_a_factored_model_of_another_method(factored: Path, peft_type: str) -> None:
    edit(factored / "adapter_config.json", peft_type=peft_type)
    with pytest.raises(SpectralError, match=peft_type):
        load_factored(factored)


def test_a_factored_model_with_a_dense_tensor_of_another_shape(factored: Path) -> None:
    edit(factored / "base" / "config.json", vocab_size=llama().config.vocab_size + 8)
    with pytest.raises(SpectralError, match="does not fit"):
        load_factored(factored)


def test_code_beside_a_factored_model_does_not_run(factored: Path, tmp_path: Path) -> None:
    (factored / "base" / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Config: ...\n")
    edit(factored / "base" / "config.json", model_type="evil", auto_map={"AutoConfig": "evil.Config"})
    with pytest.raises(SpectralError, match="trust_remote_code"):
        load_factored(factored)
    assert not (tmp_path / "ran").exists()
