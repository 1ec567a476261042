"""Every file of a checkpoint and of a data set, cut, flipped and removed."""
from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from data_pipeline import verification
from faults.attempt import Attempt
from faults.toyrun import STEPS, configuration, differences, steps_of
from serpent_scale.checkpoint import manifest, store
from serpent_scale.errors import EXIT_USER, UserError
from serpent_scale.training.streams import open_streams

HALFWAY = 2 * STEPS // 3  # where it evaluates anyway
UNREAD = "preparation.json"  # how the data was made: no run reads it, and no hash is kept of it


def cut(path: Path, draw) -> None:
    os.truncate(path, draw.randrange(path.stat().st_size))


def flip(path: Path, draw) -> None:
    content = bytearray(path.read_bytes())
    bit = draw.randrange(8 * len(content))
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


def remove(path: Path, draw) -> None:
    path.unlink()


DAMAGES = {"cut": cut, "flipped": flip, "removed": remove}


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def units(campaign):
    halves = Half(campaign)
    for damage in DAMAGES:
        yield f"checkpoint {damage}", partial(checkpoint, campaign, halves, damage)
        yield f"data {damage}", partial(data_set, campaign, halves, damage)
    yield "no checkpoint is whole", partial(no_checkpoint, campaign, halves)


class Half:
    """Copies of a run that ended halfway."""

    def __init__(self, campaign):
        self.campaign = campaign

    def copy(self, name: str) -> Path:
        """A folder with the run in it; settings are to be written for it."""
        half, folder = self.campaign.folder / "half", self.campaign.folder / name
        if not (half / "whole").exists():
            shutil.rmtree(half, ignore_errors=True)
            self.campaign.complete(0, half, f"training.stop_at_step={HALFWAY}")
            (half / "whole").touch()
        shutil.rmtree(folder, ignore_errors=True)
        return Path(shutil.copytree(half, folder))


def damaged(campaign, damage: str, folder: Path, keyed) -> Iterator[tuple[Path, bool]]:
    """Each file of the folder, damaged again and again and then made whole; True with it at the last time. keyed(path): what the
    draws of a file depend on."""
    tries = 1 if damage == "removed" else 3 if campaign.quick else 100
    for path in files(folder):
        draw, content = campaign.random(f"{damage} {keyed(path)}"), path.read_bytes()
        for i in range(tries):
            path.write_bytes(content)
            DAMAGES[damage](path, draw)
            yield path, i == tries - 1
        path.write_bytes(content)


def checkpoint(campaign, halves: Half, damage: str) -> None:
    """The newest checkpoint is passed over by name, and the run goes on from the one before."""
    folder = halves.copy("damaged")
    checkpoints = folder / "run" / "checkpoints"
    older, newest = steps_of(folder / "run")[-2:]
    newest = checkpoints / store.folder_name(newest)
    for path, last in damaged(campaign, damage, newest, lambda path: path.name):
        found, skipped = store.newest(checkpoints)
        named = [path for path, _ in skipped] == [newest]
        lost = [] if found == checkpoints / store.folder_name(older) else [f"{path}: {found} is used"]
        if not lost and last and chosen(campaign, damage, path):
            lost = campaign.completes(0, again(campaign, folder))
        campaign.count(f"a file of a checkpoint {damage}", named, lost)


def no_checkpoint(campaign, halves: Half) -> None:
    """A run whose checkpoints are all damaged is not started over."""
    folder = halves.copy("damaged")
    for path in files(folder / "run" / "checkpoints"):
        if path.name == manifest.NAME:
            path.unlink()
    before = {path: path.read_bytes() for path in files(folder / "run")}
    attempt = Attempt(campaign.settings(0, folder))
    code, why = attempt.wait()
    after = {path: path.read_bytes() for path in files(folder / "run")}
    campaign.count("all checkpoints damaged", code == EXIT_USER and "no checkpoint verifies" in why,
                   [] if before == after else [f"{folder} is not what it was"])


def data_set(campaign, halves: Half, damage: str) -> None:
    """A run that goes on with it is refused by name, or reads the same samples and launch/verify.py names the file."""
    folder = halves.copy("damaged")
    data = folder / "data"
    shutil.copytree(campaign.data, data)
    config = configuration(0, data, folder)
    path, _ = store.newest(folder / "run" / "checkpoints")
    state = store._read_json(path / "trainer.json")["data"]
    intact = read_all(config, state)
    for path, last in damaged(campaign, damage, data, lambda path: path.relative_to(data)):
        lost = []
        try:
            if read_all(config, state) != intact:
                lost = [f"{path}: other samples come out"]
            said = "\n".join(verification.Place(str(data)).faults(("train", "validation")))
        except UserError as error:
            said = str(error)
            if last and chosen(campaign, damage, path):
                lost = refused(campaign, again(campaign, folder), data, path)
        if path.name == UNREAD:
            campaign.count(f"{UNREAD} of the data {damage}", None, lost)
        else:
            campaign.count(f"a file of the data {damage}", str(path.parent) in said, lost)


def chosen(campaign, damage: str, path: Path) -> bool:
    """Whether a run is started on this damage, which in the quick form is done for one file of each kind."""
    ours = (store.folder_name(HALFWAY), "state-00001.safetensors"), ("train", "documents.npy")
    return not campaign.quick or damage == "flipped" and path.parts[-2:] in ours


def again(campaign, folder: Path) -> Path:
    """A copy: what is resumed changes."""
    copy = campaign.folder / "resumed"
    shutil.rmtree(copy, ignore_errors=True)
    return Path(shutil.copytree(folder, copy, ignore=shutil.ignore_patterns("data")))


def refused(campaign, folder: Path, data: Path, path: Path) -> list[str]:
    """Go on with damaged data, then with whole: what is lost, in words."""
    attempt = Attempt(campaign.settings(0, folder, data))
    code, why = attempt.wait()
    if code == 0:  # what is left of the run does not read this file
        return differences(folder / "run", campaign.unbroken(0))
    if code != EXIT_USER or not why.startswith("error: "):
        return [f"{path}: exit code {code}, {why}"]
    return campaign.completes(0, folder)


def read_all(config, state: dict) -> list:
    """What a run that goes on from a checkpoint would read. Raises UserError."""
    train, evaluation = open_streams(config)
    train.check_state(state)
    return [sample.tokens.tolist() for stream, n in ((train, min(train.n_windows, 8 * STEPS)), (evaluation, evaluation.n_windows))
            for sample in map(stream.sample, range(n))]
