"""The product with a matrix of which some singular triplets train, and SST's gradient of it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class SegmentedProduct(torch.autograd.Function):
    """x -> ((x Vh^T) * S) U^T + ((x Vh_rest^T) * S_rest) U_rest^T, with gradients for x, U, all of S, and Vh.

    With P = x Vh^T and Q = g U for the gradient g of the output,

        dS = sum_t P * Q,   dx = (Q * S) Vh,   dU = g^T (P * S),   dVh = (Q * S)^T x,

    and with `enhanced` dU = g^T P, dVh = Q^T x: the projections (dL/dW) v_i and (dL/dW)^T u_i of the gradient of
    W = U diag(S) Vh (Zhao et al., 2025, SST). They are not the derivatives by U and Vh: those carry a factor S_i, with
    which the vectors of small singular values would hardly learn. Neither W nor its gradient is ever built.
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
        return y.reshape(*x.shape[:-1], -1)

    @staticmethod
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
                dS = torch.cat([(P * Q).sum(0, dtype=S.dtype), (P_rest * Q_rest).sum(0, dtype=S.dtype)])
            if ctx.needs_input_grad[3]:
                dVh = ((Q if ctx.enhanced else QS).mT @ rows).to(Vh.dtype)
        return dx, dU, dS, dVh, None, None, None, None


def segmented_product(
    x: Tensor, U: Tensor, S: Tensor, Vh: Tensor, U_rest: Tensor, Vh_rest: Tensor, *, enhanced: bool, dtype: torch.dtype
) -> Tensor:
    """`SegmentedProduct` as a function; computes in `dtype`, also under autocast."""
    return SegmentedProduct.apply(x, U, S, Vh, U_rest, Vh_rest, enhanced, dtype)  # type: ignore[no-untyped-call]
