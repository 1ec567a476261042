"""Documents to leave out: those that were there before, and those that share a run of tokens with an evaluation set."""
from __future__ import annotations

import hashlib
from collections.abc import Iterable

import numpy as np

from data_pipeline.tokenizer import Tokenizer

N = 13  # tokens in a run, as in GPT-3's filter (arXiv 2005.14165, appendix C), whose runs are of words
BATCH = 1024  # texts of the evaluation set tokenised at a time
FILTER_BITS = 26  # of a hash, by which nearly all runs are told to be new with one look
MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)


class Seen:
    """Texts met so far, known by 128 bits of blake2b each; about 100 bytes of memory a text."""

    def __init__(self):
        self._keys: set[bytes] = set()

    def add(self, text: str) -> bool:
        """Whether this very text, byte for byte, was added before."""
        key, before = hashlib.blake2b(text.encode(), digest_size=16).digest(), len(self._keys)
        self._keys.add(key)
        return len(self._keys) == before


class Runs:
    """The runs of N tokens of an evaluation set. `sha256` is of them all: the identity of what is looked for.

    A text of fewer tokens has no run, so that nothing overlaps it.
    """

    def __init__(self, texts: Iterable[str], tokenizer: Tokenizer):
        rows, batch = [], []
        for text in texts:
            batch.append(text)
            if len(batch) == BATCH:
                rows += tokenizer.encode_batch(batch)
                batch = []
        rows += tokenizer.encode_batch(batch)
        self._tokens, places = _joined(rows)
        hashes = _hashes(self._tokens)[places]
        self._hashes, first = np.unique(hashes, return_index=True)
        self._places = places[first]
        self._filter = np.zeros(1 << FILTER_BITS, bool)
        self._filter[self._hashes >> np.uint64(64 - FILTER_BITS)] = True
        self.sha256 = hashlib.sha256(self._hashes.tobytes()).hexdigest()

    def __len__(self) -> int:
        return len(self._hashes)

    def overlapping(self, rows: list[list[int]]) -> np.ndarray:
        """Which of these texts, given as tokens, have a run of the set, (n,) bool."""
        found = np.zeros(len(rows), bool)
        tokens, places = _joined(rows)
        if not len(places) or not len(self):
            return found
        hashes = _hashes(tokens)[places]
        maybe = np.flatnonzero(self._filter[hashes >> np.uint64(64 - FILTER_BITS)])
        at = np.searchsorted(self._hashes, hashes[maybe])
        same = self._hashes[np.minimum(at, len(self) - 1)] == hashes[maybe]
        maybe, at = places[maybe[same]], self._places[at[same]]
        # Hashes may be equal by accident; tokens decide.
        equal = (tokens[maybe[:, None] + np.arange(N)] == self._tokens[at[:, None] + np.arange(N)]).all(1)
        ends = np.cumsum([len(row) for row in rows])
        found[np.searchsorted(ends, maybe[equal], side="right")] = True
        return found


def _joined(rows: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of all rows (n,) uint64, and where in them a run begins that lies within its row."""
    lengths = np.array([len(row) for row in rows], np.int64)
    tokens = np.concatenate([np.empty(0, np.uint64), *(np.array(row, np.uint64) for row in rows)])
    left = np.repeat(np.cumsum(lengths), lengths) - np.arange(len(tokens))  # tokens from here to the end of the row
    return tokens, np.flatnonzero(left >= N)


def _hashes(tokens: np.ndarray) -> np.ndarray:
    """A hash of the N tokens from each place on, (n - N + 1,) uint64: a polynomial mod 2^64, its high bits mixed."""
    n = max(len(tokens) - N + 1, 0)
    sums = np.zeros(n, np.uint64)
    for i in range(N):
        sums = sums * MULTIPLIER + (tokens[i : i + n] + np.uint64(1))
    sums ^= sums >> np.uint64(32)
    return sums * MULTIPLIER
