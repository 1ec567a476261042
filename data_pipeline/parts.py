"""Records made ahead by the tasks of an array job, to be merged into one split that is byte for byte that of a single job.

A part is one file, a row of frames: length of the body, hash of it and of all before it, body. The first says what the part is
of; an empty one ends it. A task that was killed goes on behind the last whole frame. Neither a task nor the merge holds more in
memory than a batch of texts, or a frame of each part.
"""
from __future__ import annotations

import fcntl
import hashlib
import heapq
import itertools
import json
import os
import re
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
from tqdm import tqdm

from data_pipeline.files import sync_folder
from data_pipeline.overlap import Runs, Seen
from data_pipeline.records import BLANK, DUPLICATE, Record, Texts, dtype_of
from data_pipeline.sources import Source, by_file, documents
from data_pipeline.tokenizer import Tokenizer
from serpent_scale.errors import UserError

FORMAT = 1
BLOCK = 256  # texts that go to the same part, where files are fewer than parts
FRAME = 256 << 10  # bytes of records to a frame, and one record more
HEAD = 8 + 32  # bytes of a frame before its body
ROW = np.dtype([("key", "V16"), ("unit", "<i8"), ("bytes", "<i8"), ("words", "<i8"), ("tokens", "<i8"), ("fate", "u1")])


def parts_folder(split: Path) -> Path:
    return split.with_name(split.name + ".parts")


def part_header(tokenizer: Tokenizer, request: dict, word_rule: str, held_out: Runs | None) -> dict:
    """All that decides what records are made of a split's texts. request: as for `prepare_split`."""
    return request | {"format": FORMAT, "tokenizer_sha256": tokenizer.sha256, "word_rule": word_rule,
                      "held_out_sha256": held_out and held_out.sha256}  # fmt: skip


def write_part(
    folder: Path, sources: list[Source], tokenizer: Tokenizer, part: int, parts: int, *,
    request: dict, word_rule: str, held_out: Runs | None = None,
) -> Path:  # fmt: skip
    """Make the records of `part` (0 ... parts - 1) of a split, or finish it, or find it done.

    Where there are as many files as parts or more, each goes to one part; else blocks of texts do, and every task reads all.
    Raises UserError when the file there is of something else, or the source has changed since.
    """
    path, units = folder / f"{part:05d}-of-{parts:05d}.part", deque()
    header = part_header(tokenizer, request, word_rule, held_out) | {"part": part, "parts": parts}
    if path.is_file():
        _Part(path).check(header)
        return path
    folder.mkdir(parents=True, exist_ok=True)
    staging = path.with_name(path.name + ".partial")

    def own() -> Iterator[str]:
        for unit, text in _own_texts(sources, part, parts):
            units.append(unit)
            yield text

    texts = Texts(own(), tokenizer, word_rule, held_out)
    with open(os.open(staging, os.O_RDWR | os.O_CREAT, 0o644), "r+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{staging}: another process is writing it; wait for its end") from None
        former = _Part(staging)
        if former.header is not None:
            former.check(header)
            for rows, _ in former.frames():
                if b"".join(key for key, _ in texts.skip(len(rows))) != rows["key"].tobytes():
                    raise UserError(f"{staging}: the source changed since it was begun; remove it and run that part again")
            units.clear()
        writer = _Writer(file, former.end, former.chain)
        if former.header is None:
            writer.append(json.dumps(header).encode())
        if not former.ended:
            bar = tqdm(desc=f"{folder.name} {part}/{parts}", unit=" tokens", unit_scale=True, disable=None)
            for record in texts.records():
                writer.add(units.popleft(), record)
                bar.update(len(record.payload))
            writer.finish()
            bar.close()
        os.fsync(file.fileno())
        os.replace(staging, path)
        sync_folder(folder)
    return path


class Parts:
    """The records of all parts of a split, in the order of its texts."""

    def __init__(self, folder: Path, tokenizer: Tokenizer, *, request: dict, word_rule: str, held_out: Runs | None = None):
        """Raises UserError when a part is missing, or made of something else than is asked for."""
        names = [path.name for path in folder.glob("*.part")]
        numbers = [tuple(map(int, match.groups())) for match in map(re.compile(r"(\d+)-of-(\d+)\.part").fullmatch, names) if match]
        if not numbers:
            raise UserError(f"{folder}: holds no finished part; run every --part I/N before --merge")
        counts = sorted({parts for _, parts in numbers})
        if len(counts) > 1:
            raise UserError(f"{folder}: holds parts of {' and of '.join(map(str, counts))}; remove those that are not wanted")
        missing = [str(part) for part in sorted(set(range(counts[0])) - {part for part, _ in numbers})]
        if missing:
            shown = ", ".join(missing[:20]) + (", …" if len(missing) > 20 else "")
            raise UserError(f"{folder}: of {counts[0]} parts these are missing or not finished: {shown}; run them before --merge")
        parts, header = [_Part(folder / name) for name in sorted(names)], part_header(tokenizer, request, word_rule, held_out)
        for number, part in enumerate(parts):
            part.check(header | {"part": number, "parts": counts[0]})
        self._records = heapq.merge(*(part.records(dtype_of(tokenizer)) for part in parts), key=lambda made: made[0])

    def skip(self, n: int) -> Iterator[tuple[bytes, bool]]:
        """See `Texts.skip`."""
        for _, record in itertools.islice(self._records, n):
            yield record.key, record.fate == BLANK

    def records(self, seen: Seen | None = None) -> Iterator[Record]:
        """See `Texts.records`."""
        for _, record in self._records:
            if seen is not None and record.fate != BLANK and seen.add(record.key):
                record = record._replace(fate=DUPLICATE, payload=record.payload[:0])
            yield record


class _Part:
    """A part's file. end, chain: where its whole frames end that were read so far, and their hash."""

    def __init__(self, path: Path):
        self.path, self.end, self.chain, self.ended = path, 0, b"", False
        body = self._next()
        self.header = None if body is None else json.loads(body)

    def check(self, expected: dict) -> None:
        """Raises UserError when it was made of something else."""
        if self.header is None:
            raise self._damaged()
        found = self.header
        for key in expected:
            if found.get(key) != expected[key]:
                shown = (json.dumps(value)[:120] for value in (found.get(key), expected[key]))
                raise UserError(f"{self.path}: was made with {key} = {next(shown)}, now it is {next(shown)}; remove it and run "
                                "that part again, or go on as it was begun")  # fmt: skip

    def frames(self) -> Iterator[tuple[np.ndarray, memoryview]]:
        """Rows (n,) ROW, and their tokens, of the frames that are whole."""
        while body := self._next():
            n = int.from_bytes(body[:8], "little")
            yield np.frombuffer(body, ROW, n, 8), memoryview(body)[8 + n * ROW.itemsize :]
        self.ended = body is not None

    def records(self, dtype: np.dtype) -> Iterator[tuple[int, Record]]:
        """Each with the number of its unit. Raises UserError for a file that is not whole."""
        for rows, tokens in self.frames():
            payloads, at = np.frombuffer(tokens, dtype), 0
            for key, unit, size, words, length, fate in rows.tolist():
                yield unit, Record(key, fate, size, words, payloads[at : at + length])
                at += length
        if not self.ended or self.end != self.path.stat().st_size:
            raise self._damaged()

    def _damaged(self) -> UserError:
        return UserError(f"{self.path}: damaged from byte {self.end} on; remove it, and run that part again")

    def _next(self) -> bytes | None:
        """The next frame; its file is opened for it alone, as there may be more parts than a process may open."""
        with open(self.path, "rb") as file:
            file.seek(self.end)
            head = file.read(HEAD)
            size = int.from_bytes(head[:8], "little")
            if len(head) < HEAD or size > os.fstat(file.fileno()).st_size:
                return None
            body = file.read(size)
        chain = _linked(self.chain, body)
        if head[8:] != chain:
            return None
        self.end, self.chain = self.end + HEAD + size, chain
        return body


class _Writer:
    """Appends frames to a part."""

    def __init__(self, file: BinaryIO, end: int, chain: bytes):
        self.file, self.chain = file, chain
        self.rows, self.payloads, self.size = [], [], 0
        file.truncate(end)
        file.seek(end)

    def add(self, unit: int, record: Record) -> None:
        self.rows.append((record.key, unit, record.bytes, record.words, len(record.payload), record.fate))
        self.payloads.append(record.payload.tobytes())
        self.size += ROW.itemsize + record.payload.nbytes
        if self.size >= FRAME:
            self._flush()

    def finish(self) -> None:
        self._flush()
        self.append(b"")
        self.file.flush()

    def append(self, body: bytes) -> None:
        self.chain = _linked(self.chain, body)
        self.file.write(len(body).to_bytes(8, "little") + self.chain)
        self.file.write(body)

    def _flush(self) -> None:
        if self.rows:
            self.append(len(self.rows).to_bytes(8, "little") + np.array(self.rows, ROW).tobytes() + b"".join(self.payloads))
        self.rows, self.payloads, self.size = [], [], 0


def _linked(chain: bytes, body: bytes) -> bytes:
    return hashlib.sha256(chain + len(body).to_bytes(8, "little") + body).digest()


def _own_texts(sources: list[Source], part: int, parts: int) -> Iterator[tuple[int, str]]:
    """The texts of a part, each with the number of its unit: a file, or a block of texts."""
    files = [file for source in sources for file in by_file(source)]
    if len(files) >= parts:
        for unit in range(part, len(files), parts):
            for text in documents(files[unit]):
                yield unit, text
    else:
        for place, text in enumerate(itertools.chain.from_iterable(map(documents, sources))):
            if place // BLOCK % parts == part:
                yield place // BLOCK, text
