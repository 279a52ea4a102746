"""Laws of every method through PEFT: what a user of PEFT takes for granted."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import torch
from peft import (
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from safetensors.torch import load_file
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from spectral_peft import SpectralError
from spectral_peft.linalg import orthonormality_error
from tests.methods import METHODS, Method, with_starts
from tests.models import approximated_, batch, gpt2, layers, llama, logits, tensors, train_, trainable, updates
from tests.tolerance import tolerance


FUNCTION = tolerance(torch.float32, 32)


both_saves = pytest.mark.parametrize(("method", "save_start"), with_starts(METHODS), ids=str)
recomputable = pytest.mark.parametrize("method", [method for method in METHODS if method.recomputable], ids=str)


def trained_model(method: Method, **kwargs: object) -> PeftModel:
    model = get_peft_model(llama(), method(**kwargs))
    train_(model, method.lr)
    return model


def assert_is_base(method: Method, model: nn.Module, base: nn.Module | None = None) -> None:
    """The function is the base model's: bit by bit, or up to rounding if the method replaces the weight.

    A method that approximates the weights has the function of the base model with their best approximations.
    """
    expected = logits(approximated_(llama() if base is None else base, model, method))
    rounding = tolerance(expected.dtype, 32) if method.replaces else 0
    torch.testing.assert_close(logits(model), expected, rtol=rounding, atol=rounding)


# The start


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_function_is_the_base_model_s_at_the_start(method: Method, dtype: torch.dtype) -> None:
    assert_is_base(method, get_peft_model(llama(dtype), method()), llama(dtype))


def test_dropout_does_not_disturb_the_start(method: Method) -> None:
    model = get_peft_model(llama(), method(dropout=0.5)).train()
    same = torch.equal(model(batch()).logits, logits(llama()))
    assert same is not method.replaces  # what replaces the weight drops its whole input


def test_dropout_drops_in_training_only(method: Method) -> None:
    model = trained_model(method, dropout=0.5)
    assert torch.equal(logits(model), logits(model))
    model.train()
    assert not torch.equal(model(batch()).logits, model(batch()).logits)


def test_the_names_that_train(method: Method) -> None:
    model = get_peft_model(llama(), method())
    names = {name.split("update.default.")[1] for name, value in model.named_parameters() if value.requires_grad}
    assert names == method.trained
    assert sum(1 for _ in layers(model)) == 14


def test_training_moves_what_trains_and_nothing_else(method: Method) -> None:
    model = get_peft_model(llama(), method())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    train_(model, method.lr)
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    kinds = [name.split("update.default.")[-1] for name in moved]
    assert set(kinds) == method.trained | method.moved
    assert sum(kind in method.trained for kind in kinds) == 14 * len(method.trained)


def test_factors_are_float32_over_a_bfloat16_base(method: Method) -> None:
    model = get_peft_model(llama(torch.bfloat16), method())
    for update in updates(model):
        assert {value.dtype for value in update.parameters()} == {torch.float32}
        if hasattr(update, "U"):
            assert orthonormality_error(update.U.weight) < tolerance(torch.float32, 32)


def test_autocast_adapter_dtype_is_honored(method: Method) -> None:
    model = get_peft_model(llama(torch.bfloat16), method(), autocast_adapter_dtype=False)
    assert {value.dtype for value in trainable(model)} == {torch.bfloat16}


def test_every_trained_number_moves_in_pure_bfloat16(method: Method) -> None:
    """Absolute singular values of 0.5 and more do not move at all under steps of 1e-4."""
    model = get_peft_model(llama(torch.bfloat16), method(), autocast_adapter_dtype=False)
    train_(model, lr=1e-4)
    still = sum(int((value == 0).sum()) for value in trainable(model))
    assert still <= 0.01 * sum(value.numel() for value in trainable(model))


# The function


def test_output_is_base_plus_the_formula(method: Method) -> None:
    model = trained_model(method)
    layer = model.get_submodule("base_model.model.model.layers.0.mlp.gate_proj")
    x = torch.randn(3, 32)
    delta = method.matrix(tensors(layer.update_of("default")))
    weight = layer.base_layer.weight.double()
    delta = delta - weight if method.replaces else delta
    expected = x.double() @ (weight + delta).T
    torch.testing.assert_close(layer(x).double(), expected, rtol=FUNCTION, atol=FUNCTION)
    torch.testing.assert_close(layer.get_delta_weight("default").double(), delta, rtol=FUNCTION, atol=FUNCTION)


@pytest.mark.parametrize("safe_merge", [False, True])
@pytest.mark.parametrize("base", [llama, gpt2])
def test_merging_keeps_the_function_and_unmerging_undoes_it(method: Method, base: type, safe_merge: bool) -> None:
    model = get_peft_model(base(), method())
    train_(model, method.lr)
    expected, original = logits(model), logits(base())
    assert (expected - original).abs().max() > 0.01
    model.merge_adapter(safe_merge=safe_merge)
    torch.testing.assert_close(logits(model), expected, rtol=FUNCTION, atol=FUNCTION)
    assert not torch.equal(
        next(layers(model)).get_base_weight(), next(layers(get_peft_model(base(), method()))).weight
    )
    model.unmerge_adapter()
    torch.testing.assert_close(logits(model), expected, rtol=FUNCTION, atol=FUNCTION)
    with model.disable_adapter():
        torch.testing.assert_close(logits(model), original, rtol=FUNCTION, atol=FUNCTION)


@pytest.mark.parametrize("method", [method for method in METHODS if not method.replaces], ids=str)
def test_what_could_not_be_unmerged_stays_merged(method: Method) -> None:
    model = trained_model(method)
    expected = logits(model)
    model.merge_adapter()
    layer = next(layers(model))
    _, value = next(layer.update_of("default").trained_parameters())
    value.data, kept = torch.zeros(0), value.data
    with pytest.raises(RuntimeError):
        model.unmerge_adapter()
    assert layer.merged_adapters == ["default"]
    value.data = kept
    model.unmerge_adapter()
    torch.testing.assert_close(logits(model), expected, rtol=FUNCTION, atol=FUNCTION)


def test_disabling_a_merged_adapter_gives_the_base(method: Method) -> None:
    model = trained_model(method)
    model.merge_adapter()
    with model.disable_adapter():
        torch.testing.assert_close(logits(model), logits(llama()), rtol=FUNCTION, atol=FUNCTION)


def test_merge_and_unload_gives_a_plain_model(method: Method) -> None:
    model = trained_model(method)
    expected = logits(model)
    merged = model.merge_and_unload()
    assert not list(layers(merged))
    torch.testing.assert_close(logits(merged), expected, rtol=FUNCTION, atol=FUNCTION)


def test_disable_and_unload_give_the_base_bit_by_bit(method: Method) -> None:
    model, expected = trained_model(method), logits(llama())
    assert not torch.equal(logits(model), expected)
    with model.disable_adapter():
        assert torch.equal(logits(model), expected)
    unloaded = model.unload()
    assert torch.equal(logits(unloaded), expected)
    original = llama().state_dict()
    assert all(torch.equal(value, original[name]) for name, value in unloaded.state_dict().items())


def test_a_refused_merge_changes_nothing(method: Method) -> None:
    model = trained_model(method)
    last = list(layers(model))[-1]
    next(iter(last.update_of("default").trained_parameters()))[1].data.view(-1)[0] = float("nan")
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match=r"down_proj: NaNs detected in .* Nothing was merged"):
            merge(safe_merge=True)
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(llama()))


def test_copies_and_pickles(method: Method) -> None:
    model = trained_model(method)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(twin), logits(model))


def test_torch_compile_traces_the_layer_whole(method: Method) -> None:
    layer = next(layers(trained_model(method)))
    x = torch.randn(3, layer.in_features)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), layer(x))


# Checkpoints


@both_saves
def test_the_names_in_a_checkpoint(method: Method, tmp_path: Path, save_start: bool) -> None:
    trained_model(method, save_start=save_start).save_pretrained(tmp_path)
    names = {name.split("update.")[1] for name in load_file(tmp_path / "adapter_model.safetensors")}
    assert names == method.trained | method.counters | (method.start if save_start else frozenset())


@both_saves
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_a_trained_adapter_reloads_to_the_same_function(
    method: Method, tmp_path: Path, save_start: bool, low_cpu_mem_usage: bool
) -> None:
    model = trained_model(method, save_start=save_start)
    model.save_pretrained(tmp_path)
    torch.manual_seed(1234)
    reloaded = PeftModel.from_pretrained(llama(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert torch.equal(logits(reloaded), logits(model))
    saved = get_peft_model_state_dict(model)
    assert all(torch.equal(value, saved[name]) for name, value in get_peft_model_state_dict(reloaded).items())


def test_the_status_of_the_model_counts_what_trains(method: Method) -> None:
    model = get_peft_model(llama(), method())
    status, found = model.get_model_status(), list(updates(model))
    trained = sum(value.numel() for update in found for _, value in update.trained_parameters())
    started = sum(value.numel() for update in found for _, value in update.frozen())
    assert status.trainable_params == trained > 0
    assert status.total_params == trained + started + sum(value.numel() for value in llama().parameters())
    assert status.num_adapter_layers == len(found)
    assert status.peft_types == {"default": f"SPECTRAL_{method.config.method.upper()}"}


def test_nothing_of_an_adapter_has_data_before_it_is_loaded(method: Method) -> None:
    trained = inject_adapter_in_model(method(), llama())
    train_(trained, method.lr)
    model = inject_adapter_in_model(method(), llama(), low_cpu_mem_usage=True)
    assert {value.device.type for value in get_peft_model_state_dict(model).values()} == {"meta"}
    set_peft_model_state_dict(model, get_peft_model_state_dict(trained), low_cpu_mem_usage=True)
    assert torch.equal(logits(model), logits(trained))


def test_an_adapter_loads_where_transformers_renames_keys(method: Method) -> None:
    """It takes `text_model` out of the names of a CLIPTextModel, and puts it back for one with a projection."""
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    first, second = (
        inject_adapter_in_model(
            method(target_modules=["q_proj"], check_base=False), CLIPTextModelWithProjection(CLIPTextConfig(**sizes))
        )
        for _ in range(2)
    )
    state_dict = get_peft_model_state_dict(first)
    result = set_peft_model_state_dict(second, state_dict)
    assert not result.unexpected_keys
    assert not [key for key in result.missing_keys if "spectral" in key]
    assert all(torch.equal(value, state_dict[key]) for key, value in get_peft_model_state_dict(second).items())


@both_saves
def test_it_reloads_under_another_thread_count(method: Method, tmp_path: Path, save_start: bool) -> None:
    model = trained_model(method, save_start=save_start)
    model.save_pretrained(tmp_path)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3 - min(threads, 2))
        reloaded = PeftModel.from_pretrained(llama(), tmp_path)
    finally:
        torch.set_num_threads(threads)
    torch.testing.assert_close(logits(reloaded), logits(model), rtol=FUNCTION, atol=FUNCTION)


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_a_float32_checkpoint_stays_float32_over_a_bfloat16_base(
    method: Method, tmp_path: Path, low_cpu_mem_usage: bool
) -> None:
    model = get_peft_model(llama(torch.bfloat16), method())
    train_(model, method.lr)
    model.save_pretrained(tmp_path)
    reloaded = PeftModel.from_pretrained(llama(torch.bfloat16), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert torch.equal(logits(reloaded), logits(model))


def test_loading_decomposes_nothing(method: Method, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = trained_model(method)
    model.save_pretrained(tmp_path)

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("a decomposition whose result the checkpoint overwrites")

    for name in ("svd", "qr", "eigh"):
        monkeypatch.setattr(torch.linalg, name, refuse)
    assert torch.equal(logits(PeftModel.from_pretrained(llama(), tmp_path)), logits(model))
    assert torch.equal(logits(PeftModel.from_pretrained(llama(), tmp_path, low_cpu_mem_usage=True)), logits(model))


def test_an_interrupted_run_equals_an_uninterrupted_one(method: Method, tmp_path: Path) -> None:
    whole = get_peft_model(llama(), method())
    train_(whole, method.lr, steps=5)
    optimizer = torch.optim.AdamW(trainable(whole), lr=method.lr, weight_decay=0.0)
    train_(whole, method.lr, steps=3, optimizer=optimizer)
    whole.save_pretrained(tmp_path)
    state = copy.deepcopy(optimizer.state_dict())
    train_(whole, method.lr, steps=3, optimizer=optimizer)

    torch.manual_seed(4321)
    resumed = PeftModel.from_pretrained(llama(), tmp_path, is_trainable=True)
    optimizer = torch.optim.AdamW(trainable(resumed), lr=method.lr, weight_decay=0.0)
    optimizer.load_state_dict(state)
    train_(resumed, method.lr, steps=3, optimizer=optimizer)
    assert torch.equal(logits(resumed), logits(whole))


def test_a_checkpoint_s_config_alone_starts_a_new_adapter(method: Method, tmp_path: Path) -> None:
    """Loading leaves the start to the checkpoint. Where no checkpoint comes, the first use starts the adapter."""
    method(task_type="CAUSAL_LM").save_pretrained(tmp_path)
    config = method.config.from_pretrained(tmp_path)
    config.inference_mode = False
    model = get_peft_model(llama(), config)
    assert_is_base(method, model)
    train_(model, method.lr)
    expected = get_peft_model(llama(), method())
    train_(expected, method.lr)
    assert torch.equal(logits(model), logits(expected))


def test_a_checkpoint_s_config_alone_saves_a_whole_adapter(method: Method, tmp_path: Path) -> None:
    method().save_pretrained(tmp_path)
    get_peft_model(llama(), method.config.from_pretrained(tmp_path)).save_pretrained(tmp_path / "adapter")
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    expected = get_peft_model_state_dict(get_peft_model(llama(), method()))
    assert all(torch.equal(value, saved[name]) for name, value in expected.items())


def test_a_cached_base_is_not_decomposed_again(
    method: Method, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPECTRAL_PEFT_CACHE", str(tmp_path))
    expected = get_peft_model_state_dict(get_peft_model(llama(), method()))

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("a decomposition that is in the cache")

    for name in ("svd", "qr", "eigh", "eigvalsh"):
        monkeypatch.setattr(torch.linalg, name, refuse)
    again = get_peft_model_state_dict(get_peft_model(llama(), method()))
    assert all(torch.equal(value, expected[name]) for name, value in again.items())


# Several adapters


def test_a_second_adapter_leaves_the_first_alone(method: Method) -> None:
    model = trained_model(method)
    first = logits(model)
    model.add_adapter("second", method(r=4))
    assert torch.equal(logits(model), first)
    model.set_adapter("second")
    assert_is_base(method, model)
    train_(model, method.lr)
    assert not torch.equal(logits(model), logits(llama()))
    model.set_adapter("default")
    assert torch.equal(logits(model), first)
    model.delete_adapter("second")
    assert torch.equal(logits(model), first)
    assert not [name for name in model.state_dict() if "second" in name]


def test_only_the_active_adapter_trains(method: Method) -> None:
    model = trained_model(method)
    model.add_adapter("second", method(r=4))
    model.set_adapter("second")
    names = {name.split("update.")[1] for name, value in model.named_parameters() if value.requires_grad}
    assert names == {f"second.{name}" for name in method.trained}


def test_two_active_adapters_add_up(method: Method) -> None:
    model = trained_model(method)
    model.add_adapter("second", method(r=4))
    model.set_adapter("second")
    train_(model, method.lr)
    layer = next(layers(model))
    x = torch.randn(3, layer.in_features)
    if method.replaces:
        model.base_model.set_adapter(["default", "second"])
        with pytest.raises(ValueError, match="each replace the base weight"):
            layer(x)
        return
    deltas = layer.get_delta_weight("default") + layer.get_delta_weight("second")
    model.base_model.set_adapter(["default", "second"])
    torch.testing.assert_close(layer(x), layer.base_layer(x) + x @ deltas.T, rtol=FUNCTION, atol=FUNCTION)


def test_adapters_load_under_any_name(method: Method, tmp_path: Path) -> None:
    model = trained_model(method)
    model.save_pretrained(tmp_path)
    model.load_adapter(tmp_path, adapter_name="U")
    model.set_adapter("U")
    expected = logits(model)
    model.set_adapter("default")
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize(("one", "other"), list(zip(METHODS, METHODS[1:] + METHODS[:1], strict=True)), ids=str)
def test_adapters_of_different_methods_share_a_model(one: Method, other: Method, tmp_path: Path) -> None:
    alone = llama()
    alone.add_adapter(one(), "one")
    train_(alone, one.lr)
    expected = logits(alone)

    model = llama()
    model.add_adapter(one(), "one")
    train_(model, one.lr)
    model.add_adapter(other(), "other")
    model.set_adapter("other")
    assert_is_base(other, model)
    train_(model, other.lr)
    second = logits(model)
    model.set_adapter("one")
    assert torch.equal(logits(model), expected)

    for name, method, function in (("one", one, expected), ("other", other, second)):
        model.set_adapter(name)
        model.save_pretrained(tmp_path / name)
        names = {key.split("update.")[1] for key in load_file(tmp_path / name / "adapter_model.safetensors")}
        assert names == method.trained | method.start | method.counters
        fresh = llama()
        fresh.load_adapter(str(tmp_path / name))
        assert torch.equal(logits(fresh), function)

    model.delete_adapter("one")
    model.set_adapter("other")
    assert torch.equal(logits(model), second)


def test_deleting_the_only_adapter_gives_the_base(method: Method) -> None:
    model = trained_model(method)
    model.base_model.delete_adapter("default")  # a PeftModel without adapters cannot be called, of whatever method
    assert torch.equal(logits(model.base_model.model), logits(llama()))


# What is refused, and that nothing has changed then


def broken_llama(value: float) -> nn.Module:
    model = llama()
    model.model.layers[1].mlp.up_proj.weight.data[3, 5] = value
    return model


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_broken_weight_is_named_and_the_model_is_left_as_it_was(method: Method, value: float) -> None:
    model = broken_llama(value)
    before = {name: (type(module), id(module)) for name, module in model.named_modules()}
    with pytest.raises(SpectralError, match=r"^model\.layers\.1\.mlp\.up_proj: .*(1 NaN|1 Inf)"):
        get_peft_model(model, method())
    assert {name: (type(module), id(module)) for name, module in model.named_modules()} == before
    assert all(value.requires_grad for value in model.parameters())


def test_a_failing_second_adapter_leaves_the_first_alone(method: Method) -> None:
    model = trained_model(method)
    expected = logits(model)
    model.get_submodule("base_model.model.model.layers.1.mlp.up_proj").base_layer.weight.data[3, 5] = float("nan")
    with pytest.raises(SpectralError, match="up_proj"):
        model.add_adapter("second", method())
    model.get_submodule("base_model.model.model.layers.1.mlp.up_proj").base_layer.weight.data.copy_(
        llama().model.layers[1].mlp.up_proj.weight
    )
    assert list(model.peft_config) == ["default"]
    assert not [name for name in model.state_dict() if "second" in name]
    assert torch.equal(logits(model), expected)


@both_saves
def test_an_adapter_of_another_base_is_refused(method: Method, tmp_path: Path, save_start: bool) -> None:
    trained_model(method, save_start=save_start).save_pretrained(tmp_path)
    other = llama(seed=1)
    expected = logits(other)
    for low_cpu_mem_usage in (False, True):
        with pytest.raises(SpectralError, match=r"q_proj: .* another base weight.*check_base = False"):
            PeftModel.from_pretrained(other, tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
        assert not list(layers(other))
        assert not hasattr(other, "peft_config")
        assert torch.equal(logits(other), expected)


def test_transformers_finds_an_adapter_of_another_base_at_its_first_use(method: Method, tmp_path: Path) -> None:
    trained_model(method).save_pretrained(tmp_path)
    other = llama(seed=1)
    other.load_adapter(str(tmp_path))
    with pytest.raises(SpectralError, match="another base weight"):
        logits(other)


def test_check_base_false_loads_on_any_base(method: Method, tmp_path: Path) -> None:
    trained_model(method).save_pretrained(tmp_path)
    config = method.config.from_pretrained(tmp_path)
    config.check_base = False
    model = PeftModel.from_pretrained(llama(seed=1), tmp_path, config=config)
    assert not torch.equal(logits(model), logits(llama(seed=1)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_rounded_base_is_the_same_base(method: Method, tmp_path: Path, dtype: torch.dtype) -> None:
    trained_model(method).save_pretrained(tmp_path)
    logits(PeftModel.from_pretrained(llama(dtype), tmp_path))


def nearly_equal_llama() -> nn.Module:
    """Too close for the check of the base, but with other singular vectors."""
    model = llama()
    for parameter in model.parameters():
        parameter.data += 2e-3 * parameter.std() * torch.randn_like(parameter)
    return model


@recomputable
def test_recomputed_vectors_of_a_changed_base_are_refused(method: Method, tmp_path: Path) -> None:
    """Nearly the same weight, but not the same singular vectors: too close for the check of the base."""
    trained_model(method, save_start=False).save_pretrained(tmp_path)
    other = nearly_equal_llama()
    with pytest.raises(SpectralError, match=r"recomputed .*save_start=True"):
        logits(PeftModel.from_pretrained(other, tmp_path))


@recomputable
def test_a_checkpoint_loaded_into_a_live_adapter_is_checked_too(method: Method, tmp_path: Path) -> None:
    """Its start was computed from a nearly equal base: only the first use after the loading can tell."""
    trained_model(method, save_start=False).save_pretrained(tmp_path)
    other = nearly_equal_llama()
    model = get_peft_model(other, method(save_start=False))
    logits(model)
    model.load_adapter(tmp_path, "default")
    with pytest.raises(SpectralError, match=r"recomputed .*save_start=True"):
        logits(model)


def test_a_failed_load_into_a_trained_adapter_keeps_it(method: Method, tmp_path: Path) -> None:
    model = trained_model(method)
    expected = logits(model)
    state = load_saved(model, tmp_path)
    state.pop(next(name for name in state if "down_proj" in name))
    save(state, tmp_path)
    with pytest.raises(SpectralError, match="has no tensor"):
        model.load_adapter(tmp_path, "default")
    assert torch.equal(logits(model), expected)


def load_saved(model: PeftModel, folder: Path) -> dict[str, torch.Tensor]:
    model.save_pretrained(folder)
    return load_file(folder / "adapter_model.safetensors")


def save(state: dict[str, torch.Tensor], folder: Path) -> None:
    from safetensors.torch import save_file

    save_file(state, folder / "adapter_model.safetensors")


def test_an_incomplete_checkpoint_is_refused(method: Method, tmp_path: Path) -> None:
    state = load_saved(trained_model(method), tmp_path)
    missing = next(name for name in state if "down_proj" in name)
    save({name: value for name, value in state.items() if name != missing}, tmp_path)
    base = llama()
    with pytest.raises(SpectralError, match=r"has no tensor .*down_proj.*incomplete"):
        PeftModel.from_pretrained(base, tmp_path)
    assert not list(layers(base))


def test_a_checkpoint_of_another_rank_is_refused(method: Method, tmp_path: Path) -> None:
    trained_model(method).save_pretrained(tmp_path)
    base, config = llama(), method.config.from_pretrained(tmp_path)
    config.r = 4
    with pytest.raises(SpectralError, match=r"has shape \(.*8.*\); expected \(.*4.*\).*`r`"):
        PeftModel.from_pretrained(base, tmp_path, config=config)
    assert not list(layers(base))


def test_a_checkpoint_of_the_wrong_dtype_is_refused(method: Method, tmp_path: Path) -> None:
    state = load_saved(trained_model(method), tmp_path)
    name = next(name for name in state if name.endswith(sorted(method.trained)[0]))
    save({**state, name: state[name].to(torch.int64)}, tmp_path)
    with pytest.raises(SpectralError, match=r"is torch\.int64"):
        PeftModel.from_pretrained(llama(), tmp_path)


def test_a_truncated_file_is_refused(method: Method, tmp_path: Path) -> None:
    trained_model(method).save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    base = llama()
    with pytest.raises(SpectralError, match=r"adapter_model\.safetensors cannot be read .*truncated"):
        PeftModel.from_pretrained(base, tmp_path)
    assert not list(layers(base))
    assert torch.equal(logits(base), logits(llama()))


def test_after_a_missing_file_the_base_still_loads_an_adapter(
    method: Method, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = trained_model(method)
    model.save_pretrained(tmp_path / "good")
    method().save_pretrained(tmp_path / "bad")
    base = llama()
    with pytest.raises(ValueError, match="Repo id"):
        PeftModel.from_pretrained(base, str(tmp_path / "bad"))
    assert "no adapter to load" in caplog.text
    assert_is_base(method, base)
    assert torch.equal(logits(PeftModel.from_pretrained(base, tmp_path / "good")), logits(model))
