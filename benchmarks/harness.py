"""What the benchmark scripts share: timing on the device, the card's ceilings, kernels by purpose, processes that work together,
markdown tables, `benchmarks/results.md`."""
from __future__ import annotations

import argparse
import importlib
import json
import math
import multiprocessing
import multiprocessing.connection
import os
import pkgutil
import platform
import re
import shlex
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import triton
from torch import Tensor

import serpent_scale.kernels
from serpent_scale.parallel.ports import free_port

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results.md"
DEVICE = "cuda" if torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR", "cuda") == "cuda" else "cpu"
os.environ["DS_ACCELERATOR"] = DEVICE  # DeepSpeed need not look for one
# NVLink multicast hangs, or worse, on some hosts: off in NCCL, PyTorch and NVSHMEM.
NO_MULTICAST = {"NCCL_NVLS_ENABLE": "0", "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1", "NVSHMEM_DISABLE_NVLS": "1"}
PRELOADED = ["torch", "deepspeed", "serpent_scale.training.trainer", "torch._inductor.compile_fx"]
LAST_WORDS = 5.0  # seconds that the other ranks have to say what they met, once one has failed


@dataclass(frozen=True)
class Spread:
    """Median, 10th and 90th percentile of a measurement."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        ordered = sorted(values)
        if not ordered:
            return cls(math.nan, math.nan, math.nan)
        at = (ordered[round(q * (len(ordered) - 1))] for q in (0.5, 0.1, 0.9))
        return cls(*at)

    def text(self, unit: Callable[[float], str]) -> str:
        return f"{unit(self.median)} ({unit(self.low)}-{unit(self.high)})"


def milliseconds(value: float) -> str:
    return f"{value:.3f}" if value < 10 else f"{value:.2f}"


def time_calls(calls: Sequence[Callable[[], object]], seconds: float = 0.3) -> Spread:
    """Device time of one call in ms. The calls do the same on different inputs and take turns, so that no input is still in
    the cache from the round before. The device is kept busy while a batch is queued: what is measured is its own time, not
    the host's."""
    host = 0.0
    for _ in range(2):  # the second round finds everything compiled
        for call in calls:
            start = time.perf_counter()
            call()
            host = time.perf_counter() - start
        synchronize()
    start = time.perf_counter()
    for call in calls:
        call()
    synchronize()
    each = (time.perf_counter() - start) / len(calls)
    repeats = min(200, max(10, math.ceil(seconds / max(each, 1e-6))))
    if DEVICE == "cpu":
        return Spread.of([_host_milliseconds(calls[i % len(calls)]) for i in range(repeats)])
    times, batch = [], 10
    for first in range(0, repeats, batch):
        torch.cuda._sleep(int(2e9 * batch * (1.5 * host + 2e-5)))  # clock cycles, at most 2 GHz
        events = [torch.cuda.Event(enable_timing=True) for _ in range(2 * batch)]
        for i in range(batch):
            events[2 * i].record()
            calls[(first + i) % len(calls)]()
            events[2 * i + 1].record()
        synchronize()
        times += [events[2 * i].elapsed_time(events[2 * i + 1]) for i in range(batch)]
    return Spread.of(times)


def _host_milliseconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - start)


def synchronize() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def sets_beyond_cache(bytes_of_one: int) -> int:
    """How many input sets make a round of them three times as large as the L2 cache: at least 2, at most 16."""
    cache = torch.cuda.get_device_properties(0).L2_cache_size if DEVICE == "cuda" else 1
    return min(16, max(2, math.ceil(3 * cache / max(bytes_of_one, 1))))


@dataclass(frozen=True)
class Ceilings:
    copy: float  # bytes/s, read plus written
    matmul: float  # bf16 FLOP/s

    def text(self) -> str:
        return f"copy {self.copy / 1e12:.2f} TB/s (read + written), bf16 matmul {self.matmul / 1e12:.0f} TFLOP/s"


def measure_ceilings(size: int | None = None) -> Ceilings:
    n = size or (8192 if DEVICE == "cuda" else 256)
    source = torch.randn(n * n * 8, device=DEVICE)
    target = torch.empty_like(source)
    copy = time_calls([lambda: target.copy_(source)])
    a, b = (torch.randn(n, n, device=DEVICE).bfloat16() for _ in range(2))
    product = time_calls([lambda: a @ b, lambda: b @ a])
    return Ceilings(2 * source.nbytes / copy.median * 1e3, 2 * n**3 / product.median * 1e3)


def time_steps(step: Callable[[], object], warmup: int, steps: int) -> Spread:
    """Wall time of a step of several ranks in ms, of the slowest."""
    for _ in range(warmup):
        step()
    times = []
    for _ in range(steps):
        synchronize()
        dist.barrier()
        started = time.perf_counter()
        step()
        synchronize()
        times.append(1e3 * (time.perf_counter() - started))
    slowest = torch.tensor(times, device=DEVICE)
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    return Spread.of(slowest.tolist())


class RanksFailed(RuntimeError):
    """A rank failed: in one line, what of."""


class RanksLate(RanksFailed):
    """They were not done in time."""


def run_ranks(world_size: int, function: Callable, *arguments, seconds: float, log: Path | None = None) -> Any:
    """What `function(ranks, *arguments)` returns on rank 0 of so many fresh processes, one a device, of one host.

    function: at the top of a module; what it returns: what JSON holds. seconds: the longest it may take. What the ranks print
    goes to `log`, if given. Raises RanksFailed and leaves none of them behind.
    """
    context, port = _context(), free_port()
    with tempfile.TemporaryDirectory() as folder:
        ranks = [
            context.Process(target=_rank, args=(rank, world_size, port, folder, log, function, arguments), daemon=True)
            for rank in range(world_size)
        ]
        try:
            for process in ranks:
                process.start()
            late = _await(ranks, time.monotonic() + seconds)
            failures = sorted(Path(folder).glob("*.failed"), key=lambda path: path.stat().st_mtime_ns)
            if failures:
                raise RanksFailed(failures[0].read_text())
            died = [f"rank {rank} ended with exit code {p.exitcode}" for rank, p in enumerate(ranks) if p.exitcode]
            if died:
                raise RanksFailed(died[0] + (f", see {log}" if log else ""))
            if late:
                raise RanksLate(f"not done after {seconds:.0f} s")
            return json.loads(Path(folder, "result").read_text())
        finally:
            for process in ranks:
                if process.pid is not None:
                    process.kill()
                    process.join()


def _await(ranks: list, deadline: float) -> bool:
    """Whether some still run at the deadline, which comes sooner once one has failed."""
    failed = False
    while running := [process.sentinel for process in ranks if process.is_alive()]:
        if not failed and any(process.exitcode for process in ranks):
            failed, deadline = True, min(deadline, time.monotonic() + LAST_WORDS)
        if not multiprocessing.connection.wait(running, max(0.0, deadline - time.monotonic())):
            return True
    return False


@cache
def _context() -> multiprocessing.context.BaseContext:
    """Forks ranks from a process that has imported the libraries, where the GPU's driver survives that: a rank then starts in
    under a second."""
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # imports then ask the driver nothing
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    if DEVICE == "cuda":
        trial = context.Process(target=torch.cuda.init, daemon=True)
        trial.start()
        trial.join()
        if trial.exitcode:
            return multiprocessing.get_context("spawn")
    return context


def _rank(rank: int, world_size: int, port: int, folder: str, log: Path | None, function: Callable, arguments: tuple) -> None:
    if log is not None:
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, 1)
        os.dup2(file, 2)
    os.environ |= NO_MULTICAST | {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port), "DS_ACCELERATOR": DEVICE,  # the server may be another's, with other settings
    }
    torch.set_num_threads(1 if DEVICE == "cpu" else max(1, os.cpu_count() // world_size))
    from serpent_scale.parallel import processes

    code = 0
    try:
        result = function(processes.start(), *arguments)
        if rank == 0:
            Path(folder, "result").write_text(json.dumps(result))
        processes.stop()
    except BaseException as error:
        code = 1
        Path(folder, f"{rank}.failed").write_text(one_line(error))
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # the interpreter's own end may abort, see processes.run_and_leave


def relative_error(got: Tensor, want: Tensor) -> float:
    """||got - want|| / ||want||; NaN if anything is not finite."""
    got, want = got.detach().double(), want.detach().double()
    return float((got - want).norm() / want.norm().clamp(min=1e-30))


def one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows])


def hardware() -> str:
    versions = f"torch {torch.__version__}, triton {triton.__version__}, Python {platform.python_version()}"
    if DEVICE == "cpu":
        return f"CPU, {versions}"
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    driver = output_of(query).splitlines()[:1] or ["unknown"]
    return f"{torch.cuda.get_device_name()}, driver {driver[0]}, CUDA {torch.version.cuda}, {versions}"


def commit() -> str:
    """Short hash of the checkout, marked where files differ from it."""
    name = output_of(["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"])
    return name + (" with changes" if name and output_of(["git", "-C", str(ROOT), "status", "--porcelain"]) else "") or "unknown"


def output_of(command: list[str]) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=60).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""


def add_report_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--append", nargs="?", const=RESULTS, type=Path, metavar="FILE",
                        help=f"append the report to FILE (default {RESULTS.relative_to(ROOT)})")  # fmt: skip
    parser.add_argument("--commit", help="what was measured, where the checkout cannot say it")


def report(title: str, parts: Sequence[str], arguments: argparse.Namespace) -> None:
    """Print the report; with --append also add it to the file, under date, commit, command and hardware."""
    body = "\n\n".join(part for part in parts if part)
    print(f"\n{body}", flush=True)
    if arguments.append:
        command = shlex.join(["python", str(Path(sys.argv[0]).resolve().relative_to(ROOT)), *sys.argv[1:]])
        heading = f"## {title}\n\n{date.today()}, commit {arguments.commit or commit()}, {hardware()}.\n\n`{command}`"
        with arguments.append.open("a") as file:
            file.write(f"\n{heading}\n\n{body}\n")
        print(f"\nappended to {arguments.append}", flush=True)


# What a kernel's name says of its purpose; the first match counts. Our own kernels are known by their op, if their name is
# not that of another op's kernel too.
FAMILIES = {
    "selective_scan": r"selective_scan",
    "causal_conv1d": r"causal_conv1d",
    "matrix products": r"nvjet|gemm|cutlass|xmma|splitk|gemv|cublas",
    "optimizer": r"multi_tensor|adam",
    "rms_norm": r"layer_norm|rms_norm|layernorm|rmsnorm",
    "softmax, cross-entropy": r"softmax|cross_entropy|nll|logsumexp",
    "sort, scan, gather": r"scan|sort|gather|scatter|index|embedding",
    "sums": r"reduce",
    "copies, casts, fills": r"copy|memcpy|memset|fill|cat",
    "other elementwise": r"elementwise|vectorized|triton_",
}


def our_kernels() -> dict[str, str]:
    """Kernel name -> op(s), folders and files under `kernels/`, that have a kernel of that name."""
    package, owners = serpent_scale.kernels.__name__, {}
    for found in pkgutil.walk_packages(serpent_scale.kernels.__path__, package + "."):
        try:
            module = importlib.import_module(found.name)
        except ImportError:
            continue
        for value in vars(module).values():
            if hasattr(value, "fn") and hasattr(value.fn, "__name__"):
                owners.setdefault(value.fn.__name__, set()).add(found.name.removeprefix(package + ".").split(".")[0])
    return {kernel: " or ".join(sorted(ops)) for kernel, ops in owners.items()}


def family(kernel: str, ours: dict[str, str]) -> str:
    if kernel in ours:
        return ours[kernel]
    return next((name for name, pattern in FAMILIES.items() if re.search(pattern, kernel, re.IGNORECASE)), "other")


def kernel_times(call: Callable[[int], object], calls: int) -> tuple[Counter, Counter]:
    """CUDA kernels of call(0), call(1), ...: name -> ms, and launches, of one call."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        for i in range(calls):
            call(i)
        torch.cuda.synchronize()
    times, launches = Counter(), Counter()
    for event in profiler.key_averages():
        if event.device_type == torch.autograd.DeviceType.CUDA and not getattr(event, "is_user_annotation", False):
            times[event.key] += event.self_device_time_total / 1e3 / calls
            launches[event.key] += event.count / calls
    return times, launches


def by_family(per_kernel: Counter) -> Counter:
    ours, total = our_kernels(), Counter()
    for kernel, value in per_kernel.items():
        total[family(kernel, ours)] += value
    return total
