"""The token stream beside plain webdataset, MosaicML streaming and litdata, on the same tokens.

    python benchmarks/loaders.py DATA [--split train] [--append]

DATA is a folder of launch/prepare_data.py. Each loader gives batches of 8 sequences of 2,048 tokens with their labels, int64
tensors, in one process without workers, shuffled as it does by default, from files in the page cache: ours and webdataset from
the shards of DATA, and the others from files of their own format, written from them beforehand (windows of 2,049 tokens, uint16).
Only ours makes document starts and a digest besides. A loader that is not installed is left out.

Each loader has three fresh processes for a start and three to resume; the loaders take turns, so that what else the machine
does meets all. Tokens per second is the median of five stretches, by the clock, and by the processor time of all threads, in the
fastest of the processes. The time to the first batch, and to the first one after resuming where the stretches ended, is the least
of them, imports not counted; a loader that has no state for that reads up to there. It is exact if that batch is the one that
would have come next. Memory is that of the process, torch included: its largest resident size, and what of it at the end is not
files in the page cache.
"""
from __future__ import annotations

import argparse
import importlib
import importlib.util
import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

SEQ_LEN, ROWS, STRETCHES = 2048, 8, 5
MODULES = {
    "ours": "data_pipeline", "webdataset": "webdataset", "webdataset_windows": "webdataset", "streaming": "streaming",
    "litdata": "litdata",
}  # fmt: skip
NAMES = {
    "ours": "ours", "webdataset": "webdataset, a document a sample", "webdataset_windows": "webdataset, a window a sample",
    "streaming": "MosaicML streaming", "litdata": "litdata",
}  # fmt: skip


def batch_of(lines: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """lines (n, seq_len + 1) of any integers: tokens and labels."""
    return torch.from_numpy(lines[:, :-1].astype(np.int64)), torch.from_numpy(lines[:, 1:].astype(np.int64))


def windows(payloads: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
    """Documents, concatenated and cut into (seq_len + 1,), the last token being the next window's first."""
    held, size = [], 0
    for payload in payloads:
        held.append(payload)
        size += len(payload)
        if size > SEQ_LEN:
            line = np.concatenate(held)
            for begin in range(0, len(line) - SEQ_LEN, SEQ_LEN):
                yield line[begin : begin + SEQ_LEN + 1]
            held = [line[begin + SEQ_LEN :]]
            size = len(held[0])


# Each loader: an iterator of batches, and what tells its state, which it is given to resume.


def ours(data: Path, split: str, folder: Path, state: dict | None) -> tuple[Iterator, Callable]:
    from data_pipeline.stream import TokenStream

    stream = TokenStream(data, split, SEQ_LEN, 1234, 65536)
    position = list(stream.check_state(state or stream.state(0, 0)))

    def batches() -> Iterator:
        while True:
            batch = stream.batch(position[0], ROWS)
            position[:] = position[0] + ROWS, (position[1] + batch.digest) % 2**128
            yield batch.tokens, batch.labels

    return batches(), lambda: stream.state(*position)


def webdataset(data: Path, split: str, folder: Path, state: dict | None) -> tuple[Iterator, Callable]:
    return _webdataset(sorted((data / split).glob("*.tar")), windows, state)


def webdataset_windows(data: Path, split: str, folder: Path, state: dict | None) -> tuple[Iterator, Callable]:
    return _webdataset(sorted((folder / "webdataset_windows").glob("*.tar")), iter, state)


def _webdataset(shards: list[Path], cut: Callable, state: dict | None) -> tuple[Iterator, Callable]:
    import webdataset as wds

    names, read = list(map(str, shards)), [0]

    def batches() -> Iterator:
        rows = []
        while True:
            dataset = wds.WebDataset(names, shardshuffle=len(names), empty_check=False).shuffle(1000)
            for line in cut(np.frombuffer(sample["tokens"], "<u2") for sample in dataset):
                rows.append(line)
                if len(rows) == ROWS:
                    read[0] += 1
                    yield batch_of(np.stack(rows))
                    rows = []

    return itertools.islice(batches(), state["batches"] if state else 0, None), lambda: {"batches": read[0]}


def streaming(data: Path, split: str, folder: Path, state: dict | None) -> tuple[Iterator, Callable]:
    from streaming import StreamingDataLoader, StreamingDataset

    dataset = StreamingDataset(local=str(folder / "streaming"), shuffle=True, shuffle_seed=1234, batch_size=ROWS)

    def collate(rows: list[dict]) -> tuple[torch.Tensor, torch.Tensor]:
        return batch_of(np.stack([np.frombuffer(row["tokens"], "<u2") for row in rows]))

    loader = StreamingDataLoader(dataset, batch_size=ROWS, num_workers=0, collate_fn=collate)
    if state:
        loader.load_state_dict(state)
    return itertools.chain.from_iterable(itertools.repeat(loader)), loader.state_dict


def litdata(data: Path, split: str, folder: Path, state: dict | None) -> tuple[Iterator, Callable]:
    from litdata import StreamingDataLoader, StreamingDataset, TokensLoader

    dataset = StreamingDataset(str(folder / "litdata"), item_loader=TokensLoader(block_size=SEQ_LEN + 1), shuffle=True, seed=1234)

    def collate(rows: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        return batch_of(torch.stack(rows).numpy())

    loader = StreamingDataLoader(dataset, batch_size=ROWS, num_workers=0, collate_fn=collate)
    if state:
        loader.load_state_dict(state)
    return itertools.chain.from_iterable(itertools.repeat(loader)), loader.state_dict


def write(data: Path, split: str, folder: Path, names: list[str]) -> None:
    """The files of the loaders that have formats of their own."""
    from data_pipeline.stream import documents

    def lines() -> Iterator[np.ndarray]:
        return windows(tokens.astype(np.uint16) for tokens in documents(data, split))

    if "webdataset_windows" in names:
        from webdataset import ShardWriter

        (folder / "webdataset_windows").mkdir()
        with ShardWriter(str(folder / "webdataset_windows" / "%06d.tar"), maxcount=25_000, verbose=0) as writer:
            for number, line in enumerate(lines()):
                writer.write({"__key__": f"{number:09d}", "tokens": line.tobytes()})
    if "streaming" in names:
        from streaming import MDSWriter

        with MDSWriter(out=str(folder / "streaming"), columns={"tokens": "bytes"}) as writer:
            for line in lines():
                writer.write({"tokens": line.tobytes()})
    if "litdata" in names:
        from litdata.streaming import Cache, TokensLoader

        cache = Cache(str(folder / "litdata"), chunk_size=(SEQ_LEN + 1) * 8192, item_loader=TokensLoader(block_size=SEQ_LEN + 1))
        for number, line in enumerate(lines()):
            cache[number] = torch.from_numpy(line)
        cache.done()
        cache.merge()


def measure(name: str, data: Path, split: str, folder: Path, batches: int, resume: bool) -> dict:
    """In a process of its own."""
    for module in (MODULES[name], "torch.utils.data", "data_pipeline.stream"):
        importlib.import_module(module)
    path = folder / f"{name}.json"
    saved = json.loads(path.read_text()) if resume else {"state": None}
    started = time.perf_counter()
    loader, state = globals()[name](data, split, folder, saved["state"])
    tokens, labels = next(loader)
    result = {"first": time.perf_counter() - started, "exact": saved.get("next") == tokens.tolist()}
    assert tokens.shape == labels.shape == (ROWS, SEQ_LEN) and tokens.dtype == labels.dtype == torch.int64
    speeds = []
    for _ in range(0 if resume else STRETCHES):
        started = time.perf_counter(), time.process_time()
        for _ in range(batches):
            next(loader)
        tokens = batches * ROWS * SEQ_LEN
        speeds.append((tokens / (time.perf_counter() - started[0]), tokens / (time.process_time() - started[1])))
    status = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    memory = {key: int(status[field].split()[0]) / 1024 for key, field in dict(peak="VmHWM", anonymous="RssAnon").items()}
    if not resume:
        path.write_text(json.dumps({"state": state(), "next": next(loader)[0].tolist()}))
    return result | memory | {"speeds": [statistics.median(speed) for speed in zip(*speeds)]}


def run(command: list[str]) -> dict:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--split", default="train")
    parser.add_argument("--batches", type=int, default=400, help="in a stretch")
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)  # name, folder, start or resume: in a process of its own
    from harness import add_report_arguments, report, table

    add_report_arguments(parser)
    arguments = parser.parse_args()
    if arguments.measure:
        name, folder, what = arguments.measure
        result = measure(name, arguments.data, arguments.split, Path(folder), arguments.batches, what == "resume")
        print("\n" + json.dumps(result), flush=True)
        os._exit(0)  # some wait for threads of theirs
    from data_pipeline.index import load_index

    index = load_index(arguments.data / arguments.split)
    names = [name for name, module in MODULES.items() if importlib.util.find_spec(module)]
    if index.tokens // SEQ_LEN // ROWS <= STRETCHES * arguments.batches:
        sys.exit(f"{arguments.data}: an epoch is too short; lower --batches")
    folder, runs, rows = Path(tempfile.mkdtemp()), defaultdict(list), {}
    try:
        write(arguments.data, arguments.split, folder, names)
        for what in ("start", "resume"):
            for name in 3 * names:
                options = ["--split", arguments.split, "--batches", str(arguments.batches), "--measure", name, str(folder), what]
                runs[name, what].append(run([sys.executable, __file__, str(arguments.data), *options]))
    finally:
        shutil.rmtree(folder)
    for name in names:
        rows[name] = [done[-1] | {"first": min(one["first"] for one in done), "speeds": max(one["speeds"] for one in done)}
                      for done in (runs[name, "start"], runs[name, "resume"])]  # fmt: skip
    speed = rows["ours"][0]["speeds"][0]
    text = table(
        ["loader", "M tokens/s", "ours is", "per s of processor", "first batch, s", "resume, s", "exactly", "memory, MB: largest", "not files"],
        [[NAMES[name], f"{new['speeds'][0] / 1e6:.1f}", f"{speed / new['speeds'][0]:.1f} ×", f"{new['speeds'][1] / 1e6:.1f}",
          f"{new['first']:.3f}", f"{resumed['first']:.3f}", "yes" if resumed["exact"] else "no",
          f"{new['peak']:.0f}", f"{new['anonymous']:.0f}"] for name, (new, resumed) in rows.items()],
    )  # fmt: skip
    left_out = [NAMES[name] for name in MODULES if name not in names]
    report("Loaders", [f"{index.tokens:,} tokens, {index.n_documents:,} documents, batches of {ROWS} × {SEQ_LEN}, one process"
                       + (f"; not installed: {', '.join(left_out)}" if left_out else ""), text], arguments)  # fmt: skip


if __name__ == "__main__":
    main()
