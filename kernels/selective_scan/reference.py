"""The selective scan one step at a time, by autograd: slow, and the meaning every other form must match."""
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def selective_scan_reference(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, dt_bias: Tensor,
    reset: Tensor | None = None, live: Tensor | None = None, initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Shapes as in `chunked.selective_scan`."""
    batch, length, d_inner = x.shape
    step = F.softplus(dt + dt_bias)  # (B, L, D)
    if live is not None:
        step = step * live[..., None]
    h = x.new_zeros(batch, d_inner, A.shape[1]) if initial_state is None else initial_state
    ys = []
    for t in range(length):
        if reset is not None:
            h = torch.where(reset[:, t, None, None], torch.zeros_like(h), h)
        h = torch.exp(step[:, t, :, None] * A) * h + (step[:, t] * x[:, t])[..., None] * B[:, t, None, :]
        ys.append((h * C[:, t, None, :]).sum(-1))
    y = torch.stack(ys, 1) + D * x
    return y * F.silu(z), h
