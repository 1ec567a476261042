"""Root-mean-square normalisation of rows with the residual add before it, the residual stream in float32.
`rms_norm` chooses the implementation: `triton.py` on CUDA devices, `reference.py`, the readable meaning, elsewhere."""
import torch

from . import reference

__all__ = ["rms_norm"]


def rms_norm(x, weight, eps, residual=None, out_dtype=None):
    """See `reference.rms_norm`: the normalised rows and the residual out, both (…, d)."""
    fast = (torch.float32, torch.bfloat16, torch.float16)
    if x.is_cuda and x.dtype in fast and (residual is None or residual.dtype in fast):
        from .triton import rms_norm as chosen
    else:
        chosen = reference.rms_norm
    return chosen(x, weight, eps, residual, out_dtype)
