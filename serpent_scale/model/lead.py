"""Mixers on a shard's elements, of which each scan begins and ends a lead of tokens early. Legend: B rows, S slots.

What looks back on elements before the shard (a read-out, the next block's convolution) finds them here: those of the lead before
the shard are formed again, from their tokens. What is emitted in the shard's own last lead follows from the state there, as in
generation, and is what the next shard's scan begins with. Which of the two forms an element is in depends on its token alone:
later ones must not move an output by a bit.
"""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from serpent_scale.model.documents import Documents
from serpent_scale.model.mixer import Begun, Mixer, at_slots


@dataclass(frozen=True)
class Elements:
    """Elements of a shard's tokens and of the tokens before it, in S slots a row, those in use first.

    documents: of the slots; tokens: of the tokens, with the shard that the last of them are; emitter (B, S) int: the one that
    each slot is of; emitted(n): (B,) int64 elements of the first n tokens, of 0 if n < 0; room(documents): slots enough for the
    elements of such tokens.
    """

    documents: Documents
    tokens: Documents
    emitter: Tensor
    emitted: Callable[[int], Tensor]
    room: Callable[[Documents], int]

    @classmethod
    def all_tokens(cls, tokens: Documents) -> Elements:
        batch, length = tokens.reset.shape
        count = lambda n: torch.full((batch,), max(0, n), device=tokens.reset.device)
        at = torch.arange(length, device=tokens.reset.device).expand(batch, -1)
        return cls(replace(tokens, n_live=count(length), shard=None), tokens, at, count, tokens.shard.room)

    def begin(self, mixer: Mixer, x: Tensor, lead: int, state: Any) -> Begun:
        """x (B, S, d). Outputs (B, S, d_out) are those of the elements from `lead` tokens before the shard on, where inputs are
        right from the mixer's reach before those on; the others are finite."""
        shard, end = self.tokens.shard, self.tokens.reset.shape[1]
        own = end - (shard.borders[shard.number + 1] - shard.begin)
        first, last = self.emitted(own - lead), self.emitted(end - lead)
        slot, elements = torch.arange(x.shape[1], device=x.device), self.documents
        until = last if mixer.has_phases else elements.in_use
        live = (slot >= first[:, None]) & (slot < until[:, None])
        shard = replace(shard, lead=lead, room=self.room, tokens=shard.begin - own + self.emitter.long())
        documents = replace(elements, reset=elements.reset & live, live=live, n_live=until, shard=shard)
        begun = mixer.begin(x, x[:, :0], documents, state)
        if not mixer.has_phases:
            return begun
        at_end = self.tokens.part(max(0, end - lead), end)

        def finish(*ran: Tensor) -> tuple[Tensor, Any]:
            y, state = begun.finish(*ran)
            if not lead:
                return y, state
            tail = last[:, None] + slot[: self.room(at_end)]
            live = tail < elements.in_use[:, None]
            documents = Documents(
                elements.reset.gather(1, tail) & live, live=live, since_reset=elements.since_reset.gather(1, tail),
                pieces=at_end.pieces,
            )
            y_tail, state = mixer(at_slots(x, tail), documents, state)
            return y.scatter(1, tail[..., None].expand_as(y_tail), y_tail.to(y.dtype)), state

        return Begun(begun.phases, begun.initial, finish, begun.meanwhile)
