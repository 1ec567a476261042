"""`manifest.json`: the size and a hash of every file of a checkpoint. A folder without a right one is no checkpoint.

Hashes find damage, not a forger, who would write a right manifest: XXH3 (128 bits) does, 15 times as fast as SHA-256. With a secret
in the environment variable SERPENT_CHECKPOINT_KEY hashes are SHA-256 and manifests are signed (HMAC-SHA256); those without a right
signature are refused.
"""
from __future__ import annotations

import hashlib
import hmac
import json
import os
import re
import stat
from pathlib import Path

import xxhash

from serpent_scale.errors import UserError

NAME = "manifest.json"
FORMAT = 2  # 1 had SHA-256 always
ALGORITHMS = {"sha256": hashlib.sha256, "xxh3_128": xxhash.xxh3_128}
KEY = "SERPENT_CHECKPOINT_KEY"
MEND = "use another checkpoint, or restore this one from a copy"


def algorithm() -> str:
    """What files that are written now are hashed by."""
    return "sha256" if os.environ.get(KEY) else "xxh3_128"


def hash_file(path: Path, by: str | None = None) -> dict:
    """The manifest's entry of a file. Raises OSError."""
    by = by or algorithm()
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, ALGORITHMS[by]).hexdigest()
        return {"bytes": file.tell(), by: digest}


def write_manifest(folder: Path, hashes: dict[str, dict]) -> None:
    """Write and sync the manifest; `hashes` maps names relative to `folder` to `hash_file`'s entries. Raises OSError."""
    content = {"format": FORMAT, "files": hashes}
    if os.environ.get(KEY):
        content["hmac"] = _signature(hashes)
    write_synced(folder / NAME, json.dumps(content, indent=1, sort_keys=True))


def _signature(hashes: dict[str, dict]) -> str:
    message = json.dumps(hashes, sort_keys=True).encode()
    return hmac.new(os.environ[KEY].encode(), message, "sha256").hexdigest()


def write_synced(path: Path, text: str) -> None:
    path.write_text(text)
    sync(path)


def sync(path: Path) -> None:
    """Wait until a file's content, or a folder's entries, are on the disk. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_manifest(folder: Path) -> dict[str, dict]:
    """name -> {bytes, sha256 or xxh3_128}, well formed and with plain names only. Raises UserError."""
    path = folder / NAME
    if not path.is_file() or path.is_symlink():
        raise UserError(f"{path}: missing, so {folder.name} is not a whole checkpoint; {MEND}")
    try:
        manifest = json.loads(path.read_text())
        if manifest["format"] not in (1, FORMAT):
            raise UserError(f"{path}: format {manifest['format']} is not 1 or {FORMAT}; use the version that wrote it")
        entries = {name: _entry(**entry) for name, entry in manifest["files"].items()}
    except (ValueError, KeyError, TypeError, AttributeError, OSError):
        raise UserError(f"{path}: not a readable manifest; {MEND}") from None
    signature = str(manifest.get("hmac"))
    if os.environ.get(KEY) and not hmac.compare_digest(signature.encode(), _signature(entries).encode()):
        raise UserError(f"{path}: not signed with the key in {KEY}; unset it only if you trust this checkpoint")
    for name, entry in entries.items():
        if os.environ.get(KEY) and "sha256" not in entry:
            raise UserError(f"{path}: signed, but {name} has no sha256, so it could be forged; do not use this checkpoint")
        if not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)*", name, re.ASCII):  # no '..', no absolute path
            raise UserError(f"{path}: the file name {name!r} is not allowed; do not use this checkpoint")
    return entries


def _entry(bytes: int, **digest: str) -> dict:
    """Raises TypeError or ValueError."""
    ((by, value),) = digest.items()
    if by not in ALGORITHMS:
        raise ValueError(by)
    return {"bytes": int(bytes), by: str(value)}


def verify(folder: Path, share: tuple[int, int] = (0, 1)) -> None:
    """Check that the folder holds the files of its manifest, no other, with their sizes and hashes.

    `share` = (rank, world size): hash every world-size-th file only; names and sizes are checked in full. Raises UserError
    naming the file.
    """
    entries, found = read_manifest(folder), {}
    for path in sorted(folder.rglob("*")):
        name, mode = path.relative_to(folder).as_posix(), path.lstat().st_mode
        if stat.S_ISREG(mode):
            found[name] = path
        elif not stat.S_ISDIR(mode):
            raise UserError(f"{path}: a link or special file in a checkpoint is refused; replace it with the file itself")
    found.pop(NAME, None)
    for name in sorted(entries.keys() - found.keys()):
        raise UserError(f"{folder / name}: missing, the manifest lists it; {MEND}")
    for name in sorted(found.keys() - entries.keys()):
        raise UserError(f"{folder / name}: the manifest does not list it; remove it if you put it there")
    for name, path in found.items():
        size = path.stat().st_size
        if size != entries[name]["bytes"]:
            raise UserError(f"{path}: {size} bytes, the manifest says {entries[name]['bytes']}; {MEND}")
    rank, world_size = share
    for name in sorted(entries)[rank::world_size]:
        try:
            by = next(key for key in entries[name] if key in ALGORITHMS)
            damaged = hash_file(found[name], by) != entries[name]
        except OSError as error:
            raise UserError(f"{found[name]}: cannot be read ({error.strerror}); {MEND}") from None
        if damaged:
            raise UserError(f"{found[name]}: damaged, its {by} is not the manifest's; {MEND}")
