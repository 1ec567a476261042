"""The inside of a Mamba layer on GPUs, composed of the Triton operations for little memory and few launches.

Kept for the backward pass: xz, x_proj's output, y and the scan's kept states. The convolution's output and the steps before
dt_bias are formed again there; the gradients of x and z, and those of dt, B and C, are written side by side where the products
before them read them.
"""
from __future__ import annotations

import torch
from torch import Tensor

from ..causal_conv1d import triton as conv
from ..selective_scan import triton as scan


def mamba_inner(
    xz: Tensor, conv_weight: Tensor, conv_bias: Tensor, x_proj: Tensor, dt_proj: Tensor, dt_bias: Tensor, A_log: Tensor,
    D: Tensor, since_reset: Tensor | None = None, n_live: Tensor | None = None, reset: Tensor | None = None,
    live: Tensor | None = None, halo: Tensor | None = None, initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `reference.mamba_inner`, for float32, bfloat16 and float16. The gradients of float32 weights are formed in float32."""
    return _MambaInner.apply(
        xz, conv_weight, conv_bias, x_proj, dt_proj, dt_bias, A_log, D, since_reset, n_live, reset, live, halo, initial_state
    )


class _MambaInner(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, xz, conv_weight, conv_bias, x_proj, dt_proj, dt_bias, A_log, D, since_reset, n_live, reset, live, halo, initial_state
    ):
        ctx.set_materialize_grads(False)
        ctx.dtypes, ctx.has_state = (x_proj.dtype, dt_proj.dtype), initial_state is not None
        x, z = xz.chunk(2, -1)
        with torch.autocast(xz.device.type, enabled=False):
            x_proj, dt_proj, A = x_proj.to(xz.dtype), dt_proj.to(xz.dtype), torch.exp(A_log).neg_()
            u, halo_out = conv.forward(x, conv_weight, conv_bias, since_reset, halo, n_live)
            projected = torch.mm(_flat(u), x_proj.t()).view(*u.shape[:2], -1)
            dt, B, C = _parts(projected, dt_proj, A)
            y, state, kept = scan.forward(u, _steps(dt, dt_proj), A, B, C, D, z, dt_bias, reset, live, initial_state)
        ctx.save_for_backward(
            xz, projected, y, kept, conv_weight, conv_bias, x_proj, dt_proj, dt_bias, A, D, since_reset, n_live, reset, live, halo
        )
        return y, halo_out, state

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_y, grad_halo_out, grad_state):
        (xz, projected, y, kept, conv_weight, conv_bias, x_proj, dt_proj, dt_bias, A, D,
         since_reset, n_live, reset, live, halo) = ctx.saved_tensors  # fmt: skip
        grad_y = torch.zeros_like(y) if grad_y is None else grad_y
        x, z = xz.chunk(2, -1)
        dt, B, C = _parts(projected, dt_proj, A)
        grad_xz, grad_projected = torch.empty_like(xz), torch.empty_like(projected)
        grad_x, grad_z = grad_xz.chunk(2, -1)
        grad_dt, grad_B, grad_C = _parts(grad_projected, dt_proj, A)
        with torch.autocast(xz.device.type, enabled=False):
            u, _ = conv.forward(x, conv_weight, conv_bias, since_reset, halo, n_live)
            g = scan.backward(
                grad_y, grad_state, u, _steps(dt, dt_proj), A, B, C, D, z, dt_bias, reset, live, kept, y,
                grad_z=grad_z, grad_B=grad_B, grad_C=grad_C,
            )
            grad_u, grad_steps = _flat(g["x"]), _flat(g["dt"])
            torch.mm(grad_steps, dt_proj, out=_flat(grad_dt))
            grad_dt_proj = _weight_gradient(grad_steps, _flat(dt), ctx.dtypes[1])
            grad_x_proj = _weight_gradient(_flat(grad_projected), _flat(u), ctx.dtypes[0])
            grad_u.addmm_(_flat(grad_projected), x_proj)
            _, grad_conv_weight, grad_conv_bias, grad_halo = conv.backward(
                g["x"], grad_halo_out, x, conv_weight, conv_bias, since_reset, halo, n_live, out=grad_x
            )
        return (
            grad_xz, grad_conv_weight, grad_conv_bias, grad_x_proj, grad_dt_proj, g["dt_bias"], g["A"].mul_(A), g["D"],
            None, None, None, None, grad_halo, g["initial_state"] if ctx.has_state else None,
        )  # fmt: skip


def _flat(v: Tensor) -> Tensor:
    """(B, L, d) as (B L, d), a view: rows lie evenly apart."""
    return v.view(-1, v.shape[-1]) if v.is_contiguous() else v.flatten(0, 1)


def _parts(projected: Tensor, dt_proj: Tensor, A: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The columns of x_proj's output: those of dt, B and C."""
    return projected.split([dt_proj.shape[1], A.shape[1], A.shape[1]], -1)


def _steps(dt: Tensor, dt_proj: Tensor) -> Tensor:
    return torch.mm(_flat(dt), dt_proj.t()).view(*dt.shape[:2], -1)


def _weight_gradient(grad_out: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    """grad_out^T x, summed over tokens in float32 and, on CUDA devices, not rounded to the products' dtype on the way."""
    if grad_out.is_cuda and dtype == torch.float32 and grad_out.dtype != dtype:
        return torch.mm(grad_out.t(), x, out_dtype=dtype)
    return torch.mm(grad_out.t(), x).to(dtype)
