"""The SeRpEnt mixer: learned time intervals compress a sequence, a mixer runs on what is left, the length is restored.

Source: Rando et al., arXiv 2501.11729; docs/serpent_layer.md says exactly what is computed here.
Legend: B batch, L tokens, Q read-out taps, M Gaussian bases.
"""
from __future__ import annotations

import math
from collections.abc import Generator
from functools import partial, reduce
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from serpent_scale.config import SerpentConfig
from serpent_scale.kernels.resample import TICKS, Carry, Clock, Sampling, apply_map, clock_maps, compress_beside, decompress
from serpent_scale.model.documents import FAR, Documents
from serpent_scale.model.lead import Elements
from serpent_scale.model.linear import Linear
from serpent_scale.model.mixer import Begun, Mixer
from serpent_scale.model.routing import RoutedBranch, width
from serpent_scale.model.stack import Stack
from serpent_scale.model.states import step_live
from serpent_scale.model.teaching import teach


POINTWISE_TAPS = 3  # K of the paper's figure 2


class BranchState(NamedTuple):
    window: Carry  # of the clock and the window
    inner: Any  # state of the inner mixer
    outputs: Tensor  # (B, Q, d_out) last outputs of the inner mixer, oldest first


class Branch(nn.Module):
    """One rate < 1: (B, L, d) -> (B, L, d_out). The inner mixer reads `mixer_width` channels."""

    def __init__(self, inner: nn.Module, d: int, d_out: int, rate: float, config: SerpentConfig):
        super().__init__()
        self.inner, self.d_out, self.sampling = inner, d_out, sampling(rate, config)
        low, bases = self.sampling.low, config.n_bases
        self.window_basis = self.window_map = self.readout_basis = None
        if config.window == "integrated":
            self.window_basis = nn.Parameter(self._half_mean(bases)[:, None].repeat(1, d))
        elif config.window == "pointwise":
            self.window_map = nn.Linear(self.sampling.window_taps * (d + bases), d_out, bias=False)
        if config.restore == "readout":
            self.readout_basis = nn.Parameter(torch.zeros(bases, d_out))
        self.clock_weight = self.clock_bias = None
        if config.clock == "learned":  # starts at the rate everywhere: uniform crossing
            start = (rate - low) / (self.sampling.high - low)
            self.clock_weight = nn.Parameter(torch.zeros(d))
            self.clock_bias = nn.Parameter(torch.tensor([math.log(start / (1 - start))]))
        self.teach = config.teach
        for parameter in self.parameters(recurse=False):
            parameter._no_weight_decay = True

    def _half_mean(self, bases: int) -> Tensor:
        """Coefficients (M,) with which the bases sum to 1 / (2 horizon): the window starts as half the mean over time."""
        horizon, width = self.sampling.horizon, self.sampling.window_width
        s = np.linspace(0, horizon, 257)[:, None] / width
        values = np.exp(-0.5 * (s - np.arange(bases)) ** 2)
        return torch.tensor(np.linalg.lstsq(values, np.full(257, 0.5 / horizon))[0], dtype=torch.float32)

    def forward(self, u: Tensor, documents: Documents, state: BranchState | None = None) -> tuple[Tensor, BranchState]:
        window, inner, outputs = (None, None, None) if state is None else state
        x, elements, clock, window, _ = self.compress(u, documents, window)
        if state is not None and x.shape[1] == 1 and not torch.is_grad_enabled():
            y, inner = step_live(self.inner, self.d_out, x, elements, inner)
        else:
            y, inner = self.inner(x, elements, inner)
        z, outputs = self.restore(y, u, clock, documents, outputs)
        return z, BranchState(window, inner, outputs)

    def compress(
        self, u: Tensor, documents: Documents, window: Carry | None = None, spare: int = 0
    ) -> tuple[Tensor, Documents, Clock, Carry, Tensor]:
        """What the inner mixer reads, its documents, the clock, the carry after u, and u for whoever else reads it. spare: slots
        beyond those that the elements can need."""
        x, clock, window, u = compress_beside(
            u, self.window_basis, self.clock_weight, self.clock_bias, documents.reset, self.sampling,
            self.slots(documents) + spare, window,
        )
        if self.window_map is not None:
            x = self.window_map(x)
        return x, Documents(
            clock.reset, live=clock.live, since_reset=clock.since_reset, n_live=clock.n_live, pieces=documents.pieces
        ), clock, window, u

    def restore(
        self, y: Tensor, u: Tensor, clock: Clock, documents: Documents, outputs: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The inner mixer's outputs y at full length, and the last of them."""
        z, outputs = decompress(y, self.readout_basis, clock, self.sampling, outputs)
        if documents.lessons is not None and self.teach != "durations":
            z = teach(self.teach, z, y, u, self.clock_weight, self.clock_bias, clock, self.sampling, documents)
        return z, outputs

    @property
    def out_projs(self) -> list[nn.Linear]:
        return self.inner.out_projs

    @property
    def lead(self) -> int:
        """Tokens among which at least as many emit as the read-out has taps."""
        return self.sampling.readout_taps * self._slowest

    @property
    def reach(self) -> int:
        """So that elements of the lead before a shard are formed again from their tokens, with the inner mixer's reach before
        them and the window of the oldest."""
        return self.lead + self.inner.reach * self._slowest + self.sampling.window_taps - 1

    @property
    def _slowest(self) -> int:
        """Tokens of a document among which one always emits."""
        return -(-TICKS // round(self.sampling.low * TICKS))

    def outline(self, u: Tensor, documents: Documents, ends: list[int]) -> Tensor:
        return clock_maps(u, self.clock_weight, self.clock_bias, documents.reset, self.sampling, ends)

    def rounds(
        self, u: Tensor, before: int, outlines: list[Tensor], documents: Documents, state: BranchState | None
    ) -> Generator[Begun, tuple[Tensor, Any], tuple[Tensor, BranchState]]:
        """As `Mixer.rounds`, for one branch. u (B, before + L, d): a shard, and the tokens before it, to where the rows begin or
        `reach` of them. The first tokens' read-out sees outputs of elements before the shard, hence the lead."""
        around = documents.around(before)
        window, inner, outputs = (None, None, None) if state is None else state
        start, end = documents.shard.begin - before, u.shape[1]
        if start > 0:
            window = self._carry(u, outlines, documents.shard.whole, start, window)
        later = self.inner.reach - self.inner.blocks[0].mixer.reach if isinstance(self.inner, Stack) else 0
        longest = self.lead + later * self._slowest  # lead of the run's first block
        spare = self.slots(around.part(max(0, end - longest), end))
        x, elements, clock, window, _ = self.compress(u, around, window, spare)
        emitted = partial(_emitted, clock)
        documents.shard.emitted(clock.n_live - emitted(before))
        line = Elements(elements, around, clock.emitter, emitted, self.slots)
        y, inner = yield from _rounds(self.inner, line, x, self.lead, self._slowest, inner)
        # The first of the tokens before the shard read outputs from before those: theirs are cut off, but must be finite.
        earlier = y.new_zeros(len(y), self.sampling.readout_taps, y.shape[2]) if start > 0 else outputs
        z, outputs = decompress(y, self.readout_basis, clock, self.sampling, earlier)
        return z[:, before:], BranchState(window, inner, outputs)

    def _carry(self, u: Tensor, outlines: list[Tensor], whole: Documents, start: int, given: Carry | None) -> Carry:
        """As compression begins at token `start` > 0 of the rows: nothing that is needed looks further back than it."""
        zero, halo = torch.zeros(len(u), dtype=torch.int64, device=u.device), self.sampling.window_taps - 1
        dev, position = (zero, zero) if given is None else given[:2]
        for outline in outlines:
            dev = apply_map(dev, *outline)
        since = whole.since_reset[:, start - 1]
        position = torch.where(since >= FAR, position + start, since + 1)
        steps = torch.zeros(len(u), halo, dtype=torch.int32, device=u.device)
        return Carry(dev, position, u.new_zeros(len(u), halo, u.shape[2]), steps)

    def slots(self, documents: Documents) -> int:
        """Room for every element these documents can emit."""
        return documents.capacity(self.sampling.rate, self.sampling.band, TICKS)


def sampling(rate: float, config: SerpentConfig) -> Sampling:
    """Of a branch at this rate < 1."""
    low, high, ticks, band, stride = rate / config.spread, min(1.0, rate * config.spread), round(rate * TICKS), config.band, 0
    if config.clock == "stride":
        stride = round(1 / rate)
        low, high, ticks, band = 1 / stride, 1 / stride, -(-TICKS // stride), 0.0  # rounded up: the capacity must hold
    horizon, gaps = config.horizon, config.n_bases - 1
    if config.window == "segment_mean":
        horizon = 1.0  # the grid cell
    taps = math.ceil(horizon / low) + 1
    if config.window == "pointwise":
        taps, horizon = POINTWISE_TAPS, (POINTWISE_TAPS - 1) * high  # as far as the oldest can lie back
    readout_taps = config.decompress_taps if config.restore == "readout" else 1
    return Sampling(
        rate=ticks, band=round(band * TICKS), low=low, high=high, horizon=horizon, window_taps=taps, window_width=horizon / gaps,
        readout_taps=readout_taps, readout_width=readout_taps / gaps, stride=stride, window=config.window,
    )


def mixer_width(d_model: int, d_out: int, rate: float, config: SerpentConfig) -> int:
    """Channels a branch's mixer reads: the pointwise window's linear map leaves as many as the branch puts out."""
    return d_out if rate != 1 and config.window == "pointwise" else d_model


class Serpent(nn.Module):
    """Branches at several rates side by side: (B, L, d_model) -> (B, L, d_model).

    A branch at rate 1 is the plain inner mixer. Where `projected` says so the branches are concatenated and projected, else
    added: one alone is as it is, so rates = [1] is exactly that mixer. With a depth, each branch runs that many blocks of the
    inner mixer at its rate. mixer, settings: the inner mixer's class and its section of the configuration.
    """

    def __init__(self, d_model: int, config: SerpentConfig, mixer: type[Mixer], settings: Any, norm_eps: float = 1e-5):
        super().__init__()
        self.branches = nn.ModuleList()
        inners, outs = branch_widths(d_model, config, mixer, settings)
        for rate, inner, out in zip(config.rates, inners, outs):
            run = [mixer(mixer_width(d_model, out, rate, config), inner, out, settings) for _ in range(config.depth)]
            branch = run[0] if config.depth == 1 else Stack(run, d_model, norm_eps)
            if rate != 1:
                routed = config.clock == "routed"
                branch = RoutedBranch(branch, d_model, out, rate) if routed else Branch(branch, d_model, out, rate, config)
            self.branches.append(branch)
        self.out_proj = Linear(d_model, d_model) if projected(config) else None
        if self.out_proj is None:  # what is added up starts as one map of all inner channels would
            for branch, inner in zip(self.branches, inners):
                for projection in branch.out_projs:
                    projection.weight.data.mul_((inner / sum(inners)) ** 0.5)

    def forward(self, x: Tensor, documents: Documents, state: tuple | None = None) -> tuple[Tensor, tuple]:
        if state is not None or self._apart:
            states = (None,) * len(self.branches) if state is None else state
            return self._join([branch(x, documents, s) for branch, s in zip(self.branches, states)])
        u, compressed = x, {}
        for branch in self.branches:
            if isinstance(branch, Branch):
                *compressed[branch], x = branch.compress(x, documents)
        read = [compressed.get(branch, (x, documents))[:2] for branch in self.branches]
        mixers = [branch.inner if branch in compressed else branch for branch in self.branches]
        results = type(mixers[0]).together(mixers, *map(list, zip(*read)))
        for i, branch in enumerate(self.branches):
            if branch in compressed:
                (y, inner), (_, _, clock, window) = results[i], compressed[branch]
                y, outputs = branch.restore(y, u, clock, documents)
                results[i] = y, BranchState(window, inner, outputs)
        return self._join(results)

    @property
    def out_projs(self) -> list[nn.Linear]:
        if self.out_proj is not None:
            return [self.out_proj]
        return [projection for branch in self.branches for projection in branch.out_projs]

    @property
    def _apart(self) -> bool:
        """Whether branches must run one by one: routed ones, and those that someone listens to, as who gathers parameters just
        before they are needed does."""
        routed = any(isinstance(branch, RoutedBranch) for branch in self.branches)
        return routed or any(m._forward_pre_hooks or m._forward_hooks for branch in self.branches for m in branch.modules())

    @property
    def reach(self) -> int:
        return max(branch.reach for branch in self.branches)

    def outline(self, x: Tensor, documents: Documents, ends: list[int]) -> Tensor | None:
        """(len(ends), branches below rate 1, 3, B): the maps of their clocks."""
        maps = [branch.outline(x, documents, ends) for branch in self.branches if isinstance(branch, Branch)]
        return torch.stack(maps, 1) if maps else None

    def rounds(self, x: Tensor, before: Tensor, outlines: list[Tensor], documents: Documents, state: tuple | None = None):
        states = (None,) * len(self.branches) if state is None else state
        around, running, n = torch.cat([before, x], 1), [], 0
        for branch, given in zip(self.branches, states):
            if isinstance(branch, Branch):
                running.append(branch.rounds(around, before.shape[1], [maps[n] for maps in outlines], documents, given))
                n += 1
            else:
                running.append(_full_rate(branch, x, before[:, max(0, before.shape[1] - branch.reach) :], documents, given))
        # Branches take equally many rounds.
        begun, results = [next(branch) for branch in running], []
        while not results:
            finished, waiting = (yield begun), []
            for branch, part in zip(running, finished):
                try:
                    waiting.append(branch.send(part))
                except StopIteration as end:
                    results.append(end.value)
            begun = waiting
        return self._join(results)

    def _join(self, results: list) -> tuple[Tensor, tuple]:
        outputs = [z for z, _ in results]
        y = reduce(torch.add, outputs) if self.out_proj is None else self.out_proj(torch.cat(outputs, -1))
        return y, tuple(state for _, state in results)


def _rounds(inner: nn.Module, line: Elements, x: Tensor, lead: int, slowest: int, state: Any):
    """The rounds of a mixer or a run of them on x, whose outputs are wanted a lead before the shard. slowest: tokens among which
    one is an element."""
    if isinstance(inner, Stack):
        begin = lambda mixer, x, reach, given: line.begin(mixer, x, lead + reach * slowest, given)
        return (yield from inner.rounds(x, begin, state))
    return (yield line.begin(inner, x, lead, state))


def _full_rate(inner: nn.Module, x: Tensor, before: Tensor, documents: Documents, state: Any):
    """The rounds of a branch at rate 1."""
    if not isinstance(inner, Stack):
        return (yield inner.begin(x, before, documents, state))
    line = Elements.all_tokens(documents.around(before.shape[1]))
    y, state = yield from _rounds(inner, line, torch.cat([before, x], 1), 0, 1, state)
    return y[:, before.shape[1] :], state


def _emitted(clock: Clock, token: int) -> Tensor:
    """(B,) int64 elements emitted before a token."""
    return torch.zeros_like(clock.n_live) if token <= 0 else clock.newest[:, token - 1].long() + 1


def projected(config: SerpentConfig) -> bool:
    """Whether the branches are concatenated and projected: where each puts out a part of d_model, but that of one alone."""
    return config.depth == 1 and len(config.rates) > 1 and config.join == "project"


def branch_widths(d_model: int, config: SerpentConfig, mixer: type[Mixer], settings: Any) -> tuple[list[int], list[int]]:
    """(inner widths, output widths) per branch; by default the layer has as many parameters as `depth` plain ones of its
    inner mixer, as nearly as that mixer's unit of width allows. Blocks of a run read and write all of d_model."""
    n = len(config.rates)
    shares = config.shares or [1.0] * n
    unit = 16 if d_model >= 512 else 1  # wide loads want multiples of 16; small models need the finer choice
    outs = _split(d_model, shares, unit) if projected(config) else [d_model] * n
    if config.d_inner is not None:
        return _split(config.d_inner, shares, mixer.width_unit(settings)), outs
    # A run alone costs little beside its blocks, so that they can have the width of plain ones, fit for wide loads.
    units = (16, 8, 4, 2, 1) if config.depth > 1 and n == unit == 1 else (unit,)
    plain = mixer.parameter_count(d_model, mixer.width(d_model, settings), d_model, settings)
    target = config.depth * (plain + d_model) - d_model  # a norm each; the layer's own is not counted here

    def excess(total: int) -> int:
        return parameter_count(d_model, _split(total, shares, unit), outs, config, mixer, settings) - target

    for unit in units:
        unit = math.lcm(unit, mixer.width_unit(settings))
        total = n * unit
        while excess(total + unit) < 0:
            total += unit
        total = min(total, total + unit, key=lambda t: abs(excess(t)))
        if abs(excess(total)) < 0.005 * target:
            break
    return _split(total, shares, unit), outs


def parameter_count(
    d_model: int, inners: list[int], outs: list[int], config: SerpentConfig, mixer: type[Mixer], settings: Any
) -> int:
    total, norm = d_model * d_model * projected(config), d_model * (config.depth > 1)
    for rate, inner, out in zip(config.rates, inners, outs):
        block = mixer.parameter_count(mixer_width(d_model, out, rate, config), inner, out, settings)
        total += config.depth * (block + norm)
        if rate != 1 and config.clock == "routed":
            total += 2 * width(d_model) * d_model
        elif rate != 1:
            window = {"integrated": config.n_bases * d_model, "segment_mean": 0,
                      "pointwise": POINTWISE_TAPS * (d_model + config.n_bases) * out}[config.window]
            total += window + config.n_bases * out * (config.restore == "readout") + (d_model + 1) * (config.clock == "learned")
    return total


def kept_bytes(d_model: int, config: SerpentConfig, mixer: type[Mixer], settings: Any, itemsize: int, length: int) -> float:
    """What a GPU keeps of one token for the backward pass, the input left out. length: tokens of a row."""
    total = itemsize * d_model * projected(config)  # the branches' outputs side by side
    norm = (4 + itemsize) * d_model * (config.depth > 1)  # the run's residual stream, and what the norm makes of it
    for rate, inner, out in zip(config.rates, *branch_widths(d_model, config, mixer, settings)):
        element = config.depth * (mixer.kept_bytes(inner, settings, itemsize) + norm)
        if rate == 1:
            total += element
            continue
        if config.clock == "routed":  # as many slots as tokens; p and the keys; float32 copies: of u, and of y per doubling
            total += element + itemsize * (d_model + out) + 4 * (d_model + 4 * width(d_model) + 8 * out) + 64
            continue
        taps = sampling(rate, config).window_taps
        x = d_model if config.window != "pointwise" else taps * (d_model + config.n_bases) + out
        element += itemsize * (x + out) + 8 * config.n_bases * taps + 16  # x and y, the window's tables, the slot
        total += min(1, rate + (2 * config.band + 1) / length) * element + 32  # and the clock
    return total


def flops(d_model: int, config: SerpentConfig, mixer: type[Mixer], settings: Any, length: int) -> tuple[float, float]:
    """Forward FLOPs per token at the target rates, in rows of `length` tokens: (matrix products, the rest)."""
    matmul, rest = 2.0 * d_model * d_model * projected(config), 0.0
    for rate, inner, out in zip(config.rates, *branch_widths(d_model, config, mixer, settings)):
        m, r = mixer.flops(mixer_width(d_model, out, rate, config), inner, out, settings, max(1, round(rate * length)))
        matmul, rest = matmul + rate * config.depth * m, rest + rate * config.depth * r
        if rate != 1 and config.clock == "routed":
            matmul, rest = matmul + 4 * width(d_model) * d_model, rest + 6 * width(d_model) + 3 * rate * out + out
        elif rate != 1:
            taps, bases = sampling(rate, config).window_taps, config.n_bases
            if config.window == "integrated":
                matmul, rest = matmul + 2 * bases * rate * taps * d_model, rest + 2 * (d_model + rate * taps * d_model)
            elif config.window == "segment_mean":
                rest += 2 * rate * taps * d_model
            else:
                matmul += 2 * rate * taps * (d_model + bases) * out
            if config.restore == "readout":
                matmul, rest = matmul + 2 * bases * config.decompress_taps * out, rest + 2 * config.decompress_taps * out
    return matmul, rest


def _split(total: int, shares: list[float], unit: int) -> list[int]:
    """`total` by the shares, as nearly as multiples of `unit` allow, one at least; the first takes what is over."""
    spare = total // unit - len(shares)
    rest = [(1 + math.floor(spare * share / sum(shares) + 1e-9)) * unit for share in shares[1:]]
    return [total - sum(rest), *rest]
