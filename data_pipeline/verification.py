"""Whether a data folder is whole: every split with its index, tokenizer, shards and packing plans."""
from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from data_pipeline.index import MEND, Index, load_index, verify_shard
from data_pipeline.packing import PackedWindows
from serpent_scale.errors import UserError


def splits(data: Path) -> list[str]:
    """Names of the splits in a data folder, those that are not finished included."""
    return sorted({path.parent.name for name in ("index.json", "preparation.json") for path in data.glob(f"*/{name}")})


def faults(data: Path, names: Iterable[str], progress: Callable[[int], None] = lambda shards: None) -> Iterator[str]:
    """Everything that is wrong in these splits of DATA, a line each, file first; nothing if they are whole.

    Every shard is read and compared with its hash and with the documents in it. progress: called with the number of shards
    that are done.
    """
    for name in names:
        folder = data / name
        if not (folder / "index.json").is_file() and (folder / "preparation.json").is_file():
            yield f"{folder}: its preparation is not finished; run launch/prepare_data.py again, it will go on"
            continue
        try:
            index = load_index(folder, check_shards=False)
        except UserError as error:
            yield str(error)
            continue
        with ThreadPoolExecutor(os.cpu_count()) as pool:  # hashing lets other threads run
            for fault in pool.map(lambda number: _of_shard(index, number), range(len(index.shards))):
                progress(1)
                yield from fault
        listed = {shard.name for shard in index.shards}
        for path in sorted(folder.glob("*.tar")):
            if path.name not in listed:
                yield f"{path}: the index does not list it; remove it, or restore the index it belongs to"
        yield from _of_plans(index)


def _of_shard(index: Index, number: int) -> list[str]:
    path = index.folder / index.shards[number].name
    try:
        verify_shard(index, number)
    except UserError as error:
        return [str(error)]
    except OSError as error:
        return [f"{path}: cannot be read ({error.strerror or error}); {MEND}"]
    return []


def _of_plans(index: Index) -> Iterator[str]:
    for path in sorted(index.folder.glob("best_fit-*.json")):
        match = re.fullmatch(r"best_fit-(\d+)\.json", path.name)
        if match:
            try:
                PackedWindows(index, int(match[1]), None, 1)
            except UserError as error:
                yield str(error)
