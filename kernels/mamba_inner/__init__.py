"""What lies between a Mamba layer's two wide projections: causal convolution, x_proj, dt_proj, selective scan and gate.
`mamba_inner` chooses: `triton.py`, fused for memory, on CUDA devices, `reference.py`, the meaning, elsewhere."""
import torch

from . import reference

__all__ = ["mamba_inner", "mamba_inner_phases", "mamba_inner_together"]


def mamba_inner(
    xz, conv_weight, conv_bias, x_proj, dt_proj, dt_bias, A_log, D, since_reset=None, n_live=None, reset=None, live=None,
    halo=None, initial_state=None,
):
    """See `reference.mamba_inner`: y (B, L, D), the halo out (B, W-1, D) and the final state (B, D, N)."""
    return _form(xz).mamba_inner(
        xz, conv_weight, conv_bias, x_proj, dt_proj, dt_bias, A_log, D, since_reset, n_live, reset, live, halo, initial_state
    )


def mamba_inner_together(calls, copies=None):
    """See `reference.mamba_inner_together`."""
    return _form(calls[0][0]).mamba_inner_together(calls, copies)


def mamba_inner_phases(xz, *arguments, **named):
    """See `reference.mamba_inner_phases`."""
    return _form(xz).mamba_inner_phases(xz, *arguments, **named)


def _form(xz):
    if xz.is_cuda and xz.dtype in (torch.float32, torch.bfloat16, torch.float16):
        from . import triton

        return triton
    return reference
