"""Whether data, in a folder or at a URL, is whole: every split with its index, tokenizer, shards and packing plans."""
from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from data_pipeline.index import MEND, Index, load_split, verify_shard
from data_pipeline.packing import PackedWindows
from data_pipeline.places import Cache, Remote, is_remote
from serpent_scale.errors import UserError

USUAL = ("train", "validation", "test")  # splits looked for where a server does not list its files
FETCHED = 4  # shards at most that are fetched at a time


class Place:
    """A folder of data, or its URL, of which whole files are fetched into `scratch` for as long as they are checked."""

    def __init__(self, place: str, scratch: Path | None = None):
        """Raises UserError for a URL that is refused."""
        self.name, self.scratch, self.remote = place.rstrip("/"), scratch, None
        if is_remote(place):
            self.cache = Cache(scratch, 1 << 62)
            self.remote = Remote(place, self.cache)
        # Names below the place, as far as two folders down; None if its server does not tell.
        self.names = sorted(_names(Path(place))) if self.remote is None else self.remote.names()

    def splits(self) -> list[str]:
        """Names of the splits, those that are not finished included. Raises UserError when a URL cannot be reached."""
        if self.names is None:
            return [split for split in USUAL if self.remote.has(f"{split}/index.json")]
        return sorted({name.partition("/")[0] for name in self.names if re.fullmatch(r"[^/]+/(index|preparation)\.json", name)})

    def faults(self, splits: Iterable[str], progress: Callable[[int], None] = lambda shards: None) -> Iterator[str]:
        """Everything that is wrong in these splits, a line each, file first; nothing if they are whole.

        Every shard is read and compared with its hash and with the documents in it. progress: called with the number of
        shards that are done.
        """
        for split in splits:
            found = [name.partition("/")[2] for name in self.names or () if name.startswith(f"{split}/")]
            if "index.json" not in found and "preparation.json" in found:
                yield f"{self.name}/{split}: its preparation is not finished; run launch/prepare_data.py again, it will go on"
                continue
            try:
                index = load_split(self.name, split, self.remote and self.cache, check_shards=False)
            except UserError as error:
                yield self._named(error)
                continue
            with ThreadPoolExecutor(min(FETCHED, os.cpu_count()) if self.remote else os.cpu_count()) as pool:
                for fault in pool.map(lambda number: self._of_shard(index, number), range(len(index.shards))):
                    progress(1)
                    yield from fault
            listed = {shard.name for shard in index.shards}
            for name in found:
                if re.fullmatch(r"[^/]*\.tar", name) and name not in listed:
                    yield f"{self.name}/{split}/{name}: the index does not list it; remove it, or restore the index it belongs to"
                if match := re.fullmatch(r"best_fit-(\d+)\.json", name):
                    try:
                        PackedWindows(index, int(match[1]), None, 1)
                    except UserError as error:
                        yield self._named(error)

    def _of_shard(self, index: Index, number: int) -> list[str]:
        path, shard = index.folder / index.shards[number].name, index.shards[number]
        try:
            if self.remote is None:
                verify_shard(index, number)
                return []
            with tempfile.TemporaryDirectory(dir=self.scratch) as folder:
                path = Path(folder) / shard.name
                for _ in range(2):  # what differs may have been changed on its way
                    if self.remote.download(index.remote_file(number)[0], shard.bytes, path) == shard.sha256:
                        break
                verify_shard(index, number, path)
        except UserError as error:
            return [self._named(error).replace(str(path), f"{self.name}/{index.folder.name}/{shard.name}")]
        except OSError as error:
            return [f"{path}: cannot be read ({error.strerror or error}); {MEND}"]
        return []

    def _named(self, error: UserError) -> str:
        """What is wrong, by its name at the place and not by that of its copy here."""
        return re.sub(rf"{re.escape(str(self.scratch))}/[0-9a-f]{{16}}/", f"{self.name}/", str(error))


def _names(folder: Path) -> Iterator[str]:
    for pattern in ("*", "*/*"):
        for path in folder.glob(pattern):
            yield path.relative_to(folder).as_posix()
