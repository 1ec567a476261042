"""The token stream: sample number in, a window of tokens with labels and document starts out.

Which sample is which window follows from its number alone, see `data_pipeline.windows`.
"""
from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from data_pipeline import digest
from data_pipeline.index import load_index, open_shard
from data_pipeline.windows import IGNORE, Windows
from serpent_scale.errors import UserError

STATE_FORMAT = 2


@dataclass(frozen=True, eq=False)
class Sample:
    """One window.

    tokens, labels (seq_len,) int64: labels[t] is the token after tokens[t], IGNORE where that begins another document, and
    on padding. starts (k,) int64, ascending: positions in [0, seq_len) that hold a document's first token, so 0 is among
    them only if a document begins there. The padding of an epoch's last window counts as a document of its own.
    """

    tokens: np.ndarray
    labels: np.ndarray
    starts: np.ndarray

    @property
    def n_labels(self) -> int:
        return int((self.labels != IGNORE).sum())

    @property
    def lengths(self) -> tuple[int, ...]:
        """Lengths of the window's pieces of documents, in order, summing to seq_len; the first may continue a document."""
        return _lengths(self.starts.tolist(), len(self.tokens))


@dataclass(frozen=True, eq=False)
class Batch:
    """Consecutive samples, one a row.

    tokens, labels (n, seq_len) int64; reset (n, seq_len) bool: True at the first token of each document, so False at 0 where
    a row continues one; lengths: see `Sample.lengths`; samples: their numbers; digest: the sum of theirs, see
    `data_pipeline.digest`.
    """

    tokens: torch.Tensor
    labels: torch.Tensor
    reset: torch.Tensor
    lengths: tuple[tuple[int, ...], ...]
    samples: range
    digest: int


def _lengths(starts: list[int], seq_len: int) -> tuple[int, ...]:
    edges = [0, *(starts[1:] if starts[:1] == [0] else starts), seq_len]
    return tuple(b - a for a, b in zip(edges, edges[1:]))


class TokenStream:
    """The samples of one split.

    Opening it checks the index; a shard is hashed and compared with the index just before its first token is read. Both
    raise UserError.
    """

    def __init__(self, folder: str | Path, split: str, seq_len: int, seed: int | None, shuffle_block: int):
        """folder: DATA, holding DATA/SPLIT. seed None: windows in stored order, see `ordered`."""
        self.windows = Windows(load_index(Path(folder) / split), seq_len, seed, shuffle_block)
        self.index, self.n_windows = self.windows.index, self.windows.n_windows
        self.seq_len, self.seed, self.shuffle_block = seq_len, seed, shuffle_block

    @classmethod
    def ordered(cls, folder: str | Path, split: str, seq_len: int) -> TokenStream:
        """Windows in stored order, for evaluation."""
        return cls(folder, split, seq_len, seed=None, shuffle_block=1)

    def sample(self, g: int) -> Sample:
        """Sample g >= 0."""
        tokens, labels, rows, _ = self._read(g, 1)
        return Sample(tokens[0], labels[0], np.array(rows[0], np.int64))

    def batch(self, first: int, n: int) -> Batch:
        """Samples first, …, first + n - 1."""
        tokens, labels, rows, consumed = self._read(first, n)
        reset = np.zeros(tokens.shape, bool)
        for row, starts in enumerate(rows):
            reset[row, starts] = True
        lengths = tuple(_lengths(starts, tokens.shape[1]) for starts in rows)
        tensors = map(torch.from_numpy, (tokens, labels, reset))
        return Batch(*tensors, lengths=lengths, samples=range(first, first + n), digest=consumed)

    def _read(self, first: int, n: int) -> tuple[np.ndarray, np.ndarray, list[list[int]], int]:
        """Tokens and labels (n, seq_len) int64 of samples first, …, their starts, and the sum of their digests."""
        # The index's dtype to the last: a quarter of the memory traffic.
        lines, rows, total = np.empty((n, self.seq_len + 1), self.index.dtype), [], 0
        changed_rows, changed_columns, changes = [], [], []
        for row, line in enumerate(lines):
            starts, columns, values = self.windows.read(first + row, line)
            last = values[-1] if columns and columns[-1] == self.seq_len - 1 else int(line[-1])
            if starts and starts[-1] == self.seq_len:
                starts.pop()
            total += digest.of_sample(first + row, line[:-1], last, starts, self.index.dtype)
            changed_rows += [row] * len(columns)
            changed_columns += columns
            changes += values
            rows.append(starts)
        tokens, labels = lines[:, :-1].astype(np.int64), lines[:, 1:].astype(np.int64)
        labels[changed_rows, changed_columns] = changes
        return tokens, labels, rows, total % digest.MODULUS

    def state(self, next_sample: int, consumed: int) -> dict:
        """All there is to know to continue at `next_sample`. consumed: the sum of the digests of the samples before it."""
        return {
            "format": STATE_FORMAT,
            "index_sha256": self.index.sha256,
            "tokenizer_sha256": self.index.tokenizer_sha256,
            "seed": self.seed,
            "seq_len": self.seq_len,
            "shuffle_block": self.shuffle_block,
            "next_sample": next_sample,
            "digest": digest.to_hex(consumed),
        }

    def check_state(self, state: dict) -> tuple[int, int]:
        """(next sample, digest of those before it) of a `state`. Raises UserError naming what differs from this stream.

        A state of format 1, which had no digest, is continued with one that counts from here on.
        """
        mine = self.state(0, 0)
        if isinstance(state, dict) and state.get("format") == 1 and "digest" not in state:
            state = state | {"format": STATE_FORMAT, "digest": digest.to_hex(0)}
        if not isinstance(state, dict) or set(state) != set(mine):
            found = sorted(state) if isinstance(state, dict) else type(state).__name__
            raise UserError(f"data state: has keys {found}, expected {sorted(mine)}; it is from another version")
        for key, value in mine.items():
            if key not in ("next_sample", "digest") and (state[key] != value or type(state[key]) is not type(value)):
                raise UserError(f"data state: {key} was {state[key]!r}, {self.index.folder} now gives {value!r}; "
                                "continue with the data and settings it began with, or start a new run")  # fmt: skip
        number = state["next_sample"]
        if type(number) is not int or number < 0:
            raise UserError(f"data state: next_sample is {number!r}, not a sample number; use another checkpoint")
        consumed = digest.from_hex(state["digest"])
        if consumed is None or (consumed and not number):
            raise UserError(f"data state: digest {state['digest']!r} is not one of {number} samples; use another checkpoint")
        return number, consumed


def documents(folder: str | Path, split: str) -> Iterator[np.ndarray]:
    """Tokens (n,) int64 of each document of DATA/SPLIT in stored order, with the mark before and after it.

    Raises UserError as `TokenStream` does.
    """
    index = load_index(Path(folder) / split)
    for shard in range(len(index.shards)):
        data = open_shard(index, shard)
        for _, offset, length in index.rows(shard).tolist():
            begin = offset // index.dtype.itemsize
            yield data[begin : begin + length].astype(np.int64)


def token_counts(folder: str | Path, split: str) -> np.ndarray:
    """How often each token is to be predicted in DATA/SPLIT, (vocab_size,) int64: a document's opening mark is not."""
    index = load_index(Path(folder) / split)
    counts, held, size = np.zeros(index.vocab_size, np.int64), [], 0
    for tokens in documents(folder, split):
        held.append(tokens[1:])
        size += len(tokens)
        if size > 1 << 20:
            counts += np.bincount(np.concatenate(held), minlength=index.vocab_size)
            held, size = [], 0
    return counts + np.bincount(np.concatenate([np.empty(0, np.int64), *held]), minlength=index.vocab_size)
