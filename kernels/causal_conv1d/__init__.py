"""Depthwise causal convolution over time with SiLU, cut at document starts, with a halo in and out.
`causal_conv1d` chooses the implementation: `triton.py` on CUDA devices, `reference.py`, the readable meaning, elsewhere."""
import torch

from . import reference

__all__ = ["causal_conv1d"]


def causal_conv1d(x, weight, bias, since_reset=None, halo=None, n_live=None):
    """See `reference.causal_conv1d`: y (B, L, D) and the halo out (B, W-1, D)."""
    if x.is_cuda and x.dtype in (torch.float32, torch.bfloat16, torch.float16):
        from .triton import causal_conv1d as chosen
    else:
        chosen = reference.causal_conv1d
    return chosen(x, weight, bias, since_reset, halo, n_live)
