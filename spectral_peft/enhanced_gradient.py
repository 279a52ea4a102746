"""The product with a matrix of which some singular triplets train, and SST's gradient of it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class SegmentedProduct(torch.autograd.Function):
    """x -> ((x Vh^T) * S) U^T + ((x Vh_rest^T) * S_rest) U_rest^T, with gradients for x, U, all of S, and Vh.

    With P = x Vh^T and Q = g U for the gradient g of the output,

        dS = sum_t P * Q,   dx = (Q * S) Vh,   dU = g^T (P * S),   dVh = (Q * S)^T x,

    and with `enhanced` dU = g^T P, dVh = Q^T x: the projections (dL/dW) v_i and (dL/dW)^T u_i of the gradient of
    W = U diag(S) Vh (Zhao et al., 2025, SST). They are not the derivatives by U and Vh: those carry a factor S_i, with
    which the vectors of small singular values would hardly learn. Neither W nor its gradient is built.
    A second derivative raises RuntimeError.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,  # shape: (..., n)
        U: Tensor,  # shape: (m, r)
        S: Tensor,  # shape: (k,), the r of U and Vh first
        Vh: Tensor,  # shape: (r, n)
        U_rest: Tensor,  # shape: (m, k - r)
        Vh_rest: Tensor,  # shape: (k - r, n)
        enhanced: bool,
        dtype: torch.dtype,
    ) -> Tensor:  # shape: (..., m), in `dtype`
        r = U.shape[1]
        with torch.autocast(x.device.type, enabled=False):
            rows = x.reshape(-1, x.shape[-1]).to(dtype)
            P, P_rest = rows @ Vh.to(dtype).mT, rows @ Vh_rest.to(dtype).mT
            scale = S.to(dtype)
            y = (P * scale[:r]) @ U.to(dtype).mT
            y += (P_rest * scale[r:]) @ U_rest.to(dtype).mT
        ctx.save_for_backward(rows, P, P_rest, U, S, Vh, U_rest, Vh_rest)
        ctx.enhanced, ctx.x_dtype, ctx.x_shape = enhanced, x.dtype, x.shape
        return y.reshape(*x.shape[:-1], len(U))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, P, P_rest, U, S, Vh, U_rest, Vh_rest = ctx.saved_tensors
        r, dtype = U.shape[1], rows.dtype
        with torch.autocast(grad.device.type, enabled=False):
            g = grad.reshape(-1, grad.shape[-1]).to(dtype)
            Q, Q_rest = g @ U.to(dtype), g @ U_rest.to(dtype)
            scale = S.to(dtype)
            QS = Q * scale[:r]
            dx = dU = dS = dVh = None
            if ctx.needs_input_grad[0]:
                dx = QS @ Vh.to(dtype)
                dx += (Q_rest * scale[r:]) @ Vh_rest.to(dtype)
                dx = dx.to(ctx.x_dtype).reshape(ctx.x_shape)
            if ctx.needs_input_grad[1]:
                dU = (g.mT @ (P if ctx.enhanced else P * scale[:r])).to(U.dtype)
            if ctx.needs_input_grad[2]:
                dS = torch.cat([_dots(P, Q, S.dtype), _dots(P_rest, Q_rest, S.dtype)])
            if ctx.needs_input_grad[3]:
                dVh = ((Q if ctx.enhanced else QS).mT @ rows).to(Vh.dtype)
        return dx, dU, dS, dVh, None, None, None, None


class DenseProduct(torch.autograd.Function):
    """The same function and gradients as `SegmentedProduct`, by way of W and its gradient G, for many rows of x.

    With W = U diag(S) Vh and the gradient g of the output, G = g^T x, and

        dS_i = u_i^T G v_i,   dx = g W,   dU = G Vh^T diag(S),   dVh = diag(S) U^T G,

    without diag(S) if `enhanced`. W is built in both passes and, like G, lives no longer than the pass through this
    one weight; of the forward pass only x is kept.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,  # shape: (..., n)
        U: Tensor,  # shape: (m, r)
        S: Tensor,  # shape: (k,), the r of U and Vh first
        Vh: Tensor,  # shape: (r, n)
        U_rest: Tensor,  # shape: (m, k - r)
        Vh_rest: Tensor,  # shape: (k - r, n)
        enhanced: bool,
        dtype: torch.dtype,
    ) -> Tensor:  # shape: (..., m), in `dtype`
        with torch.autocast(x.device.type, enabled=False):
            rows = x.reshape(-1, x.shape[-1]).to(dtype)
            y = rows @ _matrix(U, S, Vh, U_rest, Vh_rest, dtype).mT
        ctx.save_for_backward(rows, U, S, Vh, U_rest, Vh_rest)
        ctx.enhanced, ctx.x_dtype, ctx.x_shape = enhanced, x.dtype, x.shape
        return y.reshape(*x.shape[:-1], len(U))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, U, S, Vh, U_rest, Vh_rest = ctx.saved_tensors
        r, dtype = U.shape[1], rows.dtype
        dx = dU = dS = dVh = None
        with torch.autocast(grad.device.type, enabled=False):
            g = grad.reshape(-1, grad.shape[-1]).to(dtype)
            if ctx.needs_input_grad[0]:
                dx = (g @ _matrix(U, S, Vh, U_rest, Vh_rest, dtype)).to(ctx.x_dtype).reshape(ctx.x_shape)
            if any(ctx.needs_input_grad[1:4]):
                G = g.mT @ rows
                GV, UtG = G @ Vh.to(dtype).mT, U.to(dtype).mT @ G
                rest = ((U_rest.to(dtype).mT @ G) * Vh_rest.to(dtype)).sum(1, dtype=S.dtype)
                dS = torch.cat([(GV * U.to(dtype)).sum(0, dtype=S.dtype), rest])
                scale = S.new_ones(r).to(dtype) if ctx.enhanced else S[:r].to(dtype)
                dU, dVh = (GV * scale).to(U.dtype), (UtG * scale[:, None]).to(Vh.dtype)
        return dx, dU, dS, dVh, None, None, None, None


def _dots(A: Tensor, B: Tensor, dtype: torch.dtype) -> Tensor:
    """The products of the columns of A and B, in `dtype`: that of two numbers in float16 may overflow."""
    return ((A.to(dtype) if A.dtype == torch.float16 else A) * B).sum(0, dtype=dtype)


def _matrix(U: Tensor, S: Tensor, Vh: Tensor, U_rest: Tensor, Vh_rest: Tensor, dtype: torch.dtype) -> Tensor:
    r, scale = U.shape[1], S.to(dtype)
    W = (U.to(dtype) * scale[:r]) @ Vh.to(dtype)
    return torch.addmm(W, U_rest.to(dtype) * scale[r:], Vh_rest.to(dtype))


def dense_is_cheaper(rows: int, m: int, n: int, k: int, r: int) -> bool:
    """Whether `DenseProduct` needs fewer multiplications than `SegmentedProduct` for so many rows of x.

    rows (2 k + r) (m + n) for the segments, 3 rows m n + (3 k + r) m n by way of W; for a square matrix of full rank
    d and r = d / 8 from 2.5 d rows on.
    """
    return (3 * rows + 3 * k + r) * m * n < rows * (2 * k + r) * (m + n)


def segmented_product(
    x: Tensor, U: Tensor, S: Tensor, Vh: Tensor, U_rest: Tensor, Vh_rest: Tensor, *, enhanced: bool, dtype: torch.dtype
) -> Tensor:
    """`SegmentedProduct`, or `DenseProduct` where that is cheaper; computes in `dtype`, also under autocast."""
    m, n, k, r = U.shape[0], Vh.shape[1], len(S), U.shape[1]
    cheaper = dense_is_cheaper(x.numel() // n, m, n, k, r)
    product = DenseProduct if cheaper else SegmentedProduct
    return product.apply(x, U, S, Vh, U_rest, Vh_rest, enhanced, dtype)  # type: ignore[no-untyped-call]
