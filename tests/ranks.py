"""Real ranks for tests: processes that join over gloo on the CPU, with a limit on their time.

They are forked from one server that has imported torch and DeepSpeed: a group of two starts in a fraction of a second.
"""
from __future__ import annotations

import multiprocessing
import os
import tempfile
import time
import traceback
from pathlib import Path

import torch

from serpent_scale.parallel.ports import free_port

# For the server and all ranks, whatever the machine has. Before anything imports DeepSpeed.
os.environ["DS_ACCELERATOR"] = "cpu"
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload([
    "torch", "deepspeed", "serpent_scale.training.trainer",
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


def _rank(rank: int, world_size: int, port: int, results: str, function, args) -> None:
    from serpent_scale.parallel import processes

    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
        DS_ACCELERATOR="cpu",
    )
    torch.set_num_threads(1)
    try:
        result = function(processes.start(), *args)
        torch.save(result, Path(results, f"{rank}.result"))
        processes.stop()
    except BaseException:
        Path(results, f"{rank}.failure").write_text(f"rank {rank}: {traceback.format_exc()}")
        raise
