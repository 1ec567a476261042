"""SeRpEnt's resampling in Triton, for autograd. `reference.py` says what is computed; same legend. `triton_clock.py` has the
clock, `triton_compress.py` and `triton_compress_backward.py` compression, `triton_decompress.py` restoration."""
from __future__ import annotations

import torch
from torch import Tensor

from .reference import Carry, Clock, Sampling, hand_on
from .triton_clock import clock_maps
from .triton_compress import compress_forward
from .triton_compress_backward import compress_backward
from .triton_decompress import decompress_backward, decompress_forward

__all__ = ["clock_maps", "compress", "compress_beside", "decompress"]


class _Compress(torch.autograd.Function):
    @staticmethod
    def forward(ctx, u, halo, basis, weight, bias, reset, sampling, slots, carry, fixed):
        """x, the phase, and u for whoever else reads it; what carries no gradients goes into the list `fixed`: autograd's work
        grows with each output."""
        ctx.set_materialize_grads(False)
        if carry is not None:
            halo = halo.contiguous()
            carry = carry._replace(tokens=halo)
        x, clock, dev, position, saved = compress_forward(u, basis, weight, bias, reset, sampling, slots, carry)
        fixed += clock, dev, position
        ctx.save_for_backward(u, halo, basis, weight, *saved)
        ctx.sampling = sampling
        if weight is None:
            ctx.mark_non_differentiable(clock.phase)
        return x, clock.phase, u.view_as(u)

    @staticmethod
    def backward(ctx, grad_x, grad_phase, beside):
        u, halo, basis, weight, *saved = ctx.saved_tensors
        if grad_x is None:
            grad_x = torch.zeros(len(u), saved[2].shape[2], u.shape[2], dtype=u.dtype, device=u.device)
        grads = compress_backward(grad_x, grad_phase, u, halo, basis, weight, saved, ctx.sampling, beside=beside)
        return *grads, None, None, None, None, None


def compress(
    u: Tensor, basis: Tensor, weight: Tensor | None, bias: Tensor | None, reset: Tensor, sampling: Sampling, slots: int,
    carry: Carry | None = None,
) -> tuple[Tensor, Clock, Carry]:
    return compress_beside(u, basis, weight, bias, reset, sampling, slots, carry)[:3]


def compress_beside(
    u: Tensor, basis: Tensor, weight: Tensor | None, bias: Tensor | None, reset: Tensor, sampling: Sampling, slots: int,
    carry: Carry | None = None,
) -> tuple[Tensor, Clock, Carry, Tensor]:
    """As `reference.compress_beside`."""
    halo, fixed = None if carry is None else carry.tokens.to(u.dtype), []
    x, phase, through = _Compress.apply(u, halo, basis, weight, bias, reset, sampling, slots, carry, fixed)
    clock, dev, position = fixed
    return x, clock._replace(phase=phase), hand_on(u, clock.steps, dev, position, sampling, carry), through


class _Decompress(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y, tail, basis, phase, clock, sampling):
        ctx.set_materialize_grads(False)
        z, tail_out = decompress_forward(y, basis, clock, sampling, tail)
        ctx.save_for_backward(y, tail, basis, clock.newest, phase, clock.count, clock.emitter, clock.n_live)
        ctx.sampling = sampling
        return z, tail_out

    @staticmethod
    def backward(ctx, grad_z, grad_tail_out):
        y, tail, basis, newest, phase, count, emitter, n_live = ctx.saved_tensors
        clock = Clock(emitter, None, None, None, n_live, newest, None, count, phase, None, None)
        if grad_z is None:
            grad_z = torch.zeros(*newest.shape, y.shape[2], dtype=y.dtype, device=y.device)
        grad_y, grad_basis, grad_tail, grad_phase = decompress_backward(
            grad_z, grad_tail_out, y, basis, clock, ctx.sampling, tail, learn=ctx.needs_input_grad[3]
        )
        return grad_y, grad_tail, grad_basis, grad_phase, None, None


def decompress(
    y: Tensor, basis: Tensor, clock: Clock, sampling: Sampling, tail: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    tail = None if tail is None else tail.to(y.dtype).contiguous()
    return _Decompress.apply(y, tail, basis, clock.phase, clock, sampling)
