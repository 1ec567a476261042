"""One split as an endless row of windows: what window k holds is a function of (index, seed, block size, k).

An epoch joins the shards, in permuted order, into one line of tokens and cuts it into windows of `seq_len` tokens plus one
label token; windows are permuted within blocks. Window k is window `permute(k mod n_windows)` of epoch `k // n_windows`: who
reads it, when, and what was read before do not matter.
"""
from __future__ import annotations

import sys
from bisect import bisect_left, bisect_right
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from data_pipeline.index import Index, mapped_size, open_shard
from data_pipeline.order import derive_key, permutation, permute
from data_pipeline.places import Damage
from serpent_scale.errors import UserError

IGNORE = -100  # label of a token whose successor is not to be learned
OPEN_BYTES = 512 << 20  # of mapped shards and tables of their documents; those used last stay open
MAX_SKIPPED = 32  # damaged shards: more is no accident, and their list is part of the state
ASKED, TABLE = 256, 1 << 20  # calls after which a block's permutation is tabled, and the largest block for that
FEW = 16  # pieces of documents up to which a copy each is faster than one gather


@dataclass(frozen=True, eq=False)
class OpenShard:
    """A verified shard. data: its tar as tokens; begins (n_documents + 1,): where documents begin, in tokens of this shard;
    element (n_documents,): token t of the shard, in document d, is data[t + element[d]]. size: what its file's size is now."""

    data: np.ndarray
    begins: np.ndarray
    element: np.ndarray
    size: Callable[[], int]

    @cached_property
    def views(self) -> tuple[memoryview, memoryview]:
        """begins and element, of which single items are read in a tenth of the time that an array takes."""
        return memoryview(self.begins), memoryview(self.element)

    @property
    def nbytes(self) -> int:
        return self.data.nbytes + self.begins.nbytes + self.element.nbytes


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
        self._epoch: tuple[int, list[int], list[int]] | None = None
        self._block = (-1, -1, 0, 0, 0)  # epoch, number, first window, windows, key
        self._table, self._asked = None, 0  # of the block's permutation, once it is asked for often enough

    def _at(self, k: int, part: int, length: int) -> tuple[int, list[int], list[int]]:
        """(place of the first token in its epoch's line, `_shard_order`) of part `part` of window k, parts of `length` tokens."""
        if k < 0:
            raise ValueError(f"window {k} is negative")
        epoch, window = divmod(k, self.n_windows)
        if self._epoch is None or self._epoch[0] != epoch:
            self._permute_shards(epoch)
        _, order, begins = self._epoch
        return self._permuted(epoch, window) * self.seq_len + part * length, order, begins

    def spans(self, k: int, part: int = 0, parts: int = 1) -> list[tuple[int, int, int]]:
        """Where part `part` of `parts` equal ones of window k and its label token lie: (shard, first, last) in tokens of the
        shard, in the order they are joined.

        The cost does not depend on k, nor on what was read before; the first k of an epoch permutes the shards' numbers.
        """
        length = self.seq_len // parts
        at, order, begins = self._at(k, part, length)
        end = min(at + length + 1, begins[-1])
        place, spans = bisect_right(begins, at) - 1, []
        while at < end:
            begin, stop = begins[place], min(end, begins[place + 1])
            spans.append((order[place], at - begin, stop - begin))
            at, place = stop, place + 1
        return spans

    def read(self, k: int, line: np.ndarray, part: int = 0, parts: int = 1) -> tuple[list[int], list[int], list[int]]:
        """Write part `part` of window k and its label token into line (seq_len / parts + 1,), of the index's dtype.

        Returns ascending starts of documents, the padding of an epoch's last window being one, up to the label token's
        place; and ascending positions t whose label is not line[t + 1], with those labels. `tokens_skipped` counts.
        """
        size = len(line)
        at, order, begins = self._at(k, part, size - 1)
        place = bisect_right(begins, at) - 1
        if place < len(order) and at + size <= begins[place + 1]:  # as nearly all are: in one shard
            opened = self._open(order[place])
            if opened is not None:
                first, starts = at - begins[place], []
                _copy(opened, first, first + size, line, 0, starts)
                ends = [start - 1 for start in starts if start]
                return starts, ends, [IGNORE] * len(ends)
        starts, blank, at = [], [], 0
        for shard, first, last in self.spans(k, part, parts):
            opened, after = self._open(shard), at + last - first
            if opened is None:
                blank.append((at, after))
                self.tokens_skipped += min(after, size - 1) - at
            else:
                _copy(opened, first, last, line[at:after], at, starts)
            at = after
        if at < size:  # the epoch ends in or right after this: what follows is padding
            blank.append((at, size))
        ends = [start - 1 for start in starts if start]
        if blank:
            for begin, stop in blank:
                line[begin:stop] = self.index.eot_id
                starts.append(begin)
                ends += range(max(begin - 1, 0), min(stop, size - 1))
            starts.sort()
            ends = sorted(set(ends))
        return starts, ends, [IGNORE] * len(ends)

    def skip(self, shards: Iterable[int]) -> None:
        """Treat these shards as damaged. Raises UserError when they are too many."""
        self.skipped.update(shards)
        for shard in self.skipped & self._opened.keys():
            del self._opened[shard]
        if len(self.skipped) > MAX_SKIPPED:
            raise UserError(f"{self.index.folder}: more than {MAX_SKIPPED} shards are damaged; restore the data")

    def _permuted(self, epoch: int, window: int) -> int:
        if self.seed is None:
            return window
        block, number = self._block, window // self.shuffle_block
        if block[1] != number or block[0] != epoch:
            begin = number * self.shuffle_block
            size = min(self.shuffle_block, self.n_windows - begin)
            self._block = epoch, number, begin, size, derive_key("windows", self.seed, epoch, number)
            self._table, self._asked = None, 0
            if self.index.remote is not None:
                self._prefetch(epoch, number)
        _, _, begin, size, key = self._block
        self._asked += 1
        if self._asked > ASKED and self._table is None and size <= TABLE:
            self._table = memoryview(permutation(size, key))
        return begin + (permute(window - begin, size, key) if self._table is None else self._table[window - begin])

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
        if self._epoch is None or self._epoch[0] != epoch:
            self._permute_shards(epoch)
        return self._epoch[1:]

    def _permute_shards(self, epoch: int) -> None:
        n = len(self.index.shards)
        order = np.arange(n) if self.seed is None else permutation(n, derive_key("shards", self.seed, epoch))
        self._epoch = epoch, order.tolist(), [0, *np.cumsum(self._line[order]).tolist()]

    def _open(self, shard: int) -> OpenShard | None:
        """None: it is to be skipped."""
        if shard in self._opened:
            # Reading past the end of a file cut since it was mapped would end the process by SIGBUS, without a word.
            opened = self._opened[shard]
            if opened.size() == opened.data.nbytes:
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
        opened = OpenShard(data, begins, documents[:, 1] // self.index.dtype.itemsize - begins[:-1], mapped_size(data))
        self._opened[shard] = opened
        while len(self._opened) > 1 and sum(other.nbytes for other in self._opened.values()) > OPEN_BYTES:
            self._opened.popitem(last=False)
        return opened


def _copy(opened: OpenShard, first: int, last: int, out: np.ndarray, at: int, starts: list[int]) -> None:
    """Copy tokens [first, last) of a shard to out; appends to starts where documents begin, `at` being where out begins."""
    begins, element = opened.views
    document = bisect_right(begins, first) - 1
    if begins[document] == first:
        starts.append(at)
    many = document + FEW + 1
    if many < len(begins) and begins[many] < last:
        end = int(opened.begins.searchsorted(last))
        inside = opened.begins[document + 1 : end]
        starts += (inside + (at - first)).tolist()
        lengths = np.diff(inside, prepend=first, append=last)
        out[:] = opened.data[np.arange(first, last) + np.repeat(opened.element[document:end], lengths)]
        return
    begin = first
    while (stop := begins[document + 1]) < last:
        out[begin - first : stop - first] = opened.data[begin + element[document] : stop + element[document]]
        starts.append(at + stop - first)
        begin, document = stop, document + 1
    out[begin - first :] = opened.data[begin + element[document] : last + element[document]]
