"""Documents to leave out: those that were there before, and those that share runs of words with an evaluation set."""
from __future__ import annotations

import hashlib
import re
from bisect import bisect_left
from collections.abc import Iterable

import numpy as np

N = 13  # words in a run, as in GPT-3's filter (arXiv 2005.14165, appendix C)
RUNS = 8  # a document has to share of one evaluation text: 20 words in a row, say
WORD = re.compile(r"[^\W_]+")
FILTER_BITS = 26  # of a hash, by which nearly all runs are told to be new with one look
UNSORTED = 1 << 16  # keys
MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)


class Seen:
    """Keys of 16 bytes met so far, all of them kept: 19 bytes each, and 7 MB."""

    def __init__(self):
        self._new: set[bytes] = set()
        self._sorted = [np.empty((2, 0), np.uint64) for _ in range(256)]  # halves of keys, by the first byte

    def add(self, key: bytes) -> bool:
        """Whether this key was added before."""
        if key in self._new:
            return True
        high, low = int.from_bytes(key[:8], "big"), int.from_bytes(key[8:], "big")
        highs, lows = map(memoryview, self._sorted[key[0]])
        at = bisect_left(highs, high)
        while at < len(highs) and highs[at] == high:
            if lows[at] == low:
                return True
            at += 1
        self._new.add(key)
        if len(self._new) > max(UNSORTED, sum(rows.shape[1] for rows in self._sorted) >> 5):
            self._sort()
        return False

    def _sort(self) -> None:
        """A set takes 100 bytes a key: what is in it moves to the arrays before it holds a 32nd of all."""
        new = np.frombuffer(b"".join(sorted(self._new)), ">u8").reshape(-1, 2).T.astype(np.uint64)
        self._new.clear()
        edges = np.searchsorted(new[0] >> np.uint64(56), np.arange(257))
        for first, (begin, stop) in enumerate(zip(edges, edges[1:])):
            rows = np.concatenate([self._sorted[first], new[:, begin:stop]], 1)
            self._sorted[first] = np.ascontiguousarray(rows[:, np.argsort(rows[0], kind="stable")])


class Runs:
    """The runs of N words of an evaluation set. `sha256` is of them all, and of `wanted`: the identity of what is looked for.

    A word is letters and digits in a row, lower-cased, so that marks, quotes and spacing do not matter. A document overlaps
    the set if it shares `wanted` different runs with one of its texts, or all that a short text has. Runs that several texts
    have count for the first of them. A text of fewer than N words has no run, so that nothing overlaps it.
    """

    def __init__(self, texts: Iterable[str], wanted: int = RUNS):
        self._ids: dict[str, int] = {}  # of the set's words; another word's is 0
        number = self._ids.setdefault
        rows = [np.array([number(word, len(self._ids) + 1) for word in words(text)], np.uint64) for text in texts]
        self._words, places, owners = _joined(rows)
        hashes = _hashes(self._words)[places]
        self._hashes, first = np.unique(hashes, return_index=True)
        self._places, self._owners = places[first], owners[first]
        self._needed = np.minimum(np.bincount(self._owners, minlength=len(rows)), wanted)
        self._filter = np.zeros(1 << FILTER_BITS, bool)
        self._filter[self._hashes >> np.uint64(64 - FILTER_BITS)] = True
        identity = [" ".join(self._ids).encode(), self._words.tobytes(), places.tobytes(), owners.tobytes(), b"%d" % wanted]
        self.sha256 = hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in identity)).hexdigest()

    def __len__(self) -> int:
        return len(self._hashes)

    def overlapping(self, texts: list[str]) -> np.ndarray:
        """Which of these texts overlap the set, (n,) bool."""
        found, ids = np.zeros(len(texts), bool), self._ids
        tokens, places, rows = _joined([[ids.get(word, 0) for word in words(text)] for text in texts])
        if not len(places) or not len(self):
            return found
        hashes = _hashes(tokens)[places]
        maybe = np.flatnonzero(self._filter[hashes >> np.uint64(64 - FILTER_BITS)])
        at = np.searchsorted(self._hashes, hashes[maybe])
        same = self._hashes[np.minimum(at, len(self) - 1)] == hashes[maybe]
        maybe, at = maybe[same], at[same]
        # Hashes may be equal by accident; words decide.
        ours, theirs = (all_words[begins[:, None] + np.arange(N)] for all_words, begins in
                        ((tokens, places[maybe]), (self._words, self._places[at])))  # fmt: skip
        equal = (ours == theirs).all(1)
        shared = np.unique(np.stack([rows[maybe[equal]], at[equal]]), axis=1)
        pairs, counts = np.unique(np.stack([shared[0], self._owners[shared[1]]]), axis=1, return_counts=True)
        found[pairs[0, counts >= self._needed[pairs[1]]]] = True
        return found


def words(text: str) -> list[str]:
    return WORD.findall(text.lower())


def _joined(rows: list) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Words of all rows (n,) uint64, where in them a run begins that lies within its row, and in which row that is."""
    lengths = np.array([len(row) for row in rows], np.int64)
    joined = np.concatenate([np.empty(0, np.uint64), *(np.array(row, np.uint64) for row in rows)])
    left = np.repeat(np.cumsum(lengths), lengths) - np.arange(len(joined))  # words from here to the end of the row
    places = np.flatnonzero(left >= N)
    return joined, places, np.repeat(np.arange(len(rows)), lengths)[places]


def _hashes(ids: np.ndarray) -> np.ndarray:
    """A hash of the N words from each place on, (n - N + 1,) uint64: a polynomial mod 2^64, its high bits mixed."""
    n = max(len(ids) - N + 1, 0)
    sums = np.zeros(n, np.uint64)
    for i in range(N):
        sums = sums * MULTIPLIER + (ids[i : i + n] + np.uint64(1))
    sums ^= sums >> np.uint64(32)
    return sums * MULTIPLIER
