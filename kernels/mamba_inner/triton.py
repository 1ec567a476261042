"""The inside of a Mamba layer on GPUs, composed of the Triton operations for little memory and few launches.

Kept for the backward pass: xz, x_proj's output, y and the scan's kept states. The convolution's output is formed again there, and
the scan forms the steps before dt_bias of x_proj's output; the gradients of x and z, and those of dt, B and C, are written side by
side where the products before them read them.
"""
from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..causal_conv1d import triton as conv
from ..linear import low_copies, weight_gradient
from ..phases import Phases
from ..selective_scan import triton as scan
from ..weights import negative_exp
from .reference import decay


def mamba_inner(
    xz: Tensor, conv_weight: Tensor, conv_bias: Tensor, x_proj: Tensor, dt_proj: Tensor, dt_bias: Tensor, A_log: Tensor,
    D: Tensor, since_reset: Tensor | None = None, n_live: Tensor | None = None, reset: Tensor | None = None,
    live: Tensor | None = None, halo: Tensor | None = None, initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `reference.mamba_inner`, for float32, bfloat16 and float16. The gradients of float32 weights are formed in float32."""
    return _MambaInner.apply(
        None, None, xz, conv_weight, conv_bias, x_proj, dt_proj, dt_bias, A_log, D, since_reset, n_live, reset, live, halo, initial_state
    )


def mamba_inner_together(calls: list[tuple], copies: list[Tensor] | None = None) -> list[tuple[Tensor, Tensor, Tensor]]:
    """As `reference.mamba_inner_together`: one launch for their scans, and for what is small."""
    outputs = _MambaInner.apply(None, copies, *(value for call in calls for value in call))
    return list(zip(outputs[::3], outputs[1::3], outputs[2::3]))


def mamba_inner_phases(
    xz: Tensor, conv_weight: Tensor, conv_bias: Tensor, x_proj: Tensor, dt_proj: Tensor, dt_bias: Tensor, A_log: Tensor,
    D: Tensor, since_reset: Tensor | None = None, n_live: Tensor | None = None, reset: Tensor | None = None,
    live: Tensor | None = None, halo: Tensor | None = None,
) -> Phases:
    """As `reference.mamba_inner_phases`. What the phases find is not found again: not what leads to the scan, nor what its
    segments do to states and to their gradients."""
    shared = _Shared()
    with torch.no_grad(), torch.autocast(xz.device.type, enabled=False):
        call = _Call(
            xz, conv_weight, conv_bias, x_proj, dt_proj, dt_bias, A_log, D, since_reset, n_live, reset, live, halo, None
        )
        ready, = _ready([call])
        B = _parts(ready.projected, ready.dt_proj, ready.A)[1]
        passed = scan.segment_states(ready.u, ready.steps, ready.A, B, dt_bias, reset, live)
        state, span = passed.joined(ready.A)
        shared.ready = ready._replace(passed=passed)

    def run(initial: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y, halo_out, final = _MambaInner.apply(
            shared, None, xz, conv_weight, conv_bias, x_proj, dt_proj, dt_bias, A_log, D, since_reset, n_live, reset, live, halo, initial
        )
        return y, final, halo_out

    saved = xz, ready.projected, ready.dt_proj, dt_bias, ready.A, reset, live
    return Phases(state, span, decay(ready.A), run, saved, shared.gradient)


class _Call(NamedTuple):
    """Arguments of `mamba_inner`."""

    xz: Tensor
    conv_weight: Tensor
    conv_bias: Tensor
    x_proj: Tensor
    dt_proj: Tensor
    dt_bias: Tensor
    A_log: Tensor
    D: Tensor
    since_reset: Tensor | None
    n_live: Tensor | None
    reset: Tensor | None
    live: Tensor | None
    halo: Tensor | None
    initial_state: Tensor | None

    @property
    def z(self) -> Tensor:
        return self.xz.chunk(2, -1)[1]

    def convolved(self) -> tuple[Tensor, Tensor]:
        """u and the halo out."""
        return conv.forward(self.xz.chunk(2, -1)[0], self.conv_weight, self.conv_bias, self.since_reset, self.halo, self.n_live)


class _Ready(NamedTuple):
    """What leads to the scan: the products' weights in the products' dtype, A, and what they make of xz."""

    x_proj: Tensor
    dt_proj: Tensor
    A: Tensor
    u: Tensor
    halo_out: Tensor
    projected: Tensor
    steps: tuple[Tensor, Tensor]
    passed: scan.Segments | None = None


def _ready(calls: list[_Call], copies: list[Tensor] | None = None) -> list[_Ready]:
    dtype, found = calls[0].xz.dtype, []
    As = negative_exp([call.A_log for call in calls])
    if copies is None:
        copies = low_copies([weight for call in calls for weight in (call.x_proj, call.dt_proj)], dtype)
    for call, A, x_proj, dt_proj in zip(calls, As, copies[::2], copies[1::2]):
        u, halo_out = call.convolved()
        projected = torch.mm(_flat(u), x_proj.t()).view(*u.shape[:2], -1)
        steps = _parts(projected, dt_proj, A)[0], dt_proj
        found.append(_Ready(x_proj, dt_proj, A, u, halo_out, projected, steps))
    return found


class _Shared:
    """What one phase of a scan leaves for a later one, which takes it away."""

    ready: _Ready | None = None
    asked: scan.Segments | None = None

    def take(self, name: str):
        value = getattr(self, name)
        setattr(self, name, None)
        return value

    def gradient(self, saved: tuple, grad_y: Tensor, grad_final: Tensor | None) -> Tensor:
        """See `Phases`."""
        xz, projected, dt_proj, dt_bias, A, reset, live = saved
        dt, _, C = _parts(projected, dt_proj, A)
        with torch.autocast(xz.device.type, enabled=False):
            self.asked = scan.segment_gradients(grad_y, (dt, dt_proj), A, C, xz.chunk(2, -1)[1], dt_bias, reset, live)
        return scan.join_gradients(self.asked, A, grad_final)


class _MambaInner(torch.autograd.Function):
    @staticmethod
    def forward(ctx, shared, copies, *arguments):
        """Outputs of the calls, one after the other, whose arguments follow each other. shared: of the only call."""
        ctx.set_materialize_grads(False)
        size = len(_Call._fields)
        calls = [_Call(*arguments[i : i + size]) for i in range(0, len(arguments), size)]
        ctx.shared, ctx.dtypes = shared, [(call.x_proj.dtype, call.dt_proj.dtype) for call in calls]
        ctx.has_state = [call.initial_state is not None for call in calls]
        kept, outputs = [], []
        with torch.autocast(arguments[0].device.type, enabled=False):
            ready = _ready(calls, copies) if shared is None else [shared.take("ready")]
            scans = []
            for call, r in zip(calls, ready):
                _, B, C = _parts(r.projected, r.dt_proj, r.A)
                scans.append((r.u, r.steps, r.A, B, C, call.D, call.z, call.dt_bias, call.reset, call.live, call.initial_state))
            for call, r, (y, state, states) in zip(calls, ready, scan.forward_together(scans, [r.passed for r in ready])):
                kept += *call._replace(x_proj=r.x_proj, dt_proj=r.dt_proj, A_log=r.A, initial_state=None), r.projected, y, states
                outputs += y, r.halo_out, state
        ctx.save_for_backward(*kept)
        return tuple(outputs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *gradients):
        size, kept = len(_Call._fields), ctx.saved_tensors
        calls = [_Call(*kept[i : i + size]) for i in range(0, len(kept), size + 3)]  # their weights cast, A in the place of A_log
        found = [kept[i : i + 3] for i in range(size, len(kept), size + 3)]  # x_proj's output, y and the scan's kept states
        asked = None if ctx.shared is None else ctx.shared.take("asked")
        scans, results, into, segments, work = [], [], [], [], []
        with torch.autocast(kept[0].device.type, enabled=False):
            for call, (projected, y, states), grad_y, grad_state in zip(calls, found, gradients[::3], gradients[2::3]):
                grad_xz, grad_projected = torch.empty_like(call.xz), torch.empty_like(projected)
                dt, B, C = _parts(projected, call.dt_proj, call.A_log)
                grad_dt, grad_B, grad_C = _parts(grad_projected, call.dt_proj, call.A_log)
                u, _ = call.convolved()
                scans.append((u, (dt, call.dt_proj), call.A_log, B, C, call.D, call.z, call.dt_bias, call.reset, call.live, grad_state))
                results.append((torch.zeros_like(y) if grad_y is None else grad_y, states, y))
                into.append((None, None, grad_xz.chunk(2, -1)[1], grad_B, grad_C))
                segments.append(asked)
                work.append((u, dt, grad_dt, grad_projected, grad_xz))
            scanned = scan.backward_together(scans, results, into, segments, of_log=True)
            returned = [None, None]
            for call, g, (u, dt, grad_dt, grad_projected, grad_xz), grad_halo_out, dtypes, has_state in zip(
                calls, scanned, work, gradients[1::3], ctx.dtypes, ctx.has_state
            ):
                grad_steps = _flat(g["dt"])
                torch.mm(grad_steps, call.dt_proj, out=_flat(grad_dt))
                grad_dt_proj = weight_gradient(grad_steps, _flat(dt), dtypes[1])
                grad_x_proj = weight_gradient(_flat(grad_projected), _flat(u), dtypes[0])
                x, grad_x = call.xz.chunk(2, -1)[0], grad_xz.chunk(2, -1)[0]
                _, grad_conv_weight, grad_conv_bias, grad_halo = conv.backward_of_sum(
                    g["x"], grad_projected, call.x_proj, grad_halo_out, x, call.conv_weight, call.conv_bias, call.since_reset,
                    call.halo, call.n_live, out=grad_x,
                )
                returned += _Call(
                    grad_xz, grad_conv_weight, grad_conv_bias, grad_x_proj, grad_dt_proj, g["dt_bias"], g["A"], g["D"],
                    None, None, None, None, grad_halo, g["initial_state"] if has_state else None,
                )
        return tuple(returned)


def _flat(v: Tensor) -> Tensor:
    """(B, L, d) as (B L, d), a view: rows lie evenly apart."""
    return v.view(-1, v.shape[-1]) if v.is_contiguous() else v.flatten(0, 1)


def _parts(projected: Tensor, dt_proj: Tensor, A: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The columns of x_proj's output: those of dt, B and C."""
    return projected.split([dt_proj.shape[1], A.shape[1], A.shape[1]], -1)
