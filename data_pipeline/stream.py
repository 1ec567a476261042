"""The token stream: sample number in, a window of tokens with labels and document starts out.

An epoch joins the shards, in permuted order, into one line of tokens and cuts it into windows of `seq_len` tokens plus one
label token; windows are permuted within blocks. Sample g is window `permute(g mod n_windows)` of epoch `g // n_windows`: who
reads it, when, and what was read before do not matter.
"""
from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from data_pipeline import digest
from data_pipeline.index import Index, load_index, open_shard
from data_pipeline.order import derive_key, permutation, permute
from serpent_scale.errors import UserError

IGNORE = -100  # label of a token whose successor is not to be learned
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
        starts = self.starts.tolist()
        edges = [0, *(starts[1:] if starts[:1] == [0] else starts), len(self.tokens)]
        return tuple(b - a for a, b in zip(edges, edges[1:]))


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


@dataclass(frozen=True, eq=False)
class OpenShard:
    """A verified shard. data: its tar as tokens; begins (n_documents + 1,): where documents begin, in tokens of this shard;
    element (n_documents,): token t of the shard, in document d, is data[t + element[d]]."""

    data: np.ndarray
    begins: np.ndarray
    element: np.ndarray


class TokenStream:
    """The samples of one split.

    Opening it checks the index; a shard is hashed and compared with the index just before its first token is read. Both
    raise UserError.
    """

    def __init__(self, folder: str | Path, split: str, seq_len: int, seed: int | None, shuffle_block: int):
        """folder: DATA, holding DATA/SPLIT. seed None: windows in stored order, see `ordered`."""
        self.index = load_index(Path(folder) / split)
        self.seq_len, self.seed, self.shuffle_block = seq_len, seed, shuffle_block
        self.n_windows = -(-self.index.tokens // seq_len)
        self._shards: dict[int, OpenShard] = {}
        self._epoch: tuple[int, np.ndarray, np.ndarray] | None = None

    @classmethod
    def ordered(cls, folder: str | Path, split: str, seq_len: int) -> TokenStream:
        """Windows in stored order, for evaluation."""
        return cls(folder, split, seq_len, seed=None, shuffle_block=1)

    def sample(self, g: int) -> Sample:
        """Sample g >= 0."""
        tokens, labels = np.empty((2, self.seq_len), np.int64)
        return Sample(tokens, labels, self._fill(g, tokens, labels))

    def batch(self, first: int, n: int) -> Batch:
        """Samples first, …, first + n - 1."""
        tokens, labels = np.empty((2, n, self.seq_len), np.int64)
        reset = np.zeros((n, self.seq_len), bool)
        lengths, total = [], 0
        for row in range(n):
            starts = self._fill(first + row, tokens[row], labels[row])
            reset[row, starts] = True
            lengths.append(Sample(tokens[row], labels[row], starts).lengths)
            total += digest.of_sample(first + row, tokens[row], int(labels[row, -1]), starts, self.index.dtype)
        tensors = map(torch.from_numpy, (tokens, labels, reset))
        return Batch(*tensors, lengths=tuple(lengths), samples=range(first, first + n), digest=total % digest.MODULUS)

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

    def spans(self, g: int) -> list[tuple[int, int, int]]:
        """Where sample g and its label token lie: (shard, first, last) in tokens of the shard, in the order they are joined.

        The cost does not depend on g, nor on what was read before; the first g of an epoch permutes the shards' numbers.
        """
        if g < 0:
            raise ValueError(f"sample {g} is negative")
        epoch, window = divmod(g, self.n_windows)
        order, begins = self._shard_order(epoch)
        at = self._window(epoch, window) * self.seq_len
        end = min(at + self.seq_len + 1, self.index.tokens)
        place, spans = int(np.searchsorted(begins, at, "right")) - 1, []
        while at < end:
            begin, stop = int(begins[place]), min(end, int(begins[place + 1]))
            spans.append((int(order[place]), at - begin, stop - begin))
            at, place = stop, place + 1
        return spans

    def _fill(self, g: int, tokens: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """Write sample g into tokens and labels, both (seq_len,); returns its starts."""
        line = np.full(self.seq_len + 1, self.index.eot_id, np.int64)
        filled, starts = 0, []
        for shard, first, last in self.spans(g):
            starts.append(self._read(shard, first, last, line[filled : filled + last - first]) + filled)
            filled += last - first
        if filled <= self.seq_len:  # the epoch ends in or right after this window: what follows is padding
            starts.append(np.array([filled]))
            line[filled:] = self.index.eot_id
        starts = np.concatenate(starts)
        tokens[:], labels[:] = line[:-1], line[1:]
        labels[starts[starts > 0] - 1] = IGNORE
        labels[filled:] = IGNORE
        return starts[starts < self.seq_len]

    def _window(self, epoch: int, window: int) -> int:
        if self.seed is None:
            return window
        block = window // self.shuffle_block
        begin = block * self.shuffle_block
        size = min(self.shuffle_block, self.n_windows - begin)
        return begin + permute(window - begin, size, derive_key("windows", self.seed, epoch, block))

    def _shard_order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Shards in the order of an epoch (n,), and where each begins in its line of tokens (n + 1,)."""
        if self._epoch is None or self._epoch[0] != epoch:
            n = len(self.index.shards)
            order = np.arange(n) if self.seed is None else permutation(n, derive_key("shards", self.seed, epoch))
            self._epoch = epoch, order, np.concatenate([[0], np.cumsum(self.index.shard_tokens[order])])
        return self._epoch[1:]

    def _read(self, shard: int, first: int, last: int, out: np.ndarray) -> np.ndarray:
        """Copy tokens [first, last) of a shard to out; returns positions in out where documents begin."""
        if shard not in self._shards:
            self._shards[shard] = self._open(shard)
        opened = self._shards[shard]
        data, document_begins, element = opened.data, opened.begins, opened.element
        d0 = int(np.searchsorted(document_begins, first, "right")) - 1
        d1 = int(np.searchsorted(document_begins, last, "left"))
        if d1 - d0 == 1:
            begin = first + int(element[d0])
            out[:] = data[begin : begin + last - first]
        else:
            edges = np.clip(document_begins[d0 : d1 + 1], first, last)
            out[:] = data[np.arange(first, last) + np.repeat(element[d0:d1], np.diff(edges))]
        if out.max() >= self.index.vocab_size:
            document = int(np.searchsorted(document_begins, first + int(out.argmax()), "right")) - 1
            raise _foreign_token(self.index, shard, self.index.first_document(shard) + document, int(out.max()))
        begins = document_begins[d0:d1]
        return begins[begins >= first] - first

    def _open(self, shard: int) -> OpenShard:
        documents = self.index.documents[self.index.first_document(shard) : self.index.first_document(shard + 1)]
        begins = np.concatenate([[0], np.cumsum(documents[:, 2])])
        return OpenShard(open_shard(self.index, shard), begins, documents[:, 1] // self.index.dtype.itemsize - begins[:-1])


def documents(folder: str | Path, split: str) -> Iterator[np.ndarray]:
    """Tokens (n,) int64 of each document of DATA/SPLIT in stored order, with the mark before and after it.

    Raises UserError as `TokenStream` does.
    """
    index = load_index(Path(folder) / split)
    for shard in range(len(index.shards)):
        data = open_shard(index, shard)
        for number in range(index.first_document(shard), index.first_document(shard + 1)):
            _, offset, length = index.documents[number].tolist()
            begin = offset // index.dtype.itemsize
            tokens = data[begin : begin + length].astype(np.int64)
            if tokens.max() >= index.vocab_size:
                raise _foreign_token(index, shard, number, int(tokens.max()))
            yield tokens


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


def _foreign_token(index: Index, shard: int, document: int, token: int) -> UserError:
    return UserError(
        f"{index.folder / index.shards[shard].name}: token {token} in document {document} is outside the vocabulary of "
        f"{index.vocab_size}; prepare the data again with the tokenizer beside it"
    )
