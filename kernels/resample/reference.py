"""SeRpEnt's resampling in PyTorch. L tokens, J slots for emitted elements, K window taps, Q read-out taps, M bases."""
from __future__ import annotations

import math

import torch
from torch import Tensor

TICK_BITS = 20
TICKS = 1 << TICK_BITS  # integer ticks in one grid step: sums of integers do not depend on their order


def banded_clock(drift: Tensor, band: int, reset: Tensor, dev: Tensor) -> tuple[Tensor, Tensor]:
    """dev_l = clip(dev_{l-1} + drift_l, -band, band), dev_{l-1} = 0 where reset: a parallel scan of clamp maps.

    drift (B, L) int64 ticks (interval asked for, less the rate); reset (B, L) bool; dev (B,) int64, before the first token.
    Returns dev (B, L) and free (B, L) bool, False where the band cut the step.

    A map x -> clip(x + a, lo, hi) composes with (b, lo', hi') to (a + b, clip(lo + b, lo', hi'), clip(hi + b, lo', hi')).
    A reset makes the map constant: lo = hi.
    """
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
    out = torch.minimum(torch.maximum(dev[:, None] + a, lo), hi)
    before = torch.cat([dev[:, None], out[:, :-1]], 1).masked_fill(reset, 0)
    return out, before + drift == out


def gaussian_mass(near: Tensor, far: Tensor, centres: Tensor, width: float, horizon: float) -> Tensor:
    """Integral over the lag interval [near, far], clipped to [0, horizon], of exp(-(s - centre)^2 / (2 width^2)).

    near, far (...,); centres (M,). Returns (..., M).
    """
    scale = math.sqrt(2) * width
    near, far = (((v.clamp(0, horizon)[..., None] - centres) / scale).erf() for v in (near, far))
    return width * math.sqrt(math.pi / 2) * (far - near)


def compress(
    u: Tensor, halo: Tensor, emitter: Tensor, near: Tensor, far: Tensor, basis: Tensor, centres: Tensor, width: float,
    horizon: float,
) -> Tensor:
    """Emitted elements x_j = u_e + sum_k sum_m mass_m(near_jk, far_jk) basis_m * u_{e-k}, e the emitting token of slot j.

    u (B, L, d); halo (B, K-1, d), the tokens before u; emitter (B, J) int64 in [0, L);
    near, far (B, J, K) lag interval of each tap in grid steps, newest tap first, equal where the tap does not count;
    basis (M, d); centres (M,). Returns (B, J, d).
    """
    taps = near.shape[2]
    padded = torch.cat([halo.to(u.dtype), u], 1)
    mass = gaussian_mass(near, far, centres, width, horizon).to(u.dtype)  # (B, J, K, M)
    x = _rows(u, emitter)
    for k in range(taps):
        x = x + (mass[:, :, k] @ basis.to(u.dtype)) * _rows(padded, emitter + (taps - 1 - k))
    return x


def decompress(
    y: Tensor, tail: Tensor, newest: Tensor, phase: Tensor, count: Tensor, basis: Tensor, centres: Tensor, width: float,
) -> Tensor:
    """z_l = y_n + sum_{k<Q} sum_m g_m(phase_l + k) basis_m * y_{n-k}, n the newest element at token l.

    y (B, J, d) outputs of the emitted elements; tail (B, Q, d), those before them, oldest first;
    newest (B, L) int64 slot of element n, -1 if it is the last of the tail; phase (B, L) grid steps since the last grid
    point; count (B, L) int64 elements of this document so far (k >= count reads 0); basis (M, d); centres (M,).
    Returns (B, L, d).
    """
    taps = tail.shape[1]
    padded = torch.cat([tail.to(y.dtype), y], 1)
    z = 0
    for k in range(taps):
        lag = (phase + k)[..., None]
        weight = torch.exp(-0.5 * ((lag - centres) / width) ** 2).to(y.dtype) @ basis.to(y.dtype)
        if k == 0:
            weight = 1 + weight
        value = _rows(padded, newest + (taps - k))
        z = z + weight * value * (count > k)[..., None]
    return z


def _rows(x: Tensor, index: Tensor) -> Tensor:
    """x (B, S, d), index (B, J) -> x[b, index[b, j]] (B, J, d)."""
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[2]))
