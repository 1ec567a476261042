"""One decoding step of Mamba's selective scan: the state moves on by one token. No gradients.
`reference.py` is the PyTorch form and the CPU's; `triton.py` serves CUDA tensors of up to 32 bits."""
from __future__ import annotations

import torch
from torch import Tensor

from . import reference


def selective_state_update(
    state: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, dt_bias: Tensor,
    reset: Tensor | None = None, out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """y = silu(z) * (C h + D x) with h = exp(step A) state + step x B, step = softplus(dt + dt_bias); returns y and h.

    state (B, D, N) float32 (or float64 with x); x, dt, z (B, D); A (D, N), negative; B, C (B, N); D, dt_bias (D,);
    reset (B,) bool: that row's state is dropped first. out: where h goes; `state` itself makes the update in place.
    Returns y (B, D) in x's dtype and h in state's dtype: `selective_scan` of one step.
    """
    if x.is_cuda and x.dtype in (torch.float32, torch.bfloat16, torch.float16):
        from . import triton as form
    else:
        form = reference
    return form.selective_state_update(state, x, dt, A, B, C, D, z, dt_bias, reset, out)


__all__ = ["selective_state_update"]
