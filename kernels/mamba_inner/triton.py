"""The inside of a Mamba layer on GPUs, composed of the Triton operations for little memory and few launches.

Kept for the backward pass: xz, x_proj's output, y and the scan's kept states. The convolution's output and the steps before
dt_bias are formed again there; the gradients of x and z, and those of dt, B and C, are written side by side where the products
before them read them.
"""
from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..causal_conv1d import triton as conv
from ..phases import Phases
from ..selective_scan import triton as scan
from .reference import decay


def mamba_inner(
    xz: Tensor, conv_weight: Tensor, conv_bias: Tensor, x_proj: Tensor, dt_proj: Tensor, dt_bias: Tensor, A_log: Tensor,
    D: Tensor, since_reset: Tensor | None = None, n_live: Tensor | None = None, reset: Tensor | None = None,
    live: Tensor | None = None, halo: Tensor | None = None, initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `reference.mamba_inner`, for float32, bfloat16 and float16. The gradients of float32 weights are formed in float32."""
    return _MambaInner.apply(
        xz, conv_weight, conv_bias, x_proj, dt_proj, dt_bias, A_log, D, since_reset, n_live, reset, live, halo, initial_state
    )


def mamba_inner_phases(
    xz: Tensor, conv_weight: Tensor, conv_bias: Tensor, x_proj: Tensor, dt_proj: Tensor, dt_bias: Tensor, A_log: Tensor,
    D: Tensor, since_reset: Tensor | None = None, n_live: Tensor | None = None, reset: Tensor | None = None,
    live: Tensor | None = None, halo: Tensor | None = None,
) -> Phases:
    """As `reference.mamba_inner_phases`. What the phases find is not found again: not what leads to the scan, nor what its
    segments do to states and to their gradients."""
    shared = _Shared()
    with torch.no_grad(), torch.autocast(xz.device.type, enabled=False):
        ready = _ready(xz, conv_weight, conv_bias, x_proj, dt_proj, A_log, since_reset, n_live, halo)
        B = _parts(ready.projected, ready.dt_proj, ready.A)[1]
        passed = scan.segment_states(ready.u, ready.steps, ready.A, B, dt_bias, reset, live)
        state, span = passed.joined(ready.A)
        shared.ready = ready._replace(passed=passed)

    def run(initial: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y, halo_out, final = _MambaInner.apply(
            xz, conv_weight, conv_bias, x_proj, dt_proj, dt_bias, A_log, D, since_reset, n_live, reset, live, halo, initial, shared
        )
        return y, final, halo_out

    saved = xz, ready.projected, ready.dt_proj, dt_bias, ready.A, reset, live
    return Phases(state, span, decay(ready.A), run, saved, shared.gradient)


class _Ready(NamedTuple):
    """What leads to the scan: the products' weights in the products' dtype, A, and what they make of xz."""

    x_proj: Tensor
    dt_proj: Tensor
    A: Tensor
    u: Tensor
    halo_out: Tensor
    projected: Tensor
    steps: Tensor
    passed: scan.Segments | None = None


def _ready(xz, conv_weight, conv_bias, x_proj, dt_proj, A_log, since_reset, n_live, halo) -> _Ready:
    x_proj, dt_proj, A = x_proj.to(xz.dtype), dt_proj.to(xz.dtype), torch.exp(A_log).neg_()
    u, halo_out = conv.forward(xz.chunk(2, -1)[0], conv_weight, conv_bias, since_reset, halo, n_live)
    projected = torch.mm(_flat(u), x_proj.t()).view(*u.shape[:2], -1)
    return _Ready(x_proj, dt_proj, A, u, halo_out, projected, _steps(_parts(projected, dt_proj, A)[0], dt_proj))


class _Shared:
    """What one phase of a scan leaves for a later one, which takes it away."""

    ready: _Ready | None = None
    asked: tuple[Tensor, scan.Segments] | None = None

    def take(self, name: str):
        value = getattr(self, name)
        setattr(self, name, None)
        return value

    def gradient(self, saved: tuple, grad_y: Tensor, grad_final: Tensor | None) -> Tensor:
        """See `Phases`."""
        xz, projected, dt_proj, dt_bias, A, reset, live = saved
        dt, _, C = _parts(projected, dt_proj, A)
        with torch.autocast(xz.device.type, enabled=False):
            steps = _steps(dt, dt_proj)
            asked = scan.segment_gradients(grad_y, steps, A, C, xz.chunk(2, -1)[1], dt_bias, reset, live)
        self.asked = steps, asked
        return scan.join_gradients(asked, A, grad_final)


class _MambaInner(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, xz, conv_weight, conv_bias, x_proj, dt_proj, dt_bias, A_log, D, since_reset, n_live, reset, live, halo, initial_state,
        shared=None,
    ):
        ctx.set_materialize_grads(False)
        ctx.dtypes, ctx.has_state, ctx.shared = (x_proj.dtype, dt_proj.dtype), initial_state is not None, shared
        z = xz.chunk(2, -1)[1]
        with torch.autocast(xz.device.type, enabled=False):
            if shared is None:
                ready = _ready(xz, conv_weight, conv_bias, x_proj, dt_proj, A_log, since_reset, n_live, halo)
            else:
                ready = shared.take("ready")
            x_proj, dt_proj, A, u, halo_out, projected, steps, passed = ready
            _, B, C = _parts(projected, dt_proj, A)
            y, state, kept = scan.forward(u, steps, A, B, C, D, z, dt_bias, reset, live, initial_state, passed)
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
        asked = None if ctx.shared is None else ctx.shared.take("asked")
        with torch.autocast(xz.device.type, enabled=False):
            u, _ = conv.forward(x, conv_weight, conv_bias, since_reset, halo, n_live)
            steps, segments = (_steps(dt, dt_proj), None) if asked is None else asked
            g = scan.backward(
                grad_y, grad_state, u, steps, A, B, C, D, z, dt_bias, reset, live, kept, y,
                grad_z=grad_z, grad_B=grad_B, grad_C=grad_C, asked=segments,
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
            None,
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
