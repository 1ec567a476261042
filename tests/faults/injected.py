"""What goes wrong inside a rank: each is called before the entry point and changes a place that a fault would come in by."""
from __future__ import annotations

import contextlib
import ctypes
import math
import os
import random
import resource
import signal
import time
from pathlib import Path

import torch

CLONE_NEWNS, CLONE_NEWUSER = 0x00020000, 0x10000000
DISK = 20 << 20  # bytes: what a save asks for beside its tensors is 16 MiB
YEARS = 10 * 365 * 86400.0


def bad_loss(victim: int, step: int, kind: str, rank: int) -> None:
    """From `step` on the loss of one rank is infinite (`loss`), or its gradient is not a number (`gradient`)."""
    from serpent_scale.training.trainer import Trainer

    loss = Trainer._loss

    def injected(trainer, batch):
        value = loss(trainer, batch)
        if rank != victim or trainer.step + 1 < step or not torch.is_grad_enabled():
            return value
        return value + math.inf if kind == "loss" else value * torch.where(torch.tensor(True), math.nan, 1.0)

    Trainer._loss = injected


def jumping_clock(seed: int, rank: int) -> None:
    """The wall clock that Python shows jumps by up to ten years, either way, each time it is read."""
    draw, now, now_ns = random.Random(f"{seed} {rank}"), time.time, time.time_ns
    time.time = lambda: now() + draw.uniform(-YEARS, YEARS)
    time.time_ns = lambda: now_ns() + int(draw.uniform(-YEARS, YEARS) * 1e9)


# A full disk.


def mount_small_disk(folder: str, size: int = DISK) -> int:
    """Mount one in namespaces of this process, which has no other threads; the error number, 0 if there is none."""
    libc = ctypes.CDLL(None, use_errno=True)
    user, group = os.getuid(), os.getgid()
    failed = libc.unshare(CLONE_NEWUSER | CLONE_NEWNS) and ctypes.get_errno()
    if not failed:
        try:
            Path("/proc/self/setgroups").write_text("deny")
            Path("/proc/self/uid_map").write_text(f"0 {user} 1")
            Path("/proc/self/gid_map").write_text(f"0 {group} 1")
        except OSError as error:
            failed = error.errno
    return failed or libc.mount(b"tmpfs", folder.encode(), b"tmpfs", 0, f"size={size}".encode()) and ctypes.get_errno()


def hold_small_disk(folder: str, answer) -> None:
    """Mount one, tell the error number of trying, and stay until `answer` is closed."""
    answer.send(mount_small_disk(folder))
    with contextlib.suppress(EOFError):
        answer.recv()


def enter(holder: int) -> None:
    """Join the namespaces of the process that holds the small disk."""
    libc = ctypes.CDLL(None, use_errno=True)
    for kind in ("user", "mnt"):
        descriptor = os.open(f"/proc/{holder}/ns/{kind}", os.O_RDONLY)
        if libc.setns(descriptor, 0):
            raise OSError(ctypes.get_errno(), f"cannot join the {kind} namespace of the small disk")
        os.close(descriptor)


class SmallDisk:
    def __init__(self, folder: Path):
        self.filler = folder / "filler"

    def fill(self, left: int) -> None:
        with open(self.filler, "ab", buffering=0) as file:
            with contextlib.suppress(OSError):
                while file.write(bytes(1 << 16)):
                    pass
            with contextlib.suppress(OSError):
                while file.write(bytes(1 << 12)):
                    pass
            file.truncate(max(0, file.tell() - left))

    def free(self) -> None:
        self.filler.unlink(missing_ok=True)


class FileLimit:
    """Where nothing can be mounted: no file of the rank may grow beyond so many bytes."""

    def __init__(self):
        self.limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    def fill(self, left: int) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (left, self.limits[1]))

    def free(self) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, self.limits)


def full_disk(holder: int | None, folder: str, seed: int, rank: int) -> None:
    """At some saves of rank 0 the disk is full from before the step on, or fills up while tensors or before the manifest are
    written. It prints each, and looks after each step whether the older checkpoints are whole."""
    from serpent_scale.checkpoint import manifest, store, tensorfile
    from serpent_scale.training.trainer import Trainer

    if holder is not None:
        enter(holder)
    if rank:
        return
    disk = FileLimit() if holder is None else SmallDisk(Path(folder))
    draw, armed = random.Random(seed), []
    train_step, write, write_manifest = Trainer.train_step, tensorfile.write, manifest.write_manifest

    def step(trainer):
        if trainer.writing is not None:
            trainer.writing._thread.join()
        disk.free()
        _, skipped = store.newest(trainer.checkpoints)
        assert not skipped, skipped
        number = trainer.step + 1
        if number % trainer.config.checkpoint.every == 0 and number < trainer.config.total_steps:
            kind = draw.choice([None, "before the step", "in the tensors", "before the manifest"])
            if kind == "before the step":
                disk.fill(0)
            elif kind:
                armed.append(kind)
            if kind:
                print(f"injected: step {number}, no room {kind}", flush=True)
        return train_step(trainer)

    def filled(kind: str, function):
        def wrapped(path, content):
            if kind in armed and (kind != "in the tensors" or path.name == store.state_file(0)):
                armed.remove(kind)
                disk.fill(0 if kind == "before the manifest" else draw.randrange(40_000))
            return function(path, content)

        return wrapped

    Trainer.train_step = step
    tensorfile.write = filled("in the tensors", write)
    manifest.write_manifest = filled("before the manifest", write_manifest)
