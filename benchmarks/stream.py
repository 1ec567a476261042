"""The token stream: what a seek costs on an index of 10^12 tokens, and what the audit digest costs.

    python benchmarks/stream.py

The index is of 10,000 shards of 10^8 tokens (sparse files of the right size: shards are only read when a sample is) with a
document per 10^6 tokens. A seek is `Windows.spans` of a random sample in a random epoch: it finds the shards and tokens of
that sample; reading them then hashes each shard once, which is not part of it.
"""
from __future__ import annotations

import argparse
import hashlib
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from data_pipeline import digest
from data_pipeline.index import HEADER, RECORD, Shard, payload_offsets, publish_index
from data_pipeline.shards import prepare_split
from data_pipeline.stream import TokenStream
from data_pipeline.tokenizer import train_tokenizer

SHARDS, DOCUMENTS, DOCUMENT_TOKENS = 10_000, 100, 1_000_000
SEQ_LEN, BLOCK = 2048, 8192


def seconds(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def report(name: str, values: list[float], unit: float, text: str) -> None:
    values = sorted(values)
    print(f"{name:<58} {values[len(values) // 2] / unit:9.3f} {text} (median; worst {values[-1] / unit:.3f})", flush=True)


def synthetic_split(folder: Path) -> None:
    """Publish an index of 10^12 tokens over files that hold nothing."""
    (folder / "tokenizer.json").write_text("{}")
    (folder / "train").mkdir()
    offsets = payload_offsets(np.full(DOCUMENTS, 2 * DOCUMENT_TOKENS))
    size = -(-(int(offsets[-1]) + 2 * HEADER) // RECORD) * RECORD
    names = [f"shard-{number:06d}.tar" for number in range(SHARDS)]
    for name in names:
        with open(folder / "train" / name, "wb") as file:
            file.truncate(size)
    documents = np.stack([np.repeat(np.arange(SHARDS), DOCUMENTS), np.tile(offsets[:-1], SHARDS),
                          np.full(SHARDS * DOCUMENTS, DOCUMENT_TOKENS)], 1)  # fmt: skip
    publish_index(
        folder / "train", split="train", dtype="uint16", tokenizer_sha256=hashlib.sha256(b"{}").hexdigest(), vocab_size=50257,
        eot_id=50256, bytes=0, words=0, word_rule="whitespace", documents=documents,
        shards=[Shard(name, DOCUMENTS, DOCUMENTS * DOCUMENT_TOKENS, size, "0" * 64) for name in names],
    )  # fmt: skip


def seek(folder: Path, repeats: int) -> None:
    synthetic_split(folder)
    streams = []
    opening = [seconds(lambda: streams.append(TokenStream(folder, "train", SEQ_LEN, 1, BLOCK))) for _ in range(3)]
    stream = streams[-1]
    print(f"index of {stream.index.tokens:.3g} tokens, {SHARDS:,} shards, {stream.index.n_documents:,} documents")
    report("open: read and check the index, a stat per shard", opening, 1, "s")
    samples = [random.randrange(10 * stream.n_windows) for _ in range(repeats)]
    report("seek to a random sample of another epoch", [seconds(lambda g=g: stream.sources[0].spans(g)) for g in samples], 1e-3, "ms")
    samples = [random.randrange(stream.n_windows) for _ in range(repeats)]
    stream.sources[0].spans(0)
    report("seek within an epoch", [seconds(lambda g=g: stream.sources[0].spans(g)) for g in samples], 1e-6, "us")
    state = stream.state(samples[0], 0)
    report("check a state", [seconds(lambda: stream.check_state(state)) for _ in range(repeats)], 1e-6, "us")


def digest_cost(folder: Path, repeats: int) -> None:
    tokenizer = train_tokenizer([], 257, folder / "tokenizer.json")
    text = "".join(map(chr, np.random.default_rng(0).integers(97, 123, 4000)))
    prepare_split(folder / "train", [text] * 500, tokenizer, request={}, word_rule="whitespace")
    stream = TokenStream(folder, "train", SEQ_LEN, 1, BLOCK)
    n = 1_000_000 // SEQ_LEN
    per_million = 1_000_000 / (n * SEQ_LEN)
    samples = [stream.sample(g) for g in range(n)]

    def digests() -> None:
        for g, sample in enumerate(samples):
            digest.of_sample(g, sample.tokens, int(sample.labels[-1]), sample.starts, stream.index.dtype)

    def batches() -> None:
        for g in range(0, n, 8):
            stream.batch(g, 8)

    report("digest of 10^6 tokens", [seconds(digests) * per_million for _ in range(repeats)], 1e-3, "ms")
    report("batches of 10^6 tokens, digest included", [seconds(batches) * per_million for _ in range(repeats)], 1e-3, "ms")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=200, help="seeks to time")
    arguments = parser.parse_args()
    random.seed(0)
    with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as other:
        seek(Path(one), arguments.repeats)
        digest_cost(Path(other), max(3, arguments.repeats // 20))
