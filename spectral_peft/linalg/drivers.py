"""What an SVD is made of, and the ladder of drivers that compute one."""

from __future__ import annotations

from contextlib import suppress
from typing import NamedTuple

import torch
from torch import Tensor

from spectral_peft.errors import SpectralError


NotConverged = torch.linalg.LinAlgError  # type: ignore[attr-defined]


class Factors(NamedTuple):
    """A matrix as U diag(S) Vh, named and laid out as by `torch.linalg.svd`."""

    U: Tensor  # shape: (..., m, r)
    S: Tensor  # shape: (..., r)
    Vh: Tensor  # shape: (..., r, n)

    def matrix(self) -> Tensor:  # shape: (..., m, n)
        """U diag(S) Vh."""
        return (self.U * self.S.unsqueeze(-2)) @ self.Vh


def _default_driver(A: Tensor) -> Factors:
    return Factors(*torch.linalg.svd(A, full_matrices=False))


def _gesvd(A: Tensor) -> Factors:
    return Factors(*torch.linalg.svd(A, full_matrices=False, driver="gesvd"))


def _float64_on_cpu(A: Tensor) -> Factors:
    return _default_driver(A.to("cpu", torch.float64))


def _gram(A: Tensor) -> Factors:
    """From A^T A = V diag(S^2) V^T and A V = U diag(S), in float64: singular values below 1e-8 S_1 are lost in it.

    U is the Q factor of A V, hence orthonormal where singular values are zero.
    """
    if A.shape[-2] < A.shape[-1]:
        V, S, Uh = _gram(A.mT)
        return Factors(Uh.mT, S, V.mT)
    A = A.to("cpu", torch.float64)
    V = torch.linalg.eigh(A.mT @ A).eigenvectors.flip(-1)
    U, R = torch.linalg.qr(A @ V)
    diagonal = R.diagonal(dim1=-2, dim2=-1)
    S, order = diagonal.abs().sort(descending=True)
    U = torch.where(diagonal < 0, -1.0, 1.0).unsqueeze(-2) * U
    return Factors(U.take_along_dim(order.unsqueeze(-2), -1), S, V.take_along_dim(order.unsqueeze(-2), -1).mT)


def decompose(A: Tensor) -> Factors:
    """The thin SVD of a float32 or float64 `A` by the first driver that converges, in its dtype and on its device.

    Signs and memory layout are those of the driver.

    Raises:
        SpectralError: none converges.
    """
    on_cuda = (_gesvd,) if A.is_cuda else ()
    for attempt in (_default_driver, *on_cuda, _float64_on_cpu, _gram):
        with suppress(NotConverged):
            U, S, Vh = attempt(A)
            return Factors(U.to(A), S.to(A), Vh.to(A))
    raise SpectralError(f"No SVD driver converges on the matrix of shape {tuple(A.shape)}.")
