"""Train, and start again after a failure: `python launch/supervise.py --ranks 8 --config configs/wt103_350m.yaml`.

Starts one process per device of this host, or with --srun one task per device of a SLURM allocation, and starts them all
again from the last checkpoint when one of them fails: after a pause that doubles while there is no progress, at most
--restarts times, and not at all when the same failure ends the run at the same step twice, or what failed is for the user to
mend (exit code 2). SIGTERM and SIGUSR2 are passed on: the run saves and ends with exit code 75.

torchrun's agent does not serve: it turns every exit code into 1 and waits 30 s for ranks that cannot end; DeepSpeed's
launcher ends its ranks one after the other on SIGTERM, and then with exit code 1.
"""
from __future__ import annotations

import argparse
import collections
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

from serpent_scale.config import load_config
from serpent_scale.errors import EXIT_FAILED, EXIT_REQUEUE, EXIT_USER, UserError, exit_on_user_error
from serpent_scale.parallel.ports import free_port

ASKING = (signal.SIGTERM, signal.SIGUSR2)  # ask a run to save and end
TEARDOWN = 3.0  # seconds from the first rank's failure until the others are killed
LONGEST_PAUSE = 300.0


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--ranks", type=int, metavar="N", help="processes on this host, one per device")
    where.add_argument("--srun", action="store_true", help="in a SLURM job: one task per device, as the job asked for them")
    parser.add_argument("--restarts", type=int, default=20, help="at most this many (default: 20)")
    parser.add_argument("--pause", type=float, default=5.0, help="seconds before the first restart (default: 5)")
    parser.add_argument("--config", required=True, help="as for launch/pretrain.py")
    parser.add_argument("--resume", default="auto", metavar="auto|none|PATH", help="of the first start; then auto")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    return parser.parse_intermixed_args()


class Attempt:
    """One start of all ranks: their processes, and the end of what they said on stderr."""

    def __init__(self, ranks: int | None, command: list[str]):
        self.processes: list[subprocess.Popen] = []
        self.tails: list[collections.deque] = []
        self._readers: list[threading.Thread] = []
        if ranks is None:
            cpus = os.environ.get("SLURM_CPUS_PER_TASK", "1")  # since 22.05 srun does not take it from the job
            self._start(["srun", "--kill-on-bad-exit=1", f"--cpus-per-task={cpus}", *command], os.environ)
            return
        port = free_port()
        for rank in range(ranks):
            given = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            self._start(command, {**os.environ, **{name: str(value) for name, value in given.items()}})

    def _start(self, command: list[str], env) -> None:
        process = subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True, errors="replace")
        tail = collections.deque(maxlen=200)
        self.processes.append(process)
        self.tails.append(tail)
        self._readers.append(threading.Thread(target=self._read, args=(process.stderr, tail)))
        self._readers[-1].start()

    @staticmethod
    def _read(stream, tail) -> None:
        for line in stream:
            sys.stderr.write(line)
            sys.stderr.flush()
            tail.append(line.rstrip())

    def signal(self, number: int) -> None:
        for process in self.processes:
            if process.poll() is None:
                process.send_signal(number)

    def wait(self) -> tuple[int, str]:
        """Until all have ended, killed if they must be: the exit code that counts, and the line of stderr that tells why."""
        failed_at, unwilling = None, set()
        while any(process.poll() is None for process in self.processes):
            if failed_at is None and any(process.poll() for process in self.processes):
                failed_at = time.monotonic()
            if failed_at is not None and time.monotonic() > failed_at + TEARDOWN:
                unwilling |= {rank for rank, process in enumerate(self.processes) if process.poll() is None}
                self.signal(signal.SIGKILL)
            time.sleep(0.05)
        for reader in self._readers:
            reader.join()
        codes = [process.returncode for process in self.processes]
        # A rank that left because another died says 1: what the other one has to say counts more.
        weight = {rank: (code != 0, rank not in unwilling, code != EXIT_FAILED, -rank) for rank, code in enumerate(codes)}
        rank = max(weight, key=weight.get)
        return codes[rank], reason(self.tails[rank])


def reason(tail) -> str:
    """The last line that looks like an error, without what differs between two runs of the same failure."""
    wanted = re.compile(r"^(\[rank\d+\]: ?)?(error: |watchdog: |[\w.]*(Error|Exception|Interrupt)\b)")
    line = next((line for line in reversed(tail) if wanted.search(line)), "")
    return re.sub(r"0x[0-9a-f]+|\d+(\.\d+)? s\b|:\d+", "", line)[:300]


def last_step(run_folder: Path) -> int:
    """The last step that the run's metrics tell of."""
    from serpent_scale.training.metrics import read_metrics

    path = run_folder / "metrics.jsonl"
    return max((line["step"] for line in read_metrics(path)), default=0) if path.is_file() else 0


@exit_on_user_error
def main() -> None:
    args = arguments()
    if args.ranks is not None and args.ranks < 1:
        raise UserError(f"--ranks {args.ranks}: must be at least 1")
    folder = load_config(args.config, args.overrides).run_folder
    asked, current = [], []

    def pass_on(number, frame):
        asked.append(number)
        for attempt in current:
            attempt.signal(number)

    for number in ASKING:
        signal.signal(number, pass_on)
    resume, pause, former, furthest = args.resume, args.pause, None, last_step(folder)
    for restart in range(args.restarts + 1):
        command = [sys.executable, str(Path(__file__).with_name("pretrain.py")), "--config", args.config, "--resume", resume]
        current[:] = [Attempt(args.ranks, [*command, *args.overrides])]
        code, why = current[0].wait()
        current.clear()
        number = -code if code < 0 else code - 128  # of the signal that killed it, as we or srun tell it
        if number in ASKING:  # it came before the rank could catch it: nothing to save
            sys.exit(EXIT_REQUEUE)
        if code in (0, EXIT_USER, EXIT_REQUEUE) or asked:
            sys.exit(code if code >= 0 else 128 + number)
        step = last_step(folder)
        failure = (code, why, step)
        say(f"failed at step {step} with exit code {code}{f': {why}' if why else ''}")
        # A SIGKILL comes from outside, and says nothing about the run.
        if failure == former and number != signal.SIGKILL:
            say("the same failure at the same step twice: not started again; mend it, or start from an older checkpoint with "
                "--resume PATH")
            sys.exit(EXIT_FAILED)
        if restart == args.restarts:
            say(f"{args.restarts} restarts are used up (--restarts)")
            sys.exit(EXIT_FAILED)
        pause = args.pause if step > furthest or former is None else min(2 * pause, LONGEST_PAUSE)
        former, furthest, resume = failure, max(step, furthest), "auto"
        say(f"starting again in {pause:g} s, restart {restart + 1} of {args.restarts}")
        until = time.monotonic() + pause
        while time.monotonic() < until and not asked:
            time.sleep(0.1)
        if asked:
            sys.exit(EXIT_REQUEUE)


def say(text: str) -> None:
    print(f"supervise: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
