"""A product with a weight of which some output columns are wanted now and others can wait. The backward pass is one."""
from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .linear import products_dtype


def linear_later(x: Tensor, weight: Tensor, now: slice) -> tuple[Tensor, Callable[[], None]]:
    """(x W^T, what to call before its columns other than `now` are read). x (B, L, d_in), weight (d_out, d_in); under autocast
    in its dtype. now: the first columns or the last ones.

    One tensor and one node of autograd: its gradient is that of the whole product.
    """
    dtype = products_dtype(x)
    box: list[Tensor] = []
    y = _LinearLater.apply(x.to(dtype), weight, now, box)
    rest = slice(now.stop, None) if now.start in (0, None) else slice(0, now.start)

    def fill() -> None:
        _columns(y.data, x.detach().to(dtype), box.pop(), rest)  # .data: nothing has read these columns yet

    return y, fill


def _columns(y: Tensor, x: Tensor, weight: Tensor, columns: slice) -> None:
    torch.mm(x.flatten(0, 1), weight[columns].t(), out=y.flatten(0, 1)[:, columns])


class _LinearLater(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, now, box):
        ctx.save_for_backward(x, weight)
        box.append(weight.detach().to(x.dtype))
        y = x.new_empty(*x.shape[:-1], len(weight))
        _columns(y, x, box[0], now)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_y):
        x, weight = ctx.saved_tensors
        grad, x = grad_y.flatten(0, 1), x.flatten(0, 1)
        with torch.autocast(grad_y.device.type, enabled=False):
            grad_x = torch.mm(grad, weight.to(grad.dtype)).view(*grad_y.shape[:-1], -1)
            return grad_x, torch.mm(grad.t(), x).to(weight.dtype), None, None
