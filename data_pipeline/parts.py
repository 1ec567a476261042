"""Tokens made ahead by the tasks of an array job, each of every n-th block of documents.

They are a cache, found by the text itself: what is prepared with it is byte for byte what is prepared without it, and a text
that no part holds is tokenised as ever.
"""
from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import safetensors
import safetensors.numpy

from data_pipeline.files import write_atomically
from data_pipeline.tokenizer import Tokenizer
from serpent_scale.errors import UserError

BLOCK = 256  # texts that go to the same part


def parts_folder(split: Path) -> Path:
    return split.with_name(split.name + ".parts")


def write_part(folder: Path, texts: Iterable[str], tokenizer: Tokenizer, part: int, parts: int) -> int:
    """Tokenise the blocks of `part` (0 ... parts - 1) into one file of `folder`, if it is not there; how many texts it has."""
    path = folder / f"{tokenizer.sha256[:16]}-{part:05d}-of-{parts:05d}.safetensors"
    if path.is_file():
        return len(_Part(path).keys)
    keys, ids = [], []
    blocks = itertools.groupby(enumerate(texts), key=lambda pair: pair[0] // BLOCK)
    for number, block in blocks:
        if number % parts == part:
            block = [text for _, text in block]
            keys += map(_key, block)
            ids += [np.array(row, np.uint32) for row in tokenizer.encode_batch(block)]
    ends = np.cumsum([len(row) for row in ids], dtype=np.int64)
    tokens = np.concatenate(ids) if ids else np.zeros(0, np.uint32)
    arrays = {"keys": np.frombuffer(b"".join(keys), np.uint8).reshape(-1, 16), "ends": ends, "tokens": tokens}
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(path, safetensors.numpy.save(arrays, {"sha256": _digest(arrays)}))
    return len(keys)


class CachedTokenizer:
    """A tokenizer that looks into the parts first."""

    def __init__(self, tokenizer: Tokenizer, folder: Path):
        """Raises UserError for a part that is damaged."""
        self.tokenizer, self.sha256, self.vocab_size = tokenizer, tokenizer.sha256, tokenizer.vocab_size
        self.eot_id = tokenizer.eot_id
        self._parts = [_Part(path) for path in sorted(folder.glob(f"{self.sha256[:16]}-*.safetensors"))]

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        found = {text: row for text in set(texts) if (row := self._find(_key(text))) is not None}
        rest = [text for text in texts if text not in found]
        made = iter(self.tokenizer.encode_batch(rest) if rest else [])
        return [found[text] if text in found else next(made) for text in texts]

    def _find(self, key: bytes) -> list[int] | None:
        for part in self._parts:
            if key in part.keys:
                return part.row(part.keys[key])
        return None


class _Part:
    def __init__(self, path: Path):
        try:
            with safetensors.safe_open(path, framework="numpy") as file:
                arrays = {name: file.get_tensor(name) for name in ("keys", "ends", "tokens")}
                whole = file.metadata()["sha256"] == _digest(arrays)
        except (OSError, KeyError, TypeError, safetensors.SafetensorError):
            whole = False
        if not whole:
            raise UserError(f"{path}: damaged; remove it, and run its part again")
        self.ends, self.tokens = arrays["ends"], arrays["tokens"]
        self.keys = {key.tobytes(): i for i, key in enumerate(arrays["keys"])}

    def row(self, i: int) -> list[int]:
        return self.tokens[self.ends[i - 1] if i else 0 : self.ends[i]].tolist()


def _key(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def _digest(arrays: dict[str, np.ndarray]) -> str:
    return hashlib.sha256(b"".join(arrays[name].tobytes() for name in ("keys", "ends", "tokens"))).hexdigest()
