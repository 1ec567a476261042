"""What the ranks that hold the shards of a sequence tell each other, in as few messages as there are moments to wait.

Two exchanges, each with its own in the backward pass: `RowsBefore`, the inputs just before each shard and integers of all earlier
ones; and `states_before` with `Continue`, the states of all shards to all ranks. Their sizes do not depend on the length of the
sequence. Where no state sums up what is before a shard `attention.py` stands for the second.
"""
from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from serpent_scale.kernels.phases import Phases

Form = tuple[tuple[int, ...], torch.dtype]


@dataclass
class Traffic:
    """What this rank has sent to others so far, not counting what CUDA graphs repeat."""

    exchanges: int = 0
    bytes: int = 0

    def count(self, sent: int) -> None:
        self.exchanges += 1
        self.bytes += sent


class Ring:
    """The ranks of one sequence, in its order."""

    def __init__(self, group: dist.ProcessGroup):
        self.group, self.rank, self.size = group, dist.get_rank(group), dist.get_world_size(group)
        self.traffic = Traffic()

    def swap(
        self, blocks: list[list[Tensor]], forms: list[list[Form]], device: torch.device
    ) -> Callable[[], list[list[Tensor]]]:
        """blocks[q] goes to rank q. Returns at once, and what waits: for what came from each rank, as forms[q] says."""
        sent = _bytes([t for block in blocks for t in block], device)
        sizes = [sum(map(_size, block)) for block in forms]
        sent_sizes = [sum(t.numel() * t.element_size() for t in block) for block in blocks]
        received = torch.empty(sum(sizes), dtype=torch.uint8, device=device)
        under_way = dist.all_to_all_single(received, sent, sizes, sent_sizes, group=self.group, async_op=True)
        self.traffic.count(sum(sent_sizes) - sent_sizes[self.rank])

        def wait(sent: Tensor = sent) -> list[list[Tensor]]:  # which is kept until then
            under_way.wait()
            return [_tensors(part, block) for part, block in zip(received.split(sizes), forms)]

        return wait

    def gather(self, tensors: list[Tensor], meanwhile: Callable[[], None] = lambda: None) -> list[Tensor]:
        """Each with a leading dimension for the ranks, (P, ...). They share a dtype, complex ones that of their parts. meanwhile()
        is called with the message under way."""
        reals = [torch.view_as_real(t.resolve_conj()) if t.is_complex() else t for t in tensors]
        flat = torch.cat([t.flatten() for t in reals])
        out = flat.new_empty(self.size * len(flat))
        under_way = dist.all_gather_into_tensor(out, flat, group=self.group, async_op=True)
        meanwhile()
        under_way.wait()
        self.traffic.count((self.size - 1) * flat.numel() * flat.element_size())
        parts = out.view(self.size, -1).split([t.numel() for t in reals], 1)
        parts = [part.unflatten(1, t.shape) for part, t in zip(parts, reals)]
        return [torch.complex(*part.unbind(-1)) if t.is_complex() else part for part, t in zip(parts, tensors)]

    def of_last(self, tensors: list[Tensor]) -> list[Tensor]:
        """The last rank's, on all. Elsewhere they may have other sizes, of as many dimensions."""
        device, last = tensors[0].device, self.rank == self.size - 1
        sizes = torch.tensor([n for t in tensors for n in t.shape], device=device)
        dist.broadcast(sizes, group=self.group, group_src=self.size - 1)
        shapes, forms = iter(sizes.tolist()), []
        for t in tensors:
            forms.append((tuple(next(shapes) for _ in t.shape), t.dtype))
        data = _bytes(tensors, device) if last else torch.empty(sum(map(_size, forms)), dtype=torch.uint8, device=device)
        dist.broadcast(data, group=self.group, group_src=self.size - 1)
        return _tensors(data, forms)


def _size(form: Form) -> int:
    shape, dtype = form
    return math.prod(shape) * dtype.itemsize


def _bytes(tensors: list[Tensor], device: torch.device) -> Tensor:
    # A single element may be called contiguous whatever its stride.
    nothing = torch.empty(0, dtype=torch.uint8, device=device)
    return torch.cat([nothing, *(t.contiguous().as_strided((t.numel(),), (1,)).view(torch.uint8) for t in tensors)])


def _tensors(data: Tensor, forms: list[Form]) -> list[Tensor]:
    # A copy begins at an address that is fit for the dtype.
    parts = data.split(list(map(_size, forms)))
    return [part.clone().view(dtype).view(shape) for part, (shape, dtype) in zip(parts, forms)]


class RowsBefore(torch.autograd.Function):
    """x (B, L, d) -> (x, the `reach` tokens before it or as many as there are (B, n, d), outlines of all earlier shards).

    Rows go straight to where they are needed, from several shards where one is shorter than the reach. The backward pass sends
    their gradients back.
    """

    @staticmethod
    def forward(ctx, x, ring: Ring, borders: list[int], reach: int, outline: Tensor | None):
        """borders: where shards begin, and the end. outline (P, ...): what to tell each rank; of later ones it reaches."""
        ctx.ring, ctx.silent = ring, reach == 0 and outline is None
        if ctx.silent:
            return x, x.new_empty(len(x), 0, x.shape[2]), None
        p, begin = ring.rank, borders[ring.rank]
        wanted = [(max(0, a - reach), a) for a in borders[:-1]]  # of the rows, by each rank
        sends = [_overlap(wanted[q], borders[p : p + 2]) for q in range(ring.size)]
        comes = [_overlap(wanted[p], borders[q : q + 2]) for q in range(ring.size)]
        blocks = [[x[:, lo - begin : hi - begin]] for lo, hi in sends]
        forms = [[((len(x), hi - lo, x.shape[2]), x.dtype)] for lo, hi in comes]
        if outline is not None:
            for q in range(ring.size):
                if q > p:
                    blocks[q].insert(0, outline[q])
                if q < p:
                    forms[q].insert(0, (outline[q].shape, outline.dtype))
        received = ring.swap(blocks, forms, x.device)()
        ctx.sends, ctx.comes, ctx.begin = sends, comes, begin
        before = torch.cat([block[-1] for block in received], 1)
        outlines = torch.stack([block[0] for block in received[:p]]) if outline is not None and p else None
        if outlines is not None:
            ctx.mark_non_differentiable(outlines)
        return x, before, outlines

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_x, grad_before, _):
        if ctx.silent:
            return grad_x, None, None, None, None
        begin, sizes = ctx.begin, [hi - lo for lo, hi in ctx.comes]
        blocks = [[part] for part in grad_before.split(sizes, 1)]
        forms = [[(grad_x[:, lo - begin : hi - begin].shape, grad_x.dtype)] for lo, hi in ctx.sends]
        grad_x = grad_x.clone()
        for (lo, hi), (grad,) in zip(ctx.sends, ctx.ring.swap(blocks, forms, grad_x.device)()):
            if hi > lo:
                grad_x[:, lo - begin : hi - begin] += grad
        return grad_x, None, None, None, None


def _overlap(wanted: tuple[int, int], held: list[int]) -> tuple[int, int]:
    lo, hi = max(wanted[0], held[0]), min(wanted[1], held[1])
    return lo, max(lo, hi)


@torch.no_grad()
def states_before(
    ring: Ring, phases: list[Phases], initial: list[Tensor | None], meanwhile: Callable[[], None]
) -> tuple[list[Tensor], list[Tensor]]:
    """The state before this shard, for each scan, and the spans of all shards (P, ...). initial: before the whole rows."""
    gathered = ring.gather([t for part in phases for t in (part.state, part.span.to(part.state.real.dtype))], meanwhile)
    found, spans = [], gathered[1::2]
    for part, states, span, given in zip(phases, gathered[::2], spans, initial):
        if given is not None:
            states, span = torch.cat([given[None].to(states.dtype), states]), torch.cat([torch.zeros_like(span[:1]), span])
        found.append(_carried(part, states, span, ring.rank + (given is not None)))
    return found, spans


def _carried(part: Phases, states: Tensor, spans: Tensor, n: int) -> Tensor:
    """What the first n of a line of shards leave, each its state (P, ...), for the one after them."""
    if n == 0:
        return torch.zeros_like(part.state)
    between = torch.zeros_like(spans[:n])  # spans of the shards after each
    between[:-1] = spans[1:n].flip(0).cumsum(0).flip(0)
    return (part.decay(between) * states[:n]).sum(0)


class Continue(torch.autograd.Function):
    """(ring, phases, spans, y and state after of each scan, what its `Phases.saved` holds) -> y and state after of each.

    Changes nothing. In the backward pass it finds what this shard's outputs want of the state before it, tells the earlier ones,
    and adds to the gradient of each state after what the later ones want of it; the scan's own backward pass follows.
    """

    @staticmethod
    def forward(ctx, ring, phases, spans, *tensors):
        n = len(phases)
        ctx.set_materialize_grads(False)
        ctx.ring, ctx.spans = ring, spans
        ctx.parts = [(part.decay, part.gradient, len(part.saved)) for part in phases]
        ctx.save_for_backward(*tensors)
        return tensors[: 2 * n]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *grads):
        ring, tensors, n = ctx.ring, ctx.saved_tensors, len(ctx.parts)
        outputs, saved, wanted = tensors[: 2 * n], tensors[2 * n :], []
        for i, (_, gradient, count) in enumerate(ctx.parts):
            grad_y, grad_after = grads[2 * i : 2 * i + 2]
            kept, saved = saved[:count], saved[count:]
            wanted.append(gradient(kept, torch.zeros_like(outputs[2 * i]) if grad_y is None else grad_y, grad_after))
        found = list(grads)
        for i, all_wanted in enumerate(ring.gather(wanted)):
            later, spans = all_wanted[ring.rank + 1 :], ctx.spans[i][ring.rank + 1 :]
            if len(later):
                between = torch.zeros_like(spans)
                between[1:] = spans[:-1].cumsum(0)
                carried = (ctx.parts[i][0](between).conj() * later).sum(0).to(outputs[2 * i + 1].dtype)
                after = found[2 * i + 1]
                found[2 * i + 1] = carried if after is None else after + carried
        return None, None, None, *found, *(None,) * (len(tensors) - 2 * n)
