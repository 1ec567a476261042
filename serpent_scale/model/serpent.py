"""The SeRpEnt mixer: learned time intervals compress a sequence, a mixer runs on what is left, the length is restored.

Source: Rando et al., arXiv 2501.11729; docs/serpent_layer.md says exactly what is computed here.
Legend: B batch, L tokens, J slots for emitted elements, K window taps, Q read-out taps, M Gaussian bases.
"""
from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from serpent_scale.config import MambaConfig, SerpentConfig
from serpent_scale.kernels.resample import TICK_BITS, TICKS, banded_clock, compress, decompress
from serpent_scale.model.documents import FAR, Documents
from serpent_scale.model.mamba import Mamba


class BranchState(NamedTuple):
    dev: Tensor  # (B,) int64 ticks the clock is ahead of rate * position
    position: Tensor  # (B,) int64 tokens of the current document so far
    tokens: Tensor  # (B, K - 1, d) last inputs, oldest first
    steps: Tensor  # (B, K - 1) int64 ticks each of them took
    outputs: Tensor  # (B, Q, d_out) last outputs of the inner mixer, oldest first
    inner: Any  # state of the inner mixer


class Emissions(NamedTuple):
    """What the clock decided for a batch of rows."""

    fire: Tensor  # (B, L) bool: the token emits
    emitter: Tensor  # (B, J) int64 token that slot j holds, 0 in unused slots
    live: Tensor  # (B, J) bool: the slot is used
    newest: Tensor  # (B, L) int64 slot of the newest element at each token, -1 before the first
    count: Tensor  # (B, L) int64 elements of this document so far
    position: Tensor  # (B, L) int64 tokens of this document so far, this one included
    steps: Tensor  # (B, L) int64 ticks each token took
    ticks: Tensor  # (B, L) int64 time after each token
    cut: Tensor  # (B, L) int64 last token at or before this one whose step the band cut, -1 if none
    dev: Tensor  # (B, L) int64


class Branch(nn.Module):
    """One rate < 1: (B, L, d) -> (B, L, d_out)."""

    def __init__(self, inner: nn.Module, d: int, d_out: int, rate: float, config: SerpentConfig):
        super().__init__()
        self.inner, self.d_out, self.learn_clock = inner, d_out, config.learn_clock
        self.rate, self.low, self.high = rate, rate / config.spread, min(1.0, rate * config.spread)
        self.rate_ticks, self.band_ticks = round(rate * TICKS), round(config.band * TICKS)
        self.horizon, self.window_taps = config.horizon, math.ceil(config.horizon / self.low) + 1
        self.readout_taps, bases = config.decompress_taps, config.n_bases
        self.window_width, self.readout_width = config.horizon / (bases - 1), config.decompress_taps / (bases - 1)
        centres = torch.linspace(0, 1, bases, dtype=torch.float64)
        self.register_buffer("window_centres", centres * config.horizon, persistent=False)
        self.register_buffer("readout_centres", centres * config.decompress_taps, persistent=False)
        self.window_basis = nn.Parameter(self._half_mean()[:, None].repeat(1, d))
        self.readout_basis = nn.Parameter(torch.zeros(bases, d_out))
        if config.learn_clock:  # starts at the rate everywhere: uniform crossing
            start = (rate - self.low) / (self.high - self.low)
            self.clock_weight = nn.Parameter(torch.zeros(d))
            self.clock_bias = nn.Parameter(torch.tensor([math.log(start / (1 - start))]))
        for parameter in self.parameters(recurse=False):
            parameter._no_weight_decay = True

    def _half_mean(self) -> Tensor:
        """Coefficients (M,) with which the bases sum to 1 / (2 horizon): the window starts as half the mean over time."""
        s, centres = np.linspace(0, self.horizon, 257)[:, None], np.linspace(0, self.horizon, len(self.window_centres))
        bases = np.exp(-0.5 * ((s - centres) / self.window_width) ** 2)
        return torch.tensor(np.linalg.lstsq(bases, np.full(257, 0.5 / self.horizon))[0], dtype=torch.float32)

    def forward(self, u: Tensor, documents: Documents, state: BranchState | None = None) -> tuple[Tensor, BranchState]:
        u = u.to(torch.promote_types(u.dtype, torch.float32))
        state = self._fresh_state(u) if state is None else state
        with torch.autocast(u.device.type, enabled=False):
            interval = self._intervals(u)  # (B, L) in grid steps
            e = self._emit(interval.detach(), documents, state)
            x = self._compress(u, interval, e, state)
        inner_documents = Documents(documents.reset.gather(1, e.emitter) & e.live, live=e.live)
        y, inner_state = self.inner(x, inner_documents, state.inner)
        with torch.autocast(u.device.type, enabled=False):
            y = y.to(u.dtype) * e.live[..., None]
            tail = state.outputs.to(u.dtype)
            z = decompress(
                y, tail, e.newest, self._phase(interval, e), e.count, self.readout_basis,
                self.readout_centres.to(u.dtype), self.readout_width,
            )
        return z, self._state_after(u, y, tail, e, state, inner_state)

    def _fresh_state(self, u: Tensor) -> BranchState:
        batch, _, d = u.shape
        zero = torch.zeros(batch, dtype=torch.int64, device=u.device)
        halo = self.window_taps - 1
        return BranchState(
            zero, zero, u.new_zeros(batch, halo, d), zero.new_zeros(batch, halo),
            u.new_zeros(batch, self.readout_taps, self.d_out), None,
        )

    def _intervals(self, u: Tensor) -> Tensor:
        if not self.learn_clock:
            return torch.full_like(u[..., 0], self.rate)
        # Multiply and sum, not a matrix product: each row is reduced alike whatever the batch and length.
        gate = torch.sigmoid((u * self.clock_weight).sum(-1) + self.clock_bias)
        return self.low + (self.high - self.low) * gate

    def _emit(self, interval: Tensor, documents: Documents, state: BranchState) -> Emissions:
        """The banded clock, and who emits into which slot."""
        length = interval.shape[1]
        at = torch.arange(length, device=interval.device)
        asked = torch.round(interval * TICKS).long()
        reset, since = documents.reset, documents.since_reset
        dev, free = banded_clock(asked - self.rate_ticks, self.band_ticks, reset, state.dev)
        position = torch.where(since < FAR, since, state.position[:, None] + at) + 1
        ticks = TICKS - 1 + position * self.rate_ticks + dev
        before_row = TICKS - 1 + state.position * self.rate_ticks + state.dev
        before = torch.cat([before_row[:, None], ticks[:, :-1]], 1).masked_fill(reset, TICKS - 1)
        count = ticks >> TICK_BITS
        fire = count > (before >> TICK_BITS)
        newest = fire.cumsum(1) - 1
        slots = documents.capacity(self.rate_ticks, self.band_ticks, TICKS)
        # Each emitting token writes its position to its slot; the others write to one slot more, which is dropped.
        emitter = newest.new_zeros(len(fire), slots + 1)
        emitter = emitter.scatter(1, torch.where(fire, newest, slots), at.expand_as(newest))[:, :slots]
        live = torch.arange(slots, device=at.device) <= newest[:, -1:]
        cut = torch.where(free, -1, at).cummax(1).values
        return Emissions(fire, emitter, live, newest, count, position, ticks - before, ticks, cut, dev)

    def _compress(self, u: Tensor, interval: Tensor, e: Emissions, state: BranchState) -> Tensor:
        taps = self.window_taps
        back = torch.arange(taps, device=u.device)
        tap = e.emitter[..., None] - back  # (B, J, K) token of each tap, negative in the halo
        in_document = back < e.position.gather(1, e.emitter)[..., None]
        steps = _gather(torch.cat([state.steps, e.steps], 1), tap + taps - 1) * in_document
        phase = e.ticks.gather(1, e.emitter)[..., None] & (TICKS - 1)
        far = (steps.cumsum(-1) - phase).to(u.dtype) / TICKS
        near = far - steps.to(u.dtype) / TICKS
        if self.learn_clock:
            # Straight through: a token's interval moves the lags of the window it lies in. The emission's phase is a
            # constant, and so is what came before the band last cut the clock.
            learned = _gather(interval, tap.clamp(min=0)) * (in_document & (tap > e.cut.gather(1, e.emitter)[..., None]))
            learned = learned - learned.detach()
            move = learned.cumsum(-1)
            far, near = far + move, near + (move - learned)
        x = compress(
            u, state.tokens, e.emitter, near, far, self.window_basis, self.window_centres.to(u.dtype), self.window_width,
            self.horizon,
        )
        return x * e.live[..., None]

    def _phase(self, interval: Tensor, e: Emissions) -> Tensor:
        """(B, L) grid steps since the last grid point; gradients reach the intervals since the last emission."""
        phase = (e.ticks & (TICKS - 1)).to(interval.dtype) / TICKS
        if not self.learn_clock:
            return phase
        at = torch.arange(interval.shape[1], device=interval.device)
        constant_until = torch.maximum(torch.where(e.fire, at, -1).cummax(1).values, e.cut)
        total = torch.cat([interval.new_zeros(len(interval), 1), interval.cumsum(1)], 1)
        learned = total[:, 1:] - total.gather(1, constant_until + 1)
        return phase + (learned - learned.detach())

    def _state_after(self, u, y, tail, e: Emissions, state: BranchState, inner_state) -> BranchState:
        halo = self.window_taps - 1
        tokens = torch.cat([state.tokens.to(u.dtype), u], 1)
        steps = torch.cat([state.steps, e.steps], 1)
        last = e.live.sum(1)[:, None] + torch.arange(self.readout_taps, device=u.device)
        outputs = torch.cat([tail, y], 1).gather(1, last[..., None].expand(-1, -1, self.d_out))
        return BranchState(
            e.dev[:, -1], e.position[:, -1], tokens[:, tokens.shape[1] - halo :], steps[:, steps.shape[1] - halo :], outputs,
            inner_state,
        )


class Serpent(nn.Module):
    """Branches at several rates side by side, concatenated and projected: (B, L, d_model) -> (B, L, d_model).

    A branch at rate 1 is the plain inner mixer; alone it needs no projection, so rates = [1] is exactly that mixer.
    """

    def __init__(self, d_model: int, config: SerpentConfig, mamba: MambaConfig):
        super().__init__()
        self.branches = nn.ModuleList()
        for rate, inner, out in zip(config.rates, *branch_widths(d_model, config, mamba)):
            mixer = Mamba(d_model, inner, out, mamba)
            self.branches.append(mixer if rate == 1 else Branch(mixer, d_model, out, rate, config))
        plain = list(config.rates) == [1.0]
        self.out_proj = nn.Identity() if plain else nn.Linear(d_model, d_model, bias=False)

    def forward(self, x: Tensor, documents: Documents, state: tuple | None = None) -> tuple[Tensor, tuple]:
        states = (None,) * len(self.branches) if state is None else state
        results = [branch(x, documents, s) for branch, s in zip(self.branches, states)]
        return self.out_proj(torch.cat([z for z, _ in results], -1)), tuple(s for _, s in results)


def branch_widths(d_model: int, config: SerpentConfig, mamba: MambaConfig) -> tuple[list[int], list[int]]:
    """(inner widths, output widths) per branch; by default the layer has as many parameters as a plain Mamba layer."""
    n = len(config.rates)
    outs = _split(d_model, n, 1)
    if config.d_inner is not None:
        return _split(config.d_inner, n, 1), outs
    target = Mamba.parameter_count(d_model, int(mamba.expand * d_model), d_model, mamba)
    unit = 8 if d_model >= 512 else 1  # matrix units want multiples of 8; small models need the finer choice

    def excess(total: int) -> int:
        return parameter_count(d_model, _split(total, n, unit), outs, config, mamba) - target

    total = n * unit
    while excess(total + unit) < 0:
        total += unit
    total = min(total, total + unit, key=lambda t: abs(excess(t)))
    return _split(total, n, unit), outs


def parameter_count(d_model: int, inners: list[int], outs: list[int], config: SerpentConfig, mamba: MambaConfig) -> int:
    total = 0 if list(config.rates) == [1.0] else d_model * d_model
    for rate, inner, out in zip(config.rates, inners, outs):
        total += Mamba.parameter_count(d_model, inner, out, mamba)
        if rate != 1:
            total += config.n_bases * (d_model + out) + (d_model + 1 if config.learn_clock else 0)
    return total


def flops(d_model: int, config: SerpentConfig, mamba: MambaConfig) -> tuple[float, float]:
    """Forward FLOPs per token at the target rates: (matrix products, the rest)."""
    matmul, rest = (0.0 if list(config.rates) == [1.0] else 2.0 * d_model * d_model), 0.0
    for rate, inner, out in zip(config.rates, *branch_widths(d_model, config, mamba)):
        m, r = Mamba.flops(d_model, inner, out, mamba)
        matmul, rest = matmul + rate * m, rest + rate * r
        if rate != 1:
            taps, bases = math.ceil(config.horizon * config.spread / rate) + 1, config.n_bases
            matmul += 2 * bases * (rate * taps * d_model + config.decompress_taps * out)
            rest += 2 * (d_model + rate * taps * d_model + config.decompress_taps * out)
    return matmul, rest


def _split(total: int, parts: int, unit: int) -> list[int]:
    """`total` over `parts` as evenly as multiples of `unit` allow, the first taking what is over."""
    share = total // (parts * unit) * unit
    return [total - share * (parts - 1)] + [share] * (parts - 1)


def _gather(x: Tensor, index: Tensor) -> Tensor:
    """x (B, S), index (B, J, K) -> (B, J, K)."""
    return x.gather(1, index.flatten(1)).view_as(index)
