"""Compression in Triton: `_windows` finds the weights of each slot's taps, `_merge` the elements."""
from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import launch
from .reference import TICKS, Carry, Clock, Sampling
from .triton_clock import REACH, STEPS, TAPS, TICK, run_clock
from .triton_rows import bases_of, block_of, cdiv, numbers_at, power_of_2, row_of, share_of, strides_of

LOG2E = tl.constexpr(math.log2(math.e))
SQRT_HALF = tl.constexpr(math.sqrt(0.5))


@triton.jit
def _windows(
    emitter, n_live, reset, tokens, phase, halo_steps, since_reset, flags, mass, length, slots, taps, width, horizon, cap,
    HALO: tl.constexpr, LEARN: tl.constexpr, M: tl.constexpr, MP: tl.constexpr, BLOCK: tl.constexpr,
):
    """Per slot: the taps that count, (B, J, K, M) integral of each basis over each tap's lags, 0 in those that do not, and
    in a second such plane, for the backward pass, the basis at the lag where the tap ends. Flags: live, reset."""
    j, b = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.program_id(1).to(tl.int64)
    inside = j < slots
    live = j < tl.load(n_live + b)
    slot = b * slots + j
    e = tl.load(emitter + slot, mask=live & inside, other=0)
    batch = tl.num_programs(1).to(tl.int64)
    plane, slot_plane = batch * length, batch * slots
    reach, steps, slope = tokens + REACH * plane, tokens + STEPS * plane, mass + slot_plane * (taps * M)
    tl.store(emitter + slot, e, mask=inside)
    tl.store(since_reset + slot, tl.load(since_reset + slot, mask=live & inside, other=0), mask=inside)
    tl.store(flags + slot, live, mask=inside)
    tl.store(flags + slot_plane + slot, tl.load(reset + b * length + e, mask=live & inside, other=0) != 0, mask=inside)
    live = live & inside
    depth = tl.load(reach + b * length + e, mask=live, other=0)
    lag = -(tl.load(phase + b * length + e, mask=live, other=0.0) * TICK).to(tl.int32)
    m = tl.arange(0, MP)
    centre = m.to(tl.float32)
    edge = tl.zeros([BLOCK, MP], tl.float32) + tl.erf(-centre * SQRT_HALF)[None, :]
    scale = width * 1.2533141373155003  # sqrt(pi / 2)
    n = tl.zeros([BLOCK], tl.int32)
    table = slot[:, None] * (taps * M) + m[None, :]
    store = inside[:, None] & (m < M)[None, :]
    for k in range(taps):
        counts = (k < depth) & (lag.to(tl.float32) / TICK <= horizon)
        n += counts.to(tl.int32)
        t = e - k
        step = tl.load(steps + b * length + t, mask=counts & (t >= 0), other=0)
        if HALO:
            step += tl.load(halo_steps + b * (taps - 1) + (taps - 1) + t, mask=counts & (t < 0), other=0).to(tl.int32)
        lag = tl.minimum(lag + step, cap)
        far = lag.to(tl.float32) / TICK
        x = tl.minimum(tl.maximum(far, 0.0), horizon)[:, None] / width - centre[None, :]
        next_edge = tl.erf(x * SQRT_HALF)
        tl.store(mass + table + k * M, scale * (next_edge - edge), mask=store)
        if LEARN:
            density = tl.where((far >= 0.0)[:, None] & (far <= horizon)[:, None], tl.exp2(x * x * (-0.5 * LOG2E)), 0.0)
            tl.store(slope + table + k * M, density, mask=store)
        edge = next_edge
    tl.store(emitter + TAPS * slot_plane + slot, n, mask=inside)


@triton.jit
def _merge(
    u, halo, emitter, mass, basis, x, slots, d, taps, stride_b, stride_l, per_program,
    HALO: tl.constexpr, M: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):
    blocks = tl.cdiv(d, BLOCK)
    c, b = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK), tl.program_id(1).to(tl.int64)
    first = tl.program_id(0) // blocks * per_program
    last = tl.minimum(first + per_program, slots)
    emitter += b * slots
    taps_of = emitter + TAPS * tl.num_programs(1).to(tl.int64) * slots
    rows = bases_of(basis, d, c, M)
    n, e = tl.load(taps_of + first, mask=first < last, other=0), tl.load(emitter + first, mask=first < last, other=0)
    for j in range(first, last):
        slot, follows = b * slots + j, j + 1 < last
        next_n, next_e = tl.load(taps_of + j + 1, mask=follows, other=0), tl.load(emitter + j + 1, mask=follows, other=0)
        total = tl.zeros([BLOCK], tl.float32)
        for start in range(0, n, CHUNK):
            values, weights = (), ()
            for i in tl.static_range(CHUNK):
                k = start + i
                values += (row_of(u, halo, b, e - k, d, stride_b, stride_l, taps - 1, c, (c < d) & (k < n), HALO).to(tl.float32),)
                weights += numbers_at(mass + (slot * taps + tl.minimum(k, taps - 1)) * M, M)
            for i in tl.static_range(CHUNK):
                w = tl.zeros([BLOCK], tl.float32) + tl.where(start + i == 0, 1.0, 0.0)
                for m in tl.static_range(M):
                    w += weights[i * M + m] * rows[m]
                total += w * values[i]
        tl.store(x + slot * d + c, total.to(x.dtype.element_ty), mask=c < d)
        n, e = next_n, next_e


def compress_forward(
    u: Tensor, basis: Tensor, weight: Tensor | None, bias: Tensor | None, reset: Tensor, sampling: Sampling, slots: int,
    carry: Carry | None = None,
) -> tuple[Tensor, Clock, Tensor, Tensor, tuple[Tensor, ...]]:
    """x, the clock, dev and position after the last token, and what the backward pass needs."""
    (batch, length, d), bases, taps = u.shape, len(basis), sampling.window_taps
    reset, basis = reset.contiguous(), basis.contiguous()
    clock, dev, position, _, (tokens, floats, at_slots, flags, ends) = run_clock(u, weight, bias, reset, sampling, slots, carry)
    table = torch.empty(2, batch, slots, taps, bases, device=u.device)
    block = min(32, power_of_2(slots))
    launch(
        _windows, (cdiv(slots, block), batch),
        at_slots, ends, reset, tokens, floats, ends if carry is None else carry.steps.contiguous(), clock.since_reset, flags,
        table, length, slots, taps, sampling.window_width, sampling.horizon, math.ceil(sampling.horizon * TICKS) + TICKS,
        HALO=carry is not None, LEARN=weight is not None, M=bases, MP=power_of_2(bases), BLOCK=block, num_warps=4,
    )
    x = torch.empty(batch, slots, d, dtype=u.dtype, device=u.device)
    u, stride_b, stride_l = strides_of(u)
    halo, block = u if carry is None else carry.tokens.contiguous(), block_of(d, 256)
    blocks = cdiv(d, block)
    share = share_of(slots, batch, blocks, 20)
    launch(
        _merge, (blocks * cdiv(slots, share), batch),
        u, halo, at_slots, table, basis, x, slots, d, taps, stride_b, stride_l, share,
        HALO=carry is not None, M=bases, CHUNK=3, BLOCK=block, num_warps=1,
    )
    return x, clock, dev, position, (tokens, floats, at_slots, table)
