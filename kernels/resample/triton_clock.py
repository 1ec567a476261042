"""The clock in Triton: when it emits, and where a row's clock ends as a function of where it begins.

`_intervals` finds the ticks each token asks for, `_clock` walks a row in one pass. Long rows are walked in segments:
`_segment_maps` finds what each does to the clock, `_clock` walks each from there on, `_join_segments` numbers the slots.

Emissions must not depend on how a row is cut: the clock's dot product is reduced per row in one fixed shape.
"""
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import launch
from .reference import TICK_BITS, TICKS, Carry, Clock, Sampling, apply_map
from .triton_rows import cdiv, power_of_2, strides_of

TICK = tl.constexpr(TICKS)
BITS = tl.constexpr(TICK_BITS)
HALF_UP = tl.constexpr(12582912.0)  # 1.5 * 2^23: adding and taking it off rounds to an integer, halves to even
ROWS, ROW_BLOCK = 4, 1024  # tile of the clock's dot product; fixed, as it fixes the order of summation
CLOCK_BLOCK = 1024  # tokens scanned at once; sums of drifts over so many fit int32
SEGMENT = 4 * CLOCK_BLOCK  # tokens of a row that one program walks
# Planes of what is kept per token, (5, B, L) int32, and per slot, (2, B, J) int32.
NEWEST, REACH, COUNT, STEPS, CUT = (tl.constexpr(i) for i in range(5))
EMITTER, TAPS = tl.constexpr(0), tl.constexpr(1)


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


def _ask(u: Tensor, weight: Tensor, bias: Tensor, sampling: Sampling, asked: Tensor, gate: Tensor) -> None:
    """Fills asked and gate (B, L)."""
    (batch, length, d), (u, stride_b, stride_l) = u.shape, strides_of(u)
    launch(
        _intervals, (cdiv(length, ROWS), batch),
        u, weight, bias, asked, gate, length, d, stride_b, stride_l, sampling.low, sampling.high - sampling.low,
        ROWS=ROWS, BLOCK=min(ROW_BLOCK, power_of_2(d)), num_warps=4,
    )


def _block_and_warps(length: int) -> dict[str, int]:
    block = min(CLOCK_BLOCK, max(16, power_of_2(length)))
    return dict(BLOCK=block, num_warps=4 if block < 1024 else 8)


def _maps_of_segments(asked: Tensor, reset: Tensor, sampling: Sampling, learn: bool) -> Tensor:
    batch, length = reset.shape
    maps = torch.empty(batch, cdiv(length, SEGMENT), 4, dtype=torch.int64, device=reset.device)
    launch(
        _segment_maps, (maps.shape[1], batch),
        asked, reset, maps, length, SEGMENT, sampling.rate, sampling.band, LEARN=learn, **_block_and_warps(length),
    )
    return maps


def run_clock(
    u: Tensor, weight: Tensor | None, bias: Tensor | None, reset: Tensor, sampling: Sampling, slots: int, carry: Carry | None
) -> tuple[Clock, Tensor, Tensor, Tensor, tuple[Tensor, ...]]:
    """The clock, its slots still without their documents (`_windows` fills those in); dev and position after the last token;
    per token the ticks it asks for; and what the clock's fields are views of: per token (5, B, L) int32, phase and gate
    (2, B, L), per slot (2, B, J) int32, flags (2, B, J) bool, and n_live, dev, position (3, B) int64."""
    if abs(sampling.band) > CLOCK_BLOCK << TICK_BITS:
        raise ValueError(f"the clock's band must be at most {CLOCK_BLOCK} grid steps")
    (batch, length, _), device, learn = u.shape, u.device, weight is not None
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
        _ask(u, weight, bias, sampling, asked, gate)
    segments, options = cdiv(length, SEGMENT), _block_and_warps(length)
    slot_part, cut_part, elements, maps, totals = newest, cut, since_reset, ends, ends
    if segments > 1:
        slot_part, cut_part = torch.empty(2, batch, length, dtype=torch.int32, device=device).unbind(0)
        elements = torch.empty(batch, length, dtype=torch.int64, device=device)
        maps = _maps_of_segments(asked, reset, sampling, learn)
        totals = torch.empty(batch, segments, 2, dtype=torch.int32, device=device)
    launch(
        _clock, (segments, batch),
        asked, reset, *((ends, ends) if carry is None else (carry.dev.contiguous(), carry.position.contiguous())), maps,
        tokens, slot_part, cut_part, phase, at_slots, elements, ends, totals,
        length, slots, SEGMENT, sampling.rate, sampling.band, sampling.window_taps, sampling.readout_taps,
        LEARN=learn, CARRY=carry is not None, SPLIT=segments > 1, **options,
    )
    if segments > 1:
        launch(
            _join_segments, (cdiv(length, options["BLOCK"]), batch),
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
    learn, found = weight is not None, {}
    asked = torch.empty(reset.shape, dtype=torch.int32, device=u.device)
    if learn and u.shape[1]:
        _ask(u, weight, bias, sampling, asked, torch.empty(reset.shape, device=u.device))
    for end in set(ends):
        a, lo, hi = (reset.new_full((len(u),), value, dtype=torch.int64) for value in (0, -sampling.band, sampling.band))
        before = asked[:, :end].contiguous(), reset[:, :end].contiguous()
        for then in _maps_of_segments(*before, sampling, learn).unbind(1) if end else ():
            b, lo2, hi2 = then[:, :3].unbind(1)
            a, lo, hi = a + b, apply_map(lo, b, lo2, hi2), apply_map(hi, b, lo2, hi2)
        found[end] = torch.stack([a, lo, hi])
    return torch.stack([found[end] for end in ends])
