"""What preparation makes of a text: a record, which is its marked tokens, or why it is left out, and what is counted of it."""
from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

from data_pipeline.overlap import Runs, Seen
from data_pipeline.tokenizer import Tokenizer

BATCH_CHARACTERS, BATCH_TEXTS = 2_000_000, 8192  # tokenised at a time
KEPT, BLANK, DUPLICATE, OVERLAPPING, EMPTY = range(5)  # EMPTY: not blank, but without a token

# How WikiText's word perplexity is normalised: each line end counts as a word, <eos>.
WORD_RULES = {
    "whitespace": lambda text: len(text.split()),
    "whitespace+line_ends": lambda text: len(text.split()) + text.count("\n"),
}


class Record(NamedTuple):
    """key: blake2b of the text, 16 bytes. fate: KEPT or why not. bytes, words: of the text. payload: <|endoftext|> tokens
    <|endoftext|> of a text that is kept, (n + 2,) uint16 or uint32, else empty."""

    key: bytes
    fate: int
    bytes: int
    words: int
    payload: np.ndarray


class Texts:
    """The records of texts, tokenised as they are asked for."""

    def __init__(self, texts: Iterable[str], tokenizer: Tokenizer, word_rule: str, held_out: Runs | None = None):
        self._texts, self._tokenizer, self._held_out = iter(texts), tokenizer, held_out
        self._count_words, self._dtype = WORD_RULES[word_rule], dtype_of(tokenizer)

    def skip(self, n: int) -> Iterator[tuple[bytes, bool]]:
        """Read past the next n texts, if there are so many: the key of each, and whether it is blank."""
        for _, text in zip(range(n), self._texts):
            yield key_of(text.encode()), not text.strip()

    def records(self, seen: Seen | None = None) -> Iterator[Record]:
        """What is left. seen: texts that were there before are duplicates, and these are from then on."""
        mark, empty = self._tokenizer.eot_id, np.empty(0, self._dtype)
        for texts in _batches(self._texts):
            raw = [text.encode() for text in texts]
            keys = [key_of(data) for data in raw]
            fates = [BLANK if not text.strip() else DUPLICATE if seen is not None and seen.add(key) else KEPT
                     for text, key in zip(texts, keys)]  # fmt: skip
            if self._held_out is not None:
                kept = [i for i, fate in enumerate(fates) if fate == KEPT]
                for i in np.array(kept)[self._held_out.overlapping([texts[i] for i in kept])].tolist() if kept else ():
                    fates[i] = OVERLAPPING
            rows = iter(self._tokenizer.encode_batch([text for text, fate in zip(texts, fates) if fate == KEPT]))
            for text, data, key, fate in zip(texts, raw, keys, fates):
                ids = next(rows) if fate == KEPT else ()
                fate = EMPTY if fate == KEPT and not ids else fate
                payload = np.array([mark, *ids, mark], self._dtype) if fate == KEPT else empty
                yield Record(key, fate, len(data), self._count_words(text), payload)


def dtype_of(tokenizer: Tokenizer) -> np.dtype:
    return np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4")


def key_of(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=16).digest()


def _batches(texts: Iterator[str]) -> Iterator[list[str]]:
    batch, characters = [], 0
    for text in texts:
        batch.append(text)
        characters += len(text)
        if characters >= BATCH_CHARACTERS or len(batch) >= BATCH_TEXTS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch
