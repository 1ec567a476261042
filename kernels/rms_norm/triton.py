"""Residual add and root-mean-square normalisation in Triton. One row at a time, all of it in registers, so that a row's
result depends on nothing but the row; a program of the backward walks several and keeps their weight gradient.

The backward pass reads the normalised rows, which the product behind the norm keeps anyway, and divides by the weight: a weight
of 0 counts as TINY. float16 has no room for that, so there h is kept."""
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import launch
from ..sums import add_rows

TINY = tl.constexpr(1e-30)
LANE_ELEMENTS = 16  # of a row, per thread: few enough that backward keeps 16 warps on a multiprocessor
BACKWARD_WARPS = 2112  # at most: 16 on each of 132 multiprocessors; more would only mean more partial sums


@triton.jit
def _weight(weight, i, inside):
    w = tl.load(weight + i, mask=inside, other=1).to(tl.float32)
    return tl.where(tl.abs(w) < TINY, TINY, w)


@triton.jit
def _rms_norm_forward(x, residual, weight, normalised, h_out, rstd_out, x_row, residual_row, d, eps, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    inside = i < d
    h = tl.load(x + row * x_row + i, mask=inside, other=0).to(tl.float32)
    if residual is not None:
        h += tl.load(residual + row * residual_row + i, mask=inside, other=0).to(tl.float32)
    w = _weight(weight, i, inside)
    rstd = tl.rsqrt(tl.sum(h * h, 0) / d + eps)
    if h_out is not None:
        tl.store(h_out + row * d + i, h, mask=inside)
    tl.store(normalised + row * d + i, (h * rstd * w).to(normalised.dtype.element_ty), mask=inside)
    tl.store(rstd_out + row, rstd)


@triton.jit
def _rms_norm_backward(
    grad, grad_h, kept, rstd, weight, grad_residual, grad_x, partial, grad_row, grad_h_row, kept_row, grad_x_row,
    n_rows, d, rows_each, KEPT_H: tl.constexpr, BLOCK: tl.constexpr,
):
    first = tl.program_id(0).to(tl.int64) * rows_each
    i = tl.arange(0, BLOCK)
    inside = i < d
    w = _weight(weight, i, inside)
    inverse = 1.0 / w
    grad_w = tl.zeros((BLOCK,), tl.float32)
    for row in range(first, tl.minimum(first + rows_each, n_rows)):
        g = tl.load(grad + row * grad_row + i, mask=inside, other=0).to(tl.float32)
        r = tl.load(rstd + row)
        unit = tl.load(kept + row * kept_row + i, mask=inside, other=0).to(tl.float32)
        unit *= r if KEPT_H else inverse
        if grad_h is not None:
            beside = tl.load(grad_h + row * grad_h_row + i, mask=inside, other=0).to(tl.float32)
        grad_w += g * unit
        g *= w
        grad_here = (g - unit * (tl.sum(g * unit, 0) / d)) * r
        if grad_h is not None:
            grad_here += beside
        if grad_residual is not None:
            tl.store(grad_residual + row * d + i, grad_here, mask=inside)
        if grad_x is not None:
            tl.store(grad_x + row * grad_x_row + i, grad_here.to(grad_x.dtype.element_ty), mask=inside)
    tl.store(partial + tl.program_id(0).to(tl.int64) * d + i, grad_w, mask=inside)


def _rows(tensor: Tensor | None) -> Tensor | None:
    """(rows, d), its last dimension dense; a copy only where the strides leave no other way."""
    if tensor is None:
        return None
    rows = tensor.reshape(-1, tensor.shape[-1])
    return rows if rows.stride(1) == 1 or rows.shape[1] == 1 else rows.contiguous()


def _row_stride(rows: Tensor | None) -> int:
    return 0 if rows is None else rows.stride(0)


def _block_and_warps(d: int) -> tuple[int, int]:
    block = triton.next_power_of_2(d)
    return block, min(max(block // (32 * LANE_ELEMENTS), 1), 16)


def forward(
    x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None, out_dtype: torch.dtype | None = None,
    *, num_warps: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The normalised rows, h (…, d) float32 (x itself if that is float32 and alone) and 1/rms (rows,) float32; no autograd."""
    flat, before, weight = _rows(x), _rows(residual), weight.contiguous()
    rows, d = flat.shape
    alone = residual is None and x.dtype == torch.float32
    h = x if alone else torch.empty(x.shape, dtype=torch.float32, device=x.device)
    normalised = torch.empty(x.shape, dtype=out_dtype or torch.float32, device=x.device)
    rstd = torch.empty(rows, dtype=torch.float32, device=x.device)
    block, warps = _block_and_warps(d)
    launch(
        _rms_norm_forward, (rows,),
        flat, before, weight, normalised, None if alone else h, rstd, flat.stride(0), _row_stride(before), d, eps,
        BLOCK=block, num_warps=num_warps or warps,
    )
    return normalised, h, rstd


def backward(
    grad_normalised: Tensor, grad_h: Tensor | None, kept: Tensor, rstd: Tensor, weight: Tensor, x_dtype: torch.dtype,
    need_residual: bool = True, out: Tensor | None = None, *, kept_h: bool = False, num_warps: int | None = None,
    programs: int | None = None,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Gradients to x (in x_dtype), the residual (float32; None if not needed) and weight, of those to the two outputs.

    grad_h may be None. kept is the normalised rows, or h if kept_h; both and rstd are `forward`'s. grad_x is written to out if given, which may be strided, its last
    dimension dense. Without `out`, the gradients of a float32 x and of the residual are one tensor.
    """
    grad, beside, flat, weight = _rows(grad_normalised), _rows(grad_h), _rows(kept), weight.contiguous()
    rows, d = flat.shape
    grad_residual = torch.empty(kept.shape, dtype=torch.float32, device=kept.device) if need_residual else None
    shared = need_residual and out is None and x_dtype == torch.float32
    grad_x = grad_residual if shared else torch.empty(kept.shape, dtype=x_dtype, device=kept.device) if out is None else out
    into = None if shared else grad_x.view(-1, d)
    block, warps = _block_and_warps(d)
    rows_each = max(triton.cdiv(rows, programs or BACKWARD_WARPS // warps), 1)
    programs = triton.cdiv(rows, rows_each)
    partial = torch.empty(programs, d, dtype=torch.float32, device=kept.device)
    launch(
        _rms_norm_backward, (programs,),
        grad, beside, flat, rstd, weight, grad_residual, into, partial,
        grad.stride(0), _row_stride(beside), flat.stride(0), _row_stride(into), rows, d, rows_each,
        KEPT_H=kept_h, BLOCK=block, num_warps=num_warps or warps,
    )
    return grad_x, grad_residual, add_rows(partial).to(weight.dtype)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps, residual, out_dtype):
        ctx.set_materialize_grads(False)
        normalised, h, rstd = forward(x, weight, eps, residual, out_dtype)
        ctx.kept_h = normalised.dtype == torch.float16
        ctx.save_for_backward(h if ctx.kept_h else normalised, rstd, weight)
        ctx.x_dtype, ctx.residual_dtype = x.dtype, None if residual is None else residual.dtype
        return normalised, h

    @staticmethod
    def backward(ctx, grad_normalised, grad_h):
        kept, rstd, weight = ctx.saved_tensors
        if grad_normalised is None:
            grad_x, grad_residual, grad_weight = grad_h.to(ctx.x_dtype), grad_h, None
        else:
            need = ctx.residual_dtype is not None
            grad_x, grad_residual, grad_weight = backward(
                grad_normalised, grad_h, kept, rstd, weight, ctx.x_dtype, need, kept_h=ctx.kept_h
            )
        if ctx.residual_dtype is None:
            grad_residual = None
        elif grad_residual is not None:
            grad_residual = grad_residual.to(ctx.residual_dtype)
        return grad_x, grad_weight, None, grad_residual, None


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None, out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """h = residual + x (x if there is none), and h / sqrt(mean(h^2) + eps) * weight. Differentiable in x, weight, residual.

    x (…, d) float32, bfloat16 or float16; weight (d,); residual (…, d), float32 in use. Returns the normalised h in
    out_dtype (float32, if None), then h in float32.
    """
    return _RMSNorm.apply(x, weight, eps, residual, out_dtype)
