"""Check that data or checkpoints are whole: `launch/verify.py DATA|URL`, `launch/verify.py RUN|CHECKPOINT`.

Every byte is read and compared with the hashes that were written with it; of data at a URL each file is fetched, a few at a
time, and kept no longer than that. Exit code 0: whole; 1: something is wrong, each fault a line on standard error; 2: there is
nothing of the kind, or it cannot be reached. With --json one object on standard output says it all.
"""
from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

from tqdm import tqdm

from data_pipeline import verification
from data_pipeline.places import is_remote
from serpent_scale.checkpoint import manifest, store
from serpent_scale.errors import EXIT_FAILED, UserError, exit_on_user_error


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", metavar="DATA|URL|RUN|CHECKPOINT", help="folder of data or its URL, of a run, or of one checkpoint")
    parser.add_argument("--split", action="append", help="of data: only this split; repeatable (where a server does not list "
                        "its files, the default is train, validation and test)")  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print one JSON object to standard output")
    return parser.parse_args(argv)


@exit_on_user_error
def main(argv: list[str] | None = None) -> None:
    args = arguments(argv)
    path = args.path if is_remote(args.path) else str(Path(args.path))
    with tempfile.TemporaryDirectory() as scratch:
        place = verification.Place(path, Path(scratch))
        splits = args.split or place.splits()
        if splits:
            kind, checked, faults = "data", splits, []
            with tqdm(unit=" shards", disable=None) as bar:
                faults = list(place.faults(splits, bar.update))
    if not splits:
        kind, folders = "checkpoint", checkpoints(path)
        checked, faults = [str(folder) for folder in folders], []
        for folder in tqdm(folders, unit=" checkpoints", disable=None):
            try:
                manifest.verify(folder)
            except (UserError, OSError) as error:
                faults.append(str(error))
    for fault in faults:
        print(fault, file=sys.stderr)
    if args.json:
        print(json.dumps({"path": path, "kind": kind, "whole": not faults, "checked": checked, "faults": faults}))
    elif not faults:
        print(f"{path}: {kind} whole: {', '.join(checked)}")
    if faults:
        sys.exit(EXIT_FAILED)


def checkpoints(path: str) -> list[Path]:
    """The checkpoint itself, or all of a run. Raises UserError when there are none."""
    if is_remote(path):
        raise UserError(f"{path}: holds no data (SPLIT/index.json); checkpoints can only be verified in a local folder")
    path = Path(path)
    folders = [folder for _, folder in store.folders(path / "checkpoints")]
    if not folders and any((path / name).is_file() for name in (manifest.NAME, "trainer.json", "config.yaml")):
        folders = [path]
    if not folders:
        raise UserError(f"{path}: neither data (SPLIT/index.json), nor a checkpoint (manifest.json), nor a run that has some")
    return folders


if __name__ == "__main__":
    main()
