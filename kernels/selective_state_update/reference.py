"""One step of the selective scan in PyTorch."""
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


@torch.no_grad()
def selective_state_update(
    state: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, dt_bias: Tensor,
    reset: Tensor | None = None, out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """As in the package's docstring."""
    dtype, compute = x.dtype, state.dtype
    with torch.autocast(x.device.type, enabled=False):
        x, dt, A, B, C, D, z, dt_bias = (v.to(compute) for v in (x, dt, A, B, C, D, z, dt_bias))
        step = F.softplus(dt + dt_bias)  # (B, D)
        if reset is not None:
            state = state.masked_fill(reset[:, None, None], 0.0)
        h = torch.exp(step[..., None] * A) * state + (step * x)[..., None] * B[:, None, :]
        y = ((h * C[:, None, :]).sum(-1) + D * x) * F.silu(z)
    return y.to(dtype), h if out is None else out.copy_(h)
