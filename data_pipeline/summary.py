"""What a split is, for people to look at: how long its documents are, and some of them."""
from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from data_pipeline.index import Index, open_shard
from data_pipeline.order import derive_key, permute
from data_pipeline.tokenizer import Tokenizer

CHUNK = 1 << 20  # documents at a time


@dataclass(frozen=True, eq=False)
class Lengths:
    """Documents by their tokens, the marks around them included. Bin b: 2^b <= tokens < 2^(b + 1).

    documents, tokens (bins,) int64: how many documents there are in a bin, and how many tokens they have together.
    """

    documents: np.ndarray
    tokens: np.ndarray
    shortest: int
    longest: int

    @classmethod
    def of(cls, index: Index) -> Lengths:
        counts, shortest, longest = np.zeros((2, 64), np.int64), None, 0
        for begin in range(0, index.n_documents, CHUNK):  # a copy each, so that memory does not grow with the index
            lengths = np.array(index.documents[begin : begin + CHUNK, 2])
            bins = np.frexp(lengths)[1] - 1
            counts[0] += np.bincount(bins, minlength=64)
            np.add.at(counts[1], bins, lengths)
            shortest = int(lengths.min()) if shortest is None else min(shortest, int(lengths.min()))
            longest = max(longest, int(lengths.max()))
        bins = int(np.flatnonzero(counts[0])[-1]) + 1
        return cls(*counts[:, :bins], shortest, longest)


def samples(index: Index, n: int, tokens: int, seed: int) -> list[tuple[int, str]]:
    """(number, text) of n documents drawn without repetition, of each the first `tokens` tokens, by ascending number.

    Shards they lie in are verified first. Raises UserError.
    """
    tokenizer, key = Tokenizer(index.tokenizer_path), derive_key("show", seed)
    chosen = sorted(permute(i, index.n_documents, key) for i in range(min(n, index.n_documents)))
    found = []
    for number in chosen:
        shard = int(index.documents[number, 0])
        _, offset, length = index.rows(shard)[number - index.first_document(shard)].tolist()
        begin = offset // index.dtype.itemsize + 1
        found.append((number, tokenizer.decode(open_shard(index, shard)[begin : begin + min(tokens, length - 2)])))
    return found
