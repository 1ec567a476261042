"""The index of a split: what is in its shards, and the checks that it is true.

Opening a split checks the index and that every shard has its size. `verify_shard` reads a whole shard; `open_shard` does so
before it hands out a shard's tokens.
"""
from __future__ import annotations

import hashlib
import io
import json
import mmap
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from data_pipeline.files import replacing, sha256_of, write_atomically
from data_pipeline.places import Cache, Damage, Remote, is_remote
from serpent_scale.errors import UserError

FORMAT = 1
HASH = "fields_sha256"  # key of index.json: of all others; what was prepared before there was one is read without
DTYPES = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}
HEADER = 512  # of a tar member, and what its payload is padded to
NPY_HEADER, ROW = 128, 24  # bytes of documents.npy before its first document, and of one
RECORD = 10240  # what a tar file is padded to
CHUNK = 1 << 20  # documents checked at a time
MEND = "restore it from a copy, or prepare the data again in an empty folder"


@dataclass(frozen=True)
class Shard:
    name: str
    documents: int
    tokens: int
    bytes: int
    sha256: str


@dataclass(frozen=True, eq=False)
class Index:
    """One split on disk.

    sha256: of index.json, the identity of the data. documents (n, 3) int64: shard, byte offset of the payload in its tar,
    tokens; in shard order. tokens counts the marks around documents; bytes and words count the text, words by `word_rule`.
    """

    folder: Path
    sha256: str
    split: str
    dtype: np.dtype
    tokenizer_sha256: str
    vocab_size: int
    eot_id: int
    tokens: int
    bytes: int
    words: int
    word_rule: str
    shards: tuple[Shard, ...]
    documents: np.ndarray
    remote: Remote | None = None  # where the shards are, if `folder` only mirrors what describes them

    @property
    def n_documents(self) -> int:
        return len(self.documents)

    @property
    def tokenizer_path(self) -> Path:
        return self.folder.parent / "tokenizer.json"

    @cached_property
    def shard_tokens(self) -> np.ndarray:
        """Tokens of each shard, (n_shards,) int64."""
        return np.array([shard.tokens for shard in self.shards], np.int64)

    def remote_file(self, shard: int) -> tuple[str, int, str]:
        """Name, size and sha256 of a shard below `remote`."""
        found = self.shards[shard]
        return f"{self.folder.name}/{found.name}", found.bytes, found.sha256

    def beside(self, name: str) -> Path:
        """A file in the split's folder, fetched if that is elsewhere."""
        if self.remote is not None:
            with self.remote.cache.locked(self.folder.parent.name):
                _update(self.folder / name, self.remote.small(f"{self.folder.name}/{name}"))
        return self.folder / name

    def rows(self, shard: int) -> np.ndarray:
        """The documents of a shard. A copy, so that an index of any size takes no memory but what is in use."""
        first, last = self.first_document(shard), self.first_document(shard + 1)
        if not isinstance(self.documents, np.memmap):
            return np.array(self.documents[first:last])
        at = self.documents.offset + first * ROW
        rows = np.fromfile(self.documents.filename, "<i8", 3 * (last - first), offset=at).reshape(-1, 3)
        if len(rows) != last - first:
            raise UserError(f"{self.documents.filename}: cut since it was opened; {MEND}")
        return rows

    def first_document(self, shard: int) -> int:
        """Number of a shard's first document; of one past the last shard, the number of documents."""
        return int(self._first_documents[shard])

    @cached_property
    def _first_documents(self) -> np.ndarray:
        return np.concatenate([[0], np.cumsum([shard.documents for shard in self.shards])])


def payload_offsets(sizes: np.ndarray) -> np.ndarray:
    """Where payloads of these sizes (n,) int64 lie in a tar, and behind them where its end marks begin: (n + 1,)."""
    ends = np.cumsum(HEADER + -(-sizes // HEADER) * HEADER)
    return np.concatenate([[0], ends]) + np.append(np.full(len(sizes), HEADER), 0)


def member_name(document: int) -> str:
    return f"{document:09d}.tokens"


def publish_index(
    folder: Path, *, split: str, dtype: str, tokenizer_sha256: str, vocab_size: int, eot_id: int, bytes: int, words: int,
    word_rule: str, shards: list[Shard], documents: Iterable[np.ndarray],
) -> None:  # fmt: skip
    """Write documents.npy and then index.json, whose appearance makes the split readable. documents: rows of its array, in
    pieces (n, 3), so that there may be more than fit into memory."""
    header, n_documents = io.BytesIO(), sum(shard.documents for shard in shards)
    np.lib.format.write_array_header_1_0(header, dict(descr="<i8", fortran_order=False, shape=(n_documents, 3)))
    hasher = hashlib.sha256(header.getvalue())
    with replacing(folder / "documents.npy") as file:
        file.write(header.getvalue())
        for rows in documents:
            raw = rows.astype("<i8").tobytes()
            hasher.update(raw)
            file.write(raw)
    fields = dict(
        format=FORMAT, split=split, dtype=dtype, tokenizer_sha256=tokenizer_sha256, vocab_size=vocab_size, eot_id=eot_id,
        documents=n_documents, tokens=sum(shard.tokens for shard in shards), bytes=bytes, words=words,
        word_rule=word_rule, documents_sha256=hasher.hexdigest(),
        shards=[asdict(shard) for shard in shards],
    )  # fmt: skip
    write_atomically(folder / "index.json", _with_hash(fields))


def _with_hash(fields: dict) -> bytes:
    """The content of index.json. Some fields nothing else would betray: the words that a perplexity is divided by, for one."""
    digest = hashlib.sha256(json.dumps(fields, indent=1).encode()).hexdigest()
    return (json.dumps(fields | {HASH: digest}, indent=1) + "\n").encode()


_FIELDS = dict(
    format=int, split=str, dtype=str, tokenizer_sha256=str, vocab_size=int, eot_id=int, documents=int, tokens=int, bytes=int,
    words=int, word_rule=str, documents_sha256=str, shards=list,
)  # fmt: skip
_SHARD_FIELDS = dict(name=str, documents=int, tokens=int, bytes=int, sha256=str)


def load_split(data: str | Path, split: str, cache: Cache | None = None, check_shards: bool = True) -> Index:
    """Open DATA/SPLIT, DATA being a folder or a URL, whose shards are fetched into the cache when they are needed. Raises
    UserError as `load_index` does, and when a URL is refused or cannot be reached."""
    if not is_remote(data):
        return load_index(Path(data) / split, check_shards)
    if cache is None:
        raise UserError(f"{data}: data elsewhere needs a place to be kept; set data.cache to a folder on a local disk")
    remote = Remote(str(data), cache)
    # What describes the split is fetched each time: nothing says beforehand what is in it.
    folder = cache.folder / hashlib.sha256(remote.url.encode()).hexdigest()[:16] / split
    with cache.locked(folder.parent.name):
        folder.mkdir(parents=True, exist_ok=True)
        _update(folder.parent / "tokenizer.json", remote.small("tokenizer.json"))
        raw = remote.small(f"{split}/index.json")
        _update(folder / "index.json", raw)
        try:
            fields = json.loads(raw)
            size, sha256 = NPY_HEADER + ROW * int(fields["documents"]), str(fields["documents_sha256"])
        except (ValueError, KeyError, TypeError):
            pass  # load_index says what is wrong
        else:
            _link(remote.get(f"{split}/documents.npy", size, sha256), folder / "documents.npy")
        return replace(load_index(folder, check_shards=False), remote=remote)


def _update(path: Path, raw: bytes) -> None:
    if not path.is_file() or path.read_bytes() != raw:
        write_atomically(path, raw)


def _link(fetched: Path, path: Path) -> None:
    """Give a file of the cache another name, by which it stays when it has to leave the cache."""
    staging = path.with_name(path.name + ".partial")
    staging.unlink(missing_ok=True)
    os.link(fetched, staging)
    os.replace(staging, path)


def load_index(folder: Path, check_shards: bool = True) -> Index:
    """Open the split in `folder` (DATA/SPLIT).

    Raises UserError when the index or tokenizer is missing or wrong, or, with `check_shards`, a shard is missing or of another
    size.
    """
    folder = Path(folder)
    path = folder / "index.json"
    if not path.is_file():
        others = ", ".join(sorted(other.parent.name for other in folder.parent.glob("*/index.json")))
        mend = f"{folder.parent} has {others}; choose one of these, or prepare" if others else "set data.path, or prepare"
        raise UserError(f"{path}: no such index; {mend} the split with launch/prepare_data.py")
    raw = path.read_bytes()
    try:
        fields = json.loads(raw)
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON ({error}); {MEND}") from None
    if isinstance(fields, dict) and fields.get("format", FORMAT) != FORMAT:
        raise UserError(f"{path}: format {fields['format']!r}, this version reads {FORMAT}; prepare the data again")
    hashed = isinstance(fields, dict) and HASH in fields
    if hashed:
        del fields[HASH]
    intact = not hashed or raw == _with_hash(fields)
    _check_fields(path, "", fields, _FIELDS)
    for number, shard in enumerate(fields["shards"]):
        _check_fields(path, f"shards[{number}].", shard, _SHARD_FIELDS)
        if not re.fullmatch(r"[A-Za-z0-9][\w.-]*\.tar", shard["name"]):
            raise UserError(f"{path}: shards[{number}].name {shard['name']!r} is not a plain file name; {MEND}")
    if fields["dtype"] not in DTYPES:
        raise UserError(f"{path}: dtype {fields['dtype']!r} is not one of {', '.join(DTYPES)}; {MEND}")
    if not fields["eot_id"] < fields["vocab_size"]:
        raise UserError(f"{path}: eot_id {fields['eot_id']} is outside the vocabulary of {fields['vocab_size']}; {MEND}")
    if not intact:
        raise UserError(f"{path}: damaged, its {HASH} is not that of what it says; {MEND}")
    documents = _load_documents(folder / "documents.npy", fields.pop("documents_sha256"))
    shards = tuple(Shard(**shard) for shard in fields.pop("shards"))
    _check_totals(path, fields, shards, documents)
    del fields["format"], fields["documents"]
    fields["dtype"] = DTYPES[fields["dtype"]]
    index = Index(folder=folder, sha256=hashlib.sha256(raw).hexdigest(), shards=shards, documents=documents, **fields)
    _check_tokenizer(index)
    for number in range(len(shards) if check_shards else 0):
        _check_size(index, number)
    return index


def verify_shard(index: Index, number: int, path: Path | None = None) -> None:
    """Read shard `number` whole: its size, its sha256, and that its members are the documents the index says, no others.
    path: where it is, if not in its folder.

    Raises Damage naming the shard, and the byte where it is known.
    """
    path, expected = _check_size(index, number, path), index.shards[number].sha256
    digest = sha256_of(path)
    fault = _fault_of_members(index, number, np.memmap(path, np.uint8, "r"))
    if digest != expected:
        others = [shard.name for shard in index.shards if shard.sha256 == digest]
        fault = fault or "names and sizes are as indexed, other bytes differ"
        fault = f"it is {others[0]} under another name" if others else fault
        raise Damage(f"{path}: sha256 is {digest[:16]}…, the index says {expected[:16]}…: {fault}; {MEND}")
    if fault:
        raise Damage(f"{path}: {fault}; {MEND}")
    _check_vocabulary(index, number, np.memmap(path, index.dtype, "r"))


def open_shard(index: Index, number: int, verified: bool = False) -> np.ndarray:
    """Verify a shard, if that has not been done, and map its whole tar as an array of `index.dtype`: a payload at byte b
    begins at b / itemsize. One that lies elsewhere is fetched first, and again if it was damaged in the cache."""
    shard = index.shards[number]
    for again in (index.remote is not None, False):
        path = index.folder / shard.name
        try:
            if index.remote is not None:
                path = index.remote.get(*index.remote_file(number))
            if not verified:
                verify_shard(index, number, path)
            return _mapped(path, index.dtype)
        except (Damage, FileNotFoundError):  # somebody else's cache may have had no room for it any more
            if not again:
                raise
            index.remote.cache.drop(shard.sha256)


def _mapped(path: Path, dtype: np.dtype) -> np.ndarray:
    """A file as an array, its pages all mapped at once: else every window would stop for those it meets first."""
    with open(path, "rb") as file:
        return np.frombuffer(mmap.mmap(file.fileno(), 0, mmap.MAP_SHARED | mmap.MAP_POPULATE, mmap.PROT_READ), dtype)


def mapped_size(data: np.ndarray) -> Callable[[], int]:
    """What tells the bytes that the file of an array of `open_shard` has by now."""
    base = data.base
    return (base if isinstance(base, mmap.mmap) else base.obj).size


def _check_fields(path: Path, prefix: str, fields, expected: dict[str, type]) -> None:
    if not isinstance(fields, dict):
        raise UserError(f"{path}: {prefix.rstrip('.') or 'the file'} is not a JSON object; {MEND}")
    for key in sorted(set(expected) ^ set(fields)):
        raise UserError(f"{path}: {'unknown' if key in fields else 'missing'} key '{prefix}{key}'; {MEND}")
    for key, kind in expected.items():
        value = fields[key]
        if type(value) is not kind or (kind is int and value < 0):
            raise UserError(f"{path}: {prefix}{key} is {str(value)[:40]!r}, not a valid {kind.__name__}; {MEND}")


def _load_documents(path: Path, sha256: str) -> np.ndarray:
    if not path.is_file():
        raise UserError(f"{path}: missing; {MEND}")
    if sha256_of(path) != sha256:
        raise UserError(f"{path}: its sha256 is not the one in index.json; {MEND}")
    try:
        documents = np.load(path, mmap_mode="r", allow_pickle=False)
    except ValueError as error:
        raise UserError(f"{path}: not a plain array ({error}); {MEND}") from None
    if documents.dtype != np.dtype("<i8") or documents.ndim != 2 or documents.shape[1] != 3 or not documents.flags.c_contiguous:
        raise UserError(f"{path}: {documents.dtype} {documents.shape} is not int64 (documents, 3); {MEND}")
    return documents


def _check_totals(path: Path, fields: dict, shards: tuple[Shard, ...], documents: np.ndarray) -> None:
    """Piece by piece: there may be more documents than fit into memory."""
    if not len(documents):
        raise UserError(f"{path}: the split has no documents; {MEND}")
    per_shard, last = np.zeros((2, len(shards)), np.int64), 0
    for begin in range(0, len(documents), CHUNK):
        number, _, tokens = np.array(documents[begin : begin + CHUNK]).T
        in_order = begin or number[0] == 0
        if not in_order or number[0] < last or (np.diff(number) < 0).any() or number[-1] >= len(shards) or (tokens < 2).any():
            raise UserError(f"{path.parent / 'documents.npy'}: shard numbers or token counts are out of range; {MEND}")
        first, last = int(number[0]), int(number[-1])
        sums = np.concatenate([[0], np.cumsum(tokens)])
        edges = np.searchsorted(number, np.arange(first, last + 2))
        per_shard[:, first : last + 1] += np.diff([edges, sums[edges]])
    for i, shard in enumerate(shards):
        if (shard.documents, shard.tokens) != tuple(per_shard[:, i]) or not shard.documents:
            raise UserError(f"{path}: {shard.name} has {shard.documents} documents and {shard.tokens} tokens there, "
                            f"{per_shard[0, i]} and {per_shard[1, i]} in documents.npy; {MEND}")  # fmt: skip
    if len({shard.name for shard in shards}) != len(shards):
        raise UserError(f"{path}: a shard is listed twice; {MEND}")
    for key, total in dict(documents=len(documents), tokens=int(per_shard[1].sum())).items():
        if fields[key] != total:
            raise UserError(f"{path}: {key} is {fields[key]}, its shards add up to {total}; {MEND}")


def _check_tokenizer(index: Index) -> None:
    path = index.tokenizer_path
    if not path.is_file():
        raise UserError(f"{path}: missing, {index.folder} was tokenised with it; {MEND}")
    if sha256_of(path) != index.tokenizer_sha256:
        raise UserError(f"{path}: not the tokenizer that {index.folder} was made with; {MEND}")


def _check_size(index: Index, number: int, path: Path | None = None) -> Path:
    shard = index.shards[number]
    path = path or index.folder / shard.name
    if not path.is_file():
        raise Damage(f"{path}: missing; {MEND}")
    if path.stat().st_size != shard.bytes:
        raise Damage(f"{path}: {path.stat().st_size} bytes, the index says {shard.bytes}: "
                        f"{_fault_of_size(index, number, path.stat().st_size)}; {MEND}")  # fmt: skip
    return path


def _check_vocabulary(index: Index, number: int, data: np.ndarray) -> None:
    """data: the whole tar as tokens."""
    rows = index.rows(number)
    begins = rows[:, 1] // index.dtype.itemsize
    edges = np.stack([begins, begins + rows[:, 2]], 1).ravel()
    most = np.maximum.reduceat(data, edges)[::2]  # every other one is of what lies between documents
    if most.max() >= index.vocab_size:
        document = int(np.argmax(most >= index.vocab_size))
        raise Damage(f"{index.folder / index.shards[number].name}: token {most[document]} in document "
                        f"{index.first_document(number) + document} is outside the vocabulary of {index.vocab_size}; prepare "
                        "the data again with the tokenizer beside it")  # fmt: skip


def _fault_of_size(index: Index, number: int, size: int) -> str:
    if size > index.shards[number].bytes:
        return f"what is from byte {index.shards[number].bytes} on does not belong to it"
    first, last = index.first_document(number), index.first_document(number + 1)
    rows = index.rows(number)
    ends = rows[:, 1] + rows[:, 2] * index.dtype.itemsize
    whole = first + int((ends <= size).sum())
    return f"cut at byte {size}, in its end mark" if whole == last else f"cut at byte {size}, in or before document {whole}"


def _fault_of_members(index: Index, number: int, data: np.ndarray) -> str | None:
    """Compare the tar with the layout that documents.npy implies: where members lie, their names, sizes and types.

    data (bytes,) uint8. One expected layout leaves no room for a foreign member, a link or a path. Returns the first fault,
    with its byte.
    """
    first, last = index.first_document(number), index.first_document(number + 1)
    rows = index.rows(number)
    offsets, sizes = rows[:, 1], rows[:, 2] * index.dtype.itemsize
    expected = payload_offsets(sizes)
    if (offsets != expected[:-1]).any():
        at = first + int(np.argmax(offsets != expected[:-1]))
        return f"{index.folder / 'documents.npy'} has an offset of document {at} that does not fit"
    end = int(expected[-1])
    if len(data) < end:
        return f"ends at byte {len(data)}, its documents at byte {end}"
    for start in range(0, last - first, 8192):
        stop = min(start + 8192, last - first)
        headers = data[(offsets[start:stop] - HEADER)[:, None] + np.arange(HEADER)]
        names = np.array([member_name(i).encode() for i in range(first + start, first + stop)], "S100")
        octals = np.array([b"%011o" % size for size in sizes[start:stop]], "S12")
        right = (
            (headers[:, :100] == names.view(np.uint8).reshape(-1, 100)).all(1)
            & (headers[:, 124:136] == octals.view(np.uint8).reshape(-1, 12)).all(1)
            & (headers[:, 156] == ord("0"))  # a regular file
            & ~headers[:, 157:257].any(1)  # link name
            & ~headers[:, 345:500].any(1)  # prefix of the path
        )
        if not right.all():
            at = start + int(np.argmin(right))
            name = member_name(first + at)
            return f"at byte {offsets[at] - HEADER} there is no {name} with the indexed size of document {first + at}"
    if len(data) != -(-(end + 2 * HEADER) // RECORD) * RECORD or data[end:].any():
        return f"other data after its {last - first} documents, which end at byte {end}"
    return None
