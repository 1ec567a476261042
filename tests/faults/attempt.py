"""One start of launch/pretrain.py on two ranks, by the supervisor's own code but for how a process begins.

A process is forked from a server that has imported torch, DeepSpeed and the trainer, so that it starts in a fraction of a second.
The rest is what a user's is: the entry point with its arguments, rank variables, exit codes, files, waiting and teardown.
"""
from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import os
import runpy
import signal
import sys
import threading
from pathlib import Path

from ranks import CONTEXT, forked

ROOT = Path(__file__).parents[2]
WORLD = 2
POLLING = threading.Lock()  # multiprocessing looks at all children when it starts one, and two looks at once spoil an exit code
LIMIT = 180.0  # seconds; the watchdog's own default is longer than a test may take
PR_SET_PDEATHSIG = 1

_spec = importlib.util.spec_from_file_location("supervise", ROOT / "launch" / "supervise.py")
supervise = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(supervise)


def rank(command: list[str], env: dict[str, str], said, prepare) -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # not to outlive the campaign
    for descriptor in (1, 2):
        os.dup2(said.fileno(), descriptor)
    os.environ.update(env)
    forked()
    sys.argv = command
    if prepare is not None:
        prepare(int(env["RANK"]))
    runpy.run_path(command[0], run_name="__main__")


class Forked:
    """What `supervise.Attempt` asks of a subprocess.Popen."""

    def __init__(self, process):
        self.process, self.pid = process, process.pid

    def poll(self) -> int | None:
        with POLLING:
            return self.process.exitcode

    returncode = property(poll)

    def send_signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)


class Attempt(supervise.Attempt):
    """`prepare(rank)` is called in each rank before the entry point."""

    def __init__(self, config: Path, *arguments: str, prepare=None):
        self.prepare = prepare
        super().__init__(WORLD, [str(ROOT / "launch" / "pretrain.py"), "--config", str(config), *arguments])

    def _start(self, command: list[str], env) -> None:
        read, write = CONTEXT.Pipe(duplex=False)
        process = CONTEXT.Process(target=rank, args=(command, dict(env), write, self.prepare), daemon=True)
        with POLLING:
            process.start()
        write.close()
        self.processes.append(Forked(process))
        self.tails.append([])
        stream = os.fdopen(os.dup(read.fileno()), errors="replace")
        read.close()
        self._readers.append(threading.Thread(target=self._read, args=(stream, self.tails[-1]), daemon=True))
        self._readers[-1].start()

    @staticmethod
    def _read(stream, tail) -> None:
        with stream:
            for line in stream:
                tail.append(line.rstrip())

    def wait(self) -> tuple[int, str]:
        """As the supervisor does, but not for ever: what hangs is killed."""
        timer = threading.Timer(LIMIT, self.signal, [signal.SIGKILL])
        timer.start()
        try:
            return super().wait()
        finally:
            timer.cancel()

    def ended(self) -> bool:
        """One rank at least has ended."""
        return any(process.poll() is not None for process in self.processes)

    def codes(self) -> list[int | None]:
        return [process.poll() for process in self.processes]

    def said(self, text: str) -> int:
        """How many lines, of all ranks so far, have it."""
        return sum(text in line for tail in self.tails for line in list(tail))

    def begun(self) -> bool:
        """Rank 0 has made a step."""
        return any(line.startswith("step ") for line in list(self.tails[0]))
