"""Bad conditions: a full disk, a rank that is stopped, losses that are not finite, a clock that jumps, two runs in a folder."""
from __future__ import annotations

import json
import os
import random
import shutil
import signal
import time
from functools import partial
from pathlib import Path

from faults import injected
from faults.attempt import POLLING, WORLD, Attempt
from faults.toyrun import EVALUATION, EVERY, LANES, STEPS, differences
from ranks import CONTEXT
from serpent_scale.errors import EXIT_HANG, EXIT_USER
from serpent_scale.training import badsteps

HANG_TIMEOUT = 3.0


def units(campaign):
    quick = campaign.quick
    faults = {full_disk: (1, 20), bad_loss: (1, 20), stopped: (1, 10), clock: (1, 20), two_runs: (2, 10)}  # quick, or not
    for number, (fault, (few, many)) in enumerate(faults.items()):
        for i in range(few if quick else many):
            name, lane = f"{fault.__name__} {i}", (number + i) % (2 if quick else len(LANES))
            yield name, partial(in_a_fresh_folder, campaign, fault, name, lane, i)


def in_a_fresh_folder(campaign, fault, name: str, lane: int, i: int) -> None:
    folder = campaign.folder / name.replace(" ", "-")
    shutil.rmtree(folder, ignore_errors=True)
    known = len(campaign.losses)
    fault(campaign, folder, lane, campaign.random(name), i)
    if len(campaign.losses) == known:
        shutil.rmtree(folder)


def begun(file: Path, *overrides: str) -> Attempt:
    """A run that has made a step. On a machine that is busy beyond measure the watchdog may end one before."""
    while True:
        attempt = Attempt(file, *overrides)
        while not attempt.begun() and not attempt.ended():
            time.sleep(0.005)
        if not attempt.ended():
            return attempt
        attempt.wait()


def full_disk(campaign, folder: Path, lane: int, draw: random.Random, i: int) -> None:
    """The run goes on and warns, older checkpoints stay whole, and no line of its metrics is missing in the end."""
    disk = folder / "disk"
    disk.mkdir(parents=True)
    ours, theirs = CONTEXT.Pipe()
    holder = CONTEXT.Process(target=injected.hold_small_disk, args=(str(disk), theirs), daemon=True)
    with POLLING:
        holder.start()
    mounted = ours.recv() == 0
    file = campaign.settings(lane, disk)  # the one below the mounted disk
    inside = Path(f"/proc/{holder.pid}/root{disk}") if mounted else disk
    if mounted:
        shutil.copy(file, inside)
    kind = "full disk" if mounted else "full disk (nothing can be mounted: a limit on the size of files)"
    attempt = Attempt(file, prepare=partial(injected.full_disk, holder.pid if mounted else None, str(disk), draw.random()))
    code, why = attempt.wait()
    lost = [f"exit code {code}: {why}"] if code else differences(inside / "run", campaign.unbroken(lane))
    campaign.count(kind, attempt.said("warning: a checkpoint is not saved, training goes on"), lost, attempt.said("injected: "))
    ours.close()
    holder.kill()
    holder.join()


def stopped(campaign, folder: Path, lane: int, draw: random.Random, i: int) -> None:
    """SIGSTOP of a rank: the others report the hang and leave, and the run goes on when it is started again."""
    victim = draw.randrange(WORLD)
    attempt = begun(campaign.settings(lane, folder), f"training.hang_timeout={HANG_TIMEOUT}")
    time.sleep(draw.uniform(0, 0.3))
    attempt.processes[victim].send_signal(signal.SIGSTOP)
    since = time.monotonic()
    attempt.wait()
    seconds, codes = time.monotonic() - since, attempt.codes()
    told = codes[1 - victim] == EXIT_HANG and attempt.said("raised the alarm after") and codes[victim] == -signal.SIGKILL
    campaign.count("SIGSTOP of a rank", bool(told) and seconds <= HANG_TIMEOUT + 10, campaign.completes(lane, folder))


def bad_loss(campaign, folder: Path, lane: int, draw: random.Random, i: int) -> None:
    """Losses or gradients that stay not finite end the run, which names their samples; without them it goes on unharmed."""
    # Where a save is due, which must not be made; not an evaluation, whose loss is another after a skipped step, as it should be.
    kind, step = draw.choice(["loss", "gradient"]), draw.choice([s for s in range(EVERY, STEPS - 1, EVERY) if s % EVALUATION])
    attempt = Attempt(campaign.settings(lane, folder), prepare=partial(injected.bad_loss, draw.randrange(WORLD), step, kind))
    code, why = attempt.wait()
    dumped = folder / "run" / badsteps.NAME
    steps = [bad["step"] for bad in json.loads(dumped.read_text())] if dumped.exists() else []
    found = code == EXIT_USER and "not finite 2 steps in a row" in why and steps == [step, step + 1]
    campaign.count(f"NaN, {kind}", found, campaign.completes(lane, folder))


def clock(campaign, folder: Path, lane: int, draw: random.Random, i: int) -> None:
    """The clock jumps while it runs, and its files bear times of other years: nothing goes by them."""
    stop = draw.choice(range(EVALUATION, STEPS, EVALUATION))
    jumps = partial(injected.jumping_clock, i)
    attempt = Attempt(campaign.settings(lane, folder), f"training.stop_at_step={stop}", prepare=jumps)
    code, why = attempt.wait()
    for path in sorted(folder.rglob("*")):
        when = time.time() + draw.uniform(-injected.YEARS, injected.YEARS)
        os.utime(path, (when, when))
    campaign.count("a clock that jumps", None, [f"exit code {code}: {why}"] if code else campaign.completes(lane, folder))


def two_runs(campaign, folder: Path, lane: int, draw: random.Random, i: int) -> None:
    """Started together, or while the other stands still: one is refused, the other is not disturbed."""
    file = campaign.settings(lane, folder)
    if i % 2:
        first = begun(file)
        first.signal(signal.SIGSTOP)
        ends = [Attempt(file).wait()]
        first.signal(signal.SIGCONT)
        ends.append(first.wait())
    else:
        both = Attempt(file), Attempt(file)
        ends = [attempt.wait() for attempt in both]
    refused = [why for code, why in ends if code == EXIT_USER]
    lost = [] if 0 in [code for code, _ in ends] else [f"neither went on: {ends}"]
    campaign.count("two runs in one folder", len(refused) == 1 and "another process trains in it" in refused[0],
                   lost + differences(folder / "run", campaign.unbroken(lane)))
