"""Causal self-attention with rotary positions and grouped queries, for hybrids: `pattern: [mamba, mamba, mamba, attention]`.

Rotary positions: Su et al., arXiv 2104.09864; grouped queries: Ainslie et al., arXiv 2305.13245.
Legend: B batch, L length, H query heads, G key-value heads (H / G queries share one), P head_dim (H P = d_inner), S places of
the cache.
"""
from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from serpent_scale.config import AttentionConfig
from serpent_scale.model.documents import FAR, Documents
from serpent_scale.model.mixer import Begun, Mixer, Told, at_slots, to_front

QUERIES = 1024  # asked at once where there is a mask: it is (B, 1, QUERIES, keys)


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
        return self.out_proj(y.flatten(2)), hand_on(k, v, *_end(documents), state)

    def _project(self, x: Tensor, position: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = self.in_proj(x).unflatten(-1, (-1, self.head_dim)).split([self.n_heads, self.n_groups, self.n_groups], 2)
        turn = rotation(position, self.head_dim, self.rope_theta, torch.promote_types(x.dtype, torch.float32))
        return rotate(q, *turn), rotate(k, *turn), v

    @property
    def reach(self) -> int:
        return 0

    def begin(self, x: Tensor, before: Tensor, documents: Documents, state: AttentionState | None = None) -> Begun:
        """Keys and values of all earlier shards come here, and the cache that the shard hands on has them."""
        x, documents, back = to_front(x, documents)
        shard, since, length = documents.shard, documents.since_reset, x.shape[1]
        at = torch.arange(length, device=x.device)
        # Where a document lies before the rows only the cache knows its position; elements' clocks do everywhere.
        known = 0 if state is None else state.count[:, None]
        q, k, v = self._project(x, torch.where(since < FAR, since, known + shard.begin + at))
        own, sizes = torch.cat([k, v], 2).flatten(2), shard.sizes()
        n_live, last = _end(documents)

        def run(earlier: Tensor, facts: Tensor) -> tuple[Tensor, AttentionState]:
            rows, place = torch.cat([earlier, own], 1), None
            counts, lasts = torch.cat([facts, torch.stack([n_live, last])[None]]).unbind(1)
            if documents.live is not None:
                rows, place = _packed(rows, [*sizes[: shard.number], length], counts), counts[:-1].sum(0)[:, None] + at
            k, v = rows.unflatten(2, (-1, self.head_dim)).chunk(2, 2)
            if state is not None:
                k, v = _after_cache(k, v, state)
            y, since_last = attend(q, k, v, since, state, place), lasts[0]
            for n, after in zip(counts[1:], lasts[1:]):
                since_last = torch.where(n > 0, after, since_last)
            return y, hand_on(k, v, counts.sum(0), since_last, state)

        told = Told(F.pad(own, (0, 0, 0, sizes[shard.number] - length)), torch.stack([n_live, last]), sizes, run)
        return Begun(told, None, lambda y, after: (back(self.out_proj(y.flatten(2))), after))

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

    @staticmethod
    def kept_of_earlier(d_inner: int, config: AttentionConfig, itemsize: int) -> float:
        """Keys and values, once for each query head."""
        return itemsize * 2 * d_inner


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


def attend(
    q: Tensor, k: Tensor, v: Tensor, since: Tensor | None = None, state: AttentionState | None = None, place: Tensor | None = None
) -> Tensor:
    """q (B, L, H, P); k, v (B, S + M, G, P), the cache first, then the row so far -> (B, L, H, P).

    since (B, L): places of the row since the document's first, as in `Documents`; None: each row is one document, S = 0, M = L.
    place (B, L): of the queries in the row, at most M - L + their number; None: its last L.
    """
    length, cached, shared = q.shape[1], 0 if state is None else state.keys.shape[1], q.shape[2] // k.shape[2]
    before = k.shape[1] - cached - length
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if place is None and since is not None:
        place = before + torch.arange(length, device=since.device)[None]
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
        asked = q[:, :, low:high], k[:, :, : cached + before + high], v[:, :, : cached + before + high], low, high
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


def _end(documents: Documents) -> tuple[Tensor, Tensor]:
    """(B,) slots in use, and places since the document's first at the last of them."""
    n_live = documents.in_use
    return n_live, documents.since_reset.gather(1, (n_live - 1).clamp(min=0)[:, None])[:, 0]


def _packed(rows: Tensor, sizes: list[int], counts: Tensor) -> Tensor:
    """rows (B, M, w), in parts of these sizes of which the first counts[i] (B,) are in use: those first, in order."""
    at = torch.arange(rows.shape[1], device=rows.device)
    ends = counts.cumsum(0)  # places after each part
    part = (at >= ends[:-1, :, None]).sum(0)  # (B, M)
    begins = torch.tensor([0, *sizes[:-1]], device=rows.device).cumsum(0)
    shift = begins[:, None] - (ends - counts)
    source = (at + shift.t().gather(1, part)).clamp(max=rows.shape[1] - 1)
    return at_slots(rows, source)
