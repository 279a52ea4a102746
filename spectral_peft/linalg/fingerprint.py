"""Nine numbers that tell one weight from another and survive rounding and another device."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from spectral_peft.linalg.precision import factorizing


# Their square roots are linearly independent over the rationals: no two probes coincide at any size.
_ROW_PRIMES = (2, 3, 5, 7, 11, 13, 17, 19)
_COLUMN_PRIMES = (23, 29, 31, 37, 41, 43, 47, 53)
SKETCH_SIZE = 1 + len(_ROW_PRIMES)


def sketch(
    A: Tensor,  # shape: (..., m, n); leading dimensions count as rows
) -> Tensor:  # shape: (9,), float32
    """||A||_F, then a_k^T A b_k / ||A||_F for eight fixed pairs of probe vectors of cosines; zeros for A = 0.

    For unrelated matrices the forms are of order 0.5 and differ by as much; rounding A to bfloat16 moves them by
    about 1e-3. A change of relative size e in A moves them by about 0.5 e: a sketch tells models apart, not one
    training step.
    """
    A = A.detach().reshape(-1, A.shape[-1])
    A = A.to(torch.promote_types(A.dtype, torch.float32))
    with factorizing(A):
        norm = torch.linalg.vector_norm(A, dim=-1).double().square().sum().sqrt()
        rows, columns = _probes(_ROW_PRIMES, A.shape[0]).to(A), _probes(_COLUMN_PRIMES, A.shape[1]).to(A)
        forms = ((rows @ A).double() * columns.double()).sum(-1)
        normalized = torch.where(norm > 0, forms / norm, torch.zeros_like(forms))
        return torch.cat((norm[None], normalized)).float()


def same_matrix(
    sketch1: Tensor,  # shape: (9,)
    sketch2: Tensor,  # shape: (9,)
    tolerance: float,
) -> bool:
    """Whether two sketches agree: norms to `tolerance` relatively, forms to `tolerance` (relatively above 1)."""
    first, second = sketch1.detach().double().cpu(), sketch2.detach().double().cpu()
    scale = torch.maximum(first.abs(), second.abs())
    scale[1:].clamp_(min=1)
    return bool(((first - second).abs() <= tolerance * scale).all())


@functools.lru_cache(maxsize=64)  # a model has many weights and few sizes
def _probes(primes: tuple[int, ...], length: int) -> Tensor:  # shape: (8, length), float64
    """cos(sqrt(prime) * (1 + i)), computed and not drawn, so that they are the same everywhere."""
    frequencies = torch.tensor(primes, dtype=torch.float64).sqrt()
    return torch.outer(frequencies, torch.arange(1, length + 1, dtype=torch.float64)).cos()
