"""Data that lies elsewhere: whole files are fetched into a bounded local cache, checked against their hash, and used from there.

A place is a folder or a URL of `SCHEMES`, read through `fsspec`. The cache is shared by the processes of a node: files are
named by their sha256, fetched once under a lock, and appear by a rename when they are whole and right; those used longest ago
go first.
"""
from __future__ import annotations

import fcntl
import hashlib
import os
import queue
import random
import re
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from data_pipeline.files import sync_folder
from serpent_scale.errors import UserError

SCHEMES = ("http", "https", "s3", "gs", "gcs", "az", "abfs", "hf", "oss", "r2")
CHUNK = 16 << 20  # bytes asked for at a time: what a broken connection costs
ATTEMPTS, FIRST_WAIT, LONGEST_WAIT = 8, 0.5, 30.0  # about a minute and a half in all
CONNECT_SECONDS, READ_SECONDS, CHUNK_SECONDS = 20, 30, 300


class Damage(UserError):
    """A file is missing, or not what the index says."""


def is_remote(place: str | Path) -> bool:
    """Whether a data path is a URL. Raises UserError for one that could do more than name data."""
    text = str(place)
    if "GOPEN_REWRITE" in os.environ:
        raise UserError("GOPEN_REWRITE is set, which makes webdataset open other places than those named; unset it")
    if "::" in text or re.match(r"\s*pipe:", text):
        raise UserError(f"data path '{text}': chained URLs and pipes are refused; name a folder or {SCHEMES[0]}://…, s3://…")
    scheme = re.match(r"([A-Za-z][\w+.-]*)://", text)
    if scheme and scheme[1].lower() not in SCHEMES:
        raise UserError(f"data path '{text}': {scheme[1]}:// is none of {', '.join(SCHEMES)}; name one of these or a folder")
    return scheme is not None


@dataclass(frozen=True)
class Cache:
    """A folder of fetched files, kept below `limit` bytes."""

    folder: Path
    limit: int

    def get(self, sha256: str, size: int, fetch: Callable[[Path], None]) -> Path:
        """The file of this content, fetched into the path that `fetch` is given if it is not here. Raises UserError."""
        if size > self.limit:
            raise UserError(f"{self.folder}: a file of {size} bytes does not fit; raise data.cache_gib")
        path = self.folder / sha256
        with self.locked(sha256):
            try:
                os.utime(path)  # used just now
                return path
            except FileNotFoundError:
                pass
            staging = self.folder / f"{sha256}.partial"
            try:
                with self.locked("room"):
                    self._make_room(size, sha256)
                    with open(staging, "wb") as file:
                        file.truncate(size)  # counts from now on
                fetch(staging)
                os.replace(staging, path)
                sync_folder(self.folder)
            except OSError as error:
                raise UserError(f"{self.folder}: cannot keep fetched data there ({error.strerror or error}); free some space, "
                                "lower data.cache_gib, or set data.cache to another folder") from error  # fmt: skip
        return path

    def drop(self, sha256: str) -> None:
        with self.locked(sha256):
            (self.folder / sha256).unlink(missing_ok=True)

    def _make_room(self, size: int, own: str) -> None:
        """Remove what was used longest ago. A process that has it open can go on reading it."""
        files = []
        for entry in os.scandir(self.folder):
            if re.fullmatch(r"[0-9a-f]{64}(\.partial)?", entry.name):
                status = entry.stat()
                files.append((status.st_mtime_ns, status.st_size, entry.name))
        excess = sum(size for _, size, name in files if name != f"{own}.partial") + size - self.limit
        for _, freed, name in sorted(files):
            if excess <= 0:
                return
            # Somebody may be fetching it; what a killed process left has no lock.
            if not name.startswith(own):
                with self.locked(name.removesuffix(".partial"), wait=False) as mine:
                    if mine:
                        (self.folder / name).unlink(missing_ok=True)
                        excess -= freed

    @contextmanager
    def locked(self, name: str, wait: bool = True) -> Iterator[bool]:
        """Hold the lock of a name, against threads and processes; ends with the process. Without `wait`: or get False."""
        self.folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(self.folder / f"{name}.lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                yield False
                return
            yield True
        finally:
            os.close(handle)


class Remote:
    """A folder at a URL."""

    def __init__(self, url: str, cache: Cache):
        """Raises UserError when a library for this scheme is missing."""
        import fsspec

        self.url, self.cache = url.rstrip("/"), cache
        scheme, options = url.partition("://")[0].lower(), {}
        try:
            if scheme in ("http", "https"):
                import aiohttp

                timeout = aiohttp.ClientTimeout(CHUNK_SECONDS, sock_connect=CONNECT_SECONDS, sock_read=READ_SECONDS)
                options = {"client_kwargs": {"timeout": timeout}}
            elif scheme == "s3":
                options = {"config_kwargs": {"connect_timeout": CONNECT_SECONDS, "read_timeout": READ_SECONDS}}
            self._files = fsspec.filesystem(scheme, **options)
        except ImportError as error:
            raise UserError(f"{url}: a library is missing ({error}); pip install 'serpent-scale[remote]'") from None
        self._wanted: queue.SimpleQueue = queue.SimpleQueue()
        self._asked: set[str] = set()
        self._working = False

    def small(self, name: str) -> bytes:
        """A file's bytes. Raises Damage when there is no such file, UserError when it cannot be had."""
        return self._retried(name, lambda: self._files.cat_file(f"{self.url}/{name}"))

    def get(self, name: str, size: int, sha256: str) -> Path:
        """A file of known content, in the cache. Raises Damage when there is another or none, UserError when it cannot be had."""
        return self.cache.get(sha256, size, lambda staging: self._fetch(name, size, sha256, staging))

    def names(self) -> list[str] | None:
        """Names of the files below, as far as two folders down; None if the server does not list them."""
        try:
            self._files.invalidate_cache()
            found = self._files.find(self.url, maxdepth=2)
        except Exception:  # each library has its own, for servers that do not list or do not answer
            return None
        below = self._files._strip_protocol(self.url).rstrip("/") + "/"
        return sorted(name.removeprefix(below) for name in found if name.startswith(below)) or None

    def has(self, name: str) -> bool:
        """Raises UserError when it cannot be told."""
        try:
            self.small(name)
        except Damage:
            return False
        return True

    def prefetch(self, files: Iterable[tuple[str, int, str]]) -> None:
        """Get these (name, size, sha256), in the background. What goes wrong will go wrong again when they are needed."""
        new = [file for file in files if file[2] not in self._asked]
        if new and not self._working:
            self._working = True
            threading.Thread(target=self._work, daemon=True, name="prefetch").start()
        for file in new:
            self._asked.add(file[2])
            self._wanted.put(file)

    def _work(self) -> None:
        while True:
            file = self._wanted.get()
            try:
                self.get(*file)
            except UserError:
                pass
            self._asked.discard(file[2])

    def _fetch(self, name: str, size: int, sha256: str, staging: Path) -> None:
        """Write a file whole; a second time if it came otherwise than it should."""
        for again in (True, False):
            found = self.download(name, size, staging)
            if found == sha256:
                return
            if not again:
                raise Damage(f"{self.url}/{name}: its sha256 is {found[:16]}…, the index says {sha256[:16]}…")

    def download(self, name: str, size: int, path: Path) -> str:
        """Write a file of this size to path; the sha256 of what came. Raises as `get`, but for other content."""
        hasher = hashlib.sha256()
        with open(path, "wb") as file:
            for begin in range(0, size, CHUNK):
                stop = min(begin + CHUNK, size)
                data = self._retried(name, lambda: self._chunk(name, begin, stop, size))
                hasher.update(data)
                file.write(data)
            file.flush()
            os.fsync(file.fileno())
        return hasher.hexdigest()

    def _chunk(self, name: str, begin: int, stop: int, size: int) -> bytes:
        url, data = f"{self.url}/{name}", b""
        try:
            data = self._files.cat_file(url, start=begin, end=stop)
        except Exception as error:
            if getattr(error, "status", None) != 416:  # asked beyond its end
                raise
        if len(data) == size:  # a server that knows no ranges sends all of it
            data = data[begin:stop]
        if len(data) != stop - begin:
            there = self._files.info(url).get("size")
            if there not in (None, size):
                raise Damage(f"{url}: {there} bytes, the index says {size}: cut at byte {there}" if there < size else
                             f"{url}: {there} bytes, the index says {size}: what is from byte {size} on does not belong to it")
            raise OSError(f"{len(data)} bytes came from byte {begin} on, {stop - begin} were asked for")
        return data

    def _retried(self, name: str, call: Callable[[], bytes]) -> bytes:
        for attempt in range(1, ATTEMPTS + 1):
            try:
                return call()
            except Damage:
                raise
            except FileNotFoundError:
                raise Damage(f"{self.url}/{name}: no such file") from None
            except PermissionError as error:
                raise UserError(f"{self.url}/{name}: access denied ({error}); check the credentials") from None
            except Exception as error:  # each library has its own
                if getattr(error, "status", None) in (401, 403):
                    raise UserError(f"{self.url}/{name}: access denied (status {error.status}); check the credentials") from None
                reason = f"{type(error).__name__} {error}".strip()[:200]
            if attempt < ATTEMPTS:
                wait = min(LONGEST_WAIT, FIRST_WAIT * 2 ** (attempt - 1)) * random.uniform(0.5, 1)
                text = f"warning: {self.url}/{name}: {reason}; attempt {attempt + 1} of {ATTEMPTS} in {wait:.1f} s"
                print(text, file=sys.stderr, flush=True)
                time.sleep(wait)
        raise UserError(f"{self.url}/{name}: gave up after {ATTEMPTS} attempts ({reason}); run again when it can be reached")
