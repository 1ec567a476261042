"""Real ranks for tests: processes that join over gloo on the CPU, with a limit on their time.

They are forked from one server that has imported torch and DeepSpeed: a group of two starts in a fraction of a second. So does a
process of an entry point.
"""
from __future__ import annotations

import gc
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

import torch

from serpent_scale.parallel.ports import free_port

# For the server and all ranks, whatever the machine has. Before anything imports DeepSpeed.
os.environ["DS_ACCELERATOR"] = "cpu"
ROOT = Path(__file__).parents[1]
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload([
    "torch", "deepspeed", "serpent_scale.training.trainer",
    "serpent_scale.evaluation.loading", "serpent_scale.evaluation.perplexity",
    "torch._inductor.compile_fx", "deepspeed.runtime.zero.muon.muon_optimizer",  # else imported on first use
])


class Group:
    """`function(processes, *args)` on each rank; `function` at the top of an importable module."""

    def __init__(self, world_size: int, function, *args):
        port = free_port()
        self.results = tempfile.TemporaryDirectory()
        self.ranks = [
            CONTEXT.Process(target=_rank, args=(rank, world_size, port, self.results.name, function, args), daemon=True)
            for rank in range(world_size)
        ]
        for process in self.ranks:
            process.start()

    def kill(self, rank: int | None = None) -> None:
        """SIGKILL one rank, or all."""
        for process in self.ranks if rank is None else [self.ranks[rank]]:
            process.kill()

    def join(self, timeout: float = 120) -> list:
        """What each rank returned. Fails the test when one of them failed, was killed, or is not done in time."""
        deadline = time.monotonic() + timeout
        for process in self.ranks:
            process.join(max(0, deadline - time.monotonic()))
        late = [rank for rank, process in enumerate(self.ranks) if process.is_alive()]
        for process in self.ranks:
            process.kill()
            process.join()
        failures = [path.read_text() for path in sorted(Path(self.results.name).glob("*.failure"))]
        assert not failures, "\n".join(failures)
        assert not late, f"ranks {late} still run after {timeout} s"
        assert all(process.exitcode == 0 for process in self.ranks), [process.exitcode for process in self.ranks]
        files = [Path(self.results.name, f"{rank}.result") for rank in range(len(self.ranks))]
        return [torch.load(file, weights_only=False) for file in files]


def run_ranks(world_size: int, function, *args, timeout: float = 120) -> list:
    """`function(processes, *args)` on each of `world_size` ranks; what each returned."""
    return Group(world_size, function, *args).join(timeout)


def run_script(script: str | Path, *arguments, timeout: float = 120, **environment: str) -> subprocess.CompletedProcess:
    """What `python SCRIPT ARGUMENTS`, begun in the project's folder, leaves: returncode, stdout, stderr."""
    with tempfile.TemporaryDirectory() as folder:
        command = [str(script), *map(str, arguments)]
        process = CONTEXT.Process(target=_script, args=(folder, command, environment), daemon=True)
        process.start()
        process.join(timeout)
        late = process.is_alive()
        process.kill()
        process.join()
        out, err = (Path(folder, name).read_text() for name in ("out", "err"))
    assert not late, f"{command} still runs after {timeout} s: {out[-2000:]} {err[-2000:]}"
    return subprocess.CompletedProcess(command, process.exitcode, out, err)


def forked() -> None:
    """At the start of a process that was forked."""
    gc.freeze()  # else its first collection visits all that the server has imported, and copies that memory: a quarter second
    torch.set_num_threads(1)


def _script(folder: str, command: list[str], environment: dict[str, str]) -> None:
    for descriptor, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(Path(folder, name), os.O_WRONLY | os.O_CREAT), descriptor)
    os.chdir(ROOT)
    os.environ.update(environment)
    forked()
    sys.argv = command
    runpy.run_path(command[0], run_name="__main__")


def _rank(rank: int, world_size: int, port: int, results: str, function, args) -> None:
    from serpent_scale.parallel import processes

    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
        DS_ACCELERATOR="cpu",
    )
    forked()
    try:
        result = function(processes.start(), *args)
        torch.save(result, Path(results, f"{rank}.result"))
        processes.stop()
    except BaseException:
        Path(results, f"{rank}.failure").write_text(f"rank {rank}: {traceback.format_exc()}")
        raise
