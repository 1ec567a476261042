"""Where documents begin in a batch of packed sequences."""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

FAR = 1 << 40  # tokens since a document start that lies before the batch


@dataclass(frozen=True)
class Documents:
    """Documents in rows of L tokens.

    reset (B, L) bool: True at the first token of a document; False at token 0 continues the state handed in.
    lengths: per row, on the host, the lengths of its pieces of documents, in order, summing to L. They bound how many
    elements a row can emit, without asking the device.
    live (B, L) bool: True at slots in use, which come first in each row; None if all are.
    since_reset (B, L) int64: tokens since the document's first token, at least FAR where that lies before the batch.
    n_live (B,) int64: slots in use per row, None if all are. These two follow from the others, for whom does not know them yet.
    pieces: at most so many pieces of documents in a row, on the host; None: not known there, `lengths` not being given.
    lessons: where branches of a layer leave what the loss is to teach them (`teaching.Lessons`); None: nobody reads it.
    shard: what is to be known where the rows are pieces of longer ones whose other pieces are elsewhere, None if they are not.
    """

    reset: Tensor
    lengths: tuple[tuple[int, ...], ...] = ()
    live: Tensor | None = None
    since_reset: Tensor | None = None
    n_live: Tensor | None = None
    pieces: int | None = None
    shard: Shard | None = None
    lessons: list | None = None

    def __post_init__(self):
        if self.pieces is None and self.lengths:
            object.__setattr__(self, "pieces", max(map(len, self.lengths)))
        if self.since_reset is None:
            at = torch.arange(self.reset.shape[1], device=self.reset.device).expand_as(self.reset)
            object.__setattr__(self, "since_reset", at - torch.where(self.reset, at, -FAR).cummax(1).values)
        if self.n_live is None and self.live is not None:
            object.__setattr__(self, "n_live", self.live.sum(1))

    @classmethod
    def whole(cls, batch: int, length: int, device=None) -> Documents:
        """Each row one document, or the continuation of one."""
        return cls(torch.zeros(batch, length, dtype=torch.bool, device=device), ((length,),) * batch)

    def to(self, device) -> Documents:
        live = None if self.live is None else self.live.to(device, non_blocking=True)
        return Documents(self.reset.to(device, non_blocking=True), self.lengths, live, pieces=self.pieces)

    @property
    def in_use(self) -> Tensor:
        """(B,) int64 slots in use per row."""
        batch, length = self.reset.shape
        return torch.full((batch,), length, device=self.reset.device) if self.n_live is None else self.n_live

    def most_pieces(self) -> int:
        """`pieces`; the device is asked where they are not known."""
        return 1 + int(self.reset[:, 1:].sum(1).max()) if self.pieces is None else self.pieces

    def part(self, begin: int, end: int, shard: Shard | None = None) -> Documents:
        """Those of tokens begin .. end - 1 of each row, of which all slots are in use."""
        columns = slice(begin, end)
        lengths = tuple(_cut(row, begin, end) for row in self.lengths)
        return Documents(self.reset[:, columns], lengths, since_reset=self.since_reset[:, columns], shard=shard)

    def around(self, before: int) -> Documents:
        """Those of a shard's tokens and of the `before` tokens that precede them, which another shard holds."""
        begin, length = self.shard.begin, self.reset.shape[1]
        return self.shard.whole.part(begin - before, begin + length)

    def capacity(self, rate: int, band: int, ticks: int) -> int:
        """Slots enough for the elements any row can emit with a clock of `rate` ticks a token that keeps within `band` ticks.

        Any W consecutive tokens of one document emit at most floor((rate W + 2 band) / ticks) + 1 elements.
        """
        return _capacity(self.lengths, rate, band, ticks)


@dataclass(frozen=True)
class Shard:
    """Where a piece of longer rows comes from, for a model that works on it together with whoever holds the rest.

    whole: the documents of the rows; begin: the rows' token that is the piece's first; number: the piece's among all.
    sizes(): slots in which each of the pieces holds what is its own, of tokens or of the elements of a branch.
    mix(mixer, x, documents, state): the mixer's outputs at this piece's tokens, and its state after them, see `Mixer.begin_all`.
    emitted(n (B,) int64): told how many elements each branch of a SeRpEnt layer emitted at this piece's tokens.
    """

    whole: Documents
    begin: int
    number: int
    sizes: Callable[[], tuple[int, ...]]
    mix: Callable
    emitted: Callable[[Tensor], None]


def _cut(lengths: tuple[int, ...], begin: int, end: int) -> tuple[int, ...]:
    """The lengths of what tokens begin .. end - 1 hold of pieces of these lengths."""
    found, at = [], 0
    for length in lengths:
        held = min(at + length, end) - max(at, begin)
        if held > 0:
            found.append(held)
        at += length
    return tuple(found)


@lru_cache(maxsize=64)
def _capacity(lengths: tuple[tuple[int, ...], ...], rate: int, band: int, ticks: int) -> int:
    """Remembered, as every layer asks. Large ones in multiples of 16 or more, so that rows begin aligned and few shapes
    differ: of the largest power of two up to 1/32 of them."""
    slots = max(sum(min(w, (rate * w + 2 * band) // ticks + 1) for w in row) for row in lengths)
    unit = 1 if slots <= 64 else max(16, 1 << (slots.bit_length() - 6))
    return -(-slots // unit) * unit
