"""Proposition 1 of SeRpEnt (Rando et al., arXiv 2501.11729), measured: what an element leaves in the state of a diagonal SSM
is linear in its interval, ||h_L - h_L^i|| ~ c Delta_i as Delta_i -> 0, so that a selective Delta tells how much it matters.

h_l = abar(Delta_l) h_{l-1} + bbar(Delta_l) x_l with A diagonal. h^i is the state without element i, which is either deleted
(its step is not made) or zeroed (x_i = 0, time passes). Legend: L elements, N states.
"""
from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from serpent_scale.kernels.causal_conv1d import causal_conv1d
from serpent_scale.kernels.resample.reference import TICKS, intervals
from serpent_scale.model.documents import Documents
from serpent_scale.model.language_model import LanguageModel
from serpent_scale.model.mamba import Mamba
from serpent_scale.model.mamba2 import Mamba2
from serpent_scale.model.serpent import Branch

RULES = ("zoh", "euler")
REMOVALS = ("deleted", "zeroed")
STEPS = np.logspace(-8, -5, 13)  # small enough for the limit, large enough for float64 to tell the two states apart


@dataclass(frozen=True)
class Sequence:
    """An input to a diagonal SSM with selective intervals and input vectors, float64.

    A (N,) real or complex; B (L, N); x (L,); dt (L,) > 0.
    """

    A: np.ndarray
    B: np.ndarray
    x: np.ndarray
    dt: np.ndarray

    @classmethod
    def random(cls, length: int = 64, states: int = 16, seed: int = 0, imaginary: bool = False) -> Sequence:
        """A as S4D-Real starts, or S4D-Lin; intervals as Mamba's start, 0.001 to 0.1, for S4D-Lin a hundredth of that: Euler's
        steps grow where |1 + dt A| > 1."""
        draw, n = np.random.default_rng(seed), np.arange(states)
        A = -0.5 + 1j * np.pi * n if imaginary else -(1.0 + n)
        dt = 10 ** draw.uniform(-3, -1, length) / (100 if imaginary else 1)
        return cls(A, draw.normal(size=(length, states)), draw.normal(size=length), dt)

    def state(self, rule: str, upto: int | None = None, without: int | None = None) -> np.ndarray:
        """h (N,) after the first `upto` elements, all by default; element `without` deleted."""
        h = np.zeros_like(self.A, dtype=np.result_type(self.A, np.float64))
        for i in range(len(self.x) if upto is None else upto):
            if i != without:
                decay, gain = discretise(self.A, self.dt[i], rule)
                h = decay * h + gain * self.B[i] * self.x[i]
        return h

    def changed(self, i: int, dt: float | None = None, x: float | None = None) -> Sequence:
        dts, xs = self.dt.copy(), self.x.copy()
        if dt is not None:
            dts[i] = dt
        if x is not None:
            xs[i] = x
        return Sequence(self.A, self.B, xs, dts)

    def effect(self, i: int, rule: str, removal: str) -> float:
        """||h_L - h_L^i||."""
        if removal == "deleted":
            other = self.state(rule, without=i)
        else:
            other = self.changed(i, x=0.0).state(rule)
        return float(np.linalg.norm(self.state(rule) - other))

    def coefficient(self, i: int, rule: str, removal: str) -> float:
        """The limit of effect / Delta_i: ||prod_{j>i} abar_j (A h_{i-1} + B_i x_i)||, the first term only if it is deleted."""
        rate = self.B[i] * self.x[i]
        if removal == "deleted":
            rate = rate + self.A * self.state(rule, upto=i)
        for dt in self.dt[i + 1 :]:
            rate = rate * discretise(self.A, dt, rule)[0]
        return float(np.linalg.norm(rate))


def discretise(A: np.ndarray, dt: float, rule: str) -> tuple[np.ndarray, np.ndarray]:
    """(abar, bbar / B) of one step of h' = A h + B x: exact for x held (zoh), or a step of Euler's (euler)."""
    if rule == "zoh":
        return np.exp(dt * A), np.expm1(dt * A) / A
    return 1 + dt * A, np.full_like(A, dt)


@dataclass(frozen=True)
class Fit:
    """effects (S,) at intervals STEPS, their slope in log-log, and the coefficient found and predicted."""

    rule: str
    removal: str
    effects: np.ndarray
    slope: float
    found: float
    predicted: float


def fit(sequence: Sequence, i: int, rule: str, removal: str) -> Fit:
    effects = np.array([sequence.changed(i, dt=dt).effect(i, rule, removal) for dt in STEPS])
    slope = np.polyfit(np.log(STEPS), np.log(effects), 1)[0]
    found = np.exp(np.mean(np.log(effects / STEPS)))
    return Fit(rule, removal, effects, float(slope), float(found), sequence.coefficient(i, rule, removal))


# A trained model.


@dataclass(frozen=True)
class Correlation:
    """Interval of elements and what deleting each changed in the state `after` elements later, relative to that state's norm.

    what: the layer, and the branch or mixer. intervals, effects (n,). rank: Spearman's correlation of the two, NaN where all
    intervals are equal; linear: Pearson's of their logarithms.
    """

    what: str
    intervals: np.ndarray
    effects: np.ndarray

    @property
    def rank(self) -> float:
        return _pearson(_ranks(self.intervals), _ranks(self.effects))

    @property
    def linear(self) -> float:
        return _pearson(np.log(self.intervals), np.log(np.maximum(self.effects, 1e-30)))


@torch.no_grad()
def correlations(model: LanguageModel, tokens: Tensor, before: int = 64, after: int = 8, samples: int = 256) -> list[Correlation]:
    """For each SeRpEnt branch below rate 1 (its clock's interval) and each Mamba or Mamba-2 that runs on every token (its own
    dt, the mean over channels).

    tokens (L,) int64, one document, L > before + after. Each of `samples` elements, evenly spaced, is deleted from what its
    layer reads, with `before` elements ahead of it as the document's beginning and `after` behind.
    """
    heard: dict[nn.Module, Tensor] = {}
    names = {}
    for i, block in enumerate(model.blocks):
        for branch in getattr(block.mixer, "branches", [block.mixer]):
            if isinstance(branch, (Branch, Mamba, Mamba2)):
                clocked = isinstance(branch, Branch)
                what = f"rate {branch.sampling.rate / TICKS:g}: clock" if clocked else "every token: dt"
                names[branch] = f"layer {i}, {what}"
    hooks = [m.register_forward_pre_hook(lambda module, args: heard.__setitem__(module, args[0])) for m in names]
    try:
        model(tokens[None])
    finally:
        for hook in hooks:
            hook.remove()
    at = torch.linspace(before, len(tokens) - after - 1, min(samples, len(tokens) - before - after)).long().unique()
    rows = at[:, None] + torch.arange(-before, after + 1)  # (n, before + 1 + after)
    without = torch.cat([rows[:, :before], rows[:, before + 1 :]], 1)
    found = []
    for module, what in names.items():
        u = heard[module][0]
        states = [_ssm_state(module, u[index.to(u.device)]) for index in (rows, without)]
        effect = (states[0] - states[1]).norm(dim=1) / states[0].norm(dim=1).clamp(min=1e-30)
        found.append(Correlation(what, _interval(module, u)[at].double().cpu().numpy(), effect.double().cpu().numpy()))
    return found


def _ssm_state(module: nn.Module, u: Tensor) -> Tensor:
    """The state (n, everything) of the SSM after the rows u (n, L, d)."""
    _, state = module(u, Documents.whole(*u.shape[:2], device=u.device))
    inner = state.inner if isinstance(module, Branch) else state
    leaves = [inner.ssm] if hasattr(inner, "ssm") else [leaf for leaf in tree_leaves(inner) if leaf.is_floating_point()]
    return torch.cat([leaf.flatten(1).double() for leaf in leaves], 1)


def _interval(module: nn.Module, u: Tensor) -> Tensor:
    """(L,) interval of each element of u (L, d)."""
    if isinstance(module, Branch):
        return intervals(u[None].float(), module.clock_weight, module.clock_bias, module.sampling)[0]
    if isinstance(module, Mamba2):
        dt = module.in_proj(u)[:, -module.n_heads :]
    else:
        inner = module.in_proj(u[None])[..., : module.d_inner]
        inner, _ = causal_conv1d(inner, module.conv_weight, module.conv_bias, Documents.whole(1, len(u), u.device).since_reset)
        dt = module.dt_proj(module.x_proj(inner[0])[:, : module.rank])
    return nn.functional.softplus(dt + module.dt_bias).mean(-1)


def _ranks(values: np.ndarray) -> np.ndarray:
    """Equal values share the mean of their ranks."""
    _, group, count = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(count) - (count - 1) / 2)[group]


def _pearson(a: np.ndarray, b: np.ndarray) -> float:
    a, b = a - a.mean(), b - b.mean()
    scale = np.sqrt((a * a).sum() * (b * b).sum())
    return float((a * b).sum() / scale) if scale > 1e-12 * len(a) else float("nan")
