"""Depthwise causal convolution as shifted multiply-adds."""
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def causal_conv1d(
    x: Tensor, weight: Tensor, bias: Tensor, since_reset: Tensor | None = None, halo: Tensor | None = None,
    n_live: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """silu(bias + sum_k weight[:, k] x_{t-k}), and the halo that continues it.

    x (B, L, D); weight (D, W), tap 0 is the newest token; bias (D,).
    since_reset (B, L) int: tokens since the document of each token began, large where it began before x; taps reaching
    further back read 0. halo (B, W-1, D): the tokens before x, oldest first (zeros if None).
    n_live (B,) int: tokens in use at the front of each row (all, if None); the halo out holds the last of those.
    Returns y (B, L, D) in x's dtype and the halo out (B, W-1, D), zero before the start of the last token's document.
    """
    batch, length, d_inner = x.shape
    width = weight.shape[1]
    compute = torch.promote_types(x.dtype, torch.float32)
    if halo is None:
        halo = x.new_zeros(batch, width - 1, d_inner)
    padded = torch.cat([halo.to(x.dtype), x], 1)
    y = bias.to(compute)
    for k in range(width):
        tap = padded[:, width - 1 - k : width - 1 - k + length].to(compute) * weight[:, k]
        if k and since_reset is not None:
            tap = tap * (since_reset >= k)[..., None]
        y = y + tap
    return F.silu(y).to(x.dtype), _halo_out(padded, since_reset, n_live, width - 1, length)


def _halo_out(padded: Tensor, since_reset: Tensor | None, n_live: Tensor | None, size: int, length: int) -> Tensor:
    if n_live is None:
        n_live = torch.full((padded.shape[0],), length, device=padded.device)
    slots = torch.arange(size, device=padded.device)
    halo = padded.gather(1, (n_live[:, None] + slots)[..., None].expand(-1, -1, padded.shape[2]))
    if since_reset is not None:
        last = since_reset.gather(1, (n_live - 1).clamp(min=0)[:, None])  # (B, 1); slot size-1-k is k tokens back
        halo = halo * ((last >= size - 1 - slots) | (n_live == 0)[:, None])[..., None]
    return halo
