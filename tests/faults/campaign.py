"""The fault campaign: `python tests/faults/campaign.py`, or with --quick the short form that `make test` runs.

Small runs of launch/pretrain.py on two ranks meet every fault in turn, are started again, and must tell and save what an unbroken
run does, to the last bit. It prints a table:

    tried  how often the fault came
    found  how often it was noticed: the job ended, a file was named, a run warned or refused; -: there is nothing to notice
    lost   how often an older checkpoint, a step, a sample or a bit of a result was

Exit code 1 if anything was lost or not found. --folder keeps everything; the same command goes on where it was interrupted.
A fault depends on --seed and its own name alone, but for what the machine's speed decides. Needs Linux, and no GPU.
"""
from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]

from faults import conditions, damage, kills  # noqa: E402
from faults.attempt import Attempt  # noqa: E402
from faults.toyrun import configuration, differences, prepare_data  # noqa: E402


class Campaign:
    """Where it works, what it has counted, and what all faults need."""

    def __init__(self, folder: Path, seed: int, quick: bool):
        self.folder, self.seed, self.quick = folder, seed, quick
        folder.mkdir(parents=True, exist_ok=True)
        self.data = prepare_data(folder / "data")
        self._path = folder / "tally.json"
        begun = json.loads(self._path.read_text()) if self._path.is_file() else {"seed": seed, "quick": quick}
        if (begun["seed"], begun["quick"]) != (seed, quick):
            sys.exit(f"error: {folder}: begun with seed {begun['seed']}{' and --quick' * begun['quick']}; use another --folder")
        self.table: dict[str, list[int]] = begun.get("table", {})
        self.done: list[str] = begun.get("done", [])
        self.losses: list[str] = begun.get("losses", [])
        self.numbers: dict[str, float] = begun.get("numbers", {})  # that last over an interruption, and figures for the end
        self.lock = threading.RLock()

    def count(self, fault: str, found: int | None, lost: list[str], tried: int = 1) -> None:
        """`found`: how many of them were, None: there is nothing to find; `lost`: each thing that was, in words."""
        with self.lock:
            row = self.table.setdefault(fault, [0, None if found is None else 0, 0])
            row[0] += tried
            row[1] = None if found is None else row[1] + found
            row[2] += min(tried, len(lost))
            if found is not None and found < tried:
                lost = lost or ["not found"]
            self.losses += [f"{fault}: {what}" for what in lost]
            for what in lost:
                print(f"LOST, {fault}: {what}", flush=True)

    def keep(self, unit: str) -> None:
        self.done.append(unit)
        content = {"seed": self.seed, "quick": self.quick, "table": self.table, "done": self.done, "losses": self.losses,
                   "numbers": self.numbers}
        staging = self._path.with_suffix(".partial")
        staging.write_text(json.dumps(content))
        staging.rename(self._path)

    def random(self, name: str) -> random.Random:
        return random.Random(f"{self.seed} {name}")

    def settings(self, lane: int, folder: Path, data: Path | None = None) -> Path:
        """The YAML file of a run in `folder`, whose own folder is `folder`/run."""
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / "run.yaml"
        file.write_text(configuration(lane, data or self.data, folder).to_yaml())
        return file

    def unbroken(self, lane: int) -> Path:
        """The folder of the run of a lane that nothing befell."""
        folder = self.folder / f"unbroken-{lane}"
        with self.lock:
            if not (folder / "whole").exists():
                shutil.rmtree(folder, ignore_errors=True)
                self.complete(lane, folder)
                (folder / "whole").touch()
        return folder / "run"

    def complete(self, lane: int, folder: Path, *overrides: str) -> None:
        """Start a run and see it end well."""
        attempt = Attempt(self.settings(lane, folder), *overrides)
        code, why = attempt.wait()
        if code:
            said = "\n".join(line for tail in attempt.tails for line in tail)
            raise RuntimeError(f"{folder}: exit code {code}, {why}\n{said}")

    def completes(self, lane: int, folder: Path) -> list[str]:
        """Start a run again: what it lost, in words."""
        try:
            self.complete(lane, folder)
        except RuntimeError as error:
            return [str(error)]
        return differences(folder / "run", self.unbroken(lane))

    def strands(self, number_of_kills: int) -> list[list]:
        """(name, function) of each part, which counts its faults. Strands run side by side: much of each is waiting."""
        parts = [list(kills.units(self, number_of_kills, part, 2)) for part in range(2)]
        return [*parts, list(damage.units(self)), list(conditions.units(self))]

    def run(self, number_of_kills: int) -> bool:
        """All parts that are not done yet; whether nothing was lost and all was found."""
        strands = self.strands(number_of_kills)
        self.parts, self.started, self.told = sum(map(len, strands)), time.monotonic(), time.monotonic()
        self.before = self.numbers.get("seconds", 0)
        with ThreadPoolExecutor(len(strands)) as pool:
            for done in [pool.submit(self.follow, strand) for strand in strands]:
                done.result()
        return not self.losses

    def follow(self, strand: list) -> None:
        for name, function in strand:
            if name in self.done:
                continue
            function()
            with self.lock:
                seconds = time.monotonic() - self.started
                self.numbers["seconds"] = self.before + seconds
                self.keep(name)
                if seconds > self.told - self.started + 10 or len(self.done) == self.parts:
                    self.told, rows = time.monotonic(), self.table.values()
                    print(f"{len(self.done)} of {self.parts} parts done, {name} the last, in {seconds:.0f} s; "
                          f"{sum(row[0] for row in rows)} faults, {sum(row[2] for row in rows)} lost", flush=True)

    def report(self) -> str:
        lines = ["| fault | tried | found | lost |", "|---|---|---|---|"]
        lines += [f"| {fault} | {tried} | {'-' if found is None else found} | {lost} |"
                  for fault, (tried, found, lost) in sorted(self.table.items())]
        numbers = self.numbers
        runs = sum(value for name, value in numbers.items() if name.startswith("runs of part"))
        lines += ["", f"{runs:.0f} runs with kills were finished and compared; the slowest teardown of a job "
                      f"took {numbers.get('teardown', 0):.1f} s; {numbers.get('seconds', 0):.0f} s in all, seed {self.seed}"]
        return "\n".join(lines + [f"LOST, {what}" for what in self.losses])


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="30 kills, and fewer of each other fault")
    parser.add_argument("--kills", type=int, help="random SIGKILLs (default: 500, with --quick 30)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="default: a temporary one, removed at the end unless something was lost")
    args = parser.parse_args(arguments)
    folder = args.folder or Path(tempfile.mkdtemp(prefix="faults-"))
    campaign = Campaign(folder, args.seed, args.quick)
    whole = campaign.run(args.kills if args.kills is not None else 30 if args.quick else 500)
    print(campaign.report(), flush=True)
    if whole and args.folder is None:
        shutil.rmtree(folder)
    elif not whole:
        print(f"what is left of it: {folder}", flush=True)
    return 0 if whole else 1


if __name__ == "__main__":
    sys.exit(main())
