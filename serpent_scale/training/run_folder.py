"""A run's folder: kept from other runs, and searched for the checkpoint that a start goes on from."""
from __future__ import annotations

import fcntl
import os
from pathlib import Path

from serpent_scale.checkpoint import store
from serpent_scale.errors import UserError


def prepare_run_folder(folder: Path) -> None:
    """Make the run's folder, and keep other runs out of it. Raises UserError if it cannot be written, or one is in it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        writable = os.access(folder, os.W_OK | os.X_OK)
    except OSError as error:
        raise UserError(f"{folder}: cannot make the run's folder ({error.strerror}); set run.folder to one that can be") from None
    if not writable:
        raise UserError(f"{folder}: the run's folder cannot be written; set run.folder to one that can be")
    _lock(folder)


def _lock(folder: Path) -> None:
    """Keep others out of the run's folder for as long as this process lives. Raises UserError if one is in it."""
    lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"{folder}: another process trains in it; wait for its end, or set run.name to another") from None
    except OSError:
        pass  # a file system without locks


def find_checkpoint(where: str, checkpoints: Path) -> Path | None:
    """The checkpoint that --resume WHERE means. Raises UserError rather than start over where something was saved."""
    if where not in ("auto", "none"):
        return _named_checkpoint(Path(where), checkpoints)
    newest, skipped = newest_checkpoint(checkpoints)
    if where == "none":
        if newest or skipped:
            raise UserError(f"{checkpoints}: holds checkpoints of an earlier run; use --resume auto or another run.name")
        return None
    if newest is None and skipped:
        raise UserError(f"{checkpoints}: no checkpoint verifies (see above); mend one, or use another run.name to start over")
    return newest


def _named_checkpoint(path: Path, own: Path) -> Path:
    if not path.is_dir():
        raise UserError(f"--resume {path}: no such checkpoint folder")
    if (path / "checkpoints").is_dir():  # a run's folder
        newest, _ = newest_checkpoint(path / "checkpoints")
        if newest is None:
            raise UserError(f"--resume {path}: this run's folder holds no checkpoint that verifies; name another")
        path = newest
    mine, _ = store.newest(own)
    if mine is not None and path.resolve().parent != own.resolve():
        raise UserError(f"--resume {path}: is of another run, and {own} already holds checkpoints, which this one would replace; "
                        "set run.name to a new one")
    if mine is not None and path.name < mine.name:
        print(f"note: {mine} is newer than {path.name}; until this run passes it, --resume auto would choose it", flush=True)
    return path


def newest_checkpoint(checkpoints: Path) -> tuple[Path | None, list]:
    newest, skipped = store.newest(checkpoints)
    for path, reason in skipped:
        print(f"skipped checkpoint {path}: {reason}", flush=True)
    return newest, skipped
