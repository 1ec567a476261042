"""Writing a split: records of documents, in order, are packed into shards, which a rerun after a kill continues.

`preparation.json` holds what was asked for and, after each finished shard, how much of the source it took. Its last entry
decides where a rerun goes on; the source is read again up to there and must hash to the same value.
"""
from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm
from webdataset import TarWriter

from data_pipeline.files import sync_folder, write_atomically
from data_pipeline.index import HEADER, Index, Shard, load_index, member_name, payload_offsets, publish_index
from data_pipeline.overlap import Runs, Seen
from data_pipeline.parts import Parts
from data_pipeline.records import DUPLICATE, KEPT, OVERLAPPING, Record, Texts, dtype_of
from data_pipeline.tokenizer import Tokenizer
from serpent_scale.errors import UserError

SHARD_TOKENS = 100_000_000
SHARD_BYTES = (256 << 20) - (1 << 16)  # leaves room for the tar's end


@dataclass
class Progress:
    """How far into the source the finished shards reach."""

    texts: int = 0  # read from the source, skipped ones included
    documents: int = 0
    bytes: int = 0
    words: int = 0
    digest: str = ""  # of the texts' keys
    duplicates: int = 0  # left out, as texts that were there before
    overlapping: int = 0  # left out, as they share runs of words with an evaluation set


def prepare_split(
    folder: Path, texts: Iterable[str] | Parts, tokenizer: Tokenizer, *,
    request: dict, word_rule: str, shard_tokens: int = SHARD_TOKENS, deduplicate: bool = False, held_out: Runs | None = None,
) -> tuple[Index, bool]:  # fmt: skip
    """Write the split `folder` (DATA/SPLIT), or finish it, or find it done: (index, whether there was anything to do).

    texts: or the parts that were made of them, of which nothing is left but these. A document is <|endoftext|> tokens
    <|endoftext|>; blank texts are left out. A shard holds at most `shard_tokens` and 256 MiB, unless a single document is
    larger. deduplicate: of equal texts keep the first. held_out: leave out documents that overlap these. request: what else
    determines the outcome, compared with that of a former run. Memory: that of a batch of texts, a shard's index and, with
    deduplicate, 19 bytes a text.
    Raises UserError when the folder holds something else, or the source has changed since.
    """
    request = request | {"tokenizer_sha256": tokenizer.sha256, "shard_tokens": shard_tokens}
    if deduplicate:
        request["deduplicate"] = True
    if held_out is not None:
        request["held_out_sha256"] = held_out.sha256
    shards, progress = _resume(folder, request)
    if (folder / "index.json").is_file():
        return load_index(folder), False
    source = texts if isinstance(texts, Parts) else Texts(texts, tokenizer, word_rule, held_out)
    writer = _SplitWriter(folder, tokenizer, request, shards, progress, word_rule, shard_tokens)
    writer.write(source, Seen() if deduplicate else None)
    return load_index(folder), True


def left_out(folder: Path) -> dict[str, int]:
    """How many texts of a prepared split were left out, as duplicates and as overlapping an evaluation set."""
    try:
        progress = json.loads((folder / "preparation.json").read_bytes())["progress"]
        return {key: int(progress.get(key, 0)) for key in ("duplicates", "overlapping")}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {"duplicates": 0, "overlapping": 0}  # counts for people to read: their absence hinders nothing


def _resume(folder: Path, request: dict) -> tuple[list[Shard], Progress]:
    """The finished shards of a former run with the same request."""
    path = folder / "preparation.json"
    if not path.is_file():
        if folder.is_dir() and any(folder.glob("*.tar")) or (folder / "index.json").is_file():
            raise UserError(f"{folder}: holds shards but no preparation.json; choose another --out")
        return [], Progress()
    try:
        state = json.loads(path.read_bytes())
        former, shards, progress = state["request"], [Shard(**s) for s in state["shards"]], Progress(**state["progress"])
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path}: unreadable; remove {folder} to prepare it again") from None
    for key in sorted(set(former) | set(request)):
        if former.get(key) != request.get(key):
            raise UserError(f"{folder}: was prepared with {key} = {_short(former.get(key))}, now it is "
                            f"{_short(request.get(key))}; choose another --out or remove that folder")  # fmt: skip
    for shard in shards:
        if not (folder / shard.name).is_file() or (folder / shard.name).stat().st_size != shard.bytes:
            raise UserError(f"{folder / shard.name}: missing or cut since it was written; remove {folder} and start again")
    return shards, progress


def _short(value) -> str:
    text = json.dumps(value)
    return text if len(text) <= 120 else text[:117] + "..."


class _SplitWriter:
    """Carries the state of one `prepare_split`."""

    def __init__(self, folder, tokenizer, request, shards, progress, word_rule, shard_tokens):
        self.folder, self.tokenizer, self.request = folder, tokenizer, request
        self.shards, self.progress = shards, progress
        self.word_rule, self.shard_tokens = word_rule, shard_tokens
        self.dtype = dtype_of(tokenizer)
        self.hash = hashlib.sha256()

    def write(self, source: Texts | Parts, seen: Seen | None) -> None:
        """Write the shards that are missing, then the index."""
        self._skip(source, seen)
        self.folder.mkdir(parents=True, exist_ok=True)
        with tqdm(desc=self.folder.name, unit=" tokens", unit_scale=True, disable=None, initial=self._tokens()) as bar:
            tar = None
            try:
                for record in source.records(seen):
                    if tar is not None and not tar.has_room(record.payload, self.shard_tokens):
                        self._finish(tar)
                        tar = None
                    if record.fate == KEPT:
                        if tar is None:
                            tar = _ShardWriter(self.folder, len(self.shards))
                        tar.write(member_name(self.progress.documents), record.payload)
                        bar.update(len(record.payload))
                        bar.set_postfix(documents=self.progress.documents + 1, refresh=False)
                    self._count(record)
                if tar is not None:
                    self._finish(tar)
            except BaseException:
                if tar is not None:
                    tar.file.failed = True
                raise
        if not self.shards:
            raise UserError(f"{self.folder}: the source holds no text for this split; check --source")
        publish_index(
            self.folder, split=self.folder.name, dtype=self.dtype.name, tokenizer_sha256=self.tokenizer.sha256,
            vocab_size=self.tokenizer.vocab_size, eot_id=self.tokenizer.eot_id, bytes=self.progress.bytes,
            words=self.progress.words, word_rule=self.word_rule, shards=self.shards, documents=self._documents(),
        )  # fmt: skip

    def _tokens(self) -> int:
        return sum(shard.tokens for shard in self.shards)

    def _skip(self, source: Texts | Parts, seen: Seen | None) -> None:
        """Read past what the finished shards took, and check that it is the same text."""
        done = source.skip(self.progress.texts)
        for key, blank in tqdm(done, f"{self.folder.name}: already done", self.progress.texts, disable=None, leave=False):
            self.hash.update(key)
            if seen is not None and not blank:
                seen.add(key)
        if self.progress.texts and self.hash.hexdigest() != self.progress.digest:
            raise UserError(f"{self.folder}: the source changed since it was begun, or another version of this began it; remove "
                            "that folder and start again")  # fmt: skip

    def _count(self, record: Record) -> None:
        self.hash.update(record.key)
        self.progress.texts += 1
        self.progress.duplicates += record.fate == DUPLICATE
        self.progress.overlapping += record.fate == OVERLAPPING
        if record.fate == KEPT:
            self.progress.documents += 1
            self.progress.bytes += record.bytes
            self.progress.words += record.words

    def _finish(self, tar: _ShardWriter) -> None:
        self.shards.append(tar.finish())
        self.progress.digest = self.hash.hexdigest()
        state = dict(request=self.request, progress=asdict(self.progress), shards=[asdict(shard) for shard in self.shards])
        write_atomically(self.folder / "preparation.json", (json.dumps(state, indent=1) + "\n").encode())

    def _documents(self) -> Iterator[np.ndarray]:
        """Rows (n, 3) int64 of each shard, read back from it, as a former run may have written it."""
        for number, shard in enumerate(self.shards):
            sizes, at = np.empty(shard.documents, np.int64), 0
            with open(self.folder / shard.name, "rb", buffering=0) as tar:
                for document in range(shard.documents):
                    sizes[document] = size = int(os.pread(tar.fileno(), 11, at + 124), 8)
                    at += HEADER + -(-size // HEADER) * HEADER
            offsets = payload_offsets(sizes)[:-1]
            yield np.stack([np.full_like(sizes, number), offsets, sizes // self.dtype.itemsize], 1)


class _ShardWriter:
    """One tar, the same bytes whenever and by whomever it is written; under its final name only when it is whole."""

    def __init__(self, folder: Path, number: int):
        self.path = folder / f"shard-{number:06d}.tar"
        self.staging = self.path.with_name(self.path.name + ".partial")
        self.file = _HashingFile(open(self.staging, "wb"))
        self.tar = TarWriter(self.file, encoder=False, user="", group="", mode=0o444, mtime=0)
        self.documents = self.tokens = self.bytes = 0

    def has_room(self, payload: np.ndarray, shard_tokens: int) -> bool:
        if not len(payload):
            return True
        return self.tokens + len(payload) <= shard_tokens and self.bytes + payload.nbytes + 2 * HEADER <= SHARD_BYTES

    def write(self, name: str, payload: np.ndarray) -> None:
        key, _, extension = name.partition(".")
        self.tar.write({"__key__": key, extension: payload.tobytes()})
        self.documents += 1
        self.tokens += len(payload)
        self.bytes += HEADER + -(-payload.nbytes // HEADER) * HEADER

    def finish(self) -> Shard:
        self.tar.close()
        self.file.raw.flush()
        os.fsync(self.file.raw.fileno())
        self.file.raw.close()
        os.replace(self.staging, self.path)
        sync_folder(self.path.parent)
        size = self.path.stat().st_size
        return Shard(self.path.name, self.documents, self.tokens, size, self.file.sha256.hexdigest())


class _HashingFile:
    """Hashes what passes through, to spare reading it back."""

    def __init__(self, raw):
        self.raw, self.sha256, self.failed = raw, hashlib.sha256(), False

    def write(self, data: bytes) -> int:
        if self.failed:  # a tarfile tries once more when it is collected, and would print a second error
            return len(data)
        self.failed = True
        self.sha256.update(data)
        written = self.raw.write(data)
        self.failed = False
        return written
