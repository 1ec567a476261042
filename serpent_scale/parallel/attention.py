"""Attention over shards of sequences: queries meet the keys and values of one other shard at a time.

Every pair of a later and an earlier shard that share a document is work for one rank, in floor(P / 2) steps after its own shard:
in step t keys and values of the shard t before come to its queries; where there is none, queries of the shard P - t after come to
the keys here, and their outputs go back. So no rank has much more to do than another, though the last shard sees P times as much
as the first (Li et al., arXiv 2310.03294). Partial outputs are merged by their log-sum-exp; a rank holds two blocks of others at
a time, the next being under way while one is worked on. The backward pass takes the same steps.
"""
from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from serpent_scale.kernels.attention import Mask, attend_block, attend_block_backward, merge
from serpent_scale.model.mixer import Asked
from serpent_scale.parallel.exchange import Form, Ring

Pair = tuple[int, int, int]  # later shard, whose queries see keys of the earlier shard; the rank that works on it


def steps(size: int) -> list[list[Pair]]:
    """What `size` ranks do after their own shards: in a step at most one pair each."""
    plan = []
    for t in range(1, size // 2 + 1):
        step = [(later, later - t, later) for later in range(t, size)]
        if 2 * t < size:
            step += [(earlier + size - t, earlier, earlier) for earlier in range(t)]
        plan.append(step)
    return plan


class ShardedAttention(torch.autograd.Function):
    """(ring, what is asked by each part of a layer, its q, k and v) -> y (B, S, H, P) of each part."""

    @staticmethod
    def forward(ctx, ring: Ring, asked: list[Asked], *tensors: Tensor):
        with torch.autocast(tensors[0].device.type, enabled=False):
            parts = [_Part(one, ring, *(t.transpose(1, 2) for t in tensors[3 * i : 3 * i + 3])) for i, one in enumerate(asked)]
            _walk(ring, parts, _Forward)
            found = [part.y.to(part.q.dtype) for part in parts]
            ctx.ring, ctx.asked = ring, asked
            ctx.save_for_backward(*tensors, *found, *(part.lse for part in parts))
            return tuple(y.transpose(1, 2) for y in found)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *grads):
        ring, n, saved = ctx.ring, len(ctx.asked), ctx.saved_tensors
        with torch.autocast(grads[0].device.type, enabled=False):
            parts = []
            for i, (one, grad) in enumerate(zip(ctx.asked, grads)):
                part = _Part(one, ring, *(t.transpose(1, 2) for t in saved[3 * i : 3 * i + 3]))
                part.y, part.lse, part.grad = saved[3 * n + i], saved[4 * n + i], grad.transpose(1, 2).contiguous()
                parts.append(part)
            _walk(ring, parts, _Backward)
            return None, None, *(g.to(part.q.dtype).transpose(1, 2) for part in parts for g in part.grads)


class _Part:
    """One part of a layer at work. Heads before slots: q, y, grad (B, H, S, P), k, v (B, G, S, P), lse (B, H, S)."""

    def __init__(self, asked: Asked, ring: Ring, q: Tensor, k: Tensor, v: Tensor):
        self.asked, self.rank = asked, ring.rank
        self.q, self.k, self.v = q.contiguous(), k.contiguous(), v.contiguous()
        slot = torch.arange(asked.sizes[ring.rank], device=q.device)
        self.own = torch.where(slot < asked.n_own[:, None], asked.document[:, : len(slot)], -1)  # documents of keys for others

    def forward_own(self) -> None:
        """y and lse of the shard's own keys, and of the cache's."""
        y, self.lse = attend_block(self.q, self.k, self.v, *self.own_mask())
        self.y = y.to(self.lse.dtype)
        if self.asked.cache is not None:
            keys, values, document = self.asked.cache
            mask = _same(self.asked.document, document)
            seen = attend_block(self.q, keys.transpose(1, 2).to(self.k.dtype), values.transpose(1, 2).to(self.v.dtype), mask)
            self.y, self.lse = merge(self.y, self.lse, *seen)

    def backward_own(self) -> None:
        """grads, of q, k and v, in lse's dtype. The cache takes none."""
        q, k, v = attend_block_backward(self.grad, self.q, self.k, self.v, self.y, self.lse, *self.own_mask())
        if self.asked.cache is not None:
            keys, values, document = (t.transpose(1, 2).to(q.dtype) if t.is_floating_point() else t for t in self.asked.cache)
            q = q + attend_block_backward(
                self.grad, self.q, keys, values, self.y, self.lse, _same(self.asked.document, document)
            )[0]
        self.grads = [t.to(self.lse.dtype) for t in (q, k, v)]

    def own_mask(self) -> tuple[Mask | None, bool]:
        if self.asked.single:
            return None, True
        document = self.asked.document
        at = torch.arange(document.shape[1], device=document.device)

        def seen(low: int, high: int) -> Tensor:
            query = at[low:high, None]
            same = document[:, low:high, None] == document[:, None]
            return ((same & (at <= query)) | (at == query))[:, None]  # slots not in use see themselves

        return seen, False


def _same(queries: Tensor, keys: Tensor) -> Mask:
    """Those of one document, which are numbered from 0: negative numbers are slots not in use."""
    return lambda low, high: ((queries[:, low:high, None] == keys[:, None]) & (keys[:, None] >= 0))[:, None]


class _Job:
    """What one pair of shards needs of one part. `spans`: see `Asked`."""

    def __init__(self, part: _Part, pair: Pair):
        self.part, (self.later, self.earlier, self.at) = part, pair
        self.helped = self.at == self.earlier  # the later shard's queries come to the keys
        self.spans = part.asked.spans(self.earlier, self.later)
        if self.spans is not None:
            queries, first, self.all_seen = self.spans
            self.queries, self.keys = slice(0, queries), slice(first, part.asked.sizes[self.earlier])
            self.lengths = queries, part.asked.sizes[self.earlier] - first
            self.source, self.target = (self.later, self.earlier) if self.helped else (self.earlier, self.later)

    def form(self, like: Tensor, length: int, dtype: torch.dtype | None = None) -> Form:
        return (*like.shape[:2], length, *like.shape[3:]), dtype or like.dtype

    def documents(self) -> list[Tensor]:
        part = self.part
        return [] if self.all_seen else [(part.asked.document[:, self.queries] if self.helped else part.own[:, self.keys]).int()]

    def document_forms(self, length: int) -> list[Form]:
        return [] if self.all_seen else [((len(self.part.q), length), torch.int32)]

    def mask(self, received: list[Tensor]) -> Mask | None:
        """received: what came, the documents last."""
        if self.all_seen:
            return None
        if self.helped:
            return _same(received[-1], self.part.own[:, self.keys])
        return _same(self.part.asked.document[:, self.queries], received[-1])


class _Forward(_Job):
    own = _Part.forward_own

    def sent(self) -> list[Tensor]:
        part = self.part
        if self.helped:
            return [part.q[:, :, self.queries], *self.documents()]
        return [part.k[:, :, self.keys], part.v[:, :, self.keys], *self.documents()]

    def coming(self) -> list[Form]:
        part, (queries, keys) = self.part, self.lengths
        if self.helped:
            return [self.form(part.q, queries), *self.document_forms(queries)]
        return [self.form(part.k, keys), self.form(part.v, keys), *self.document_forms(keys)]

    def work(self, received: list[Tensor]) -> list[Tensor]:
        """What is to go back."""
        part, mask = self.part, self.mask(received)
        if self.helped:
            return list(attend_block(received[0], part.k[:, :, self.keys], part.v[:, :, self.keys], mask))
        self.take(list(attend_block(part.q[:, :, self.queries], *received[:2], mask)))
        return []

    def answer(self) -> list[Form]:
        part, queries = self.part, self.lengths[0]
        return [self.form(part.q, queries), self.form(part.lse, queries)] if self.helped else []

    def take(self, answer: list[Tensor]) -> None:
        part, rows = self.part, self.queries
        part.y[:, :, rows], part.lse[:, :, rows] = merge(part.y[:, :, rows], part.lse[:, :, rows], *answer)


class _Backward(_Job):
    own = _Part.backward_own

    def sent(self) -> list[Tensor]:
        part, rows = self.part, self.queries
        if self.helped:
            return [part.q[:, :, rows], part.y[:, :, rows], part.grad[:, :, rows], part.lse[:, :, rows], *self.documents()]
        return [part.k[:, :, self.keys], part.v[:, :, self.keys], *self.documents()]

    def coming(self) -> list[Form]:
        part, (queries, keys) = self.part, self.lengths
        if self.helped:
            three = [self.form(part.q, queries, t.dtype) for t in (part.q, part.y, part.grad)]
            return [*three, self.form(part.lse, queries), *self.document_forms(queries)]
        return [self.form(part.k, keys), self.form(part.v, keys), *self.document_forms(keys)]

    def work(self, received: list[Tensor]) -> list[Tensor]:
        part, mask, rows = self.part, self.mask(received), self.queries
        if self.helped:
            q, y, grad, lse = received[:4]
            grad_q, *grads = attend_block_backward(grad, q, part.k[:, :, self.keys], part.v[:, :, self.keys], y, lse, mask)
            self.add(grads, (1, 2), self.keys)
            return [grad_q]
        mine = (t[:, :, rows] for t in (part.y, part.lse))
        grad_q, *grads = attend_block_backward(part.grad[:, :, rows], part.q[:, :, rows], *received[:2], *mine, mask)
        self.add([grad_q], (0,), rows)
        return grads

    def answer(self) -> list[Form]:
        part, (queries, keys) = self.part, self.lengths
        return [self.form(part.q, queries)] if self.helped else [self.form(part.k, keys), self.form(part.v, keys)]

    def take(self, answer: list[Tensor]) -> None:
        if self.helped:
            self.add(answer, (0,), self.queries)
        else:
            self.add(answer, (1, 2), self.keys)

    def add(self, grads: list[Tensor], which: tuple[int, ...], rows: slice) -> None:
        for i, grad in zip(which, grads):
            self.part.grads[i][:, :, rows] += grad


def _walk(ring: Ring, parts: list[_Part], kind: type[_Job]) -> None:
    """The shard's own keys, then all steps. While a block is worked on the next is under way, and what the last one sent back."""
    plan = [[job for pair in step for part in parts if (job := kind(part, pair)).spans is not None] for step in steps(ring.size)]
    plan = [jobs for jobs in plan if jobs]  # the same on all ranks, as all know which documents shards share
    deliver = lambda jobs: _send(ring, [(job, job.source, job.target, job.sent, job.coming) for job in jobs])
    coming, going_back = deliver(plan[0]) if plan else None, None
    for part in parts:
        kind.own(part)
    for jobs, following in zip(plan, [*plan[1:], []]):
        received, coming = coming(), deliver(following) if following else None
        answers = {job: job.work(tensors) for job, tensors in received}
        if going_back:
            _take(going_back)
        back = [(job, job.target, job.source, partial(answers.get, job), job.answer) for job in jobs if job.answer()]
        going_back = _send(ring, back) if back else None
    if going_back:
        _take(going_back)


def _take(going_back: Callable[[], list[tuple[_Job, list[Tensor]]]]) -> None:
    for job, tensors in going_back():
        job.take(tensors)


def _send(ring: Ring, ways: list[tuple]) -> Callable[[], list[tuple[_Job, list[Tensor]]]]:
    """ways: (job, source, target, its tensors there, their forms here), in one exchange. Returns what waits: for each job whose
    target is here, with what came."""
    blocks, forms = [[] for _ in range(ring.size)], [[] for _ in range(ring.size)]
    expected = []
    for job, source, target, tensors, coming in ways:
        if ring.rank == source:
            blocks[target] += tensors()
        if ring.rank == target:
            forms[source] += (mine := coming())
            expected.append((job, source, len(mine)))
    swap = ring.swap(blocks, forms, ways[0][0].part.q.device)

    def wait() -> list[tuple[_Job, list[Tensor]]]:
        received = [iter(block) for block in swap()]
        return [(job, [next(received[source]) for _ in range(count)]) for job, source, count in expected]

    return wait
