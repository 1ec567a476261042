"""Residual add and root-mean-square normalisation in PyTorch."""
from __future__ import annotations

import torch
from torch import Tensor


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None, out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """h = residual + x (x if there is none), and h / sqrt(mean(h^2) + eps) * weight over the last dimension.

    x (…, d); weight (d,); residual (…, d). Returns the normalised h in out_dtype (h's, if None), then h, which is float32, or
    float64 if x or the residual is.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    h = x.to(wide) if residual is None else residual.to(torch.promote_types(wide, residual.dtype)) + x
    normalised = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + eps) * weight
    return normalised.to(out_dtype or h.dtype), h
