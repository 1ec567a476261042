"""Best-fit packing: documents are cut as little as can be, and whole ones share a window, by a plan made beforehand.

A document longer than a window gives whole windows and a rest; rests and shorter documents are put, the longest first, where
the least room is left that holds them (best-fit decreasing), shard by shard. The plan is a file beside the index, hashed.
"""
from __future__ import annotations

import hashlib
import json
from bisect import bisect_right
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data_pipeline.files import replacing, sha256_of, write_atomically
from data_pipeline.index import MEND, Index
from data_pipeline.windows import Windows
from serpent_scale.errors import UserError

FORMAT = 1
ROW = 32  # bytes of a piece
PLANS = 64  # of shards, kept
_FIELDS = dict(format=int, index_sha256=str, seq_len=int, windows=list, pieces=list, sha256=str)


def best_fit(lengths: np.ndarray, size: int) -> np.ndarray:
    """Bins of `size` for pieces of lengths (n,) in [1, size]: the bin of each piece, (n,) int64."""
    bins, n, order = np.empty(len(lengths), np.int64), 0, np.argsort(-lengths, kind="stable")
    open_bins: list[list[int]] = [[] for _ in range(size + 1)]  # by room left
    rooms = 0  # bit r: there is a bin with room r
    for piece, length in zip(order.tolist(), lengths[order].tolist()):
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            chosen = open_bins[room].pop()
            if not open_bins[room]:
                rooms ^= 1 << room
        else:
            room, chosen, n = size, n, n + 1
        bins[piece] = chosen
        if room > length:
            open_bins[room - length].append(chosen)
            rooms |= 1 << room - length
    return bins


def plan_shard(lengths: np.ndarray, seq_len: int) -> np.ndarray:
    """Pieces of a shard whose documents have these lengths, (n, 4) int64: window, document, first token in it, tokens.

    Windows lie in the order of their first documents; their pieces in the order of the documents.
    """
    whole, rest = np.divmod(lengths, seq_len)
    document = np.repeat(np.arange(len(lengths)), whole)
    number = np.arange(len(document)) - np.repeat(np.cumsum(whole) - whole, whole)
    rests = np.flatnonzero(rest)
    bins = best_fit(rest[rests], seq_len) + len(document)
    pieces = np.concatenate([
        np.stack([np.arange(len(document)), document, number * seq_len, np.full(len(document), seq_len)], 1),
        np.stack([bins, rests, whole[rests] * seq_len, rest[rests]], 1),
    ])  # fmt: skip
    pieces = pieces[np.lexsort((pieces[:, 2], pieces[:, 1], pieces[:, 0]))]
    first = np.flatnonzero(np.diff(pieces[:, 0], prepend=-1))  # of each window
    rank = np.empty(len(first), np.int64)
    rank[np.lexsort((pieces[first, 2], pieces[first, 1]))] = np.arange(len(first))
    pieces[:, 0] = rank[pieces[:, 0]]
    return pieces[np.argsort(pieces[:, 0], kind="stable")]


def paths(folder: Path, seq_len: int) -> tuple[Path, Path]:
    """The plan of a split, and the pieces that it hashes: rows as of `plan_shard`, little-endian int64, shard after shard."""
    return folder / f"best_fit-{seq_len}.json", folder / f"best_fit-{seq_len}.pieces"


def write_plan(index: Index, seq_len: int) -> float:
    """Plan the windows of a split; the share of padding in them."""
    plan, array = paths(index.folder, seq_len)
    windows, pieces, sha256 = [], [], hashlib.sha256()
    with replacing(array) as file:
        for shard in tqdm(range(len(index.shards)), desc=f"{index.folder.name}: packing", unit=" shards", disable=None):
            part = plan_shard(index.rows(shard)[:, 2], seq_len).astype("<i8")
            windows.append(int(part[-1, 0]) + 1)
            pieces.append(len(part))
            sha256.update(part.tobytes())
            file.write(part.tobytes())
    fields = dict(format=FORMAT, index_sha256=index.sha256, seq_len=seq_len, windows=windows, pieces=pieces,
                  sha256=sha256.hexdigest())  # fmt: skip
    write_atomically(plan, (json.dumps(fields) + "\n").encode())
    return 1 - index.tokens / (sum(windows) * seq_len)


class PackedWindows(Windows):
    """The windows of a best-fit plan: `Windows` in all but what a window holds. `plan_sha256` is the plan's identity."""

    def __init__(self, index: Index, seq_len: int, *options):
        """Raises UserError when there is no plan for this sequence length, or it is not of this index."""
        super().__init__(index, seq_len, *options)
        path, array = (index.beside(path.name) for path in paths(index.folder, seq_len))
        if not path.is_file():
            raise UserError(f"{path}: no such plan; make it with launch/prepare_data.py --pack {seq_len}, or set "
                            "data.packing=cut")  # fmt: skip
        raw, again = path.read_bytes(), f"make it again with launch/prepare_data.py --pack {seq_len}"
        try:
            fields = json.loads(raw)
            valid = fields.keys() == _FIELDS.keys() and all(type(fields[key]) is kind for key, kind in _FIELDS.items())
            valid = valid and all(type(n) is int and n > 0 for n in fields["windows"] + fields["pieces"])
            valid = valid and len(fields["windows"]) == len(fields["pieces"]) == len(index.shards)
        except (ValueError, AttributeError):
            valid = False
        if not valid or (fields["format"], fields["seq_len"], fields["index_sha256"]) != (FORMAT, seq_len, index.sha256):
            raise UserError(f"{path}: not a plan of {index.folder / 'index.json'}; {again}")
        size = ROW * sum(fields["pieces"])
        if not array.is_file() or array.stat().st_size != size or sha256_of(array) != fields["sha256"]:
            raise UserError(f"{array}: missing, or not what {path.name} says; {again}")
        self.plan_sha256 = hashlib.sha256(raw).hexdigest()
        self._line, self.n_windows = np.array(fields["windows"], np.int64), sum(fields["windows"])
        self._unit = 1
        self._pieces, self._first_piece = array, np.concatenate([[0], np.cumsum(fields["pieces"])])
        self._plans: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def read(
        self, k: int, line: memoryview, part: int, parts: int, checked: set[int]
    ) -> tuple[list[int], list[tuple[int, int]]]:
        """As `Windows.read`; a piece that begins inside a document and inside the window is among the starts too."""
        at, order, begins = self._at(k)
        place = bisect_right(begins, at) - 1
        opened = self._open(order[place], checked)
        lo = part * (self.seq_len // parts)
        hi, starts, padding, filled, end = lo + self.seq_len // parts, [], [], 0, 0
        for document, first, tokens in self._plan(order[place], at - begins[place]):
            a, b = max(filled, lo), min(filled + tokens, hi)
            token, filled = first + a - filled, filled + tokens
            if a >= b:
                continue
            end = b - lo
            if opened is None:
                self._pad(line, a - lo, end, starts, padding)
                self.tokens_skipped += b - a
                continue
            if a > lo or token == 0:
                starts.append(a - lo)
            begin, stop = opened.begins[document : document + 2]
            source = begin + opened.element[document] + token
            end += token + b - a < stop - begin  # the label of the last one, where the document goes on
            line[a - lo : end] = opened.data[source : source + end - (a - lo)]
        if end < len(line):
            self._pad(line, end, len(line), starts, padding)
        return starts, padding

    def _plan(self, shard: int, window: int) -> list[list[int]]:
        """Pieces of a window of a shard: document of the shard, first token, tokens."""
        if shard not in self._plans:
            first, last = self._first_piece[shard : shard + 2].tolist()
            pieces = np.fromfile(self._pieces, "<i8", 4 * (last - first), offset=ROW * first).reshape(-1, 4)
            if len(pieces) != last - first:
                raise UserError(f"{self._pieces}: cut since it was opened; {MEND}")
            while len(self._plans) >= PLANS:
                del self._plans[next(iter(self._plans))]
            self._plans[shard] = pieces[:, 1:], np.searchsorted(pieces[:, 0], np.arange(self._line[shard] + 1))
        pieces, edges = self._plans[shard]
        begin, stop = edges[window : window + 2].tolist()
        return pieces[begin:stop].tolist()
