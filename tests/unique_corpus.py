"""A data set in which every token but the marks occurs once: what was read tells where it lay."""
from __future__ import annotations

from pathlib import Path

from data_pipeline.files import sha256_of
from data_pipeline.shards import prepare_split

LENGTHS = [1, 700, 3, 40, 2, 90, 260, 5, 33, 64, 62, 1, 9]  # of documents, over and over


class Counter:
    """Stands for a tokenizer: the text "5 3" is the tokens 5, 6, 7; 0 is the mark."""

    eot_id = 0

    def __init__(self, path: Path, vocab_size: int):
        path.write_text("{}")
        self.sha256, self.vocab_size = sha256_of(path), vocab_size

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        pairs = [map(int, text.split()) for text in texts]
        return [list(range(first, first + n)) for first, n in pairs]


def write_corpus(folder: Path, documents: int, shard_tokens: int, first: int = 1, vocab_size: int | None = None) -> int:
    """Write DATA/train with `documents` documents, whose tokens are `first` and those after it; one past the last."""
    texts = []
    for i in range(documents):
        texts.append(f"{first} {LENGTHS[i % len(LENGTHS)]}")
        first += LENGTHS[i % len(LENGTHS)]
    folder.mkdir(exist_ok=True)
    tokenizer = Counter(folder / "tokenizer.json", vocab_size or first)
    prepare_split(folder / "train", texts, tokenizer, request={}, word_rule="whitespace", shard_tokens=shard_tokens)
    return first
