"""The windows of the evaluation split that a replica runs, pass by pass."""
from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from data_pipeline.index import Index
from data_pipeline.stream import Batch, TokenStream
from data_pipeline.windows import IGNORE
from serpent_scale.evaluation.perplexity import stretches


def apart(stream: TokenStream, windows: int, rows: int, replicas: int, replica: int) -> Iterator[Batch]:
    """The first `windows` windows, dealt to rows in turn. Every replica has as many passes (ZeRO-3 gathers together); rows past
    the end count for nothing."""
    for first in range(replica * rows, windows + replica * rows, rows * replicas):
        batch = stream.batch(min(first, windows - 1), rows)
        batch.labels[max(0, windows - first) :] = IGNORE
        yield batch


def in_order(stream: TokenStream, windows: int, rows: int, replicas: int, replica: int) -> Iterator[Batch]:
    """The first `windows` windows for states that are handed on from pass to pass: a row's windows follow each other.

    Each row has whole documents, which labels tell from those of its neighbours, so what is predicted from what does not depend
    on the number of rows. Labels of all windows count once. Every replica has as many passes.
    """
    length = stream.seq_len
    n = min(windows * length, stream.index.tokens)
    begins, ends = stretches(document_starts(stream.index, n), n, rows * replicas)
    empty = np.zeros(rows * replicas - len(begins), np.int64)
    begins, ends = np.append(begins, empty), np.append(ends, empty)
    own = slice(replica * rows, (replica + 1) * rows)
    for i in range(int((-(-ends // length) - begins // length).max())):
        parts = []
        for begin, end in zip(begins[own].tolist(), ends[own].tolist()):
            window = begin // length + i
            part = stream.batch(min(window, windows - 1), 1)
            at = window * length + torch.arange(length)
            part.labels[0, (at < begin) | (at >= end)] = IGNORE
            parts.append(part)
        yield Batch(
            *(torch.cat([getattr(part, name) for part in parts]) for name in ("tokens", "labels", "reset")),
            sum((part.lengths for part in parts), ()), range(0), 0, sum(part.tokens_skipped for part in parts),
        )


def document_starts(index: Index, n: int) -> np.ndarray:
    """Where the documents begin that do so in the first n tokens, in stored order."""
    lengths, seen, shard = [np.empty(0, np.int64)], 0, 0
    while shard < len(index.shards) and seen < n:
        lengths.append(index.rows(shard)[:, 2])
        seen, shard = seen + int(lengths[-1].sum()), shard + 1
    starts = np.append(0, np.cumsum(np.concatenate(lengths)))
    return starts[starts < n]
