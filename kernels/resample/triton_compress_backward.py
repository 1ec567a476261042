"""The backward pass of compression in Triton, through the clock's intervals too.

In gather form: every sum is taken by one program in a fixed order, and what is summed over programs goes through partial sums.
So results repeat to the bit.
"""
from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import launch
from .reference import Sampling
from .triton_clock import CUT, TAPS
from .triton_rows import add_up, bases_of, block_of, cdiv, numbers_at, power_of_2, row_of, share_of, strides_of, wide

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)  # the interpreter has no arithmetic in bfloat16


@triton.jit
def _merge_backward_slots(
    u, halo, grad_x, emitter, mass, basis, lag_parts, basis_parts,
    slots, d, taps, stride_b, stride_l, grad_b, grad_j, per_program,
    HALO: tl.constexpr, LEARN: tl.constexpr, M: tl.constexpr, MP: tl.constexpr, BLOCK: tl.constexpr,
):
    """Parts of grad_basis (B, programs, M, d), and of the gradient of each tap's interval (blocks of d, B, J, K).

    With v_k = grad_x * u_{e-k}, by 16 slots a time: the bases' gradients are sums over slots and taps of v_k times masses, and
    an interval's follow from sums of v_k over channels times bases. Both are products for tensor cores, in u's dtype; float32
    as three of its halves.
    """
    blocks = tl.cdiv(d, BLOCK)
    block, chunk, b = tl.program_id(0) % blocks, tl.program_id(0) // blocks, tl.program_id(1).to(tl.int64)
    c, m, first = block * BLOCK + tl.arange(0, BLOCK), tl.arange(0, MP), chunk * per_program
    last = tl.minimum(first + per_program, slots)
    inside, real = (c < d)[None, :], (m < M)[None, :]
    plane = tl.num_programs(1).to(tl.int64) * slots
    emitter += b * slots
    taps_of, slope = emitter + TAPS * plane, mass + plane * (taps * M)
    DTYPE: tl.constexpr = tl.bfloat16 if u.dtype.element_ty == tl.bfloat16 and not INTERPRETED else tl.float32
    bases = tl.load(basis + m[None, :] * d + c[:, None], mask=real & (c < d)[:, None], other=0.0).to(DTYPE)
    sums = tl.zeros([BLOCK, MP], tl.float32)
    for start in range(first, last, 16):
        j = start + tl.arange(0, 16)
        used = j < last
        n, e = tl.load(taps_of + j, mask=used, other=0), tl.load(emitter + j, mask=used, other=0)
        g = grad_x + b * grad_b + wide(j)[:, None] * grad_j + c[None, :]
        g = tl.load(g, mask=inside & (n > 0)[:, None], other=0.0).to(DTYPE)
        # Oldest tap first: an interval moves the far lag of its own tap and both lags of the older ones.
        older, moved = tl.zeros([16, MP], tl.float32), tl.zeros([16], tl.float32)
        most = tl.max(n, 0)
        for i in range(0, most):
            k = most - 1 - i
            counts = k < n
            row = row_of(
                u, halo, b, (e - k)[:, None], d, stride_b, stride_l, taps - 1, c[None, :], inside & counts[:, None], HALO
            )
            v = row.to(DTYPE) * g
            at = ((b * slots + j) * taps + k)[:, None] * M + m[None, :]
            weight = tl.load(mass + at, mask=counts[:, None] & real, other=0.0).to(DTYPE)
            sums = tl.dot(tl.trans(v), weight, sums, input_precision="tf32x3")
            if LEARN:
                density = tl.load(slope + at, mask=counts[:, None] & real, other=0.0)
                paid = tl.dot(v, bases, input_precision="tf32x3")
                moved += tl.sum((paid - older) * density, 1)
                older = paid
                tl.store(lag_parts + (block * plane + b * slots + j) * taps + k, moved, mask=counts)
    chunks = tl.num_programs(0) // blocks
    out = basis_parts + ((b * chunks + chunk) * M + m[None, :]) * d + c[:, None]
    tl.store(out, sums, mask=real & (c < d)[:, None])


@triton.jit
def _interval_backward(
    tokens, emitter, gate, lag_parts, grad_phase, covering, grad_logit,
    length, slots, taps, halo, reach, blocks, phase_b, phase_l, span,
    LEARN: tl.constexpr, PHASE: tl.constexpr, BLOCK: tl.constexpr,
):
    """Per token, those of the halo first: how many slots it counts in, and the gradient of its clock's logit.

    The phase moves with the intervals since the last emission or cut, a slot's lags with those of its taps since the last
    cut; so a token looks at the tokens after it.
    """
    p, b = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.program_id(1).to(tl.int64)
    t = p - halo
    row, batch = b * length, tl.num_programs(1).to(tl.int64)
    newest, cut, taps_of = tokens, tokens + CUT * batch * length, emitter + TAPS * batch * slots
    count, grad = tl.zeros([BLOCK], tl.int32), tl.zeros([BLOCK], tl.float32)
    open_phase = t >= 0
    slot_before = tl.load(newest + row + t - 1, mask=(t > 0) & (t <= length), other=-1)
    for k in range(reach):
        l = t + k
        valid = (l >= 0) & (l < length)
        slot = tl.load(newest + row + l, mask=valid, other=-1)
        fire = (slot > slot_before) & (slot < slots)
        n = tl.load(taps_of + b * slots + slot, mask=fire & (k < taps), other=0)
        member = k < n
        count += member.to(tl.int32)
        if LEARN:
            last_cut = tl.load(cut + row + l, mask=valid, other=0)
            moves = member & (t >= 0) & (t > last_cut)
            for block in range(blocks):
                part = ((block * batch + b) * slots + slot) * taps + k
                grad += tl.load(lag_parts + part, mask=moves, other=0.0)
            if PHASE:
                open_phase = open_phase & valid & (slot == slot_before) & (last_cut != l)
                grad += tl.load(grad_phase + b * phase_b + l.to(tl.int64) * phase_l, mask=open_phase, other=0.0)
        slot_before = tl.where(valid, slot, slot_before)
    inside = p < length + halo
    tl.store(covering + b * (length + halo) + p, count, mask=inside)
    if LEARN:
        value = tl.load(gate + row + t, mask=inside & (t >= 0), other=0.0)
        tl.store(grad_logit + row + t, grad * span * value * (1.0 - value), mask=inside & (t >= 0))


@triton.jit
def _merge_backward_tokens(
    u, grad_x, emitter, newest, covering, mass, basis, weight, grad_logit, beside, grad_u, grad_halo, clock_parts,
    length, slots, d, taps, stride_b, stride_l, grad_b, grad_j, beside_b, beside_l, out_b, out_l, halo, per_program,
    HALO: tl.constexpr, LEARN: tl.constexpr, BESIDE: tl.constexpr, M: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):
    """grad_u, with what others ask of u beside, and parts of the gradients of the clock's weight and bias (B, programs, d+1)."""
    blocks = tl.cdiv(d, BLOCK)
    block, chunk, b = tl.program_id(0) % blocks, tl.program_id(0) // blocks, tl.program_id(1).to(tl.int64)
    c, first = block * BLOCK + tl.arange(0, BLOCK), chunk * per_program
    last = tl.minimum(first + per_program, length + halo)
    covering, newest, grad_logit = covering + b * (length + halo), newest + b * length, grad_logit + b * length
    rows = bases_of(basis, d, c, M)
    if LEARN:
        w_clock = tl.load(weight + c, mask=c < d, other=0.0).to(tl.float32)
    sums, logits = tl.zeros([BLOCK], tl.float32), tl.zeros([], tl.float32)
    n = tl.load(covering + first, mask=first < last, other=0)
    before = tl.load(newest + first - halo - 1, mask=(first > halo) & (first < last), other=-1)
    for p in range(first, last):
        t, first_slot = p - halo, before + 1
        next_n = tl.load(covering + p + 1, mask=p + 1 < last, other=0)
        before = tl.load(newest + t, mask=t >= 0, other=-1)
        if LEARN:
            g_logit = tl.load(grad_logit + t, mask=t >= 0, other=0.0)
            value = tl.load(u + b * stride_b + wide(t) * stride_l + c, mask=(c < d) & (t >= 0), other=0.0)
        total = tl.zeros([BLOCK], tl.float32)
        if BESIDE:
            others = beside + b * beside_b + wide(t) * beside_l + c
            total += tl.load(others, mask=(c < d) & (t >= 0), other=0.0).to(tl.float32)
        for start in range(0, n, CHUNK):
            taps_back, values, weights = (), (), ()
            for i in tl.static_range(CHUNK):
                j, counts = first_slot + start + i, start + i < n
                g = grad_x + b * grad_b + wide(j) * grad_j + c
                values += (tl.load(g, mask=(c < d) & counts, other=0.0).to(tl.float32),)
                taps_back += (tl.load(emitter + b * slots + j, mask=counts, other=t) - t,)
            for i in tl.static_range(CHUNK):
                at = (b * slots + tl.minimum(first_slot + start + i, slots - 1)) * taps + taps_back[i]
                weights += numbers_at(mass + at * M, M)
            for i in tl.static_range(CHUNK):
                w = tl.zeros([BLOCK], tl.float32) + tl.where(taps_back[i] == 0, 1.0, 0.0)
                for m in tl.static_range(M):
                    w += weights[i * M + m] * rows[m]
                total += w * values[i]
        if LEARN:
            total += g_logit * w_clock
            sums += g_logit * value.to(tl.float32)
            logits += g_logit
        tl.store(grad_u + b * out_b + wide(t) * out_l + c, total.to(grad_u.dtype.element_ty), mask=(c < d) & (t >= 0))
        if HALO:
            tl.store(grad_halo + (b * halo + p) * d + c, total.to(grad_halo.dtype.element_ty), mask=(c < d) & (t < 0))
        n = next_n
    if LEARN:
        out = clock_parts + (b * (tl.num_programs(0) // blocks) + chunk) * (d + 1)
        tl.store(out + c, sums, mask=c < d)
        if block == 0:
            tl.store(out + d, logits)


def compress_backward(
    grad_x: Tensor, grad_phase: Tensor | None, u: Tensor, halo: Tensor | None, basis: Tensor, weight: Tensor | None,
    saved: tuple[Tensor, ...], sampling: Sampling, out: Tensor | None = None, beside: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None, Tensor | None]:
    """Gradients of u (into `out`, which may be strided, if given), halo, basis, weight and bias. beside (B, L, d): what is to be
    added to that of u."""
    tokens, floats, at_slots, table = saved
    (batch, length, d), slots, bases, taps = u.shape, grad_x.shape[1], len(basis), sampling.window_taps
    device, learn, has_halo = u.device, weight is not None, halo is not None
    u, stride_b, stride_l = strides_of(u)
    grad_x, grad_b, grad_j = strides_of(grad_x)
    basis, block = basis.contiguous(), block_of(d, 64)
    blocks = cdiv(d, block)
    share = 16 * cdiv(share_of(slots, batch, blocks, 16), 16)
    chunks = cdiv(slots, share)
    lag_parts = torch.empty((blocks, batch, slots, taps) if learn else 0, device=device)
    basis_parts = torch.empty(batch * chunks, bases * d, device=device)
    launch(
        _merge_backward_slots, (blocks * chunks, batch),
        u, halo if has_halo else u, grad_x, at_slots, table, basis, lag_parts, basis_parts,
        slots, d, taps, stride_b, stride_l, grad_b, grad_j, share,
        HALO=has_halo, LEARN=learn, M=bases, MP=max(8, power_of_2(bases)), BLOCK=block, num_warps=1, num_stages=1,
    )
    before = taps - 1 if has_halo else 0
    covering = torch.empty(batch, before + length, dtype=torch.int32, device=device)
    grad_logit = torch.empty((batch, length) if learn else 0, device=device)
    # No clock runs longer than 1 / low tokens between emissions.
    reach = max(taps, math.ceil(1 / sampling.low) + 1) if learn else taps
    launch(
        _interval_backward, (cdiv(before + length, 128), batch),
        tokens, at_slots, floats[1], lag_parts, lag_parts if grad_phase is None else grad_phase, covering, grad_logit,
        length, slots, taps, before, reach, blocks, *((0, 0) if grad_phase is None else grad_phase.stride()),
        sampling.high - sampling.low, LEARN=learn, PHASE=grad_phase is not None, BLOCK=128, num_warps=4,
    )
    grad_u = torch.empty(batch, length, d, dtype=u.dtype, device=device) if out is None else out
    grad_halo = torch.empty_like(halo) if has_halo else None
    block = block_of(d, 256)
    blocks = cdiv(d, block)
    share = share_of(before + length, batch, blocks, 16)
    chunks = cdiv(before + length, share)
    clock_parts = torch.empty((batch * chunks, d + 1) if learn else (0, 0), device=device)
    _, out_b, out_l = strides_of(grad_u)
    beside_at = (grad_u, 0, 0) if beside is None else strides_of(beside)
    launch(
        _merge_backward_tokens, (blocks * chunks, batch),
        u, grad_x, at_slots, tokens, covering, table, basis, weight if learn else basis, grad_logit, beside_at[0],
        grad_u, grad_halo if has_halo else grad_u, clock_parts,
        length, slots, d, taps, stride_b, stride_l, grad_b, grad_j, *beside_at[1:], out_b, out_l, before, share,
        HALO=has_halo, LEARN=learn, BESIDE=beside is not None, M=bases, CHUNK=2, BLOCK=block, num_warps=1,
    )
    grad_basis = torch.empty(bases, d, dtype=basis.dtype, device=device)
    grad_clock = torch.empty(d + 1, dtype=weight.dtype, device=device) if learn else clock_parts
    add_up(basis_parts, grad_basis, clock_parts, grad_clock)
    if not learn:
        return grad_u, grad_halo, grad_basis, None, None
    return grad_u, grad_halo, grad_basis, grad_clock[:d], grad_clock[d:]
