"""One split as an endless row of windows: what window k holds is a function of (index, seed, block size, k).

An epoch joins the shards, in permuted order, into one line of tokens and cuts it into windows of `seq_len` tokens plus one
label token; windows are permuted within blocks. Window k is window `permute(k mod n_windows)` of epoch `k // n_windows`: who
reads it, when, and what was read before do not matter.
"""
from __future__ import annotations

import sys
from bisect import bisect_left, bisect_right
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from data_pipeline.index import Index, mapped_size, open_shard
from data_pipeline.order import derive_key, permutation, permute
from data_pipeline.places import Damage
from serpent_scale.errors import UserError

IGNORE = -100  # label of a token whose successor is not to be learned
OPEN_BYTES = 512 << 20  # of mapped shards and tables of their documents; those used last stay open
MAX_SKIPPED = 32  # damaged shards: more is no accident, and their list is part of the state
ASKED, TABLE = 256, 1 << 20  # windows after which a block's permutation is tabled, and the largest block for that


@dataclass(frozen=True, eq=False)
class OpenShard:
    """A verified shard. data: its tar as tokens; begins (n_documents + 1,): where documents begin, in tokens of this shard;
    element (n_documents,): token t of the shard, in document d, is data[t + element[d]]. size: what its file's size is now.

    Views of memory: single items are read, and stretches of some hundred copied, in a fraction of the time that arrays take.
    """

    data: memoryview
    begins: memoryview
    element: memoryview
    size: Callable[[], int]

    @property
    def nbytes(self) -> int:
        return self.data.nbytes + self.begins.nbytes + self.element.nbytes

    def copy(self, first: int, last: int, line: memoryview, at: int, starts: list[int]) -> None:
        """Copy tokens [first, last) of the shard to line[at:]; appends to starts where in line documents begin."""
        data, begins, element = self.data, self.begins, self.element
        document = bisect_right(begins, first)  # the next one
        shift = element[document - 1]
        if begins[document - 1] == first:
            starts.append(at)
        while (stop := begins[document]) < last:
            end = at + stop - first
            line[at:end] = data[first + shift : stop + shift]
            starts.append(end)
            first, at, shift = stop, end, element[document]
            document += 1
        line[at : at + last - first] = data[first + shift : last + shift]


@dataclass(eq=False)
class Block:
    """Windows [first, stop) of an epoch, permuted among themselves. place: of the first one in its epoch's stored order; key: of
    the permutation, and its table once it is worth one; order, begins: see `Windows._shard_order`."""

    first: int
    stop: int
    place: int
    key: int
    order: list[int]
    begins: list[int]
    table: Sequence[int] | None = None
    asked: int = 0

    def permuted(self, i: int) -> int:
        if self.table is not None:
            return self.table[i]
        self.asked += 1
        n = self.stop - self.first
        if self.asked > ASKED and n <= TABLE:
            self.table = memoryview(permutation(n, self.key))
        return permute(i, n, self.key)


class Windows:
    """The windows of one split.

    A shard is hashed and compared with the index just before its first token is read. If it is damaged, that is a UserError,
    or, with `skip_damaged`, a warning: the shard's number is in `skipped` from then on, what is in it reads as padding, and all
    other tokens keep their places.
    """

    def __init__(self, index: Index, seq_len: int, seed: int | None, shuffle_block: int, skip_damaged: bool = False):
        """seed None: windows in stored order."""
        self.index, self.seq_len, self.seed, self.shuffle_block = index, seq_len, seed, shuffle_block
        self.skip_damaged, self.skipped, self.tokens_skipped = skip_damaged, set(), 0
        self.n_windows = -(-index.tokens // seq_len)
        self._line = index.shard_tokens  # what each shard contributes to the line of an epoch
        self._unit = seq_len  # of which a window is so much
        self._verified: set[int] = set()
        self._opened: OrderedDict[int, OpenShard] = OrderedDict()
        self._epoch: tuple[int, list[int], list[int]] = (-1, [], [])  # its number and `_shard_order`
        self._block = Block(0, 0, 0, 0, [], [])

    def spans(self, k: int, part: int = 0, parts: int = 1) -> list[tuple[int, int, int]]:
        """Where part `part` of `parts` equal ones of window k and its label token lie: (shard, first, last) in tokens of the
        shard, in the order they are joined.

        The cost does not depend on k, nor on what was read before; the first k of an epoch permutes the shards' numbers.
        """
        length = self.seq_len // parts
        at, order, begins = self._at(k)
        at += part * length
        end, place, spans = at + length + 1, bisect_right(begins, at) - 1, []
        while place < len(order):
            begin, stop = begins[place], begins[place + 1]
            if end <= stop:
                spans.append((order[place], at - begin, end - begin))
                break
            spans.append((order[place], at - begin, stop - begin))
            at, place = stop, place + 1
        return spans

    def read(
        self, k: int, line: memoryview, part: int, parts: int, checked: set[int]
    ) -> tuple[list[int], list[tuple[int, int]]]:
        """Write part `part` of window k and its label token into line (seq_len / parts + 1,), of the index's dtype.

        Returns where documents start, ascending, up to the label token's place, and stretches [begin, stop) of line that hold
        padding, each among the starts too. `tokens_skipped` counts. checked: shards of which it was seen, shortly before, that
        their files are whole; those read are added.
        """
        starts, padding, at, size = [], [], 0, len(line)
        for shard, first, last in self.spans(k, part, parts):
            opened, after = self._open(shard, checked), at + last - first
            if opened is None:
                self._pad(line, at, after, starts, padding)
                self.tokens_skipped += min(after, size - 1) - at
            else:
                opened.copy(first, last, line, at, starts)
            at = after
        if at < size:  # the epoch ends in or right after this
            self._pad(line, at, size, starts, padding)
        return starts, padding

    def _pad(self, line: memoryview, begin: int, stop: int, starts: list[int], padding: list[tuple[int, int]]) -> None:
        np.asarray(line)[begin:stop] = self.index.eot_id
        starts.append(begin)
        padding.append((begin, stop))

    def skip(self, shards: Iterable[int]) -> None:
        """Treat these shards as damaged. Raises UserError when they are too many."""
        self.skipped.update(shards)
        for shard in self.skipped & self._opened.keys():
            del self._opened[shard]
        if len(self.skipped) > MAX_SKIPPED:
            raise UserError(f"{self.index.folder}: more than {MAX_SKIPPED} shards are damaged; restore the data")

    def _at(self, k: int) -> tuple[int, list[int], list[int]]:
        """Where window k begins in the line of its epoch, and that epoch's `_shard_order`."""
        block = self._block
        if not block.first <= k < block.stop:
            block = self._block = self._block_of(k)
        return (block.place + block.permuted(k - block.first)) * self._unit, block.order, block.begins

    def _block_of(self, k: int) -> Block:
        if k < 0:
            raise ValueError(f"window {k} is negative")
        epoch, window = divmod(k, self.n_windows)
        order, begins = self._shard_order(epoch)
        if self.seed is None:
            return Block(k - window, k - window + self.n_windows, 0, 0, order, begins, range(self.n_windows))
        number = window // self.shuffle_block
        place = number * self.shuffle_block
        first, size = k - window + place, min(self.shuffle_block, self.n_windows - place)
        if self.index.remote is not None:
            self._prefetch(epoch, number)
        return Block(first, first + size, place, derive_key("windows", self.seed, epoch, number), order, begins)

    def _prefetch(self, epoch: int, number: int) -> None:
        """Ask for the shards of this block and the next one, as far as they fill half the cache."""
        after = (epoch, number + 1) if (number + 1) * self.shuffle_block < self.n_windows else (epoch + 1, 0)
        shards: dict[int, None] = {}
        for at, block in (after, (epoch, number))[::-1]:
            order, begins = self._shard_order(at)
            first, last = block * self.shuffle_block, min((block + 1) * self.shuffle_block, self.n_windows)
            end = min(last * self._unit + 1, begins[-1])
            places = range(bisect_right(begins, first * self._unit) - 1, bisect_left(begins, end))
            shards |= dict.fromkeys(order[place] for place in places)
        files, room = [], self.index.remote.cache.limit // 2
        for file in map(self.index.remote_file, (shard for shard in shards if shard not in self.skipped)):
            room -= file[1]
            if room < 0 and files:
                break
            files.append(file)
        self.index.remote.prefetch(files)

    def _shard_order(self, epoch: int) -> tuple[list[int], list[int]]:
        """Shards in the order of an epoch (n,), and where each begins in its line of tokens (n + 1,)."""
        if self._epoch[0] != epoch:
            n = len(self.index.shards)
            order = np.arange(n) if self.seed is None else permutation(n, derive_key("shards", self.seed, epoch))
            self._epoch = epoch, order.tolist(), [0, *np.cumsum(self._line[order]).tolist()]
        return self._epoch[1:]

    def _open(self, shard: int, checked: set[int]) -> OpenShard | None:
        """None: it is to be skipped."""
        opened = self._opened.get(shard)
        if opened is not None:
            if shard in checked:
                return opened
            # Reading past the end of a file cut since it was mapped would end the process by SIGBUS, without a word.
            if opened.size() == opened.data.nbytes:
                checked.add(shard)
                self._opened.move_to_end(shard)
                return opened
            del self._opened[shard]
            self._verified.discard(shard)
        if shard in self.skipped:
            return None
        try:
            data = open_shard(self.index, shard, verified=shard in self._verified)
        except Damage as error:
            if not self.skip_damaged:
                raise
            text = f"warning: {error}; skipped, its {self.index.shards[shard].tokens:,} tokens are left out"
            print(text, file=sys.stderr, flush=True)
            self.skip([shard])
            return None
        self._verified.add(shard)
        documents = self.index.rows(shard)
        begins = np.concatenate([[0], np.cumsum(documents[:, 2])])
        element = documents[:, 1] // self.index.dtype.itemsize - begins[:-1]
        opened = OpenShard(*map(memoryview, (data, begins, element)), mapped_size(data))
        self._opened[shard] = opened
        while len(self._opened) > 1 and sum(other.nbytes for other in self._opened.values()) > OPEN_BYTES:
            self._opened.popitem(last=False)
        return opened
