"""SeRpEnt's rival clock, `model.serpent.clock: routed`: a token emits where it is unlike the one before it.

Source: Hwang et al., arXiv 2507.07955, section 2.2 (dynamic chunking); docs/serpent_layer.md says what is computed here.
Legend: B rows, L tokens, J = L slots for emitted elements, R channels of a projection.
"""
from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from serpent_scale.model.documents import Documents
from serpent_scale.model.mixer import at_slots
from serpent_scale.model.states import step_live
from serpent_scale.model.teaching import Losses

WIDTH = 64  # R; with the d of the source a layer's two branches would have no parameters left for anything else


class RoutedState(NamedTuple):
    key: Tensor  # (B, R) of the last token
    inner: Any  # state of the inner mixer
    output: Tensor  # (B, d_out) smoothed output of the newest element


class RoutedBranch(nn.Module):
    """One rate < 1, which emissions keep to in the mean by the ratio loss alone: (B, L, d) -> (B, L, d_out)."""

    def __init__(self, inner: nn.Module, d: int, d_out: int, rate: float):
        super().__init__()
        self.inner, self.d_out, self.rate = inner, d_out, rate
        start = torch.randn(width(d), d) / math.sqrt(d)  # the same for both, so that p starts from the tokens' own likeness
        self.query_weight, self.key_weight = nn.Parameter(start), nn.Parameter(start.clone())
        for parameter in self.parameters(recurse=False):
            parameter._no_weight_decay = True

    @property
    def out_projs(self) -> list[nn.Linear]:
        return self.inner.out_projs

    def forward(self, u: Tensor, documents: Documents, state: RoutedState | None = None) -> tuple[Tensor, RoutedState]:
        key, inner, output = (None, None, None) if state is None else state
        p, key = self.boundaries(u, documents.reset, key)
        emits = p >= 0.5
        newest = emits.cumsum(1) - 1
        emitter, live = _slots(emits, newest)
        reset = documents.reset.gather(1, emitter) & live
        elements = Documents(reset, live=live, n_live=newest[:, -1] + 1, pieces=documents.pieces)
        x = at_slots(u, emitter) * live[..., None]
        if state is not None and u.shape[1] == 1 and not torch.is_grad_enabled():
            y, inner = step_live(self.inner, self.d_out, x, elements, inner)
        else:
            y, inner = self.inner(x, elements, inner)
        y = y.masked_fill(~live[..., None], 0)
        with torch.autocast(u.device.type, enabled=False):
            smoothed = smooth(y.to(p.dtype), torch.where(live, p.gather(1, emitter), 1), output)
            z = at_slots(smoothed, newest + 1)
            if torch.is_grad_enabled():
                sure = torch.where(emits, p, 1 - p)
                z = z * (1 + (sure - sure.detach()))[..., None]
        if documents.lessons is not None:
            documents.lessons.append(lambda losses: ratio_loss(p, emits, self.rate, losses))
        return z.to(y.dtype), RoutedState(key, inner, at_slots(smoothed, newest[:, -1:] + 1)[:, 0])

    def boundaries(self, u: Tensor, reset: Tensor, key: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(p (B, L) that a token begins something new, 1 at the first of a document; the last token's key (B, R))."""
        with torch.autocast(u.device.type, enabled=False):
            u = u.to(torch.promote_types(u.dtype, torch.float32))
            query, keys = F.normalize(F.linear(u, self.query_weight), dim=-1), F.normalize(F.linear(u, self.key_weight), dim=-1)
            before = torch.zeros_like(keys[:, :1]) if key is None else key[:, None].to(keys.dtype)
            likeness = (query * torch.cat([before, keys[:, :-1]], 1)).sum(-1)
            if key is None:  # the first token is a document's
                reset = torch.cat([torch.ones_like(reset[:, :1]), reset[:, 1:]], 1)
            return (0.5 - 0.5 * likeness).clamp(0, 1).masked_fill(reset, 1), keys[:, -1]


def width(d: int) -> int:
    return min(WIDTH, d)


def _slots(emits: Tensor, newest: Tensor) -> tuple[Tensor, Tensor]:
    """(token that each of L slots holds, 0 where unused; bool: it is used)."""
    length = emits.shape[1]
    at = torch.arange(length, device=emits.device)
    # Each emitting token writes its position to its slot; the others write to one slot more, which is dropped.
    emitter = newest.new_zeros(len(emits), length + 1).scatter(1, torch.where(emits, newest, length), at.expand_as(newest))
    return emitter[:, :length], at <= newest[:, -1:]


def smooth(y: Tensor, p: Tensor, before: Tensor | None) -> Tensor:
    """ȳ_j = p_j y_j + (1 - p_j) ȳ_{j-1}, with ȳ_{-1} = before (B, d), 0 if None, ahead of them: (B, 1 + J, d).

    y (B, J, d); p (B, J) in [1/2, 1]: what lies 64 elements back has a share of at most 2^-64 in an output, which six doublings
    of the span that is summed leave out.
    """
    first = y.new_zeros(len(y), 1, y.shape[2]) if before is None else before[:, None].to(y.dtype)
    h, keep = torch.cat([first, p[..., None] * y], 1), F.pad(1 - p, (1, 0))[..., None]
    for span in (1, 2, 4, 8, 16, 32):
        if span < h.shape[1]:
            h = torch.cat([h[:, :span], h[:, span:] + keep[:, span:] * h[:, :-span]], 1)
            keep = torch.cat([keep[:, :span], keep[:, span:] * keep[:, :-span]], 1)
    return h


def ratio_loss(p: Tensor, emits: Tensor, rate: float, losses: Losses) -> Tensor:
    """Least, 1, where the share F of emitting tokens and the mean G of p are both the rate 1 / N (equation 10 of the source):
    N / (N - 1) ((N - 1) F G + (1 - F) (1 - G)), over the labelled tokens of the pass."""
    n, known, count = 1 / rate, losses.known, losses.known.sum().clamp(min=1)
    share, mean = (emits & known).sum() / count, (p * known).sum() / count
    return n / (n - 1) * ((n - 1) * share * mean + (1 - share) * (1 - mean))
