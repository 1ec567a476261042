"""Selective scan of Mamba (Gu & Dao, arXiv 2312.00752, algorithm 2): h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_t, y_t = C_t h_t.
`reference.py` is the sequential meaning, `chunked.py` the PyTorch form, `triton.py` the GPU's, of kernels in files beside it."""
import torch

from . import chunked

__all__ = ["scan_state", "scan_state_gradient", "selective_scan"]


def selective_scan(x, *arguments, **named):
    """`chunked.selective_scan`, by `triton.py` for float32, bfloat16 and float16 on a GPU."""
    if x.is_cuda and x.dtype != torch.float64:
        from . import triton

        return triton.selective_scan(x, *arguments, **named)
    return chunked.selective_scan(x, *arguments, **named)


def scan_state(x, *arguments, **named):
    if x.is_cuda and x.dtype != torch.float64:
        from . import triton

        return triton.scan_state(x, *arguments, **named)
    return chunked.scan_state(x, *arguments, **named)


def scan_state_gradient(grad_y, *arguments, **named):
    if grad_y.is_cuda and grad_y.dtype != torch.float64:
        from . import triton

        return triton.scan_state_gradient(grad_y, *arguments, **named)
    return chunked.scan_state_gradient(grad_y, *arguments, **named)


scan_state.__doc__, scan_state_gradient.__doc__ = chunked.scan_state.__doc__, chunked.scan_state_gradient.__doc__
