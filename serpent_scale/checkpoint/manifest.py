"""`manifest.json`: the size and sha256 of every file of a checkpoint. A folder without a right one is no checkpoint.

Hashes find damage, not a forger, who would write a right manifest. With a secret in the environment variable
SERPENT_CHECKPOINT_KEY manifests are signed (HMAC-SHA256), and those without a right signature are refused.
"""
from __future__ import annotations

import hashlib
import hmac
import json
import os
import re
import stat
from pathlib import Path

from serpent_scale.errors import UserError

NAME = "manifest.json"
FORMAT = 1
KEY = "SERPENT_CHECKPOINT_KEY"
MEND = "use another checkpoint, or restore this one from a copy"


def hash_file(path: Path) -> dict:
    """The manifest's entry of a file. Raises OSError."""
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return {"bytes": file.tell(), "sha256": digest}


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
    """name -> {bytes, sha256}, well formed and with plain names only. Raises UserError."""
    path = folder / NAME
    if not path.is_file() or path.is_symlink():
        raise UserError(f"{path}: missing, so {folder.name} is not a whole checkpoint; {MEND}")
    try:
        manifest = json.loads(path.read_text())
        if manifest["format"] != FORMAT:
            raise UserError(f"{path}: format {manifest['format']} is not {FORMAT}; use the version that wrote it")
        entries = {name: {"bytes": int(e["bytes"]), "sha256": str(e["sha256"])} for name, e in manifest["files"].items()}
    except (ValueError, KeyError, TypeError, AttributeError, OSError):
        raise UserError(f"{path}: not a readable manifest; {MEND}") from None
    signature = str(manifest.get("hmac"))
    if os.environ.get(KEY) and not hmac.compare_digest(signature.encode(), _signature(entries).encode()):
        raise UserError(f"{path}: not signed with the key in {KEY}; unset it only if you trust this checkpoint")
    for name in entries:
        if not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)*", name, re.ASCII):  # no '..', no absolute path
            raise UserError(f"{path}: the file name {name!r} is not allowed; do not use this checkpoint")
    return entries


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
            damaged = hash_file(found[name]) != entries[name]
        except OSError as error:
            raise UserError(f"{found[name]}: cannot be read ({error.strerror}); {MEND}") from None
        if damaged:
            raise UserError(f"{found[name]}: damaged, its sha256 is not the manifest's; {MEND}")
