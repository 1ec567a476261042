"""SeRpEnt's resampling in PyTorch: what it computes, and the form CPUs use.

Legend: B rows, L tokens, J slots for emitted elements, K window taps, Q read-out taps, M Gaussian bases. Basis m of width w
is g_m(s) = exp(-(s / w - m)^2 / 2): centres lie one width apart, the first at 0.
"""
from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

TICK_BITS = 20
TICKS = 1 << TICK_BITS  # integer ticks in one grid step: sums of integers do not depend on their order


class Sampling(NamedTuple):
    """The fixed numbers of one branch. Ticks are integers, the rest is in grid steps."""

    rate: int  # ticks a token takes at the target rate
    band: int  # ticks the clock may run ahead of or behind rate * position
    low: float  # bounds of an interval
    high: float
    horizon: float  # how far back the window reaches
    window_taps: int  # K
    window_width: float
    readout_taps: int  # Q
    readout_width: float
    stride: int = 0  # tokens of a block of fixed length, which take the place of the clock's crossings; 0: the clock
    window: str = "integrated"  # what an element is made of: see `compress`


class Clock(NamedTuple):
    """What the clock decided for a batch of rows. Only `phase` carries gradients."""

    emitter: Tensor  # (B, J) int, token that slot j holds, 0 in unused slots
    live: Tensor  # (B, J) bool: the slot is used
    reset: Tensor  # (B, J) bool: the slot holds the first element of a document
    since_reset: Tensor  # (B, J) int64 elements since the document's first, large where that lies before the row
    n_live: Tensor  # (B,) int64 slots in use
    newest: Tensor  # (B, L) int, slot of the newest element at each token, -1 before the first
    reach: Tensor  # (B, L) int, tokens of this document so far, this one included, counted up to K
    count: Tensor  # (B, L) int, elements of this document so far, counted up to Q
    phase: Tensor  # (B, L) grid steps since the last grid point
    steps: Tensor  # (B, L) int, ticks each token took
    cut: Tensor  # (B, L) int, last token at or before this one whose step the band cut, -1 if none


class Carry(NamedTuple):
    """What compression hands from one piece of a row to the next."""

    dev: Tensor  # (B,) int64 ticks the clock is ahead of rate * position
    position: Tensor  # (B,) int64 tokens of the current document so far
    tokens: Tensor  # (B, K - 1, d) last inputs, oldest first
    steps: Tensor  # (B, K - 1) int, ticks each of them took


def compress(
    u: Tensor, basis: Tensor | None, weight: Tensor | None, bias: Tensor | None, reset: Tensor, sampling: Sampling, slots: int,
    carry: Carry | None = None,
) -> tuple[Tensor, Clock, Carry]:
    """Run the clock over u and merge what lies between emissions: (x (B, J, d) in u's dtype, the clock, what to hand on).

    Windows: integrated, `window`; segment_mean, the mean over the time since the last grid point but one, without parameters;
    pointwise, `pointwise`: features (B, J, K (d + M)) for a linear map of the caller's. The last two take no basis.

    u (B, L, d); basis (M, d) of the window; weight (d,) and bias (1,) of the clock, None for one that stays at its rate;
    reset (B, L) bool, True at the first token of a document; slots = J, enough for any clock (`Documents.capacity`);
    carry: from the tokens before u, None at the start of documents. Unused slots of x are 0.
    """
    batch, length, d = u.shape
    out, u = u.dtype, u.to(torch.promote_types(u.dtype, torch.float32))
    if carry is None:
        zero, halo = torch.zeros(batch, dtype=torch.int64, device=u.device), sampling.window_taps - 1
        carry = Carry(zero, zero, u.new_zeros(batch, halo, d), zero.new_zeros(batch, halo))
    interval = intervals(u, weight, bias, sampling)
    clock, dev, position = run_clock(interval, reset, sampling, slots, carry.dev, carry.position)
    if sampling.window == "integrated":
        mass = window_mass(interval, clock, sampling, carry.steps, len(basis))
        x = window(u, carry.tokens, clock.emitter, mass, basis)
    else:
        form = segment_mean if sampling.window == "segment_mean" else pointwise
        x = form(u, carry.tokens, clock, window_lags(interval, clock, sampling, carry.steps), sampling)
    x = x * clock.live[..., None]
    return x.to(out), clock, hand_on(u.to(out), clock.steps, dev, position, sampling, carry)


def compress_beside(
    u: Tensor, basis: Tensor | None, weight: Tensor | None, bias: Tensor | None, reset: Tensor, sampling: Sampling, slots: int,
    carry: Carry | None = None,
) -> tuple[Tensor, Clock, Carry, Tensor]:
    """`compress`, and u for whoever else reads it: where its gradient is formed, what they ask of it is added."""
    return *compress(u, basis, weight, bias, reset, sampling, slots, carry), u


def hand_on(u: Tensor, steps: Tensor, dev: Tensor, position: Tensor, sampling: Sampling, carry: Carry | None) -> Carry:
    """The carry after the tokens u."""
    halo, length = sampling.window_taps - 1, u.shape[1]
    if length < halo:
        if carry is None:
            older = u.new_zeros(len(u), halo - length, u.shape[2]), steps.new_zeros(len(u), halo - length)
        else:
            older = carry.tokens[:, length:].to(u.dtype), carry.steps[:, length:].to(steps.dtype)
        return Carry(dev, position, torch.cat([older[0], u], 1), torch.cat([older[1], steps], 1))
    return Carry(dev, position, u[:, length - halo :], steps[:, length - halo :])


def intervals(u: Tensor, weight: Tensor | None, bias: Tensor | None, sampling: Sampling) -> Tensor:
    """(B, L) the time each token asks for, in grid steps."""
    if weight is None:
        return torch.full_like(u[..., 0], sampling.rate / TICKS)
    # Multiply and sum, not a matrix product: each row is reduced alike whatever the batch and length.
    gate = torch.sigmoid((u * weight).sum(-1) + bias)
    return sampling.low + (sampling.high - sampling.low) * gate


def run_clock(
    interval: Tensor, reset: Tensor, sampling: Sampling, slots: int, dev: Tensor, position: Tensor
) -> tuple[Clock, Tensor, Tensor]:
    """The banded clock, and who emits into which slot; then dev and position after the last token, as in `Carry`.

    Gradients reach the intervals through the phase: those since the last emission and since the band last cut.
    """
    length = interval.shape[1]
    at = torch.arange(length, device=interval.device)
    drift = torch.round(interval.detach() * TICKS).long() - sampling.rate
    devs, free = banded_clock(drift, sampling.band, reset, dev)
    start = torch.where(reset, at, -1).cummax(1).values  # (B, L) where this token's document began, -1 before the row
    positions = torch.where(start < 0, position[:, None] + at, at - start) + 1
    if sampling.stride:
        ticks, before = (n * TICKS // sampling.stride for n in (positions, positions - 1))
    else:
        ticks = TICKS - 1 + positions * sampling.rate + devs
        before_row = TICKS - 1 + position * sampling.rate + dev
        before = torch.cat([before_row[:, None], ticks[:, :-1]], 1).masked_fill(reset, TICKS - 1)
    count = ticks >> TICK_BITS
    first = count == 1 if sampling.stride else reset  # at tokens that emit: the document's first element
    fire = count > (before >> TICK_BITS)
    newest = fire.cumsum(1) - 1
    # Each emitting token writes its position to its slot; the others write to one slot more, which is dropped.
    emitter = newest.new_zeros(len(fire), slots + 1)
    emitter = emitter.scatter(1, torch.where(fire, newest, slots), at.expand_as(newest))[:, :slots]
    live = torch.arange(slots, device=at.device) <= newest[:, -1:]
    cut = torch.where(free, -1, at).cummax(1).values
    constant_until = torch.maximum(torch.where(fire, at, -1).cummax(1).values, cut)
    total = torch.cat([interval.new_zeros(len(interval), 1), interval.cumsum(1)], 1)
    learned = total[:, 1:] - total.gather(1, constant_until + 1)
    phase = (ticks & (TICKS - 1)).to(interval.dtype) / TICKS + (learned - learned.detach())
    clock = Clock(
        emitter, live, first.gather(1, emitter) & live, count.gather(1, emitter) - 1, live.sum(1), newest,
        positions.clamp(max=sampling.window_taps), count.clamp(max=sampling.readout_taps), phase, ticks - before, cut,
    )
    return clock, devs[:, -1], positions[:, -1]


def banded_clock(drift: Tensor, band: int, reset: Tensor, dev: Tensor) -> tuple[Tensor, Tensor]:
    """dev_l = clip(dev_{l-1} + drift_l, -band, band), dev_{l-1} = 0 where reset: a parallel scan of clamp maps.

    drift (B, L) int64 ticks (interval asked for, less the rate); reset (B, L) bool; dev (B,) int64, before the first token.
    Returns dev (B, L) and free (B, L) bool, False where the band cut the step.

    A map x -> clip(x + a, lo, hi) composes with (b, lo', hi') to (a + b, clip(lo + b, lo', hi'), clip(hi + b, lo', hi')).
    A reset makes the map constant: lo = hi.
    """
    a, lo, hi = _prefix_maps(drift, band, reset)
    out = apply_map(dev[:, None], a, lo, hi)
    before = torch.cat([dev[:, None], out[:, :-1]], 1).masked_fill(reset, 0)
    return out, before + drift == out


def apply_map(dev: Tensor, a: Tensor, lo: Tensor, hi: Tensor) -> Tensor:
    return torch.minimum(torch.maximum(dev + a, lo), hi)


@torch.no_grad()
def clock_maps(
    u: Tensor, weight: Tensor | None, bias: Tensor | None, reset: Tensor, sampling: Sampling, ends: list[int]
) -> Tensor:
    """What the clock does to dev over the first `end` tokens of u, for each of ends: maps (a, lo, hi), (len(ends), 3, B) int64.

    u (B, L, d); ends in [0, L]; the rest as in `compress`.
    """
    interval = intervals(u.to(torch.promote_types(u.dtype, torch.float32)), weight, bias, sampling)
    drift = torch.round(interval * TICKS).long() - sampling.rate
    maps = torch.stack(_prefix_maps(drift, sampling.band, reset))  # (3, B, L)
    nothing = torch.stack([maps.new_full((len(u),), value) for value in (0, -sampling.band, sampling.band)])
    return torch.stack([maps[..., end - 1] if end else nothing for end in ends])


def _prefix_maps(drift: Tensor, band: int, reset: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(a, lo, hi), each (B, L): what all tokens up to each do together, see `banded_clock`."""
    start = drift.clamp(-band, band)
    a = drift
    lo = torch.where(reset, start, torch.full_like(drift, -band))
    hi = torch.where(reset, start, torch.full_like(drift, band))
    span, length = 1, drift.shape[1]
    while span < length:  # Hillis-Steele: after each pass a map spans twice as many tokens
        b, lo2, hi2 = a[:, span:], lo[:, span:], hi[:, span:]
        a = torch.cat([a[:, :span], a[:, :-span] + b], 1)
        lo, hi = (
            torch.cat([lo[:, :span], torch.minimum(torch.maximum(lo[:, :-span] + b, lo2), hi2)], 1),
            torch.cat([hi[:, :span], torch.minimum(torch.maximum(hi[:, :-span] + b, lo2), hi2)], 1),
        )
        span *= 2
    return a, lo, hi


def window_lags(interval: Tensor, clock: Clock, sampling: Sampling, halo_steps: Tensor) -> Tensor:
    """(B, J, K + 1) grid steps from the grid point that each slot crossed back to where its taps end, newest first.

    Tap k of slot j is token e - k, e the emitting token; its lags end where those of tap k + 1 begin. Straight through: an
    interval moves the lags of the window its token lies in. The emission's phase is a constant, and so is what came before
    the band last cut the clock.
    """
    taps, emitter = sampling.window_taps, clock.emitter.long()
    back = torch.arange(taps, device=emitter.device)
    tap = emitter[..., None] - back  # (B, J, K) token of each tap, negative in the halo
    in_document = back < clock.reach.gather(1, emitter)[..., None]
    steps = _gather(torch.cat([halo_steps, clock.steps], 1), tap + taps - 1) * in_document
    phase = (clock.phase.detach().gather(1, emitter) * TICKS).long()[..., None]
    lags = torch.cat([-phase, steps.cumsum(-1) - phase], -1).to(interval.dtype) / TICKS  # (B, J, K + 1)
    learned = _gather(interval, tap.clamp(min=0)) * (in_document & (tap > clock.cut.gather(1, emitter)[..., None]))
    moved = (learned - learned.detach()).cumsum(-1)
    return torch.cat([lags[..., :1], lags[..., 1:] + moved], -1)


def window_mass(interval: Tensor, clock: Clock, sampling: Sampling, halo_steps: Tensor, bases: int) -> Tensor:
    """(B, J, K, M) integral of each basis over the lags of each tap, newest tap first, clipped to [0, horizon]."""
    lags = window_lags(interval, clock, sampling, halo_steps)
    return gaussian_mass(lags, bases, sampling.window_width, sampling.horizon)


def gaussian_mass(lags: Tensor, bases: int, width: float, horizon: float) -> Tensor:
    """Integral of each basis between neighbouring lags, clipped to [0, horizon]. lags (..., K + 1) -> (..., K, M)."""
    centres = torch.arange(bases, dtype=lags.dtype, device=lags.device)
    edge = ((lags.clamp(0, horizon)[..., None] / width - centres) * math.sqrt(0.5)).erf()
    return width * math.sqrt(math.pi / 2) * edge.diff(dim=-2)


def window(u: Tensor, halo: Tensor, emitter: Tensor, mass: Tensor, basis: Tensor) -> Tensor:
    """Emitted elements x_j = u_e + sum_k sum_m mass_jkm basis_m * u_{e-k}, e the emitting token of slot j.

    u (B, L, d); halo (B, K-1, d), the tokens before u; emitter (B, J) int in [0, L); mass (B, J, K, M), 0 where the tap does
    not count; basis (M, d). Returns (B, J, d).
    """
    taps = mass.shape[2]
    padded = torch.cat([halo.to(u.dtype), u], 1)
    x = _rows(u, emitter)
    for k in range(taps):
        x = x + (mass[:, :, k].to(u.dtype) @ basis.to(u.dtype)) * _rows(padded, emitter + (taps - 1 - k))
    return x


def segment_mean(u: Tensor, halo: Tensor, clock: Clock, lags: Tensor, sampling: Sampling) -> Tensor:
    """Mean of u over the grid cell that ends at the slot's grid point, each token weighted by the time it takes there: (B, J, d).

    Time before the document does not count. u, halo as in `window`; lags (B, J, K + 1) of `window_lags`.
    """
    ends = lags.clamp(0, 1)
    share = ends.diff(dim=-1) / (ends[..., -1:] - ends[..., :1]).clamp(min=0.5 / TICKS)
    taps, padded = sampling.window_taps, torch.cat([halo.to(u.dtype), u], 1)
    x = 0
    for k in range(taps):
        x = x + share[:, :, k, None].to(u.dtype) * _rows(padded, clock.emitter + (taps - 1 - k))
    return x


def pointwise(u: Tensor, halo: Tensor, clock: Clock, lags: Tensor, sampling: Sampling) -> Tensor:
    """[u_{e-k}, g_m(time from token e - k to token e)] of each tap k < K, side by side: (B, J, K (d + M)).

    Figure 2 of the paper. 0 for taps before the document. u, halo as in `window`; lags (B, J, K + 1) of `window_lags`.
    """
    taps, padded = sampling.window_taps, torch.cat([halo.to(u.dtype), u], 1)
    centres = torch.arange(round(sampling.horizon / sampling.window_width) + 1, dtype=lags.dtype, device=lags.device)
    features = torch.exp(-0.5 * ((lags[..., :-1] - lags[..., :1])[..., None] / sampling.window_width - centres) ** 2)
    reach = clock.reach.gather(1, clock.emitter.long())[..., None]
    parts = []
    for k in range(taps):
        part = torch.cat([_rows(padded, clock.emitter + (taps - 1 - k)), features[:, :, k].to(u.dtype)], -1)
        parts.append(part * (reach > k))
    return torch.cat(parts, -1)


def decompress(
    y: Tensor, basis: Tensor | None, clock: Clock, sampling: Sampling, tail: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """z_l = y_n + sum_{k<Q} sum_m g_m(phase_l + k) basis_m * y_{n-k}, n the newest element at token l: (z, tail after y).

    y (B, J, d) outputs of the emitted elements; basis (M, d) of the read-out, None: the newest output is held as it is;
    tail (B, Q, d), the outputs before y, oldest first, None at the start of documents. Elements before the document read 0.
    Returns z (B, L, d) and the tail after the slots in use (B, Q, d), in y's dtype.
    """
    taps = sampling.readout_taps
    out, y = y.dtype, y.to(torch.promote_types(y.dtype, torch.float32))
    tail = y.new_zeros(len(y), taps, y.shape[2]) if tail is None else tail.to(y.dtype)
    padded = torch.cat([tail, y * clock.live[..., None]], 1)
    last = clock.n_live[:, None] + torch.arange(taps, device=y.device)
    if basis is None:
        z = _rows(padded, clock.newest + taps) * (clock.count > 0)[..., None]
        return z.to(out), _rows(padded, last).to(out)
    phase, centres = clock.phase.to(y.dtype), torch.arange(len(basis), dtype=y.dtype, device=y.device)
    z = 0
    for k in range(taps):
        weight = torch.exp(-0.5 * ((phase + k)[..., None] / sampling.readout_width - centres) ** 2) @ basis.to(y.dtype)
        if k == 0:
            weight = 1 + weight
        z = z + weight * _rows(padded, clock.newest + (taps - k)) * (clock.count > k)[..., None]
    return z.to(out), _rows(padded, last).to(out)


def _rows(x: Tensor, index: Tensor) -> Tensor:
    """x (B, S, d), index (B, J) -> x[b, index[b, j]] (B, J, d)."""
    return x.gather(1, index.long()[..., None].expand(-1, -1, x.shape[2]))


def _gather(x: Tensor, index: Tensor) -> Tensor:
    """x (B, S), index (B, J, K) -> (B, J, K)."""
    return x.gather(1, index.flatten(1)).view_as(index)
