"""What a mixer is to the stack, to SeRpEnt and to the accounting. `mixers.py` knows them by name."""
from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from serpent_scale.errors import UserError
from serpent_scale.kernels.phases import Phases
from serpent_scale.model.documents import Documents


class Asked(NamedTuple):
    """Queries, and keys and values for those of later shards, where no state sums up what is before a shard (attention).

    q (B, S, H, P); k, v (B, S, G, P). document (B, S) int64: of all that the rows hold, the one that a slot is of; -1 where the
    slot is not in use. A query sees the keys of its document that are not after it. single: all slots of this shard are in use,
    by one document. n_own (B,): the first slots, whose keys are for later shards too; in sizes[i] slots, of shard i. cache: keys,
    values (B, C, G, P) and document (B, C) of before the rows, or None.
    spans(earlier, later): what those two shards share, (n, m, all): the first n queries of the later and the keys from m on of
    the earlier, and whether each of those sees all of these; None if nothing. The same on all shards.
    told: what all shards are to be told, of equal sizes on all, if anything.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    document: Tensor
    n_own: Tensor
    sizes: tuple[int, ...]
    single: bool
    cache: tuple[Tensor, Tensor, Tensor] | None
    spans: Callable[[int, int], tuple[int, int, bool] | None]
    told: list[Tensor]


class Begun(NamedTuple):
    """A mixer at work on a shard: its scan in phases, or the attention it asks for, and what is left to do then.

    finish(y, ...) -> (outputs, the mixer's state), from what phases.run returned or from the attention's y and what shards told
    (P, ...) each. Of scans alone: initial, the state before the whole rows, None if it is 0; meanwhile(), work that need not
    wait for the state before the shard.
    """

    phases: Phases | Asked
    initial: Tensor | None
    finish: Callable[..., tuple[Tensor, Any]]
    meanwhile: Callable[[], None] = lambda: None


class Mixer(nn.Module):
    """Mixes tokens causally and with a state of constant size (attention: a cache of the document): (B, L, d_in) ->
    (B, L, d_out), by d_inner inner channels.

    config is the mixer's own section of the model's configuration; it has `expand`.
    """

    has_phases = True  # or else `begin` asks for attention, and outputs of all that the shard holds follow from it
    fixed_shapes = True  # inside a pass they depend on documents by the slots of compressed branches alone

    def __init__(self, d_in: int, d_inner: int, d_out: int, config: Any):
        super().__init__()

    def forward(self, x: Tensor, documents: Documents, state: Any = None) -> tuple[Tensor, Any]:
        """x (B, L, d_in) -> (y (B, L, d_out), state after x), any L. state: what an earlier piece of the rows returned.

        The state is dropped where documents.reset is True. Slots that are not live leave the state as it is; their outputs
        mean nothing.
        """
        raise NotImplementedError

    @property
    def out_projs(self) -> list[nn.Linear]:
        """The linear maps whose outputs it adds to the residual stream."""
        return [self.out_proj]

    @staticmethod
    def together(mixers: list[Mixer], xs: list[Tensor], documents: list[Documents]) -> list[tuple[Tensor, Any]]:
        """What each mixer, all of this class, makes of its own rows from no state; in common launches where the class has some."""
        return [mixer(x, d) for mixer, x, d in zip(mixers, xs, documents)]

    # What follows serves rows that are cut into shards (serpent_scale/parallel/sequence.py): the forward pass in parts,
    # between which the shards' holders exchange what each needs of the others.

    @property
    def reach(self) -> int:
        """Tokens before a shard whose inputs its outputs need, beyond what the state says of them."""
        raise UserError(f"parallel.sequence: {type(self).__name__} has no form for shards of a sequence; set parallel.sequence=1")

    def begin(self, x: Tensor, before: Tensor, documents: Documents, state: Any = None) -> Begun:
        """x (B, L, d_in), a shard; before (B, n, d_in): the n <= reach tokens before it, fewer only where the rows begin there;
        state: before the whole rows."""
        raise NotImplementedError

    def outline(self, x: Tensor, documents: Documents, ends: list[int]) -> Tensor | None:
        """(len(ends), ...) int64: what shards after this one must know of its first `end` tokens, for each of ends."""
        return None

    def rounds(
        self, x: Tensor, before: Tensor, outlines: list[Tensor], documents: Documents, state: Any = None
    ) -> Generator[list[Begun], list[tuple[Tensor, Any]], tuple[Tensor, Any]]:
        """The layer on a shard: yields what has begun and waits for an exchange, is sent what that finished with, and so on, and
        returns outputs and state. outlines: the earlier shards', in order."""
        finished = yield [self.begin(x, before, documents, state)]
        return finished[0]

    @staticmethod
    def width(d_model: int, config: Any) -> int:
        """d_inner of a layer of its own."""
        return int(config.expand * d_model)

    @staticmethod
    def width_unit(config: Any) -> int:
        """d_inner is a multiple of this."""
        return 1

    @staticmethod
    def parameter_count(d_in: int, d_inner: int, d_out: int, config: Any) -> int:
        raise NotImplementedError

    @staticmethod
    def flops(d_in: int, d_inner: int, d_out: int, config: Any, length: int) -> tuple[float, float]:
        """Forward FLOPs per token, in rows of `length` tokens: (matrix products, the rest)."""
        raise NotImplementedError

    @staticmethod
    def kept_bytes(d_inner: int, config: Any, itemsize: int) -> float:
        """What a GPU keeps of one token for the backward pass, the input left out."""
        raise NotImplementedError


def to_front(x: Tensor, documents: Documents) -> tuple[Tensor, Documents, Callable[[Tensor], Tensor]]:
    """x (B, L, d) and its documents with the slots in use first in each row, where a shard of compressed rows has others before
    them; and what moves outputs (B, L, ...) back. For mixers whose reach is 0: they read nothing of those others."""
    if documents.live is None:
        return x, documents, lambda y: y
    at, shard = torch.arange(x.shape[1], device=x.device), documents.shard
    n_live = documents.live.sum(1)
    first = (documents.n_live - n_live)[:, None]
    forth, back = (at + first).clamp(max=x.shape[1] - 1), (at - first).clamp(min=0)
    live = at < n_live[:, None]
    moved = replace(
        documents, reset=documents.reset.gather(1, forth) & live, live=live, n_live=n_live,
        since_reset=documents.since_reset.gather(1, forth), shard=replace(shard, tokens=shard.tokens.gather(1, forth)),
    )
    return at_slots(x, forth), moved, lambda y: at_slots(y, back)


def at_slots(x: Tensor, index: Tensor) -> Tensor:
    """x (B, S, d), index (B, J) int64 -> x[b, index[b, j]] (B, J, d)."""
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[2]))


def halo(given: Tensor | None, rows: Tensor, size: int) -> Tensor:
    """The last `size` of the rows (B, n, d), which `given` (B, size, d) precedes, or zeros."""
    if given is None:
        given = rows.new_zeros(len(rows), size, rows.shape[2])
    return torch.cat([given[:, rows.shape[1] :].to(rows.dtype), rows], 1)
