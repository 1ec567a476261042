"""The token stream: what a seek costs on an index of 10^12 tokens, how well it shuffles, and what the audit digest costs.

    python benchmarks/stream.py

The index is of 10,000 shards of 10^8 tokens (sparse files of the right size: shards are only read when a sample is) with a
document per 10^6 tokens. A seek is `Windows.spans` of a random sample in a random epoch: it finds the shards and tokens of
that sample; reading them then hashes each shard once, which is not part of it.

Shuffling is measured on 100 shards of 10^8 tokens. Moved: how far a window lies from its place in stored order, as a share of
the epoch. Neighbours: how far two consecutive samples lie apart in stored order. Shards: how many a batch of 256 comes from.
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
from data_pipeline.index import HEADER, RECORD, Index, Shard, payload_offsets, publish_index
from data_pipeline.order import permute
from data_pipeline.shards import prepare_split
from data_pipeline.stream import TokenStream
from data_pipeline.tokenizer import train_tokenizer
from data_pipeline.windows import Windows

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
        eot_id=50256, bytes=0, words=0, word_rule="whitespace", documents=[documents],
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
    windows = stream.sources[0]
    report("seek to a random sample of another epoch", [seconds(lambda g=g: windows.spans(g)) for g in samples], 1e-3, "ms")
    samples = [random.randrange(stream.n_windows) for _ in range(repeats)]
    stream.sources[0].spans(0)
    report("seek within an epoch", [seconds(lambda g=g: stream.sources[0].spans(g)) for g in samples], 1e-6, "us")
    state = stream.state(samples[0], 0)
    status = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    print(f"memory with three such streams open: {int(status['VmHWM'].split()[0]) / 1024:.0f} MB at most, libraries included")
    report("check a state", [seconds(lambda: stream.check_state(state)) for _ in range(repeats)], 1e-6, "us")


def shuffle_quality() -> None:
    shards = tuple(Shard(f"{n}.tar", 1, 100_000_000, 0, "") for n in range(100))
    index = Index(None, "", "train", np.dtype("<u2"), "", 10, 0, 10**10, 0, 0, "", shards, np.empty((0, 3)))
    rng, n = np.random.default_rng(0), -(-(10**10) // SEQ_LEN)

    def row(name: str, place: Callable[[int], int]) -> None:
        """place: window number to its first token, in stored order."""
        starts = rng.integers(0, n - 256, 200)
        batches = np.array([[place(start + k) for k in range(256)] for start in starts.tolist()])
        moved = np.abs(batches[:, 0] / 10**10 - starts / n).mean()
        apart = np.abs(np.diff(batches, axis=1)).mean() / 10**10
        from_shards = np.mean([len(set(batch // 10**8)) for batch in batches])
        print(f"{name:<24}{moved:>10.3f}{apart:>14.4f}{from_shards:>10.1f}", flush=True)

    print(f"\n{'shuffle_block':<24}{'moved':>10}{'neighbours':>14}{'shards':>10}")
    row("none, stored order", lambda k: k * SEQ_LEN)
    for block in (1, 8192, 65_536, 262_144, 1_048_576):
        windows = Windows(index, SEQ_LEN, 1, block)

        def place(k: int, windows: Windows = windows) -> int:
            shard, first, _ = windows.spans(k)[0]
            return shard * 10**8 + first

        row(f"{block:,}", place)
    row("full shuffle", lambda k: permute(k, n, 7) * SEQ_LEN)
    print()


def digest_cost(folder: Path, repeats: int) -> None:
    tokenizer = train_tokenizer([], 257, folder / "tokenizer.json")
    text = "".join(map(chr, np.random.default_rng(0).integers(97, 123, 4000)))
    prepare_split(folder / "train", [text] * 500, tokenizer, request={}, word_rule="whitespace")
    stream = TokenStream(folder, "train", SEQ_LEN, 1, BLOCK)
    n = 1_000_000 // SEQ_LEN
    per_million = 1_000_000 / (n * SEQ_LEN)
    samples = [(sample.tokens.astype(stream.index.dtype), int(sample.labels[-1]), sample.starts.tolist())
               for sample in map(stream.sample, range(n))]  # fmt: skip

    def digests() -> None:
        for g, sample in enumerate(samples):
            digest.of_sample(g, *sample)

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
        shuffle_quality()
        digest_cost(Path(other), max(3, arguments.repeats // 20))
