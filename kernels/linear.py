"""Products with weights that are kept in higher precision than the products: float32 weights under autocast."""
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def linear(x: Tensor, weight: Tensor, copy: Tensor | None = None) -> Tensor:
    """x W^T, under autocast in its dtype; the gradient of W is formed in W's own, not rounded on the way.

    x (..., d_in), weight (d_out, d_in); copy: of the weight in the products' dtype, from `low_copies`, if there is one already.
    """
    dtype = products_dtype(x)
    if dtype == weight.dtype or x.dtype == torch.float64:
        return F.linear(x, weight)
    return _Linear.apply(x.to(dtype), weight, weight.detach().to(dtype) if copy is None else copy)


def products_dtype(x: Tensor) -> torch.dtype:
    """Of products with x: autocast's, where that is on."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) and x.dtype != torch.float64 else x.dtype


def low_copies(weights: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """The weights in `dtype`, cast in one launch; themselves where they are in it. They carry no gradients."""
    weights = [weight.detach() for weight in weights]
    if all(weight.dtype == dtype for weight in weights):
        return weights
    if weights[0].is_cuda and all(weight.dtype == weights[0].dtype and weight.is_contiguous() for weight in weights):
        from .weights import cast

        return cast(weights, dtype)
    copies = [torch.empty_like(weight, dtype=dtype) for weight in weights]
    torch._foreach_copy_(copies, weights)
    return copies


def weight_gradient(grad_out: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    """grad_out^T x, both (tokens, ·), summed over tokens in float32 and, on CUDA devices, not rounded to the products' dtype on
    the way."""
    if grad_out.is_cuda and dtype == torch.float32 and grad_out.dtype != dtype:
        return torch.mm(grad_out.t(), x, out_dtype=dtype)
    return torch.mm(grad_out.t(), x).to(dtype)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, copy):
        ctx.save_for_backward(x, copy)
        ctx.dtype = weight.dtype
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x, copy)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_y):
        x, weight = ctx.saved_tensors
        grad = grad_y.flatten(0, -2)
        with torch.autocast(grad.device.type, enabled=False):
            grad_x = torch.mm(grad, weight).view(*grad_y.shape[:-1], weight.shape[1]) if ctx.needs_input_grad[0] else None
            return grad_x, weight_gradient(grad, x.flatten(0, -2), ctx.dtype), None
