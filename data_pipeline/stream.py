"""The token stream: sample number in, a window of tokens with labels and document starts out.

Which sample is which part of which window of which source follows from its number alone, see `data_pipeline.schedule` and
`data_pipeline.windows`.
"""
from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from operator import sub
from pathlib import Path

import numpy as np
import torch

from data_pipeline import digest
from data_pipeline.index import load_split, open_shard
from data_pipeline.order import derive_key
from data_pipeline.packing import PackedWindows
from data_pipeline.places import Cache
from data_pipeline.schedule import Mixture, Schedule
from data_pipeline.windows import IGNORE, Windows
from serpent_scale.errors import UserError

STATE_FORMAT = 4
# What states of earlier formats lack. Digests of 2 and 3 are of another hash, and are carried on with this one.
_NEW_IN_3 = {"packing": "cut", "sources": [], "stages": [], "skipped": [], "tokens_skipped": 0}
FORMER = {1: {"digest": digest.to_hex(0)} | _NEW_IN_3, 2: _NEW_IN_3, 3: {}}
PACKINGS = {"cut": Windows, "best_fit": PackedWindows}


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
    `data_pipeline.digest`; tokens_skipped: tokens of damaged shards, which read as padding.
    """

    tokens: torch.Tensor
    labels: torch.Tensor
    reset: torch.Tensor
    lengths: tuple[tuple[int, ...], ...]
    samples: range
    digest: int
    tokens_skipped: int


def _lengths(starts: list[int], seq_len: int) -> tuple[int, ...]:
    if not starts:
        return (seq_len,)
    edges = [*starts, seq_len] if starts[0] == 0 else [0, *starts, seq_len]
    return tuple(map(sub, edges[1:], edges))


class TokenStream:
    """The samples of one split, or of one split of several data folders.

    Opening it checks the index; a shard is hashed and compared with the index just before its first token is read. Both
    raise UserError.
    """

    def __init__(
        self, folder: str | Path | Sequence[tuple[str, Fraction | int]], split: str, seq_len: int, seed: int | None,
        shuffle_block: int, *, packing: str = "cut", stages: Sequence[tuple[int, int, int]] = (), on_error: str = "stop",
        cache: Cache | None = None,
    ):  # fmt: skip
        """folder: DATA, holding DATA/SPLIT, or several with their shares. seed None: windows in stored order, see `ordered`.
        packing: cut, or best_fit for which there must be a plan. stages: see `Schedule`. on_error: stop at a damaged shard, or
        skip it. cache: where data from a URL is kept.
        """
        folders = [(folder, 1)] if isinstance(folder, (str, Path)) else folder
        self.sources = []
        for number, (path, _) in enumerate(folders):
            index = load_split(path, split, cache, check_shards=on_error == "stop")
            key = seed if seed is None or number == 0 else derive_key("source", seed, number)
            self.sources.append(PACKINGS[packing](index, seq_len, key, shuffle_block, on_error == "skip"))
        self.index, self.n_windows = self.sources[0].index, self.sources[0].n_windows
        for source in self.sources:
            mine, theirs = ([i.tokenizer_sha256, i.vocab_size, i.eot_id, i.dtype] for i in (self.index, source.index))
            if mine != theirs:
                raise UserError(f"{source.index.folder}: tokenised with another tokenizer than {self.index.folder}; prepare it "
                                f"with --tokenizer {self.index.tokenizer_path}")  # fmt: skip
        self.seq_len, self.seed, self.shuffle_block, self.packing = seq_len, seed, shuffle_block, packing
        self.schedule, self.mixture = Schedule(seq_len, stages=stages), Mixture([share for _, share in folders])
        self.tokens_skipped = 0  # so far, by all ranks: to be kept by who consumes samples

    @classmethod
    def ordered(cls, folder: str | Path, split: str, seq_len: int, cache: Cache | None = None) -> TokenStream:
        """Windows in stored order, for evaluation."""
        return cls(folder, split, seq_len, seed=None, shuffle_block=1, cache=cache)

    def sample(self, g: int) -> Sample:
        """Sample g >= 0."""
        batch = self.batch(g, 1)
        return Sample(batch.tokens[0].numpy(), batch.labels[0].numpy(), np.flatnonzero(batch.reset[0].numpy()))

    def batch(self, first: int, n: int) -> Batch:
        """Samples first, …, first + n - 1, which must be of one stage."""
        if first < 0:
            raise ValueError(f"sample {first} is negative")
        stage = self.schedule.stage_of_sample(first)
        if n > 1 and self.schedule.stage_of_sample(first + n - 1) is not stage:
            raise ValueError(f"samples {first} to {first + n - 1} are of two stages")
        seq_len, before, consumed = stage.seq_len, self._skipped_so_far(), 0
        lines = np.empty((n, seq_len + 1), self.index.dtype)  # widened at the end: a quarter of the memory traffic
        reset = np.zeros((n, seq_len), bool)
        flat, resets = memoryview(lines.reshape(-1)), memoryview(reset.reshape(-1))
        checked, lengths = [set() for _ in self.sources], []
        unlearned = []  # places in the flattened labels, row after row
        for row in range(n):
            window, part = stage.locate(first + row)
            source, window = self.mixture.locate(window)
            line = flat[row * (seq_len + 1) : (row + 1) * (seq_len + 1)]
            starts, padding = self.sources[source].read(window, line, part, stage.parts, checked[source])
            at, end, known = row * seq_len, (row + 1) * seq_len - 1, len(unlearned)
            for start in starts:
                if start:
                    unlearned.append(at + start - 1)
            for begin, stop in padding:
                unlearned += range(at + begin, at + min(stop, seq_len))
            if starts and starts[-1] == seq_len:
                starts.pop()
            for start in starts:
                resets[at + start] = True
            masked = unlearned[known:]
            last = IGNORE if end in masked else line[-1]
            ends = () if self.packing == "cut" else [IGNORE] * len({*masked} - {end}) + [last]
            consumed += digest.of_sample(first + row, line[:-1], last, starts, ends)
            lengths.append(_lengths(starts, seq_len))
        tokens, labels = (part.astype(np.int64, "C") for part in (lines[:, :-1], lines[:, 1:]))
        flat = memoryview(labels.reshape(-1))
        for at in unlearned:
            flat[at] = IGNORE
        return Batch(*map(torch.from_numpy, (tokens, labels, reset)), tuple(lengths), range(first, first + n),
                     consumed % digest.MODULUS, self._skipped_so_far() - before)  # fmt: skip

    def _skipped_so_far(self) -> int:
        return sum([source.tokens_skipped for source in self.sources])

    @property
    def skipped(self) -> list[list[int]]:
        """Damaged shards that are left out: [source, shard] each."""
        return [[number, shard] for number, source in enumerate(self.sources) for shard in sorted(source.skipped)]

    def skip(self, shards: Sequence[Sequence[int]]) -> None:
        """Leave out these too, `skipped` of another stream: ranks, and a resumed run, must agree on them."""
        for number, source in enumerate(self.sources):
            source.skip(shard for which, shard in shards if which == number)

    def state(self, next_sample: int, consumed: int) -> dict:
        """All there is to know to continue at `next_sample`. consumed: the sum of the digests of the samples before it."""
        sources = [[source.index.sha256[:16], str(share)] for source, share in zip(self.sources, self.mixture.shares)]
        many = len(sources) > 1
        whole = json.dumps([[source.index.sha256, str(share)] for source, share in zip(self.sources, self.mixture.shares)])
        plans = "".join(source.plan_sha256 for source in self.sources) if self.packing != "cut" else ""
        return {
            "format": STATE_FORMAT,
            "index_sha256": hashlib.sha256(whole.encode()).hexdigest() if many else self.index.sha256,
            "tokenizer_sha256": self.index.tokenizer_sha256,
            "seed": self.seed,
            "seq_len": self.seq_len,
            "shuffle_block": self.shuffle_block,
            "packing": f"{self.packing} {hashlib.sha256(plans.encode()).hexdigest()[:16]}" if plans else self.packing,
            "sources": sources if many else [],
            "stages": self.schedule.shapes,
            "next_sample": next_sample,
            "digest": digest.to_hex(consumed),
            "skipped": self.skipped,
            "tokens_skipped": self.tokens_skipped,
        }

    def check_state(self, state: dict) -> tuple[int, int]:
        """(next sample, digest of those before it) of a `state`; what it left out is left out here too. Raises UserError naming
        what differs from this stream.

        A state of format 1, which had no digest, is continued with one that counts from here on.
        """
        mine = self.state(0, 0)
        for former, new in FORMER.items():
            if isinstance(state, dict) and state.get("format") == former and not new.keys() & state.keys():
                state = state | new | {"format": STATE_FORMAT}
        if not isinstance(state, dict) or set(state) != set(mine):
            found = sorted(state) if isinstance(state, dict) else type(state).__name__
            raise UserError(f"data state: has keys {found}, expected {sorted(mine)}; it is from another version")
        moving = ("next_sample", "digest", "skipped", "tokens_skipped")
        # The sources of a mixture first: what differs else may follow from them, and the sum over them says less.
        for key in sorted(mine.keys() - set(moving), key=lambda key: (key != "sources", key == "index_sha256")):
            if state[key] != mine[key] or type(state[key]) is not type(mine[key]):
                raise UserError(f"data state: {key} was {state[key]!r}, {self.index.folder} now gives {mine[key]!r}; "
                                "continue with the data and settings it began with, or start a new run")  # fmt: skip
        number, skipped = state["next_sample"], state["tokens_skipped"]
        if type(number) is not int or number < 0:
            raise UserError(f"data state: next_sample is {number!r}, not a sample number; use another checkpoint")
        consumed = digest.from_hex(state["digest"])
        if consumed is None or (consumed and not number):
            raise UserError(f"data state: digest {state['digest']!r} is not one of {number} samples; use another checkpoint")
        shards = [len(source.index.shards) for source in self.sources]
        if type(skipped) is not int or not isinstance(state["skipped"], list) or not all(
            isinstance(pair, list) and len(pair) == 2 and all(type(n) is int and n >= 0 for n in pair)
            and pair[0] < len(shards) and pair[1] < shards[pair[0]] for pair in state["skipped"]
        ):  # fmt: skip
            raise UserError(f"data state: skipped is {state['skipped']!r}, not a list of shards; use another checkpoint")
        if skipped and self.sources[0].skip_damaged is False:
            raise UserError("data state: damaged shards were skipped before; set data.on_error=skip to go on without them")
        self.skip(state["skipped"])
        self.tokens_skipped = skipped
        return number, consumed


def documents(folder: str | Path, split: str, cache: Cache | None = None) -> Iterator[np.ndarray]:
    """Tokens (n,) int64 of each document of DATA/SPLIT in stored order, with the mark before and after it.

    cache: where data from a URL is kept. Raises UserError as `TokenStream` does.
    """
    index = load_split(folder, split, cache)
    for shard in range(len(index.shards)):
        data = open_shard(index, shard)
        for _, offset, length in index.rows(shard).tolist():
            begin = offset // index.dtype.itemsize
            yield data[begin : begin + length].astype(np.int64)


def token_counts(folder: str | Path, split: str) -> np.ndarray:
    """How often each token is to be predicted in DATA/SPLIT, (vocab_size,) int64: a document's opening mark is not."""
    index = load_split(folder, split)
    counts, held, size = np.zeros(index.vocab_size, np.int64), [], 0
    for tokens in documents(folder, split):
        held.append(tokens[1:])
        size += len(tokens)
        if size > 1 << 20:
            counts += np.bincount(np.concatenate(held), minlength=index.vocab_size)
            held, size = [], 0
    return counts + np.bincount(np.concatenate([np.empty(0, np.int64), *held]), minlength=index.vocab_size)
