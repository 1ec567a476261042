"""Restoration in Triton, back to full length: `_restore`, and `_restore_backward`, in which a slot sums over the tokens that
read it, in their order."""
from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import launch
from .reference import Clock, Sampling
from .triton_rows import add_up, bases_of, block_of, cdiv, row_of, share_of, strides_of, wide

GAUSS = tl.constexpr(math.sqrt(0.5 * math.log2(math.e)))  # exp(-s^2 / 2) = 2^-(GAUSS s)^2


@triton.jit
def _zeros(M: tl.constexpr, BLOCK: tl.constexpr):
    out = ()
    for m in tl.static_range(M):
        out += (tl.zeros([BLOCK], tl.float32),)
    return out


@triton.jit
def _restore(
    y, tail, newest, phase, count, n_live, basis, z, tail_out,
    length, d, y_b, y_j, z_b, z_l, width, per_program,
    TAIL: tl.constexpr, Q: tl.constexpr, M: tl.constexpr, BLOCK: tl.constexpr,
):
    blocks, chunks = tl.cdiv(d, BLOCK), tl.cdiv(length, per_program)
    c, b = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK), tl.program_id(1).to(tl.int64)
    chunk = tl.program_id(0) // blocks
    mask = c < d
    if chunk == chunks:  # one program more per block of d: the tail after y
        for q in range(Q):
            j = tl.load(n_live + b) - Q + q
            value = row_of(y, tail, b, j, d, y_b, y_j, Q, c, mask, TAIL)
            tl.store(tail_out + (b * Q + q) * d + c, value.to(tail_out.dtype.element_ty), mask=mask)
    else:
        rows = bases_of(basis, d, c, M)
        for l in range(chunk * per_program, tl.minimum((chunk + 1) * per_program, length)):
            n, known = tl.load(newest + b * length + l), tl.load(count + b * length + l)
            lag = tl.load(phase + b * length + l) * (GAUSS / width)
            total = tl.zeros([BLOCK], tl.float32)
            for k in tl.static_range(Q):
                value = row_of(y, tail, b, n - k, d, y_b, y_j, Q, c, mask & (k < known), TAIL).to(tl.float32)
                w = tl.zeros([BLOCK], tl.float32) + (1.0 if k == 0 else 0.0)
                for m in tl.static_range(M):
                    s = lag + (k / width - m) * GAUSS
                    w += tl.exp2(-s * s) * rows[m]
                total += w * value
            tl.store(z + b * z_b + wide(l) * z_l + c, total.to(z.dtype.element_ty), mask=mask)


@triton.jit
def _first_token(emitter, row, slot, n_live, length):
    """Of slot `slot`: where it begins to be the newest; 0 before the row's own slots, length past the last in use."""
    e = tl.load(emitter + row + slot, mask=(slot >= 0) & (slot < n_live), other=0)
    return tl.where(slot < n_live, e, length)


@triton.jit
def _restore_backward(
    y, tail, grad_z, grad_tail_out, newest, phase, count, emitter, n_live_of, basis, grad_y, grad_tail, phase_parts, basis_parts,
    batch, length, slots, d, y_b, y_j, z_b, z_l, width, per_program,
    TAIL: tl.constexpr, TAIL_OUT: tl.constexpr, LEARN: tl.constexpr, Q: tl.constexpr, M: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Slots, those of the tail first, each summing over the tokens that read it. Parts of grad_basis (B, programs, M, d) and
    of grad_phase (Q, blocks of d, B, L), written where a slot is read."""
    blocks = tl.cdiv(d, BLOCK)
    block, chunk, b = tl.program_id(0) % blocks, tl.program_id(0) // blocks, tl.program_id(1).to(tl.int64)
    c = block * BLOCK + tl.arange(0, BLOCK)
    mask = c < d
    rows = bases_of(basis, d, c, M)
    sums = _zeros(M, BLOCK)
    newest, count, phase, grad_z = newest + b * length, count + b * length, phase + b * length, grad_z + b * z_b
    plane = wide(batch) * length * blocks
    phase_parts += (wide(block) * batch + b) * length
    n_live, scale = tl.load(n_live_of + b).to(tl.int32), GAUSS / width
    older = Q if TAIL else 0
    first = chunk * per_program - older
    for j in range(first, tl.minimum(first + per_program, slots)):
        lo = _first_token(emitter, b * slots, j, n_live, length)
        hi = _first_token(emitter, b * slots, j + Q, n_live, length)
        held = row_of(y, tail, b, j, d, y_b, y_j, Q, c, mask & (j < n_live), TAIL).to(tl.float32)
        total, by_basis = tl.zeros([BLOCK], tl.float32), _zeros(M, BLOCK)
        for start in range(lo, hi, CHUNK):
            elements, known, lags, values, parts = (), (), (), (), ()
            newest_at, count_at, phase_at, g = newest + start, count + start, phase + start, grad_z + wide(start) * z_l + c
            for i in tl.static_range(CHUNK):
                inside = start + i < hi
                values += (tl.load(g + i * z_l, mask=mask & inside, other=0.0).to(tl.float32),)
                elements += (tl.load(newest_at + i, mask=inside, other=j) - j,)
                known += (tl.load(count_at + i, mask=inside, other=0),)
                lags += (tl.load(phase_at + i, mask=inside, other=0.0),)
            for i in tl.static_range(CHUNK):
                k = elements[i]
                g, lag = tl.where(k < known[i], values[i], 0.0), (lags[i] + k) * scale
                total += tl.where(k == 0, 1.0, 0.0) * g
                dw = tl.zeros([BLOCK], tl.float32)
                grown = ()
                for m in tl.static_range(M):
                    s = lag - m * GAUSS
                    value = tl.exp2(-s * s)
                    grown += (by_basis[m] + value * g,)
                    if LEARN:
                        dw -= (value * s) * rows[m]
                by_basis = grown
                if LEARN:
                    parts += (tl.sum(dw * (g * held), 0) / (GAUSS * width),)
            if LEARN:
                for i in tl.static_range(CHUNK):
                    part = phase_parts + elements[i] * plane + start
                    tl.store(part + i, parts[i], mask=elements[i] < known[i])
        grown = ()
        for m in tl.static_range(M):
            total += by_basis[m] * rows[m]
            grown += (sums[m] + by_basis[m] * held,)
        sums = grown
        if TAIL_OUT:
            q = j + Q - n_live
            handed = (q >= 0) & (q < Q)
            total += tl.load(grad_tail_out + (b * Q + q) * d + c, mask=mask & handed, other=0.0).to(tl.float32)
        tl.store(grad_y + (b * slots + j) * d + c, total.to(grad_y.dtype.element_ty), mask=mask & (j >= 0))
        if TAIL:
            tl.store(grad_tail + (b * Q + Q + j) * d + c, total.to(grad_tail.dtype.element_ty), mask=mask & (j < 0))
    chunks = tl.num_programs(0) // blocks
    for m in tl.static_range(M):
        tl.store(basis_parts + ((b * chunks + chunk) * M + m) * d + c, sums[m], mask=mask)


def decompress_forward(
    y: Tensor, basis: Tensor, clock: Clock, sampling: Sampling, tail: Tensor | None = None, out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """z (into `out`, which may be strided, if given) and the tail after y."""
    (batch, _, d), length, taps = y.shape, clock.newest.shape[1], sampling.readout_taps
    z = torch.empty(batch, length, d, dtype=y.dtype, device=y.device) if out is None else out
    tail_out = torch.empty(batch, taps, d, dtype=y.dtype, device=y.device)
    y, y_b, y_j = strides_of(y)
    _, z_b, z_l = strides_of(z)
    block = block_of(d, 128)
    blocks = cdiv(d, block)
    share = share_of(length, batch, blocks, 28)
    launch(
        _restore, (blocks * (cdiv(length, share) + 1), batch),
        y, y if tail is None else tail, clock.newest, clock.phase, clock.count, clock.n_live, basis.contiguous(), z, tail_out,
        length, d, y_b, y_j, z_b, z_l, sampling.readout_width, share,
        TAIL=tail is not None, Q=taps, M=len(basis), BLOCK=block, num_warps=1,
    )
    return z, tail_out


def decompress_backward(
    grad_z: Tensor, grad_tail_out: Tensor | None, y: Tensor, basis: Tensor, clock: Clock, sampling: Sampling,
    tail: Tensor | None = None, learn: bool = True,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gradients of y, basis, tail and, if the clock learns, of the phase (B, L). grad_z (B, L, d) may be strided."""
    (batch, slots, d), length, taps, bases = y.shape, clock.newest.shape[1], sampling.readout_taps, len(basis)
    y, y_b, y_j = strides_of(y)
    grad_z, z_b, z_l = strides_of(grad_z)
    block = block_of(d, 128)
    blocks, before = cdiv(d, block), 0 if tail is None else taps
    share = share_of(before + slots, batch, blocks, 12)
    chunks = cdiv(before + slots, share)
    grad_y = torch.empty(batch, slots, d, dtype=y.dtype, device=y.device)
    grad_tail = None if tail is None else torch.empty_like(tail)
    phase_parts = torch.empty((taps * blocks, batch * length) if learn else (0, 0), device=y.device)
    basis_parts = torch.empty(batch * chunks, bases * d, device=y.device)
    launch(
        _restore_backward, (blocks * chunks, batch),
        y, y if tail is None else tail, grad_z, y if grad_tail_out is None else grad_tail_out.contiguous(),
        clock.newest, clock.phase, clock.count, clock.emitter, clock.n_live, basis.contiguous(),
        grad_y, grad_y if tail is None else grad_tail, phase_parts, basis_parts,
        batch, length, slots, d, y_b, y_j, z_b, z_l, sampling.readout_width, share,
        TAIL=tail is not None, TAIL_OUT=grad_tail_out is not None, LEARN=learn, Q=taps, M=bases, CHUNK=4, BLOCK=block,
        num_warps=1,
    )
    grad_basis = torch.empty(bases, d, dtype=basis.dtype, device=y.device)
    grad_phase = torch.empty(batch, length, device=y.device) if learn else None
    add_up(basis_parts, grad_basis, phase_parts, grad_phase if learn else phase_parts, clock.count if learn else None, blocks)
    return grad_y, grad_basis, grad_tail, grad_phase
