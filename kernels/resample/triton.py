"""SeRpEnt's resampling in Triton. `reference.py` says what is computed; same legend.

Forward: `_intervals` (ticks each token asks for), `_clock` (one pass over a row; long rows in segments), `_windows` (weights
of the taps of each slot), `_merge` (the elements), `_restore` (back to full length). Backward in gather form: every sum is
taken by one program in a fixed order; what is summed over programs goes through partial sums, added up by `_sum_parts`. So
results repeat to the bit.

Emissions must not depend on how a row is cut: the clock's dot product is reduced per row in one fixed shape.
"""
from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import launch

from .reference import TICK_BITS, TICKS, Carry, Clock, Sampling, apply_map, hand_on

TICK = tl.constexpr(TICKS)
BITS = tl.constexpr(TICK_BITS)
LOG2E = tl.constexpr(math.log2(math.e))
SQRT_HALF = tl.constexpr(math.sqrt(0.5))
GAUSS = tl.constexpr(math.sqrt(0.5 * math.log2(math.e)))  # exp(-s^2 / 2) = 2^-(GAUSS s)^2
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)  # the interpreter has no arithmetic in bfloat16
HALF_UP = tl.constexpr(12582912.0)  # 1.5 * 2^23: adding and taking it off rounds to an integer, halves to even
ROWS, ROW_BLOCK = 4, 1024  # tile of the clock's dot product; fixed, as it fixes the order of summation
CLOCK_BLOCK = 1024  # tokens scanned at once; sums of drifts over so many fit int32
SEGMENT = 4 * CLOCK_BLOCK  # tokens of a row that one program walks
PROCESSORS = 132  # of an H200
# Planes of what is kept per token, (5, B, L) int32, and per slot, (2, B, J) int32.
NEWEST, REACH, COUNT, STEPS, CUT = (tl.constexpr(i) for i in range(5))
EMITTER, TAPS = tl.constexpr(0), tl.constexpr(1)


# ---- the clock ---------------------------------------------------------------------------------------------------------


@triton.jit
def _intervals(
    u, weight, bias, asked, gate_out, length, d, stride_b, stride_l, low, span,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):
    l, b = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.program_id(1).to(tl.int64)
    rows = u + b * stride_b + l.to(tl.int64)[:, None] * stride_l
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in range(0, d, BLOCK):
        c = start + tl.arange(0, BLOCK)
        mask = (l < length)[:, None] & (c < d)[None, :]
        w = tl.load(weight + c[None, :], mask=(c < d)[None, :], other=0.0).to(tl.float32)
        total += tl.load(rows + c[None, :], mask=mask, other=0.0).to(tl.float32) * w
    logit = tl.sum(total, 1) + tl.load(bias).to(tl.float32)
    gate = 1.0 / (1.0 + tl.exp(-logit))
    gate = tl.where(gate == gate, gate, 0.0)  # NaN would become any number of ticks, and slots out of bounds
    ticks = ((low + span * gate) * TICK + HALF_UP) - HALF_UP
    tl.store(asked + b * length + l, ticks.to(tl.int32), mask=l < length)
    tl.store(gate_out + b * length + l, gate, mask=l < length)


@triton.jit
def _then(a, lo, hi, start, a2, lo2, hi2, start2):
    """Two clamp maps x -> clip(x + a, lo, hi) in sequence, and the latest document start."""
    return a + a2, tl.minimum(tl.maximum(lo + a2, lo2), hi2), tl.minimum(tl.maximum(hi + a2, lo2), hi2), tl.maximum(start, start2)


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b)


@triton.jit
def _map_of(asked, reset, l, valid, rate, band, LEARN: tl.constexpr):
    """The clamp map of each token, the identity where not valid."""
    if LEARN:
        drift = tl.where(valid, tl.load(asked + l, mask=valid, other=0) - rate, 0)
    else:
        drift = tl.zeros_like(l)
    is_start = tl.load(reset + l, mask=valid, other=0) != 0
    after_start = tl.minimum(tl.maximum(drift, -band), band)
    return drift, tl.where(is_start, after_start, -band), tl.where(is_start, after_start, band), tl.where(is_start, l, -1)


@triton.jit
def _segment_maps(asked, reset, maps, length, segment, rate, band, LEARN: tl.constexpr, BLOCK: tl.constexpr):
    """The composed map of each segment of a row: (B, segments, 4) int64 of a, lo, hi, latest document start."""
    s, b, i = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.arange(0, BLOCK)
    a, lo, hi = tl.zeros([], tl.int64), tl.zeros([], tl.int64) - band, tl.zeros([], tl.int64) + band
    latest = tl.zeros([], tl.int64) - 1
    for start in range(s * segment, tl.minimum((s + 1) * segment, length), BLOCK):
        l = start + i
        m = _map_of(asked + b * length, reset + b * length, l, l < length, rate, band, LEARN)
        m = tl.associative_scan(m, 0, _then)
        last = i == BLOCK - 1
        a2, lo2, hi2 = tl.sum(tl.where(last, m[0], 0)), tl.sum(tl.where(last, m[1], 0)), tl.sum(tl.where(last, m[2], 0))
        a, lo, hi, latest = _then(a, lo, hi, latest, a2, lo2, hi2, tl.max(m[3]))
    out = maps + (b * tl.num_programs(0) + s) * 4
    tl.store(out, a)
    tl.store(out + 1, lo)
    tl.store(out + 2, hi)
    tl.store(out + 3, latest)


@triton.jit
def _clock(
    asked, reset, dev_in, position_in, maps, tokens_out, newest_out, cut_out, phase, emitter, since_reset, ends, totals,
    length, slots, segment, rate, band, taps, readout_taps,
    LEARN: tl.constexpr, CARRY: tl.constexpr, SPLIT: tl.constexpr, BLOCK: tl.constexpr,
):
    """Walks one segment. Not split: also fills the slots. Split: newest and cut count from the segment's start, and
    totals (B, segments, 2) says how many elements it emits and where the band last cut."""
    s, b, i = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.arange(0, BLOCK)
    row, batch = b * length, tl.num_programs(1).to(tl.int64)
    plane = batch * length
    dev, position = tl.zeros([], tl.int32), tl.zeros([], tl.int64)
    if CARRY:
        dev, position = tl.load(dev_in + b).to(tl.int32), tl.load(position_in + b)
    latest, base, cut_before = tl.full([], -1, tl.int32), tl.zeros([], tl.int32), tl.full([], -1, tl.int32)
    if SPLIT:
        for earlier in range(s):
            m = maps + (b * tl.num_programs(0) + earlier) * 4
            moved = dev.to(tl.int64) + tl.load(m)
            dev = tl.minimum(tl.maximum(moved, tl.load(m + 1)), tl.load(m + 2)).to(tl.int32)
            latest = tl.maximum(latest, tl.load(m + 3).to(tl.int32))
    for start in range(s * segment, tl.minimum((s + 1) * segment, length), BLOCK):
        l = start + i
        valid = l < length
        # Scanned over the tokens one earlier: what the clock read before each token, which the token then moves itself.
        m = _map_of(asked + row, reset + row, l - 1, (i > 0) & (l <= length), rate, band, LEARN)
        m = tl.associative_scan(m, 0, _then)
        own = _map_of(asked + row, reset + row, l, valid, rate, band, LEARN)
        document = tl.maximum(tl.maximum(m[3], own[3]), latest)
        before = tl.minimum(tl.maximum(dev + m[0], m[1]), m[2])
        before = tl.where(own[3] >= 0, 0, before)
        asked_dev = before + own[0]
        after = tl.minimum(tl.maximum(asked_dev, -band), band)
        tokens = tl.where(document < 0, position + l, (l - document).to(tl.int64)) + 1
        was = TICK - 1 + (tokens - 1) * rate + before
        ticks = TICK - 1 + tokens * rate + after
        count = ticks >> BITS
        fire = (count > (was >> BITS)) & valid
        slot = base + tl.cumsum(fire.to(tl.int32), 0) - 1
        cut = tl.maximum(tl.associative_scan(tl.where(asked_dev == after, -1, l), 0, _larger), cut_before)
        tl.store(newest_out + row + l, slot, mask=valid)
        tl.store(cut_out + row + l, cut, mask=valid)
        tl.store(tokens_out + REACH * plane + row + l, tl.minimum(tokens, taps).to(tl.int32), mask=valid)
        tl.store(tokens_out + COUNT * plane + row + l, tl.minimum(count, readout_taps).to(tl.int32), mask=valid)
        tl.store(tokens_out + STEPS * plane + row + l, (ticks - was).to(tl.int32), mask=valid)
        tl.store(phase + row + l, (ticks & (TICK - 1)).to(tl.float32) / TICK, mask=valid)
        if SPLIT:
            tl.store(since_reset + row + l, count - 1, mask=valid)
        else:
            fire = fire & (slot < slots)
            tl.store(emitter + b * slots + slot, l, mask=fire)
            tl.store(since_reset + b * slots + slot, count - 1, mask=fire)
        dev = tl.sum(tl.where(i == BLOCK - 1, after, 0))
        latest, cut_before = tl.max(document), tl.max(cut)
        base += tl.sum(fire.to(tl.int32))
    if SPLIT:
        tl.store(totals + (b * tl.num_programs(0) + s) * 2, base)
        tl.store(totals + (b * tl.num_programs(0) + s) * 2 + 1, cut_before)
    else:
        tl.store(ends + b, base.to(tl.int64))
    if s == tl.num_programs(0) - 1:
        tl.store(ends + batch + b, dev.to(tl.int64))
        tl.store(ends + 2 * batch + b, tl.where(latest < 0, position + length, (length - latest).to(tl.int64)))


@triton.jit
def _join_segments(
    slot_in_segment, cut_in_segment, elements, totals, tokens_out, emitter, since_reset, n_live,
    length, slots, segment, segments, BLOCK: tl.constexpr,
):
    """Adds to newest and cut what came before each segment, and fills the slots."""
    block, b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    l, row, own = block * BLOCK + tl.arange(0, BLOCK), b * length, block * BLOCK // segment
    valid = l < length
    base, cut_before = tl.zeros([], tl.int32), tl.full([], -1, tl.int32)
    for s in range(own):
        base += tl.load(totals + (b * segments + s) * 2)
        cut_before = tl.maximum(cut_before, tl.load(totals + (b * segments + s) * 2 + 1))
    local = tl.load(slot_in_segment + row + l, mask=valid, other=-1)
    earlier = tl.load(slot_in_segment + row + l - 1, mask=valid & (l > own * segment), other=-1)
    slot = local + base
    plane = tl.num_programs(1).to(tl.int64) * length
    tl.store(tokens_out + NEWEST * plane + row + l, slot, mask=valid)
    last_cut = tl.maximum(tl.load(cut_in_segment + row + l, mask=valid, other=-1), cut_before)
    tl.store(tokens_out + CUT * plane + row + l, last_cut, mask=valid)
    fire = valid & (local > earlier) & (slot < slots)
    tl.store(emitter + b * slots + slot, l, mask=fire)
    tl.store(since_reset + b * slots + slot, tl.load(elements + row + l, mask=valid, other=0), mask=fire)
    if own == segments - 1:
        tl.store(n_live + b, (base + tl.load(totals + (b * segments + own) * 2)).to(tl.int64))


# ---- compression -------------------------------------------------------------------------------------------------------


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
def _wide(i):
    """i as int64: offsets pass 2^31."""
    return tl.zeros([], tl.int64) + i


@triton.jit
def _row(x, halo, b, t, d, stride_b, stride_l, rows, c, mask, HALO: tl.constexpr):
    """Row t of x, or of the `rows` rows before x where t < 0; 0 where masked."""
    value = tl.load(x + b * stride_b + _wide(t) * stride_l + c, mask=mask & (t >= 0), other=0.0)
    if HALO:
        before = halo + (b * rows + rows + t) * d + c
        value = tl.where(t < 0, tl.load(before, mask=mask & (t < 0), other=0.0), value)
    return value


@triton.jit
def _bases(basis, d, c, M: tl.constexpr):
    out = ()
    for m in tl.static_range(M):
        out += (tl.load(basis + m * d + c, mask=c < d, other=0.0).to(tl.float32),)
    return out


@triton.jit
def _zeros(M: tl.constexpr, BLOCK: tl.constexpr):
    out = ()
    for m in tl.static_range(M):
        out += (tl.zeros([BLOCK], tl.float32),)
    return out


@triton.jit
def _read(at, N: tl.constexpr):
    out = ()
    for i in tl.static_range(N):
        out += (tl.load(at + i),)
    return out


# In the kernels below a program is one warp, and what hides the time of a load is other loads. So nothing is loaded under an
# `if`: the rows of taps that do not count read 0, their weights anything finite, and the next slot or token is looked up
# while this one is worked on.


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
    rows = _bases(basis, d, c, M)
    n, e = tl.load(taps_of + first, mask=first < last, other=0), tl.load(emitter + first, mask=first < last, other=0)
    for j in range(first, last):
        slot, follows = b * slots + j, j + 1 < last
        next_n, next_e = tl.load(taps_of + j + 1, mask=follows, other=0), tl.load(emitter + j + 1, mask=follows, other=0)
        total = tl.zeros([BLOCK], tl.float32)
        for start in range(0, n, CHUNK):
            values, weights = (), ()
            for i in tl.static_range(CHUNK):
                k = start + i
                values += (_row(u, halo, b, e - k, d, stride_b, stride_l, taps - 1, c, (c < d) & (k < n), HALO).to(tl.float32),)
                weights += _read(mass + (slot * taps + tl.minimum(k, taps - 1)) * M, M)
            for i in tl.static_range(CHUNK):
                w = tl.zeros([BLOCK], tl.float32) + tl.where(start + i == 0, 1.0, 0.0)
                for m in tl.static_range(M):
                    w += weights[i * M + m] * rows[m]
                total += w * values[i]
        tl.store(x + slot * d + c, total.to(x.dtype.element_ty), mask=c < d)
        n, e = next_n, next_e


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
        g = grad_x + b * grad_b + _wide(j)[:, None] * grad_j + c[None, :]
        g = tl.load(g, mask=inside & (n > 0)[:, None], other=0.0).to(DTYPE)
        # Oldest tap first: an interval moves the far lag of its own tap and both lags of the older ones.
        older, moved = tl.zeros([16, MP], tl.float32), tl.zeros([16], tl.float32)
        most = tl.max(n, 0)
        for i in range(0, most):
            k = most - 1 - i
            counts = k < n
            row = _row(u, halo, b, (e - k)[:, None], d, stride_b, stride_l, taps - 1, c[None, :], inside & counts[:, None], HALO)
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
    """grad_u, with what others ask of u beside, and parts of the gradients of the clock's weight and bias (B, programs, d + 1)."""
    blocks = tl.cdiv(d, BLOCK)
    block, chunk, b = tl.program_id(0) % blocks, tl.program_id(0) // blocks, tl.program_id(1).to(tl.int64)
    c, first = block * BLOCK + tl.arange(0, BLOCK), chunk * per_program
    last = tl.minimum(first + per_program, length + halo)
    covering, newest, grad_logit = covering + b * (length + halo), newest + b * length, grad_logit + b * length
    rows = _bases(basis, d, c, M)
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
            value = tl.load(u + b * stride_b + _wide(t) * stride_l + c, mask=(c < d) & (t >= 0), other=0.0)
        total = tl.zeros([BLOCK], tl.float32)
        if BESIDE:
            others = beside + b * beside_b + _wide(t) * beside_l + c
            total += tl.load(others, mask=(c < d) & (t >= 0), other=0.0).to(tl.float32)
        for start in range(0, n, CHUNK):
            taps_back, values, weights = (), (), ()
            for i in tl.static_range(CHUNK):
                j, counts = first_slot + start + i, start + i < n
                g = grad_x + b * grad_b + _wide(j) * grad_j + c
                values += (tl.load(g, mask=(c < d) & counts, other=0.0).to(tl.float32),)
                taps_back += (tl.load(emitter + b * slots + j, mask=counts, other=t) - t,)
            for i in tl.static_range(CHUNK):
                at = (b * slots + tl.minimum(first_slot + start + i, slots - 1)) * taps + taps_back[i]
                weights += _read(mass + at * M, M)
            for i in tl.static_range(CHUNK):
                w = tl.zeros([BLOCK], tl.float32) + tl.where(taps_back[i] == 0, 1.0, 0.0)
                for m in tl.static_range(M):
                    w += weights[i * M + m] * rows[m]
                total += w * values[i]
        if LEARN:
            total += g_logit * w_clock
            sums += g_logit * value.to(tl.float32)
            logits += g_logit
        tl.store(grad_u + b * out_b + _wide(t) * out_l + c, total.to(grad_u.dtype.element_ty), mask=(c < d) & (t >= 0))
        if HALO:
            tl.store(grad_halo + (b * halo + p) * d + c, total.to(grad_halo.dtype.element_ty), mask=(c < d) & (t < 0))
        n = next_n
    if LEARN:
        out = clock_parts + (b * (tl.num_programs(0) // blocks) + chunk) * (d + 1)
        tl.store(out + c, sums, mask=c < d)
        if block == 0:
            tl.store(out + d, logits)


@triton.jit
def _sum_rows(parts, out, rows, columns, program, limit, group, LIMIT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    c = program * COLUMNS + tl.arange(0, COLUMNS)
    inside = c < columns
    if LIMIT:
        rows_of = tl.load(limit + c, mask=inside, other=0) * group
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, rows, ROWS):
        r = start + tl.arange(0, ROWS)[:, None]
        mask = (r < rows) & inside[None, :]
        if LIMIT:
            mask = mask & (r < rows_of[None, :])
        total += tl.load(parts + r.to(tl.int64) * columns + c[None, :], mask=mask, other=0.0)
    tl.store(out + c, tl.sum(total, 0).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _sum_parts(
    first, first_out, first_rows, first_columns, second, second_out, second_rows, second_columns, limit, group,
    LIMIT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):
    """Sums two (rows, columns) tables over their rows; with a limit (columns,), the second over its first limit * group."""
    p, programs = tl.program_id(0), tl.cdiv(first_columns, COLUMNS)
    if p < programs:
        _sum_rows(first, first_out, first_rows, first_columns, p, limit, group, False, ROWS, COLUMNS)
    else:
        _sum_rows(second, second_out, second_rows, second_columns, p - programs, limit, group, LIMIT, ROWS, COLUMNS)


# ---- restoration -------------------------------------------------------------------------------------------------------


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
            value = _row(y, tail, b, j, d, y_b, y_j, Q, c, mask, TAIL)
            tl.store(tail_out + (b * Q + q) * d + c, value.to(tail_out.dtype.element_ty), mask=mask)
    else:
        rows = _bases(basis, d, c, M)
        for l in range(chunk * per_program, tl.minimum((chunk + 1) * per_program, length)):
            n, known = tl.load(newest + b * length + l), tl.load(count + b * length + l)
            lag = tl.load(phase + b * length + l) * (GAUSS / width)
            total = tl.zeros([BLOCK], tl.float32)
            for k in tl.static_range(Q):
                value = _row(y, tail, b, n - k, d, y_b, y_j, Q, c, mask & (k < known), TAIL).to(tl.float32)
                w = tl.zeros([BLOCK], tl.float32) + (1.0 if k == 0 else 0.0)
                for m in tl.static_range(M):
                    s = lag + (k / width - m) * GAUSS
                    w += tl.exp2(-s * s) * rows[m]
                total += w * value
            tl.store(z + b * z_b + _wide(l) * z_l + c, total.to(z.dtype.element_ty), mask=mask)


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
    rows = _bases(basis, d, c, M)
    sums = _zeros(M, BLOCK)
    newest, count, phase, grad_z = newest + b * length, count + b * length, phase + b * length, grad_z + b * z_b
    plane = _wide(batch) * length * blocks
    phase_parts += (_wide(block) * batch + b) * length
    n_live, scale = tl.load(n_live_of + b).to(tl.int32), GAUSS / width
    older = Q if TAIL else 0
    first = chunk * per_program - older
    for j in range(first, tl.minimum(first + per_program, slots)):
        lo = _first_token(emitter, b * slots, j, n_live, length)
        hi = _first_token(emitter, b * slots, j + Q, n_live, length)
        held = _row(y, tail, b, j, d, y_b, y_j, Q, c, mask & (j < n_live), TAIL).to(tl.float32)
        total, by_basis = tl.zeros([BLOCK], tl.float32), _zeros(M, BLOCK)
        for start in range(lo, hi, CHUNK):
            elements, known, lags, values, parts = (), (), (), (), ()
            newest_at, count_at, phase_at, g = newest + start, count + start, phase + start, grad_z + _wide(start) * z_l + c
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


# ---- on the host -------------------------------------------------------------------------------------------------------


def _cdiv(a: int, b: int) -> int:  # Triton's own wrap their arguments: microseconds a call, tens of them a layer
    return -(-a // b)


def _power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length()


def _strides(x: Tensor) -> tuple[Tensor, int, int]:
    """x (B, S, d) with its last dimension contiguous, and its other strides; those of a dimension of 1 as if contiguous,
    so that equal rows always meet the same kernel."""
    if x.stride(2) != 1 and x.shape[2] > 1:
        x = x.contiguous()
    inner = x.stride(1) if x.shape[1] > 1 else x.shape[2]
    return x, x.stride(0) if x.shape[0] > 1 else inner * x.shape[1], inner


def _block(d: int, largest: int) -> int:
    """Channels per program: a power of two that wastes little of the last block."""
    block = min(largest, max(16, _power_of_2(d)))
    while block > 128 and d % block and -d % block > d // 8:
        block //= 2
    return block


def _share(rows: int, batch: int, blocks: int, warps: int) -> int:
    """Rows (slots or tokens) per program of one warp, if the kernel's registers let so many warps run on a multiprocessor:
    all programs run at once, and are few enough that their partial sums cost little."""
    return max(4, _cdiv(rows, max(1, PROCESSORS * warps // (batch * blocks))))


def _add_up(
    first: Tensor, first_out: Tensor, second: Tensor, second_out: Tensor, limit: Tensor | None = None, group: int = 1
) -> None:
    """Two tables of partial sums (n, columns) float32, each summed over n in one launch; with a limit (columns,) int, the
    second over its first limit * group rows."""
    columns, (n, m) = 32, (first.shape[1], second.shape[1])
    launch(
        _sum_parts, (_cdiv(n, columns) + _cdiv(m, columns),),
        first, first_out, len(first), n, second, second_out, len(second), m, first if limit is None else limit, group,
        LIMIT=limit is not None, ROWS=64, COLUMNS=columns, num_warps=4,
    )


def run_clock(
    u: Tensor, weight: Tensor | None, bias: Tensor | None, reset: Tensor, sampling: Sampling, slots: int, carry: Carry | None
) -> tuple[Clock, Tensor, Tensor, Tensor, tuple[Tensor, ...]]:
    """The clock, its slots still without their documents (`_windows` fills those in); dev and position after the last token;
    per token the ticks it asks for; and what the clock's fields are views of: per token (5, B, L) int32, phase and gate
    (2, B, L), per slot (2, B, J) int32, flags (2, B, J) bool, and n_live, dev, position (3, B) int64."""
    (batch, length, d), device = u.shape, u.device
    u, stride_b, stride_l = _strides(u)
    learn = weight is not None
    tokens = torch.empty((6, batch, length) if learn else (5, batch, length), dtype=torch.int32, device=device)
    floats = torch.empty(2, batch, length, device=device)
    at_slots = torch.empty(2, batch, slots, dtype=torch.int32, device=device)
    flags = torch.empty(2, batch, slots, dtype=torch.bool, device=device)
    since_reset = torch.empty(batch, slots, dtype=torch.int64, device=device)
    ends = torch.empty(3, batch, dtype=torch.int64, device=device)
    newest, reach, count, steps, cut, *asked = tokens.unbind(0)
    phase, gate = floats.unbind(0)
    asked = asked[0] if learn else newest
    if learn:
        launch(
            _intervals, (_cdiv(length, ROWS), batch),
            u, weight, bias, asked, gate, length, d, stride_b, stride_l, sampling.low, sampling.high - sampling.low,
            ROWS=ROWS, BLOCK=min(ROW_BLOCK, _power_of_2(d)), num_warps=4,
        )
    segments, block = _cdiv(length, SEGMENT), min(CLOCK_BLOCK, max(16, _power_of_2(length)))
    options = dict(BLOCK=block, num_warps=4 if block < 1024 else 8)
    slot_part, cut_part, elements, maps, totals = newest, cut, since_reset, ends, ends
    if segments > 1:
        slot_part, cut_part = torch.empty(2, batch, length, dtype=torch.int32, device=device).unbind(0)
        elements = torch.empty(batch, length, dtype=torch.int64, device=device)
        maps = torch.empty(batch, segments, 4, dtype=torch.int64, device=device)
        totals = torch.empty(batch, segments, 2, dtype=torch.int32, device=device)
        launch(
            _segment_maps, (segments, batch),
            asked, reset, maps, length, SEGMENT, sampling.rate, sampling.band, LEARN=learn, **options
        )
    launch(
        _clock, (segments, batch),
        asked, reset, *((ends, ends) if carry is None else (carry.dev.contiguous(), carry.position.contiguous())), maps,
        tokens, slot_part, cut_part, phase, at_slots, elements, ends, totals,
        length, slots, SEGMENT, sampling.rate, sampling.band, sampling.window_taps, sampling.readout_taps,
        LEARN=learn, CARRY=carry is not None, SPLIT=segments > 1, **options,
    )
    if segments > 1:
        launch(
            _join_segments, (_cdiv(length, block), batch),
            slot_part, cut_part, elements, totals, tokens, at_slots, since_reset, ends,
            length, slots, SEGMENT, segments, **options,
        )
    n_live, dev, position = ends.unbind(0)
    clock = Clock(at_slots[EMITTER.value], *flags.unbind(0), since_reset, n_live, newest, reach, count, phase, steps, cut)
    return clock, dev, position, asked, (tokens, floats, at_slots, flags, ends)


@torch.no_grad()
def clock_maps(
    u: Tensor, weight: Tensor | None, bias: Tensor | None, reset: Tensor, sampling: Sampling, ends: list[int]
) -> Tensor:
    """As `reference.clock_maps`."""
    (batch, length, d), learn, found = u.shape, weight is not None, {}
    u, stride_b, stride_l = _strides(u)
    asked = torch.empty((batch, length), dtype=torch.int32, device=u.device)
    if learn and length:
        launch(
            _intervals, (_cdiv(length, ROWS), batch),
            u, weight, bias, asked, torch.empty(batch, length, device=u.device), length, d, stride_b, stride_l, sampling.low,
            sampling.high - sampling.low, ROWS=ROWS, BLOCK=min(ROW_BLOCK, _power_of_2(d)), num_warps=4,
        )
    for end in set(ends):
        segments, block = _cdiv(end, SEGMENT), min(CLOCK_BLOCK, max(16, _power_of_2(end)))
        maps = torch.empty(batch, segments, 4, dtype=torch.int64, device=u.device)
        if segments:
            launch(
                _segment_maps, (segments, batch),
                asked[:, :end].contiguous(), reset[:, :end].contiguous(), maps, end, SEGMENT, sampling.rate, sampling.band,
                LEARN=learn, BLOCK=block, num_warps=4 if block < 1024 else 8,
            )
        a, lo, hi = (maps.new_full((batch,), value) for value in (0, -sampling.band, sampling.band))
        for then in maps.unbind(1):
            b, lo2, hi2 = then[:, :3].unbind(1)
            a, lo, hi = a + b, apply_map(lo, b, lo2, hi2), apply_map(hi, b, lo2, hi2)
        found[end] = torch.stack([a, lo, hi])
    return torch.stack([found[end] for end in ends])


def compress_forward(
    u: Tensor, basis: Tensor, weight: Tensor | None, bias: Tensor | None, reset: Tensor, sampling: Sampling, slots: int,
    carry: Carry | None = None, per_program: int | None = None, largest_block: int = 256, chunk: int = 3,
) -> tuple[Tensor, Clock, Tensor, Tensor, tuple[Tensor, ...]]:
    """x, the clock, dev and position after the last token, and what the backward pass needs."""
    (batch, length, d), bases, taps = u.shape, len(basis), sampling.window_taps
    if abs(sampling.band) > CLOCK_BLOCK << TICK_BITS:
        raise ValueError(f"the clock's band must be at most {CLOCK_BLOCK} grid steps")
    reset, basis = reset.contiguous(), basis.contiguous()
    clock, dev, position, _, (tokens, floats, at_slots, flags, ends) = run_clock(u, weight, bias, reset, sampling, slots, carry)
    table = torch.empty(2, batch, slots, taps, bases, device=u.device)
    block = min(32, _power_of_2(slots))
    launch(
        _windows, (_cdiv(slots, block), batch),
        at_slots, ends, reset, tokens, floats, ends if carry is None else carry.steps.contiguous(), clock.since_reset, flags,
        table, length, slots, taps, sampling.window_width, sampling.horizon, math.ceil(sampling.horizon * TICKS) + TICKS,
        HALO=carry is not None, LEARN=weight is not None, M=bases, MP=_power_of_2(bases), BLOCK=block, num_warps=4,
    )
    x = torch.empty(batch, slots, d, dtype=u.dtype, device=u.device)
    u, stride_b, stride_l = _strides(u)
    halo, block = u if carry is None else carry.tokens.contiguous(), _block(d, largest_block)
    blocks = _cdiv(d, block)
    share = per_program or _share(slots, batch, blocks, 20)
    launch(
        _merge, (blocks * _cdiv(slots, share), batch),
        u, halo, at_slots, table, basis, x, slots, d, taps, stride_b, stride_l, share,
        HALO=carry is not None, M=bases, CHUNK=chunk, BLOCK=block, num_warps=1,
    )
    return x, clock, dev, position, (tokens, floats, at_slots, table)


def compress_backward(
    grad_x: Tensor, grad_phase: Tensor | None, u: Tensor, halo: Tensor | None, basis: Tensor, weight: Tensor | None,
    saved: tuple[Tensor, ...], sampling: Sampling, out: Tensor | None = None, beside: Tensor | None = None,
    slots_per_program: int | None = None, tokens_per_program: int | None = None, slots_block: int = 64, tokens_block: int = 256,
    slots_warps: int = 1, slots_stages: int = 1,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None, Tensor | None]:
    """Gradients of u (into `out`, which may be strided, if given), halo, basis, weight and bias. beside (B, L, d): what is to be
    added to that of u."""
    tokens, floats, at_slots, table = saved
    (batch, length, d), slots, bases, taps = u.shape, grad_x.shape[1], len(basis), sampling.window_taps
    device, learn, has_halo = u.device, weight is not None, halo is not None
    u, stride_b, stride_l = _strides(u)
    grad_x, grad_b, grad_j = _strides(grad_x)
    basis, block = basis.contiguous(), _block(d, slots_block)
    blocks = _cdiv(d, block)
    share = slots_per_program or 16 * _cdiv(_share(slots, batch, blocks, 16), 16)
    chunks = _cdiv(slots, share)
    lag_parts = torch.empty((blocks, batch, slots, taps) if learn else 0, device=device)
    basis_parts = torch.empty(batch * chunks, bases * d, device=device)
    launch(
        _merge_backward_slots, (blocks * chunks, batch),
        u, halo if has_halo else u, grad_x, at_slots, table, basis, lag_parts, basis_parts,
        slots, d, taps, stride_b, stride_l, grad_b, grad_j, share,
        HALO=has_halo, LEARN=learn, M=bases, MP=max(8, _power_of_2(bases)), BLOCK=block,
        num_warps=slots_warps, num_stages=slots_stages,
    )
    before = taps - 1 if has_halo else 0
    covering = torch.empty(batch, before + length, dtype=torch.int32, device=device)
    grad_logit = torch.empty((batch, length) if learn else 0, device=device)
    # No clock runs longer than 1 / low tokens between emissions.
    reach = max(taps, math.ceil(1 / sampling.low) + 1) if learn else taps
    launch(
        _interval_backward, (_cdiv(before + length, 128), batch),
        tokens, at_slots, floats[1], lag_parts, lag_parts if grad_phase is None else grad_phase, covering, grad_logit,
        length, slots, taps, before, reach, blocks, *((0, 0) if grad_phase is None else grad_phase.stride()),
        sampling.high - sampling.low, LEARN=learn, PHASE=grad_phase is not None, BLOCK=128, num_warps=4,
    )
    grad_u = torch.empty(batch, length, d, dtype=u.dtype, device=device) if out is None else out
    grad_halo = torch.empty_like(halo) if has_halo else None
    block = _block(d, tokens_block)
    blocks = _cdiv(d, block)
    share = tokens_per_program or _share(before + length, batch, blocks, 16)
    chunks = _cdiv(before + length, share)
    clock_parts = torch.empty((batch * chunks, d + 1) if learn else (0, 0), device=device)
    _, out_b, out_l = _strides(grad_u)
    beside_at = (grad_u, 0, 0) if beside is None else _strides(beside)
    launch(
        _merge_backward_tokens, (blocks * chunks, batch),
        u, grad_x, at_slots, tokens, covering, table, basis, weight if learn else basis, grad_logit, beside_at[0],
        grad_u, grad_halo if has_halo else grad_u, clock_parts,
        length, slots, d, taps, stride_b, stride_l, grad_b, grad_j, *beside_at[1:], out_b, out_l, before, share,
        HALO=has_halo, LEARN=learn, BESIDE=beside is not None, M=bases, CHUNK=2, BLOCK=block, num_warps=1,
    )
    grad_basis = torch.empty(bases, d, dtype=basis.dtype, device=device)
    grad_clock = torch.empty(d + 1, dtype=weight.dtype, device=device) if learn else clock_parts
    _add_up(basis_parts, grad_basis, clock_parts, grad_clock)
    if not learn:
        return grad_u, grad_halo, grad_basis, None, None
    return grad_u, grad_halo, grad_basis, grad_clock[:d], grad_clock[d:]


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


def decompress_forward(
    y: Tensor, basis: Tensor, clock: Clock, sampling: Sampling, tail: Tensor | None = None, out: Tensor | None = None,
    per_program: int | None = None, largest_block: int = 128,
) -> tuple[Tensor, Tensor]:
    """z (into `out`, which may be strided, if given) and the tail after y."""
    (batch, _, d), length, taps = y.shape, clock.newest.shape[1], sampling.readout_taps
    z = torch.empty(batch, length, d, dtype=y.dtype, device=y.device) if out is None else out
    tail_out = torch.empty(batch, taps, d, dtype=y.dtype, device=y.device)
    y, y_b, y_j = _strides(y)
    _, z_b, z_l = _strides(z)
    block = _block(d, largest_block)
    blocks = _cdiv(d, block)
    share = per_program or _share(length, batch, blocks, 28)
    launch(
        _restore, (blocks * (_cdiv(length, share) + 1), batch),
        y, y if tail is None else tail, clock.newest, clock.phase, clock.count, clock.n_live, basis.contiguous(), z, tail_out,
        length, d, y_b, y_j, z_b, z_l, sampling.readout_width, share,
        TAIL=tail is not None, Q=taps, M=len(basis), BLOCK=block, num_warps=1,
    )
    return z, tail_out


def decompress_backward(
    grad_z: Tensor, grad_tail_out: Tensor | None, y: Tensor, basis: Tensor, clock: Clock, sampling: Sampling,
    tail: Tensor | None = None, learn: bool = True, per_program: int | None = None, largest_block: int = 128, chunk: int = 4,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gradients of y, basis, tail and, if the clock learns, of the phase (B, L). grad_z (B, L, d) may be strided."""
    (batch, slots, d), length, taps, bases = y.shape, clock.newest.shape[1], sampling.readout_taps, len(basis)
    y, y_b, y_j = _strides(y)
    grad_z, z_b, z_l = _strides(grad_z)
    block = _block(d, largest_block)
    blocks, before = _cdiv(d, block), 0 if tail is None else taps
    share = per_program or _share(before + slots, batch, blocks, 12)
    chunks = _cdiv(before + slots, share)
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
        TAIL=tail is not None, TAIL_OUT=grad_tail_out is not None, LEARN=learn, Q=taps, M=bases, CHUNK=chunk, BLOCK=block,
        num_warps=1,
    )
    grad_basis = torch.empty(bases, d, dtype=basis.dtype, device=y.device)
    grad_phase = torch.empty(batch, length, device=y.device) if learn else None
    _add_up(basis_parts, grad_basis, phase_parts, grad_phase if learn else phase_parts, clock.count if learn else None, blocks)
    return grad_y, grad_basis, grad_tail, grad_phase


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
