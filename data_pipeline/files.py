"""Files that are either whole or absent: write aside, sync, rename."""
from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


def sha256_of(path: Path) -> str:
    """Hex sha256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync_folder(folder: Path) -> None:
    """Make renames inside `folder` survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to write, which becomes `path` when all went well: a reader, or a crash, sees the old file or the new one."""
    staging = path.with_name(path.name + ".partial")
    with open(staging, "wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    os.replace(staging, path)
    sync_folder(path.parent)


def write_atomically(path: Path, data: bytes) -> None:
    """Replace `path` by `data`, see `replacing`."""
    with replacing(path) as file:
        file.write(data)
