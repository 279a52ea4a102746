"""Mixed precision, and the features that save memory: what they may change of the function and of its gradients."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint

from tests.methods import METHODS, Method
from tests.models import batch, layers, llama, logits, tensors, train_, trainable, updates


dtypes = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
additive = pytest.mark.parametrize("method", [method for method in METHODS if not method.replaces], ids=str)
with_spectrum = pytest.mark.parametrize(
    "method", [method for method in METHODS if "dS.weight" in method.trained], ids=str
)


def eps(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps


def relative(actual: Tensor, expected: Tensor) -> float:
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


def trained(method: Method, dtype: torch.dtype = torch.float32, **kwargs: object) -> PeftModel:
    model = get_peft_model(llama(dtype), method(), **kwargs)
    train_(model, method.lr)
    return model.train()


def gradients(model: nn.Module) -> list[Tensor]:
    """Of what trains, for the same data and the same random numbers."""
    torch.manual_seed(0)
    ids = batch()
    model(input_ids=ids, labels=ids).loss.backward()
    found = [value.grad for value in trainable(model)]
    model.zero_grad()
    assert all(value is not None for value in found)
    return found


# 16 bits


@dtypes
def test_autocast_rounds_and_keeps_float32_gradients(method: Method, dtype: torch.dtype) -> None:
    model = trained(method)
    exact = gradients(model)
    with torch.autocast("cpu", dtype):
        rounded = gradients(model)
    assert {value.dtype for value in rounded} == {torch.float32}
    assert relative(torch.cat([g.flatten() for g in rounded]), torch.cat([g.flatten() for g in exact])) < 32 * eps(
        dtype
    )


@dtypes
def test_the_change_under_autocast_is_right_relative_to_itself(method: Method, dtype: torch.dtype) -> None:
    """A change of a thousandth of the weight would drown in the rounding of the two products that it is between."""
    layer = next(layers(get_peft_model(llama(), method())))
    update = layer.update_of("default")
    for _, value in update.trained_parameters():
        value.data.add_(torch.randn_like(value), alpha=1e-3)
    x = torch.randn(64, layer.in_features)
    exact = x.double() @ method.matrix(tensors(update)).T
    with torch.no_grad(), torch.autocast("cpu", dtype):
        assert relative(update(x), exact) < 4 * eps(dtype)


@additive
@dtypes
def test_the_change_of_16_bit_factors_is_right_relative_to_itself(method: Method, dtype: torch.dtype) -> None:
    model = get_peft_model(llama(dtype), method(), autocast_adapter_dtype=False)
    layer = next(layers(model))
    update = layer.update_of("default")
    update.dS.weight.data.fill_(2**-10) if hasattr(update, "dS") else update.perturb_()
    x = torch.randn(64, layer.in_features).to(dtype)
    change = method.matrix(tensors(update))
    assert change.norm() > 0
    with torch.no_grad():
        assert relative(update(x), x.double() @ change.T) < 4 * eps(dtype)
        assert relative(layer.get_delta_weight("default"), change) < 4 * eps(dtype)


@with_spectrum
@pytest.mark.parametrize("step", [1e-6, 1e-4, 1e-2])
def test_small_steps_of_singular_values_add_up_in_bfloat16(method: Method, step: float) -> None:
    """As far as 32 roundings let them; the values themselves would not move at all: theirs are steps of 0.4 %."""
    model = get_peft_model(llama(torch.bfloat16), method(**dict(method.at_rest)), autocast_adapter_dtype=False)
    values = [update.dS.weight for update in updates(model)]
    starts = [update.S.weight.detach().clone() for update in updates(model)]
    optimizer = torch.optim.SGD(values, lr=step)
    for _ in range(32):
        for value in values:
            value.grad = -torch.ones_like(value)
        optimizer.step()
    for update, value, start in zip(updates(model), values, starts, strict=True):
        assert value.dtype == torch.bfloat16
        assert torch.equal(update.S.weight, start)
        torch.testing.assert_close(value.double(), torch.full_like(value, 32 * step).double(), rtol=0.1, atol=0)


def test_pure_bfloat16_trains_as_float32_does(method: Method) -> None:
    """The loss falls by nearly as much when everything, what trains included, is in bfloat16."""
    falls = []
    for dtype in (torch.float32, torch.bfloat16):
        model = get_peft_model(llama(dtype), method(), autocast_adapter_dtype=False)
        ids = batch()

        def loss(model: nn.Module = model, ids: Tensor = ids) -> float:
            return float(
                nn.functional.cross_entropy(logits(model, ids)[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())
            )

        before = loss()
        optimizer = torch.optim.AdamW(trainable(model), lr=method.lr, weight_decay=0.0)
        for _ in range(8):
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        falls.append(before - loss())
    assert falls[0] > 0.1
    assert falls[1] > 0.8 * falls[0]


def test_a_float32_update_over_a_bfloat16_base_has_float32_gradients(method: Method) -> None:
    model = trained(method, torch.bfloat16)
    assert {value.dtype for value in gradients(model)} == {torch.float32}
    assert logits(model).dtype == torch.bfloat16


# What trains cast to 16 bits alone, as TRL's trainers do over a quantized base


def cast_(model: nn.Module) -> nn.Module:
    for value in trainable(model):
        value.data = value.data.to(torch.bfloat16)
    return model


@additive
def test_an_adapter_whose_trained_part_is_cast_starts_as_the_base(method: Method) -> None:
    model = cast_(get_peft_model(llama(), method()))
    expected = logits(llama())
    assert torch.equal(logits(model), expected)
    with pytest.warns(UserWarning, match="had been cast to 16 bits"):
        model.train()
    assert {value.dtype for value in trainable(model)} == {torch.float32}
    assert torch.equal(logits(model), expected)


def test_what_was_cast_trains_as_if_it_had_not_been(method: Method) -> None:
    """Bit by bit for a new adapter of a method that adds, up to the rounding of the start where it replaces."""
    model, expected = get_peft_model(llama(), method()), get_peft_model(llama(), method())
    held = trainable(model)
    with pytest.warns(UserWarning, match="had been cast to 16 bits"):
        train_(cast_(model), method.lr)
    train_(expected, method.lr)
    assert all(one is other for one, other in zip(held, trainable(model), strict=True))
    rounding = 0.1 if method.replaces else 0
    torch.testing.assert_close(logits(model), logits(expected), rtol=rounding, atol=rounding)


def test_a_checkpoint_that_is_loaded_into_a_cast_adapter_is_not_rounded(method: Method, tmp_path: Path) -> None:
    model = trained(method)
    model.save_pretrained(tmp_path)
    other = cast_(get_peft_model(llama(), method()))
    other.load_adapter(tmp_path, "default", is_trainable=True)
    assert {value.dtype for value in trainable(other)} == {torch.float32}
    assert torch.equal(logits(other), logits(model))


def test_a_model_in_16_bits_as_a_whole_stays_so(method: Method, recwarn: pytest.WarningsRecorder) -> None:
    model = get_peft_model(llama(torch.bfloat16), method(), autocast_adapter_dtype=False).train()
    assert {value.dtype for value in trainable(model)} == {torch.bfloat16}
    get_peft_model(llama(), method()).to(torch.bfloat16).train()
    assert not [warning for warning in recwarn if "16 bits" in str(warning.message)]


# Memory


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "not-reentrant"])
def test_gradient_checkpointing(method: Method, use_reentrant: bool, dropout: float) -> None:
    model = get_peft_model(llama(), method(dropout=dropout))
    train_(model, method.lr)
    expected = gradients(model.train())
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    with recomputing(model) as calls:
        found = gradients(model)
    assert calls() == 2  # it did compute the layer again
    for actual, exact in zip(found, expected, strict=True):
        torch.testing.assert_close(actual, exact)


@contextmanager
def recomputing(model: nn.Module) -> Iterator[Callable[[], int]]:
    """Counts the calls of the first layer."""
    count = [0]
    hook = next(layers(model)).register_forward_hook(lambda *_: count.__setitem__(0, count[0] + 1))
    yield lambda: count[0]
    hook.remove()


@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "not-reentrant"])
def test_checkpointing_one_layer_by_hand(method: Method, use_reentrant: bool) -> None:
    layer = next(layers(trained(method)))
    x = torch.randn(5, layer.in_features, requires_grad=True)
    found = []
    for call in (layer, lambda x: checkpoint(layer, x, use_reentrant=use_reentrant)):
        call(x).square().sum().backward()
        found.append([x.grad, *(value.grad for value in trainable(layer))])
        x.grad = None
        layer.zero_grad()
    for plain, recomputed in zip(*found, strict=True):
        assert torch.equal(plain, recomputed)


def moved_away() -> AbstractContextManager:
    """Keeps every activation as a numpy array, as one that is kept on disk or on another device."""
    return torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: tensor if isinstance(tensor, nn.Parameter) else tensor.detach().numpy().copy(),
        lambda kept: kept if isinstance(kept, Tensor) else torch.from_numpy(kept),
    )


@pytest.mark.parametrize("offload", [torch.autograd.graph.save_on_cpu, moved_away])
def test_activations_may_lie_elsewhere(method: Method, offload: Callable[[], AbstractContextManager]) -> None:
    model = trained(method)
    expected = gradients(model)
    with offload():
        found = gradients(model)
    for actual, exact in zip(found, expected, strict=True):
        torch.testing.assert_close(actual, exact)  # a copy may have other strides, and its product another order


# torch.compile


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(24, 40), nn.Linear(40, 24)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(x)))


def losses(
    model: nn.Module,
    call: Callable[[Tensor], Tensor],
    lr: float,
    autocast: bool,
    after_first: AbstractContextManager,
) -> list[float]:
    """Of nine steps, in which every schedule of the table swaps and decomposes twice."""
    optimizer = torch.optim.AdamW(trainable(model), lr=lr, weight_decay=0.0)
    generator, found = torch.Generator().manual_seed(0), []
    for step in range(9):
        x = torch.randn(6, 24, generator=generator)
        with nullcontext() if step == 0 else after_first:
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                loss = (call(x) - 1).square().mean()
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(float(loss))
    return found


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
def test_torch_compile_compiles_once(method: Method, autocast: bool) -> None:
    """No swap, decomposition or retraction makes it compile again, and results are those of the eager model."""
    base = Net()
    eager, other = (
        get_peft_model(copy.deepcopy(base), method(target_modules=["up", "down"])).train() for _ in range(2)
    )
    torch._dynamo.reset()
    counters.clear()
    compiled = torch.compile(other, backend="eager" if autocast else "aot_eager", fullgraph=True)
    once = torch._dynamo.config.patch(error_on_recompile=True)
    found = losses(other, compiled, method.lr, autocast, once)
    expected = losses(eager, eager, method.lr, autocast, nullcontext())
    assert counters["stats"]["unique_graphs"] == 1
    assert found == expected
    assert expected[-1] < expected[0]
    for one, exact in zip(trainable(other), trainable(eager), strict=True):
        assert torch.equal(one, exact)
