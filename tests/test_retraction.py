"""Many factors are retracted as one is, with one call for all small matrices of a size."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import get_peft_model
from torch import Tensor

from spectral_peft import SCTConfig
from spectral_peft.linalg import orthonormality_error, stiefel
from spectral_peft.retraction import RETRACTIONS, Point, retract_
from tests.models import llama, train_, updates
from tests.tolerance import tolerance


every_retraction = pytest.mark.parametrize("retraction", list(RETRACTIONS))


def near(m: int, r: int, size: float = 0.02, dtype: torch.dtype = torch.float32) -> Tensor:
    """Nearly orthonormal, as after an optimizer step."""
    X = torch.linalg.qr(torch.randn(m, r, dtype=torch.float64)).Q
    return (X + size * torch.randn(m, r, dtype=torch.float64)).to(dtype)


def mixed() -> list[Tensor]:
    """Several shapes, ranks and dtypes, transposed views, and matrices that are far from orthonormal."""
    deficient = near(30, 4)
    deficient[:, 1] = deficient[:, 2]
    return [
        near(30, 4), near(50, 4), near(40, 4).mT.contiguous().mT, near(30, 6), near(30, 6, dtype=torch.float64),
        near(20, 20), 3 * near(30, 4), torch.randn(30, 4), deficient, torch.zeros(30, 4),
    ]  # fmt: skip


def points(matrices: list[Tensor]) -> list[Point]:
    return [Point(X, str(number)) for number, X in enumerate(matrices)]


@every_retraction
def test_together_is_one_by_one(retraction: str) -> None:
    together = mixed()
    originals = [X.clone() for X in together]
    expected = [RETRACTIONS[retraction](X) for X in originals]
    retract_(points(together), retraction)
    for X, one in zip(together, expected, strict=True):
        assert orthonormality_error(X) <= tolerance(X.dtype, len(X))
        torch.testing.assert_close(X, one, rtol=0, atol=tolerance(X.dtype, len(X)))


@every_retraction
def test_adapters_of_one_step_are_retracted_as_if_alone(retraction: str) -> None:
    model = get_peft_model(llama(), SCTConfig(r=4, target_modules="all-linear", retraction=retraction))
    group = list(updates(model))
    for update in group:
        for _, value in update.trained_parameters():
            value.data.add_(torch.randn_like(value), alpha=0.02)
    alone = copy.deepcopy(group)
    type(group[0]).after_optimizer_step_of(group)
    for update, twin in zip(group, alone, strict=True):
        twin.after_optimizer_step()
        for (name, value), (_, other) in zip(update.named_parameters(), twin.named_parameters(), strict=True):
            torch.testing.assert_close(value, other, rtol=0, atol=tolerance(torch.float32, 48), msg=name)


@pytest.mark.parametrize("retraction", ["polar", "cholesky_qr"])
def test_small_matrices_are_factored_in_one_call_for_each_rank(
    retraction: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    module = "spectral_peft.retraction"
    transform = getattr(stiefel, f"{retraction.removesuffix('_qr')}_transform")

    def recorded(G: Tensor, distance: float) -> Tensor:
        calls.append(tuple(G.shape))
        return transform(G, distance)

    monkeypatch.setattr(f"{module}._TRANSFORMS", {retraction: recorded})
    model = get_peft_model(
        llama(), SCTConfig(r=4, target_modules="all-linear", retraction=retraction, rank_pattern={"q_proj": 3})
    )
    train_(model, lr=1e-3, steps=1)
    assert sorted(calls) == [(2 * 2, 3, 3), (2 * 12, 4, 4)]


def test_stacks_are_split_where_they_would_be_large(monkeypatch: pytest.MonkeyPatch) -> None:
    together = [near(30, 4) for _ in range(7)]
    whole = [X.clone() for X in together]
    retract_(points(whole), "polar")
    monkeypatch.setattr("spectral_peft.retraction._STACKED_ENTRIES", 3 * 16)
    retract_(points(together), "polar")
    for X, one in zip(together, whole, strict=True):
        torch.testing.assert_close(X, one, rtol=0, atol=tolerance(torch.float32, 30))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [1e-4, 1e-2, 3e-2])
def test_the_nearest_point_from_the_gram_matrix_alone_is_accurate(size: float, dtype: torch.dtype) -> None:
    X = near(300, 16, size, dtype)
    U, _, Vh = torch.linalg.svd(X.double(), full_matrices=False)
    retract_(points([X]), "polar")
    eps = torch.finfo(dtype).eps
    assert orthonormality_error(X.double()) < 10 * eps
    assert (X.double() - U @ Vh).abs().max() < 10 * eps
