"""Check that data or checkpoints are whole: `launch/verify.py DATA`, `launch/verify.py RUN|CHECKPOINT`.

Every byte is read and compared with the hashes that were written with it. Exit code 0: whole; 1: something is wrong, each
fault a line on standard error; 2: there is nothing of the kind. With --json one object on standard output says it all.
"""
from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from tqdm import tqdm

from data_pipeline import verification
from data_pipeline.places import is_remote
from serpent_scale.checkpoint import manifest, store
from serpent_scale.errors import EXIT_FAILED, UserError, exit_on_user_error


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", metavar="DATA|RUN|CHECKPOINT", help="folder of data, of a run, or of one checkpoint")
    parser.add_argument("--split", action="append", help="of data: only this split; repeatable")
    parser.add_argument("--json", action="store_true", help="print one JSON object to standard output")
    return parser.parse_args(argv)


@exit_on_user_error
def main(argv: list[str] | None = None) -> None:
    args = arguments(argv)
    if is_remote(args.path):
        raise UserError(f"{args.path}: only a local folder can be verified; what is fetched from a URL is, before it is used")
    path = Path(args.path)
    splits = verification.splits(path)
    if splits or args.split:
        kind, checked, faults = "data", args.split or splits, []
        with tqdm(unit=" shards", disable=None) as bar:
            faults = list(verification.faults(path, checked, bar.update))
    else:
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
        print(json.dumps({"path": str(path), "kind": kind, "whole": not faults, "checked": checked, "faults": faults}))
    elif not faults:
        print(f"{path}: {kind} whole: {', '.join(checked)}")
    if faults:
        sys.exit(EXIT_FAILED)


def checkpoints(path: Path) -> list[Path]:
    """The checkpoint itself, or all of a run. Raises UserError when there are none."""
    folders = [folder for _, folder in store.folders(path / "checkpoints")]
    if not folders and any((path / name).is_file() for name in (manifest.NAME, "trainer.json", "config.yaml")):
        folders = [path]
    if not folders:
        raise UserError(f"{path}: neither data (SPLIT/index.json), nor a checkpoint (manifest.json), nor a run that has some")
    return folders


if __name__ == "__main__":
    main()
