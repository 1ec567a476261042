"""State-space duality of Mamba-2 (Dao & Gu, arXiv 2405.21060): h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t^T, y_t = h_t C_t + D x_t.
`reference.py` has the sequential meaning and the CPU's chunked form; `triton.py` serves CUDA tensors of up to 32 bits."""
from __future__ import annotations

import torch
from torch import Tensor

from ..phases import Phases
from . import reference


def ssd(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, dt_bias: Tensor,
    reset: Tensor | None = None, live: Tensor | None = None, initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """y = scan(x, softplus(dt + dt_bias), A, B, C) + D x, and the state after the last step.

    x (B, L, H, P); dt (B, L, H); A (H,), negative; B, C (B, L, G, N), head h reads group h // (H / G); D, dt_bias (H,).
    reset (B, L) bool: the state before that step is dropped. live (B, L) bool: False makes a step a no-op (dt = 0).
    initial_state (B, H, P, N). Computes in float32, or float64 if x is float64.
    Returns y (B, L, H, P) in x's dtype and the final state (B, H, P, N) in the compute dtype. Differentiable in every float
    input.
    """
    return _form(x).ssd(x, dt, A, B, C, D, dt_bias, reset, live, initial_state)


def ssd_phases(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, dt_bias: Tensor, reset: Tensor | None = None,
    live: Tensor | None = None,
) -> Phases:
    """`ssd` of a shard whose initial state is not known yet. The span is the sum of steps (B, H)."""
    form, rates = _form(x), A.detach()
    return Phases(
        *form.ssd_state(x, dt, A, B, dt_bias, reset, live),
        lambda span: torch.exp(span * rates)[..., None, None],
        lambda initial: ssd(x, dt, A, B, C, D, dt_bias, reset, live, initial),
        (dt, A, C, dt_bias, reset, live), lambda saved, *grads: form.ssd_state_gradient(*grads, *saved),
    )


def _form(x: Tensor):
    if x.is_cuda and x.dtype in (torch.float32, torch.bfloat16, torch.float16):
        from . import triton

        return triton
    return reference


__all__ = ["ssd", "ssd_phases"]
