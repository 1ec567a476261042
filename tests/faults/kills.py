"""SIGKILL at random moments: of all ranks, as when a host goes, or of one."""
from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

from faults.attempt import ROOT, WORLD, Attempt
from faults.toyrun import LANES, differences, steps_of, told
from serpent_scale.checkpoint import store
from serpent_scale.training.metrics import NAME

TEARDOWN = 5.0  # seconds from a rank's death to the end of the job
AIMS = {"starting": 3, "training": 3, "saving": 4}  # what a kill waits for, and how often


def units(campaign, number: int, part: int, parts: int):
    """Every `parts`-th kill, in runs of their own."""
    runs = Kills(campaign, part)
    for i in range(part, number, parts):
        yield f"kill {i}", partial(runs.kill, f"kill {i}")
    yield f"kills, the last run of part {part}", runs.finish
    if part == 0 and not campaign.quick:
        yield "kills under the supervisor", partial(supervised, campaign, 10)


class Kills:
    """One run after another, each killed until it is through."""

    def __init__(self, campaign, part: int):
        self.campaign, self.part, self.attempt = campaign, part, None

    @property
    def number(self) -> int:
        return int(self.campaign.numbers.get(f"runs of part {self.part}", 0))

    @property
    def lane(self) -> int:
        return (self.part + self.number) % (2 if self.campaign.quick else len(LANES))

    @property
    def folder(self) -> Path:
        return self.campaign.folder / f"killed-{self.part}-{self.number}"

    @property
    def run(self) -> Path:
        return self.folder / "run"

    def start(self) -> Attempt:
        self.unbroken = self.campaign.unbroken(self.lane)
        return Attempt(self.campaign.settings(self.lane, self.folder))

    def kill(self, name: str) -> None:
        draw = self.campaign.random(name)
        aim = draw.choices(list(AIMS), AIMS.values())[0]
        victim = draw.choice([None, draw.randrange(WORLD)])
        hasty = victim == 0 and draw.random() < 0.5  # a start meets the former run's other rank
        while True:
            attempt = self.attempt = self.attempt or self.start()
            leftovers, before = self.leftovers(), steps_of(self.run)
            if not self.wait_for(aim, attempt, draw):
                self.end()
                continue
            for process in attempt.processes if victim is None else [attempt.processes[victim]]:
                if process.poll() is None:
                    process.send_signal(signal.SIGKILL)
            killed = time.monotonic()
            while hasty and attempt.processes[victim].poll() is None:  # up to 0.4 s were seen, with its lock
                time.sleep(0.002)
            self.attempt = self.start() if hasty else None
            code, _ = attempt.wait()
            seconds = time.monotonic() - killed
            if -signal.SIGKILL in attempt.codes():
                break  # else it had just ended
        phase = "saving" if self.leftovers() - leftovers else "training" if attempt.begun() else "starting"
        self.campaign.numbers["teardown"] = max(self.campaign.numbers.get("teardown", 0), seconds)
        lost = self.losses(before)
        self.campaign.count(f"SIGKILL of {'all ranks' if victim is None else 'one rank'}, {phase}",
                            code != 0 and seconds <= TEARDOWN, lost)
        if lost:
            self.give_up()

    def wait_for(self, aim: str, attempt: Attempt, draw) -> bool:
        """Until the moment has come; False if the run ended before."""
        until = time.monotonic() + draw.uniform(0, 1)
        partial_ones = self.leftovers()
        while not attempt.ended():
            come = {"starting": lambda: time.monotonic() > until, "training": attempt.begun,
                    "saving": lambda: self.leftovers() - partial_ones}[aim]()
            if come:
                time.sleep({"starting": 0, "training": draw.uniform(0, 0.5), "saving": draw.uniform(0, 0.1)}[aim])
                return not attempt.ended()
            time.sleep(0.002)
        return False

    def leftovers(self) -> set[tuple[str, int]]:
        """Checkpoints under way, or left half written or half removed."""
        found = set()
        for path in [*self.run.glob("checkpoints/*.partial"), *self.run.glob("checkpoints/*.old")]:
            try:
                found.add((path.name, path.stat().st_ino))
            except FileNotFoundError:
                pass
        return found

    def losses(self, before: list[int]) -> list[str]:
        path, skipped = store.newest(self.run / "checkpoints")
        found = [f"{path}: {why}" for path, why in skipped]
        if before and (path is None or int(path.name[5:]) < before[-1]):
            found.append(f"there was a checkpoint of step {before[-1]}, the newest whole one is {path}")
        return found + differences(self.run, self.unbroken, finished=False)

    def end(self) -> None:
        """The attempt ended by itself: it must be through."""
        attempt, self.attempt = self.attempt, None
        code, why = attempt.wait()
        lost = [f"{self.folder}: ended by itself with exit code {code}: {why}"] if code else differences(self.run, self.unbroken)
        if lost:
            self.campaign.count("a run started again after kills", True, lost)
            return self.give_up()
        shutil.rmtree(self.folder)
        self.campaign.numbers[f"runs of part {self.part}"] = self.number + 1

    def give_up(self) -> None:
        """Leave what was lost for a look, and go on with a fresh run."""
        if self.attempt is not None:
            self.attempt.signal(signal.SIGKILL)
            self.attempt.wait()
            self.attempt = None
        self.campaign.numbers[f"runs of part {self.part}"] = self.number + 1

    def finish(self) -> None:
        """See the last run through."""
        self.attempt = self.attempt or self.start()
        self.end()


def supervised(campaign, times: int) -> None:
    """The same under launch/supervise.py, with nothing forked: it starts pythons, and starts them again by itself."""
    draw, tried, run = campaign.random("supervised"), 0, 0
    while tried < times:
        run, kills, folder, known = run + 1, 0, campaign.folder / f"supervised-{run}", set()
        shutil.rmtree(folder, ignore_errors=True)
        command = [sys.executable, ROOT / "launch" / "supervise.py", "--ranks", str(WORLD), "--pause", "0", "--restarts", "100",
                   "--config", campaign.settings(0, folder)]
        metrics = folder / "run" / NAME
        with open(folder / "log", "w") as log:
            process = subprocess.Popen(command, env={**os.environ, "DS_ACCELERATOR": "cpu"}, stdout=log, stderr=log)
        while process.poll() is None:
            ranks = children(process.pid)
            if tried < times and len(ranks) == WORLD and not known & set(ranks):
                known |= set(ranks)
                steps, soon = len(told(metrics)), draw.random() < 0.3
                while not soon and children(process.pid) == ranks and len(told(metrics)) <= steps:
                    time.sleep(0.01)
                time.sleep(draw.uniform(0, 8 if soon else 0.3))
                victims = draw.choice([ranks, [draw.choice(ranks)]])
                if children(process.pid) == ranks and not any(ended(rank) for rank in ranks):
                    for rank in victims:
                        os.kill(rank, signal.SIGKILL)
                    tried, kills = tried + 1, kills + 1
            time.sleep(0.01)
        lost = differences(folder / "run", campaign.unbroken(0))
        if process.returncode:
            lost.append(f"{folder}: the supervisor ended with exit code {process.returncode}")
        found = (folder / "log").read_text().count("supervise: failed at step")
        campaign.count("SIGKILL under launch/supervise.py", min(found, kills), lost, kills)


def children(pid: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except FileNotFoundError:
        return []


def ended(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except FileNotFoundError:
        return True
