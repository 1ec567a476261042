"""The inside of a Mamba layer (Gu & Dao, arXiv 2312.00752, section 3.4) as a composition of the plain operations."""
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..causal_conv1d import causal_conv1d
from ..phases import Phases
from ..selective_scan import scan_state, scan_state_gradient, selective_scan


def mamba_inner(
    xz: Tensor, conv_weight: Tensor, conv_bias: Tensor, x_proj: Tensor, dt_proj: Tensor, dt_bias: Tensor, A_log: Tensor,
    D: Tensor, since_reset: Tensor | None = None, n_live: Tensor | None = None, reset: Tensor | None = None,
    live: Tensor | None = None, halo: Tensor | None = None, initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """y = scan(u, dt_proj dt, -exp(A_log), B, C) gated by z, with u = silu(conv(x)), (dt, B, C) = x_proj u, (x, z) = xz.

    xz (B, L, 2D); conv_weight (D, W), tap 0 is the newest token; x_proj (R + 2N, D), its rows those of dt, B and C;
    dt_proj (D, R); A_log (D, N); conv_bias, dt_bias, D (D,). since_reset and n_live as in `causal_conv1d`, reset and live
    as in `selective_scan`.
    halo (B, W-1, D) and initial_state (B, D, N): what an earlier piece of the row left. Both products are in xz's dtype.
    Returns y (B, L, D) in xz's dtype, the halo out and the final state. Differentiable in every float input.
    """
    u, dt, B, C, z, halo = _project(xz, conv_weight, conv_bias, x_proj, dt_proj, A_log, since_reset, n_live, halo)
    y, state = selective_scan(u, dt, -torch.exp(A_log), B, C, D, z, dt_bias, reset, live, initial_state)
    return y, halo, state


def mamba_inner_together(calls: list[tuple], copies: list[Tensor] | None = None) -> list[tuple[Tensor, Tensor, Tensor]]:
    """`mamba_inner` of each: rows of any sizes, all xz of one dtype, all A_log of one d_state. copies: of each x_proj and dt_proj
    in turn, in the dtype of xz, if there are some already."""
    return [mamba_inner(*call) for call in calls]


def mamba_inner_phases(
    xz: Tensor, conv_weight: Tensor, conv_bias: Tensor, x_proj: Tensor, dt_proj: Tensor, dt_bias: Tensor, A_log: Tensor,
    D: Tensor, since_reset: Tensor | None = None, n_live: Tensor | None = None, reset: Tensor | None = None,
    live: Tensor | None = None, halo: Tensor | None = None,
) -> Phases:
    """`mamba_inner` of a shard whose initial state is not known yet; `run` returns the halo out besides. The span is the sum of
    steps (B, D)."""
    u, dt, B, C, z, halo = _project(xz, conv_weight, conv_bias, x_proj, dt_proj, A_log, since_reset, n_live, halo)
    A = -torch.exp(A_log)
    return Phases(
        *scan_state(u, dt, A, B, dt_bias, reset, live), decay(A.detach()),
        lambda initial: (*selective_scan(u, dt, A, B, C, D, z, dt_bias, reset, live, initial), halo),
        (dt, A, C, z, dt_bias, reset, live), lambda saved, *grads: scan_state_gradient(*grads, *saved),
    )


def decay(A: Tensor):
    """From sums of steps (..., D) to what they leave of a state (..., D, N)."""
    return lambda span: torch.exp(span[..., None] * A)


def _project(xz, conv_weight, conv_bias, x_proj, dt_proj, A_log, since_reset, n_live, halo):
    """u, dt, B, C, z and the halo out."""
    rank, d_state = dt_proj.shape[1], A_log.shape[1]
    x, z = xz.chunk(2, -1)
    u, halo = causal_conv1d(x, conv_weight, conv_bias, since_reset, halo, n_live)
    dt, B, C = F.linear(u, x_proj.to(u.dtype)).split([rank, d_state, d_state], -1)
    return u, F.linear(dt, dt_proj.to(dt.dtype)), B, C, z, halo
