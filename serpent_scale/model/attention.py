"""Causal self-attention with rotary positions and grouped queries, for hybrids: `pattern: [mamba, mamba, mamba, attention]`.

Rotary positions: Su et al., arXiv 2104.09864; grouped queries: Ainslie et al., arXiv 2305.13245.
Legend: B batch, L length, H query heads, G key-value heads (H / G queries share one), P head_dim (H P = d_inner), S places of
the cache.
"""
from __future__ import annotations

from functools import lru_cache, partial
from itertools import accumulate
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from serpent_scale.config import AttentionConfig
from serpent_scale.kernels.attention import QUERIES
from serpent_scale.model.documents import FAR, Documents, Shard
from serpent_scale.model.mixer import Asked, Begun, Mixer, at_slots, to_front


class AttentionState(NamedTuple):
    """The tokens of each row's current document, at the front of S places."""

    keys: Tensor  # (B, S, G, P), rotated
    values: Tensor  # (B, S, G, P)
    count: Tensor  # (B,) int64 places in use, and so the next token's position


class Attention(Mixer):
    """in_proj to queries, keys and values, rotation by the position in the document, attention within it, out_proj.

    The state is a cache of keys and values: unlike other mixers' it grows with the document, and it begins anew with the next.
    A step costs as much as the cache is long.
    """

    has_phases = False
    fixed_shapes = False

    def __init__(self, d_in: int, d_inner: int, d_out: int, config: AttentionConfig):
        super().__init__(d_in, d_inner, d_out, config)
        self.head_dim, self.n_heads, self.n_groups = config.head_dim, *heads(d_inner, config)
        self.rope_theta = config.rope_theta
        self.in_proj = nn.Linear(d_in, (self.n_heads + 2 * self.n_groups) * config.head_dim, bias=False)
        self.out_proj = nn.Linear(d_inner, d_out, bias=False)

    def forward(self, x: Tensor, documents: Documents, state: AttentionState | None = None) -> tuple[Tensor, AttentionState]:
        q, k, v = self._project(x, positions(documents, state))
        alone = state is None and documents.pieces == 1  # no mask is needed but the causal one
        if state is not None:
            k, v = _after_cache(k, v, state)
        y = attend(q, k, v) if alone else attend(q, k, v, documents.since_reset, state)
        if alone and documents.n_live is None:
            return self.out_proj(y.flatten(2)), AttentionState(k, v, documents.in_use)
        return self.out_proj(y.flatten(2)), hand_on(k, v, documents.in_use, _since_last(documents, documents.in_use), state)

    def _project(self, x: Tensor, position: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = self.in_proj(x).unflatten(-1, (-1, self.head_dim)).split([self.n_heads, self.n_groups, self.n_groups], 2)
        turn = rotation(position, self.head_dim, self.rope_theta, torch.promote_types(x.dtype, torch.float32))
        return rotate(q, *turn), rotate(k, *turn), v

    @property
    def reach(self) -> int:
        return 0

    def begin(self, x: Tensor, before: Tensor, documents: Documents, state: AttentionState | None = None) -> Begun:
        """Where the state is asked for, keys and values of all shards come here."""
        x, documents, back = to_front(x, documents)
        shard, length = documents.shard, x.shape[1]
        sizes, held, at = shard.sizes(), shard.held(), torch.arange(length, device=x.device)
        size = held[shard.number]
        # Where a document lies before the rows only the cache knows its position; elements' clocks do everywhere.
        known, since = 0 if state is None else state.count[:, None], documents.since_reset
        q, k, v = self._project(x, torch.where(since < FAR, since, known + shard.begin + at))
        q, k, v = (_fit(t, size) for t in (q, k, v))
        n_live, document = documents.in_use, shard.whole.reset.cumsum(1)
        if shard.tokens is None:
            n_own, document = n_live, document[:, shard.begin : shard.begin + length]
        else:
            own = (at < n_live[:, None]) & (shard.tokens < shard.owned()[shard.number][1])
            n_own, document = own.sum(1), document.gather(1, shard.tokens)
        document, cache, told = _fit(torch.where(at < n_live[:, None], document, -1), size, -1), None, []
        if state is not None:
            places = torch.arange(state.keys.shape[1], device=x.device)
            cache = state.keys, state.values, torch.where(places < state.count[:, None], 0, -1)
        if shard.carried:
            facts = [count for n in (n_own, n_live) for count in (n, _since_last(documents, n))]
            told = [_fit(torch.cat([k, v], 2).detach(), max(held)), torch.stack(facts)]

        def finish(y: Tensor, *rest: Tensor) -> tuple[Tensor, AttentionState | None]:
            y = back(_fit(self.out_proj(y.flatten(2)), length))
            return y, _state_after(*(t[: shard.number + 1] for t in rest), state) if rest else None

        single = shard.tokens is None and documents.pieces == 1
        asked = Asked(q, k, v, document, n_own, sizes, single, cache, partial(_spans, shard, held), told)
        return Begun(asked, None, finish)

    @staticmethod
    def width_unit(config: AttentionConfig) -> int:
        return config.head_dim * config.queries_per_key

    @staticmethod
    def parameter_count(d_in: int, d_inner: int, d_out: int, config: AttentionConfig) -> int:
        n_heads, n_groups = heads(d_inner, config)
        return d_in * (n_heads + 2 * n_groups) * config.head_dim + d_inner * d_out

    @staticmethod
    def flops(d_in: int, d_inner: int, d_out: int, config: AttentionConfig, length: int) -> tuple[float, float]:
        """A token sees (length + 1) / 2 keys on average: what lies behind the causal mask is not counted."""
        n_heads, n_groups = heads(d_inner, config)
        matmul = 2 * d_in * (n_heads + 2 * n_groups) * config.head_dim + 2 * d_inner * d_out + 2 * d_inner * (length + 1)
        return matmul, 3 * (n_heads + n_groups) * config.head_dim + 2.5 * n_heads * (length + 1)  # rotation, softmax

    @staticmethod
    def kept_bytes(d_inner: int, config: AttentionConfig, itemsize: int) -> float:
        """Queries, keys and values, these once for each query head, and the output; a logsumexp per head."""
        return itemsize * 4 * d_inner + 4 * heads(d_inner, config)[0]


def heads(d_inner: int, config: AttentionConfig) -> tuple[int, int]:
    """(query heads, key-value heads)."""
    return d_inner // config.head_dim, d_inner // (config.head_dim * config.queries_per_key)


def positions(documents: Documents, state: AttentionState | None) -> Tensor:
    """(B, L) int64 tokens since the document's first, counted from the row's beginning where nothing is known of before."""
    at = torch.arange(documents.reset.shape[1], device=documents.reset.device)
    before = 0 if state is None else state.count[:, None]
    return torch.where(documents.since_reset > at, before + at, documents.since_reset)


def rotation(position: Tensor, head_dim: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosine and sine (B, L, 1, P / 2) of position * theta^(-2i/P)."""
    speed = theta ** (-torch.arange(0, head_dim, 2, device=position.device, dtype=dtype) / head_dim)
    angle = position[..., None, None].to(dtype) * speed
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (B, L, H, P), channel i turned with channel i + P / 2; in cos's dtype, returned in x's."""
    a, b = x.to(cos.dtype).chunk(2, -1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1).to(x.dtype)


def attend(q: Tensor, k: Tensor, v: Tensor, since: Tensor | None = None, state: AttentionState | None = None) -> Tensor:
    """q (B, L, H, P); k, v (B, S + L, G, P), the cache first -> (B, L, H, P).

    since (B, L): places of the row since the document's first, as in `Documents`; None: each row is one document, S = 0.
    """
    length, cached, shared = q.shape[1], 0 if state is None else state.keys.shape[1], q.shape[2] // k.shape[2]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    place = None if since is None else torch.arange(length, device=since.device)[None]
    if length == 1:  # the queries of a group ask together: no copy of the cache
        mask = None if since is None else visible(since, place, state, k.shape[2])[:, None]
        y = F.scaled_dot_product_attention(q.unflatten(1, (-1, shared)).flatten(2, 3), k, v, mask)
        return y.flatten(1, 2)[:, None]
    k, v = k.repeat_interleave(shared, 1), v.repeat_interleave(shared, 1)
    if since is None:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)

    def ask(q: Tensor, k: Tensor, v: Tensor, low: int, high: int) -> Tensor:
        mask = visible(since[:, low:high], place[:, low:high], state, k.shape[2])[:, None]
        return F.scaled_dot_product_attention(q, k, v, mask)

    # Masks of all queries are larger than all else where rows are long: they are made again for the backward pass.
    again = torch.is_grad_enabled() and k.shape[2] > QUERIES
    parts = []
    for low in range(0, length, QUERIES):
        high = min(low + QUERIES, length)
        asked = q[:, :, low:high], k[:, :, : cached + high], v[:, :, : cached + high], low, high
        parts.append(checkpoint(ask, *asked, use_reentrant=False, preserve_rng_state=False) if again else ask(*asked))
    return torch.cat(parts, 2).transpose(1, 2)


def visible(since: Tensor, place: Tensor, state: AttentionState | None, keys: int) -> Tensor:
    """(B, L, keys) bool: the queries at `place` see a key, the cache's first: it is of their document, and not after them."""
    cached = 0 if state is None else state.keys.shape[1]
    at = torch.arange(keys - cached, device=since.device)
    since, place = since[..., None], place[..., None]
    seen = (at <= place) & (place - at <= since)
    if not cached:
        return seen
    places = torch.arange(cached, device=at.device)
    return torch.cat([(places < state.count[:, None, None]) & (since > place), seen], 2)


def hand_on(k: Tensor, v: Tensor, n_live: Tensor, since: Tensor, state: AttentionState | None) -> AttentionState:
    """Keys and values (B, S + M, G, P), the cache first, of the documents that the rows end with, moved to the front.

    n_live (B,): of the M in use; since (B,): from the document's first to the last of those.
    """
    device, cached = k.device, 0 if state is None else state.keys.shape[1]
    count = torch.zeros_like(n_live) if state is None else state.count
    goes_on = (n_live == 0) | (since >= n_live)  # the cache is of the document that the row ends with
    new = torch.where(goes_on, n_live, since + 1)  # its tokens in this piece, the last of those in use
    count = count * goes_on
    total = count + new
    places = k.shape[1]
    if not torch.is_grad_enabled():  # in training the host does not wait for the device: places for all there could be
        fewest, most = (int(n) for n in total.aminmax())
        if fewest == places:
            return AttentionState(k, v, total)
        places = most
    place = torch.arange(places, device=device)
    source = torch.where(place < count[:, None], place, cached + (n_live - new)[:, None] + place - count[:, None])
    source = source.clamp(max=k.shape[1] - 1)[..., None, None].expand(-1, -1, *k.shape[2:])
    return AttentionState(k.gather(1, source), v.gather(1, source), total)


def _after_cache(k: Tensor, v: Tensor, state: AttentionState) -> tuple[Tensor, Tensor]:
    return torch.cat([state.keys.to(k.dtype), k], 1), torch.cat([state.values.to(v.dtype), v], 1)


def _since_last(documents: Documents, n: Tensor) -> Tensor:
    """(B,) places since the document's first at the last of the first n slots."""
    return documents.since_reset.gather(1, (n - 1).clamp(min=0)[:, None])[:, 0]


def _spans(shard: Shard, held: tuple[int, ...], earlier: int, later: int) -> tuple[int, int, bool] | None:
    """Of `Asked`."""
    owned = shard.owned()
    (begin, end), (first, _), last = owned[earlier], owned[later], shard.borders[later + 1]
    everything = held[later], 0, False
    if not shard.whole.lengths:
        return everything
    shared = _shared(shard.whole.lengths, begin, end, first, last)
    return shared if shared is None or shard.tokens is None else everything


@lru_cache(maxsize=1024)
def _shared(
    lengths: tuple[tuple[int, ...], ...], begin: int, end: int, first: int, last: int
) -> tuple[int, int, bool] | None:
    """`_spans` of tokens begin .. end - 1 and later ones, first .. last - 1. In a row they share one document at most, that of
    token `first`."""
    found = []
    if begin < end and first < last:
        for row in lengths:
            start, length = next(document for document in zip(accumulate(row, initial=0), row) if first < sum(document))
            if start < end:
                found.append((min(start + length, last) - first, max(start, begin) - begin))
    if not found:
        return None
    queries, keys = (set(numbers) for numbers in zip(*found))
    return max(queries), min(keys), len(found) == len(lengths) and len(queries) == len(keys) == 1


def _state_after(rows: Tensor, facts: Tensor, before: AttentionState | None) -> AttentionState:
    """rows (p, B, M, 2 G, P), keys and values of p shards; facts (p, 4, B), own slots and since the first at the last of them,
    then those of all slots in use, which count in the last shard."""
    counts, lasts = torch.cat([facts[:-1, :2], facts[-1:, 2:]]).unbind(1)
    rows = _packed(rows.flatten(3).transpose(0, 1).flatten(1, 2), counts, rows.shape[2]).unflatten(2, rows.shape[3:])
    since_last = lasts[0]
    for n, after in zip(counts[1:], lasts[1:]):
        since_last = torch.where(n > 0, after, since_last)
    k, v = rows.chunk(2, 2)
    if before is not None:
        k, v = _after_cache(k, v, before)
    return hand_on(k, v, counts.sum(0), since_last, before)


def _packed(rows: Tensor, counts: Tensor, size: int) -> Tensor:
    """rows (B, p size, w), in parts of which the first counts[i] (B,) are in use: those first, in order."""
    at = torch.arange(rows.shape[1], device=rows.device)
    ends = counts.cumsum(0)  # places after each part
    part = (at >= ends[:-1, :, None]).sum(0)  # (B, p size)
    begins = size * torch.arange(len(counts), device=rows.device)
    shift = begins[:, None] - (ends - counts)
    source = (at + shift.t().gather(1, part)).clamp(max=rows.shape[1] - 1)
    return at_slots(rows, source)


def _fit(x: Tensor, length: int, value: float = 0) -> Tensor:
    """x (B, S, ...) cut or filled to S = length."""
    return F.pad(x, (0, 0) * (x.ndim - 2) + (0, length - x.shape[1]), value=value)
