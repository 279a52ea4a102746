"""Laws of every update as a torch module: no PEFT, no model."""

from __future__ import annotations

import pytest
import torch

from spectral_peft import Size, SpectralUpdate
from tests.methods import METHODS, Method
from tests.models import tensors
from tests.tolerance import tolerance


SHAPES = [(24, 10), (10, 24), (16, 16)]


def make(
    method: Method, shape: tuple[int, int], change: float, dtype: torch.dtype = torch.float64, **fields: object
) -> SpectralUpdate:
    """An update of rank 4 that was moved by `change` relative to the entries of its start."""
    update = started(method, torch.randn(shape, dtype=dtype), **fields)
    size = torch.cat([value.flatten() for value in tensors(update).values()]).abs().mean()
    for _, parameter in update.trained_parameters():
        parameter.data.add_(torch.randn_like(parameter), alpha=change * float(size))
    return update


def started(method: Method, weight: torch.Tensor, **fields: object) -> SpectralUpdate:
    config = method(r=4, svd="exact", **fields)
    update = config.build(Size(*weight.shape, 4, weight.dtype))
    update.start_(config.decompose(weight, 4))
    return update


@pytest.mark.parametrize("shape", SHAPES)
def test_it_starts_as_the_weight_or_as_no_change(method: Method, shape: tuple[int, int]) -> None:
    weight = torch.randn(shape, dtype=torch.float64)
    update = started(method, weight)
    expected = method.at_start(weight, 4) if method.replaces else torch.zeros_like(weight)
    torch.testing.assert_close(update.matrix(), expected)


@pytest.mark.parametrize("shape", SHAPES)
def test_delta_is_the_formula_of_the_paper(method: Method, shape: tuple[int, int]) -> None:
    update = make(method, shape, change=0.1)
    torch.testing.assert_close(update.matrix(), method.matrix(tensors(update)))


@pytest.mark.parametrize("shape", SHAPES)
def test_forward_agrees_with_delta(method: Method, shape: tuple[int, int]) -> None:
    update = make(method, shape, change=0.1)
    x = torch.randn(2, 3, shape[1], dtype=torch.float64)
    torch.testing.assert_close(update(x), x @ update.matrix().T)
    torch.testing.assert_close(update(x), torch.stack([torch.stack([update(row) for row in rows]) for rows in x]))


def test_an_index_is_a_one_hot_vector(embedding_method: Method) -> None:
    update = make(embedding_method, (10, 24), change=0.1)
    ids = torch.randint(0, 24, (2, 5))
    one_hot = torch.nn.functional.one_hot(ids, 24).double()
    torch.testing.assert_close(update(ids), update(one_hot))


@pytest.mark.parametrize("shape", SHAPES)
def test_gradients(method: Method, shape: tuple[int, int]) -> None:
    update = make(method, shape, change=0.1, **dict(method.derivative))
    update.freeze_start_()
    names, values = zip(*update.trained_parameters(), strict=True)

    def forward(x: torch.Tensor, *parameters: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(update, dict(zip(names, parameters, strict=True)), x)

    x = torch.randn(3, shape[1], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(forward, (x, *values))


def test_only_what_is_named_trains(method: Method) -> None:
    update = make(method, (16, 16), change=0.1)
    update.freeze_start_()
    assert {name for name, value in update.named_parameters() if value.requires_grad} == method.trained
    assert {name for name, value in update.named_parameters() if not value.requires_grad} == method.start


@pytest.mark.parametrize("method", [method for method in METHODS if not method.replaces], ids=str)
@pytest.mark.parametrize("change", [1e-1, 1e-2, 1e-3])
def test_a_small_change_survives_bfloat16_autocast(method: Method, change: float) -> None:
    """The plain difference of two products has an error relative to W: 30 % of a change of 1 %."""
    update = make(method, (64, 48), change, dtype=torch.float32)
    x = torch.randn(32, 48)
    expected = x.double() @ method.matrix(tensors(update)).T
    with torch.autocast("cpu", dtype=torch.bfloat16):
        error = (update(x).double() - expected).norm() / expected.norm()
    assert error < 1e-2


def test_it_runs_whatever_the_mix_of_dtypes(method: Method) -> None:
    """Trained tensors in bfloat16 over a start in float32 is what TRL makes of adapters on quantized bases."""
    update = make(method, (16, 16), change=0.1, dtype=torch.float32)
    x = torch.randn(8, 16)
    expected = update(x)
    for _, parameter in update.trained_parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    for dtype in (torch.float32, torch.bfloat16):
        got = update(x.to(dtype)).float()
        assert (got - expected).norm() / expected.norm() < tolerance(torch.bfloat16, 1)


def test_a_fingerprint_outlives_a_cast(method: Method) -> None:
    update, weight = make(method, (16, 16), change=0.1, dtype=torch.float32), torch.randn(16, 16)
    update.take_fingerprint_(weight)
    before = update.fingerprint.clone()
    assert before.any()
    assert torch.equal(update.to(torch.bfloat16).fingerprint, before)
