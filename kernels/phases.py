"""A linear recurrence over one shard of a sequence, in phases: something may happen between finding what the shard does to a
state and running it from the state that the shards before it leave."""
from __future__ import annotations

from typing import Callable, NamedTuple

from torch import Tensor


class Phases(NamedTuple):
    """The shard takes the state h before it to decay(span) * h + state.

    state (B, ...): what it leaves of 0. span (B, ...), smaller: spans of shards in sequence add up, infinite where a document
    begins. decay(span): the factors, broadcastable to state; any leading dimensions. These carry no gradients.
    run(h) -> (y, state after, ...): the outputs, differentiable in everything but for what h owes to other shards, and what else
    there is to hand on.
    gradient(saved, grad_y, grad_after): gradient of h as far as this shard's outputs go, for a backward pass that must know it
    before that of `run`. saved: the tensors it needs, for autograd to keep.
    """

    state: Tensor
    span: Tensor
    decay: Callable[[Tensor], Tensor]
    run: Callable[[Tensor], tuple[Tensor, ...]]
    saved: tuple[Tensor | None, ...]
    gradient: Callable[[tuple, Tensor, Tensor | None], Tensor]
