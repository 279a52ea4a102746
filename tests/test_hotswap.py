"""A swapped adapter is the other one, in the tensors of the first."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from spectral_peft import PiSSAConfig, SpectralError, SVFitConfig, hotswap_adapter
from tests.methods import METHODS, PISSA, SVFIT, Method, with_starts
from tests.models import gpt2, llama, logits, train_


def saved(config: object, folder: Path, base: nn.Module | None = None) -> tuple[Path, Tensor]:
    """An adapter in its folder, and the function that it has."""
    model = get_peft_model(llama() if base is None else base, config).eval()
    model.save_pretrained(folder)
    return folder, logits(model)


def live(method: Method, **fields: object) -> PeftModel:
    model = get_peft_model(llama(), method(**fields))
    train_(model, method.lr)
    return model


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize(("method", "save_start"), with_starts(METHODS), ids=str)
def test_the_function_becomes_the_other_s_and_the_parameters_stay(
    method: Method, save_start: bool, tmp_path: Path
) -> None:
    folder, expected = saved(method(init_weights=False, save_start=save_start), tmp_path)
    model = live(method, save_start=save_start)
    parameters = {name: (id(value), value.data_ptr()) for name, value in model.named_parameters()}
    assert (logits(model) - expected).abs().max() > 1e-3
    hotswap_adapter(model, folder)
    assert torch.equal(logits(model), expected)
    assert {name: (id(value), value.data_ptr()) for name, value in model.named_parameters()} == parameters


def test_one_of_two_adapters_is_swapped(method: Method, tmp_path: Path) -> None:
    folder, expected = saved(method(init_weights=False), tmp_path)
    model = live(method)
    model.add_adapter("second", method())
    first = logits(model)
    hotswap_adapter(model, str(folder), "second")
    assert torch.equal(logits(model), first)
    model.set_adapter("second")
    assert torch.equal(logits(model), expected)


def test_what_trains_in_full_and_conv1d_are_swapped_too(method: Method, tmp_path: Path) -> None:
    fields = {"target_modules": ["c_attn"], "modules_to_save": ["lm_head"], "init_weights": False}
    other = get_peft_model(gpt2(), method(**fields)).eval()
    with torch.no_grad():
        other.base_model.model.lm_head.modules_to_save["default"].weight.mul_(2)
    other.save_pretrained(tmp_path)
    model = get_peft_model(gpt2(), method(**fields))
    hotswap_adapter(model, tmp_path)
    assert torch.equal(logits(model), logits(other))


def test_a_swapped_adapter_trains_as_one_that_was_loaded(method: Method, tmp_path: Path) -> None:
    folder, _ = saved(method(init_weights=False), tmp_path)
    model = live(method)
    loaded = PeftModel.from_pretrained(llama(), folder, is_trainable=True)
    hotswap_adapter(model, folder)
    for one in (model, loaded):
        train_(one, method.lr)
    torch.testing.assert_close(logits(model), logits(loaded), rtol=1e-4, atol=1e-4)


def two_layers() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 24), nn.Linear(24, 20))


def test_a_compiled_model_is_not_compiled_again(method: Method, tmp_path: Path) -> None:
    fields = {"target_modules": ["0", "1"], "init_weights": False}
    other = get_peft_model(two_layers(), method(**fields)).eval()
    other.save_pretrained(tmp_path)
    model, x, graphs = get_peft_model(two_layers(), method(**fields)).eval(), torch.randn(3, 16), []

    def backend(graph: torch.fx.GraphModule, _: object) -> object:
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    compiled = torch.compile(model, backend=backend)
    compiled(x)
    compiled_once = len(graphs)
    hotswap_adapter(compiled, tmp_path)
    torch.testing.assert_close(compiled(x), other(x), rtol=1e-5, atol=1e-5)
    assert len(graphs) == compiled_once > 0


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"r": 4}, "has shape"),
        ({"target_modules": ["q_proj"]}, "are missing there"),
        ({"modules_to_save": ["lm_head"]}, "have no place here, such as .*lm_head"),
    ],
)
def test_another_shape_of_adapter_is_refused(
    method: Method, fields: dict[str, object], message: str, tmp_path: Path
) -> None:
    folder, _ = saved(method(**fields), tmp_path)
    check_refused(live(method), folder, message)


def check_refused(model: PeftModel, folder: Path, message: str) -> None:
    before, function = state(model), logits(model)
    with pytest.raises(SpectralError, match=message):
        hotswap_adapter(model, folder)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(logits(model), function)


@pytest.mark.parametrize(("method", "save_start"), with_starts(METHODS), ids=str)
def test_an_adapter_of_another_base_is_refused(method: Method, save_start: bool, tmp_path: Path) -> None:
    folder, _ = saved(method(save_start=save_start), tmp_path, llama(seed=1))
    check_refused(
        live(method, save_start=save_start), folder, "another base weight" if save_start else "singular vectors"
    )


def test_a_damaged_adapter_is_refused(method: Method, tmp_path: Path) -> None:
    folder, _ = saved(method(), tmp_path)
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file(dict(list(tensors.items())[1:]), file)
    check_refused(live(method), folder, "1 are missing there and 0 have no place")
    file.write_bytes(file.read_bytes()[:-9])
    check_refused(live(method), folder, "truncated or damaged")


def test_configs_that_the_tensors_do_not_show_are_compared(tmp_path: Path) -> None:
    folder, _ = saved(PiSSAConfig(r=8, alpha=16, target_modules="all-linear"), tmp_path / "pissa")
    check_refused(live(PISSA), folder, "alpha is None and 16")
    folder, _ = saved(SVFitConfig(r=8, target_modules="all-linear", save_start=False), tmp_path / "svfit")
    check_refused(live(SVFIT), folder, "save_start is True and False")
    check_refused(live(PISSA), folder, "peft_type is 'SPECTRAL_PISSA' and 'SPECTRAL_SVFIT'")


def test_what_cannot_be_swapped_is_refused(method: Method, tmp_path: Path) -> None:
    folder, _ = saved(method(), tmp_path)
    model = live(method)
    with pytest.raises(ValueError, match="no spectral adapter named 'x'"):
        hotswap_adapter(model, folder, "x")
    with pytest.raises(FileNotFoundError):
        hotswap_adapter(model, tmp_path / "nowhere")
    model.merge_adapter()
    with pytest.raises(ValueError, match="is merged"):
        hotswap_adapter(model, folder)
