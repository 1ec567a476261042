"""One process per device: find out who we are, whichever launcher started us, and act together without hanging.

Started by `deepspeed` or torchrun (RANK, LOCAL_RANK and WORLD_SIZE are given), by SLURM's srun with one task per device, or
as plain `python` (a world of one). `start()` must run before anything else imports DeepSpeed: it picks its accelerator.
"""
from __future__ import annotations

import atexit
import logging
import os
import subprocess
import sys
import traceback
import warnings
from dataclasses import dataclass
from typing import Any, Callable, NoReturn

import torch
import torch.distributed

from serpent_scale.errors import UserError


@dataclass(frozen=True)
class Processes:
    rank: int
    local_rank: int
    world_size: int
    device: torch.device


def start(deterministic: bool = False) -> Processes:
    """Join the other ranks. Raises UserError when the launcher's variables do not add up or a rank has no GPU.

    deterministic: torch's own operations repeat to the bit too, see `training.deterministic`.
    """
    if deterministic:
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # read when CUDA starts
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # a debugging aid that costs a pass over each new tensor
    for name, value in rank_variables(os.environ).items():
        os.environ[name] = value
    rank, local_rank, world_size = (int(os.environ[name]) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"))
    on_gpu = torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR", "cuda") == "cuda"
    if on_gpu:
        if local_rank >= torch.cuda.device_count():
            raise UserError(
                f"local rank {local_rank} has no GPU, this host shows {torch.cuda.device_count()}; "
                "start one process per GPU (deepspeed --num_gpus, or srun --ntasks-per-node and --gpus-per-node)"
            )
        torch.cuda.set_device(local_rank)
        os.environ.setdefault("NCCL_NVLS_ENABLE", "0")  # NVLink multicast hangs or fails at start on some hosts
    else:
        os.environ["DS_ACCELERATOR"] = "cpu"
    # DeepSpeed 0.19 calls torch's collectives by names that torch 2.13 deprecates: a warning per rank and call site.
    warnings.filterwarnings("ignore", message=r".*torch\.distributed\..* is deprecated", category=FutureWarning)

    import deepspeed
    import deepspeed.ops

    for logger in (deepspeed.utils.logger, *deepspeed.utils.logger.handlers):
        logger.setLevel(logging.WARNING)
    if not on_gpu:
        # No prebuilt or just-in-time ops: with gloo, DeepSpeed would compile one for inference at the first start, which
        # takes a minute and a C++ compiler, and print a line about it.
        deepspeed.ops.__compatible_ops__ = {}
    try:
        deepspeed.init_distributed(dist_backend="nccl" if on_gpu else "gloo", auto_mpi_discovery=False, verbose=False)
    except torch.distributed.DistNetworkError as error:
        if "EADDRINUSE" not in str(error):
            raise
        raise UserError(
            f"port {os.environ['MASTER_PORT']} is in use on this host, perhaps by another run; choose one with "
            "deepspeed --master_port or torchrun --master-port"
        ) from None
    return Processes(rank, local_rank, world_size, torch.device("cuda", local_rank) if on_gpu else torch.device("cpu"))


def rank_variables(env) -> dict[str, str]:
    """RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT, from what the launcher left in `env`. Raises UserError."""
    given = [name for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE") if name in env]
    if given:
        needed = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
        missing = [name for name in needed if name not in env]
        if missing:
            raise UserError(
                f"{given[0]} is set but not {', '.join(missing)}; start with deepspeed, torchrun or srun, or unset it"
            )
        return {name: env[name] for name in needed}
    # A batch script has SLURM_PROCID and SLURM_NTASKS too; only a task that srun started has the size of its step.
    if "SLURM_PROCID" in env and "SLURM_STEP_NUM_TASKS" in env:
        return {
            "RANK": env["SLURM_PROCID"], "LOCAL_RANK": env["SLURM_LOCALID"], "WORLD_SIZE": env["SLURM_STEP_NUM_TASKS"],
            "MASTER_ADDR": env.get("MASTER_ADDR") or _first_slurm_host(env),
            # Below the ephemeral ports, and another for each job that shares the host.
            "MASTER_PORT": env.get("MASTER_PORT") or str(20000 + int(env["SLURM_JOB_ID"]) % 10000),
        }
    # Port 0: the store of a world of one listens on any free port.
    return {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}


def _first_slurm_host(env) -> str:
    hosts = env.get("SLURM_STEP_NODELIST") or env["SLURM_JOB_NODELIST"]
    try:
        listed = subprocess.run(["scontrol", "show", "hostnames", hosts], capture_output=True, text=True, check=True)
        return listed.stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        raise UserError(f"cannot list the hosts of {hosts} with scontrol; export MASTER_ADDR before srun") from None


_before_stop: list[Callable[[], None]] = []


def before_stop(release: Callable[[], None]) -> None:
    """Have what holds on to the communicators released before they are closed."""
    _before_stop.append(release)


def stop() -> None:
    while _before_stop:
        _before_stop.pop()()
    if torch.distributed.is_initialized():
        import deepspeed.comm

        deepspeed.comm.destroy_process_group()


def run_and_leave(main: Callable[[], None]) -> NoReturn:
    """Run an entry point and end the process with its exit code, without the interpreter's own finalisation.

    A thread of torch's that asks for the interpreter's lock meanwhile aborts the process: about one run in ten ended so, with
    exit code -6, after all it had to do was done.
    """
    code = 0
    try:
        main()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        code = 1
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def barrier() -> None:
    torch.distributed.barrier()


def all_reduce_sum(tensor: torch.Tensor) -> torch.Tensor:
    """Sum over ranks, in place."""
    torch.distributed.all_reduce(tensor)
    return tensor


def broadcast_object(obj: Any) -> Any:
    """What rank 0 passed, on every rank."""
    box = [obj]
    torch.distributed.broadcast_object_list(box, src=0)
    return box[0]


def on_rank_zero(fn: Callable[[], Any]) -> Any:
    """Run `fn` on rank 0; its result on every rank. If it fails, all raise: the same UserError, or a RuntimeError."""
    rank = torch.distributed.get_rank()
    result, error = _attempt(fn) if rank == 0 else (None, None)
    result, failure = broadcast_object((result, _describe(error)))
    _raise_together({0: failure}, error)
    return result


def on_every_rank(fn: Callable[[], Any]) -> list:
    """Run `fn` on each rank; everyone's results, in rank order. If it fails anywhere, every rank raises the first failure.

    `fn` must not use collectives: a rank that fails in it would leave the others waiting.
    """
    result, error = _attempt(fn)
    outcomes = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(outcomes, (result, _describe(error)))
    _raise_together({rank: failure for rank, (_, failure) in enumerate(outcomes)}, error)
    return [result for result, _ in outcomes]


def _attempt(fn: Callable[[], Any]) -> tuple[Any, Exception | None]:
    try:
        return fn(), None
    except Exception as error:  # raised again, on all ranks, by _raise_together
        return None, error


def _describe(error: Exception | None) -> tuple[bool, str] | None:
    if error is None:
        return None
    return isinstance(error, UserError), str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"


def _raise_together(failures: dict[int, tuple[bool, str] | None], own: Exception | None) -> None:
    if own is not None and not isinstance(own, UserError):
        raise own  # with its traceback
    for rank, failure in failures.items():
        if failure is not None:
            users, message = failure
            raise UserError(message) if users else RuntimeError(f"rank {rank} failed: {message}")
