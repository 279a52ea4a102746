"""Retraction of all factors that one optimizer step moved: their small matrices together, the large ones in turn."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor

from spectral_peft.errors import diverged
from spectral_peft.linalg import cholesky_qr_retraction, polar_retraction, qr_retraction
from spectral_peft.linalg.precision import exact_products, factorizing
from spectral_peft.linalg.stiefel import NEARLY_ORTHONORMAL, cholesky_transform, polar_transform


RETRACTIONS: MappingProxyType[str, Callable[[Tensor], Tensor]] = MappingProxyType(
    {"polar": polar_retraction, "qr": qr_retraction, "cholesky_qr": cholesky_qr_retraction}
)
# The r x r matrix T with which X T is the retracted X, from the Gram matrix X^T X alone.
_TRANSFORMS: MappingProxyType[str, Callable[[Tensor, float], Tensor]] = MappingProxyType(
    {"polar": polar_transform, "cholesky_qr": cholesky_transform}
)
_STACKED_ENTRIES = 2**24
"""Entries of Gram matrices that are worked on at a time, so that what they need beside them stays small."""


class Point(NamedTuple):
    """A factor to retract, and the name that errors call it by.

    Attributes:
        X: Shape (m, r), m >= r: the parameter, or its transpose as a view. It is changed in place.
        name: Name of the parameter and of its module.
    """

    X: Tensor
    name: str


class _Stack(NamedTuple):
    points: list[Point]
    grams: Tensor  # shape: (k, r, r)
    errors: list[float]  # the largest entries of |X^T X - I|
    distances: list[float]  # as in NEARLY_ORTHONORMAL; NaN for a zero matrix


@torch.no_grad()
def retract_(points: Sequence[Point], retraction: str, tolerance: float | None = None) -> list[Point]:
    """Makes the columns of each X orthonormal, in place, as `RETRACTIONS` does for one of them.

    Only the r x r Gram matrices of equal size are stacked and factored in one call, since a stack of the factors
    themselves would double their memory: one Gram matrix and one product for each X. Where an X is too far from
    orthonormal for its Gram matrix, it is retracted by itself.

    Args:
        points: what to retract.
        retraction: a key of `RETRACTIONS`.
        tolerance: None retracts every X; a number those of which an entry of |X^T X - I| is larger.

    Returns:
        Those of the points that were retracted.

    Raises:
        SpectralError: NaN or Inf in an X. None has changed then.
    """
    return [point for stack in measured(points) for point in _retract_stack_(stack, retraction, tolerance)]


@torch.no_grad()
def measured(points: Sequence[Point]) -> list[_Stack]:
    """The points with their Gram matrices, in stacks of one size, dtype and device.

    Raises:
        SpectralError: NaN or Inf in an X, which the Gram matrix shows without a pass of its own.
    """
    groups: defaultdict[tuple[int, torch.dtype, torch.device], list[Point]] = defaultdict(list)
    for point in points:
        X = point.X
        groups[X.shape[1], torch.promote_types(X.dtype, torch.float32), X.device].append(point)
    return [_measured_stack(chunk) for (r, _, _), group in groups.items() for chunk in _chunks(group, r)]


def _chunks(points: list[Point], r: int) -> Iterator[list[Point]]:
    size = max(1, _STACKED_ENTRIES // r**2)
    return (points[first : first + size] for first in range(0, len(points), size))


def _measured_stack(points: list[Point]) -> _Stack:
    with exact_products(points[0].X.device):
        grams = torch.stack([_gram(point.X) for point in points])
        identity = torch.eye(grams.shape[-1], dtype=grams.dtype, device=grams.device)
        scale = grams.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None]
        numbers = (
            (grams - identity).abs().amax(dim=(-2, -1)),
            torch.linalg.matrix_norm(grams / scale - identity),
        )
        errors, distances = torch.stack(numbers).tolist()  # the one transfer from the device
    for point, error in zip(points, errors, strict=True):
        if not math.isfinite(error):
            raise diverged(point.name)
    return _Stack(points, grams, errors, distances)


def _gram(X: Tensor) -> Tensor:  # shape: (m, r) -> (r, r)
    working = X.to(torch.promote_types(X.dtype, torch.float32))
    return working.mT @ working


def _retract_stack_(stack: _Stack, retraction: str, tolerance: float | None) -> list[Point]:
    due = [i for i, error in enumerate(stack.errors) if tolerance is None or error > tolerance]
    near = [i for i in due if retraction in _TRANSFORMS and stack.distances[i] <= NEARLY_ORTHONORMAL]
    if near:
        grams = stack.grams if len(near) == len(stack.points) else stack.grams[near]
        with factorizing(grams):
            transforms = _TRANSFORMS[retraction](grams, max(stack.distances[i] for i in near))
            spare: dict[torch.Size, Tensor] = {}
            for i, T in zip(near, transforms, strict=True):
                _transform_(stack.points[i].X, T, spare)
    for i in sorted({*due} - {*near}):
        X = stack.points[i].X
        X.copy_(RETRACTIONS[retraction](X))
    return [stack.points[i] for i in due]


def _transform_(X: Tensor, T: Tensor, spare: dict[torch.Size, Tensor]) -> None:
    """Sets X to X T; where X is the transpose of a parameter, in the parameter's own layout, which is faster.

    The product goes to memory that was used for an X of this shape before: fresh memory costs a fifth of the time.
    """
    parameter, left, right = (X, X, T) if X.is_contiguous() else (X.mT, T.mT, X.mT)
    out = spare.get(parameter.shape)
    if out is None:
        out = spare[parameter.shape] = torch.empty(parameter.shape, dtype=T.dtype, device=T.device)
    parameter.copy_(torch.mm(left.to(T.dtype), right.to(T.dtype), out=out))
