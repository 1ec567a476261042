"""Checkpoints: save one atomically, find the newest whole one, resume from it, read its parameters.

A checkpoint is a folder `step-00000100`. It is written as `step-00000100.partial` and renamed when all of it is on the disk
and its manifest is written: a folder by the final name is whole, unless something damaged it later, which its hashes tell.

    state-00000.safetensors, ...  what each rank writes: master.NAME, exp_avg.NAME, exp_avg_sq.NAME, runs of elements
    rng-00000.safetensors, ...    states of the random number generators, one file per rank
    layout.json                   which elements of which parameter are where, shapes, tied names, Adam's steps
    trainer.json                  what the training loop wants back
    config.yaml, tokenizer.json   the texts handed to `save`
    manifest.json                 size and hash of all these

A folder of parameters alone, which `save_parameters` writes, has model.safetensors in place of states and trainer.json. A run
that begins with it begins at step 0.

Any engine resumes from it, whatever its ZeRO stage and world size: each rank reads the elements it holds. There is no pickle
in it. All ranks call `begin`, `finish`, `save` and `load` together, and when one of them fails, all raise.
"""
from __future__ import annotations

import contextlib
import json
import math
import re
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import safetensors.torch
import torch
import torch.distributed

from serpent_scale.checkpoint import manifest, rng, slices, tensorfile
from serpent_scale.errors import UserError
from serpent_scale.parallel.processes import on_every_rank, on_rank_zero

PARAMETERS = "model.safetensors"
FORMAT = 2
SPARE = 16 << 20  # bytes asked for beside the tensors: texts, manifest, the file system's own


def folder_name(step: int) -> str:
    return f"step-{step:08d}"


def step_of(path: Path) -> int:
    """Of a checkpoint, or of one that is being replaced."""
    return int(path.name.removeprefix("step-").removesuffix(".old"))


def state_file(rank: int) -> str:
    return f"state-{rank:05d}.safetensors"


def rng_file(rank: int) -> str:
    return f"rng-{rank:05d}.safetensors"


@dataclass(frozen=True)
class Saved:
    """A checkpoint that is whole, and what it cost: seconds from begin to rename, those that training stood still."""

    path: Path
    bytes: int
    seconds: float
    stall_seconds: float


def save(
    engine, checkpoints: Path, step: int, trainer: dict, texts: dict[str, str], keep_last: int, keep_every: int | None = None
) -> Path:
    """Write the checkpoint of `step`, then remove all but those to keep; its folder. See `begin` and `Save.finish`."""
    return begin(engine, checkpoints, step, trainer, texts).finish(keep_last, keep_every).path


def begin(
    engine, checkpoints: Path, step: int, trainer: dict, texts: dict[str, str], copies: dict[str, torch.Tensor] | None = None
) -> Save:
    """Start to write the checkpoint of `step` in a thread of each rank.

    `trainer` is anything JSON holds; `texts` maps file names to contents. With `copies` the thread first copies the state into
    it, on the host: training may go on, but for `wait_for_copy` before the next update; the next save uses that memory again,
    since fresh memory is slow to come by. Without, training must stand still until `finish`. Raises UserError on all ranks, and
    leaves nothing behind, when the disk has too little room.
    """
    started = time.monotonic()
    checkpoints, rank = Path(checkpoints), torch.distributed.get_rank()
    staging = (checkpoints / folder_name(step)).with_suffix(".partial")
    own, layout = _share_out(engine)
    views = slices.tensors(engine, own)
    tensors = {f"{kind}.{s.name}": view for kind in slices.KINDS for s, view in zip(own, views[kind])}
    size = sum(sum(held) for held in on_every_rank(lambda: [t.numel() * t.element_size() for t in tensors.values()]))
    on_rank_zero(lambda: _prepare(staging, size))
    files = {"layout.json": json.dumps(layout), "trainer.json": json.dumps(trainer), **texts} if rank == 0 else {}
    writing = Save(staging, rank, size, started, {"layout.json", "trainer.json", *texts}, waits=copies is None)
    ready = None
    if any(tensor.is_cuda for tensor in tensors.values()):
        ready = torch.cuda.Event()
        ready.record()
    writing.start(tensors, copies, ready, rng.state(), files)
    return writing


class Save:
    """A checkpoint being written; `waits`: training does, so that removing older ones need not be put off."""

    def __init__(self, staging: Path, rank: int, size: int, started: float, expected: set[str], waits: bool):
        self.staging, self.rank, self.size, self.started, self.expected = staging, rank, size, started, expected
        self.waits = waits
        self._entries: dict[str, dict] = {}
        self._error: BaseException | None = None
        self._copied, self._stall = threading.Event(), 0.0

    def start(self, tensors: dict, copies: dict | None, ready, generators: dict, files: dict[str, str]) -> None:
        """`ready`: event of the device after which the tensors hold this step's state."""
        self._thread = threading.Thread(target=self._write, args=(tensors, copies, ready, generators, files), name="checkpoint")
        self._thread.start()
        self._stall = time.monotonic() - self.started

    def wait_for_copy(self) -> None:
        """To be called before parameters or moments change."""
        started = time.monotonic()
        self._copied.wait()
        self._stall += time.monotonic() - started

    @property
    def done(self) -> bool:
        """This rank has written its part, or failed to: `finish` will not wait for it."""
        return not self._thread.is_alive()

    def finish(self, keep_last: int, keep_every: int | None = None) -> Saved:
        """Wait for all ranks, publish the checkpoint, and remove all up to its step but the `keep_last` newest and those whose
        step is a multiple of `keep_every`.

        An existing folder of this step is replaced, and kept until the new one is whole. Raises UserError on all ranks if
        anything could not be written; then nothing of this checkpoint stays.
        """
        resumed = time.monotonic()
        final = self.staging.with_suffix("")
        world_size = torch.distributed.get_world_size()
        try:
            parts = on_every_rank(self._join)
            expected = self.expected | {name(rank) for rank in range(world_size) for name in (state_file, rng_file)}
            on_rank_zero(lambda: self._publish(final, {n: e for part in parts for n, e in part.items()}, expected))
        except UserError:
            if self.rank == 0:
                shutil.rmtree(self.staging, ignore_errors=True)
            raise
        on_rank_zero(lambda: _prune(final.parent, step_of(final), keep_last, keep_every, self.waits))
        now = time.monotonic()
        return Saved(final, self.size, now - self.started, self._stall + now - resumed)

    def _write(self, tensors: dict, copies: dict | None, ready, generators: dict, files: dict[str, str]) -> None:
        try:
            tensors = _to_host(tensors, copies, ready)
            self._copied.set()
            # Each rank syncs and hashes what it wrote: another host's fsync would not reach its pages.
            self._entries[state_file(self.rank)] = tensorfile.write(self.staging / state_file(self.rank), tensors)
            self._entries[rng_file(self.rank)] = tensorfile.write(self.staging / rng_file(self.rank), generators)
            for name, text in files.items():
                manifest.write_synced(self.staging / name, text)
                self._entries[name] = manifest.hash_file(self.staging / name)
        except BaseException as error:  # raised again by _join
            self._error = error
        finally:
            self._copied.set()

    def _join(self) -> dict[str, dict]:
        self._thread.join()
        if self._error is not None:
            with _cannot_write(self.staging):
                raise self._error
        return self._entries

    def _publish(self, final: Path, entries: dict[str, dict], expected: set[str]) -> None:
        seen = {path.relative_to(self.staging).as_posix() for path in self.staging.rglob("*") if path.is_file()}
        if not entries.keys() == seen == expected:
            odd = sorted((entries.keys() ^ expected) | (seen ^ expected))[0]
            raise UserError(
                f"{self.staging / odd}: expected, written and seen by rank 0 do not agree on this file; run.folder must be on a "
                "filesystem that all hosts share"
            )
        with _cannot_write(self.staging):
            manifest.write_manifest(self.staging, entries)
            manifest.sync(self.staging)
            _rename_over(self.staging, final)


def newest(checkpoints: Path) -> tuple[Path | None, list[tuple[Path, str]]]:
    """The newest checkpoint that verifies, or None, and the newer ones that do not, with the reason. Needs no other rank."""
    skipped = []
    for _, path in reversed(folders(Path(checkpoints))):
        try:
            manifest.verify(path)
            return path, skipped
        except (UserError, OSError) as error:  # OSError: removed while we read it
            skipped.append((path, str(error)))
    return None, skipped


def load(engine, path: Path, check: Callable[[], None] = lambda: None) -> dict:
    """Resume a fresh engine of any ZeRO stage and world size; what was saved as `trainer`.

    `check` may refuse it, by a UserError, once it is found whole and before parameters are compared.

    The same stage and world size go on to the bit. Raises UserError on all ranks, before the engine is touched: the folder is
    not whole, or of another model or format.
    """
    path = Path(path)
    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    found = {}

    def read() -> dict:
        check()
        found["layout"] = layout = _read_layout(path)
        _check_same_parameters(engine, layout, path)
        found["rng"] = _read_rng(path / rng_file(rank % layout["world_size"]))
        return _read_json(path / "trainer.json")

    on_every_rank(lambda: manifest.verify(path, share=(rank, world_size)))
    trainer = on_every_rank(read)[rank]
    layout = found["layout"]
    reader = tensorfile.Reader(path, state_file, layout["slices"])
    slices.restore(engine, slices.held_slices(engine), reader.read, layout["adam_steps"])
    for name, value in layout["engine"].items():
        setattr(engine, name, value)
    rng.set_state(found["rng"])
    if rank >= layout["world_size"]:
        rng.branch_off(rank)
    return trainer


def save_parameters(folder: Path, state: dict[str, torch.Tensor], texts: dict[str, str]) -> None:
    """Write a folder of parameters alone, by another name first. Raises UserError if it is there or cannot be written."""
    first, tied = {}, {}
    for name, value in state.items():
        if first.setdefault(value.data_ptr(), name) != name:
            tied[name] = first[value.data_ptr()]
    with new_folder(folder) as staging:
        parameters = {name: value.contiguous() for name, value in state.items() if name not in tied}
        safetensors.torch.save_file(parameters, staging / PARAMETERS)
        for name, text in {"layout.json": json.dumps({"tied": tied}), **texts}.items():
            (staging / name).write_text(text)
        written = sorted(staging.iterdir())
        for path in written:
            manifest.sync(path)
        manifest.write_manifest(staging, {path.name: manifest.hash_file(path) for path in written})


@contextlib.contextmanager
def new_folder(folder: Path):
    """A folder to be filled, `folder` once that is done without an error. Raises UserError if it is there already or cannot be
    written."""
    if folder.exists():
        raise UserError(f"{folder}: is there already; name another folder, or remove this one")
    staging = folder.with_name(folder.name + ".partial")
    with _cannot_write(folder, "name another folder"):
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
        try:
            yield staging
            manifest.sync(staging)
            staging.rename(folder)
        except (safetensors.SafetensorError, RuntimeError) as error:  # how the libraries say that a disk is full
            raise OSError(None, str(error).splitlines()[0], str(folder)) from error
        finally:
            shutil.rmtree(staging, ignore_errors=True)


def parameters_alone(path: Path) -> bool:
    """Whether the folder holds parameters and nothing to resume a run with."""
    return (Path(path) / PARAMETERS).is_file()


def read_full_state(path: Path) -> dict[str, torch.Tensor]:
    """The fp32 parameters of a checkpoint under every name `load_state_dict` wants, tied ones included, from any ZeRO stage
    and world size. Verifies it first; needs no other rank. Raises UserError."""
    path = Path(path)
    manifest.verify(path)
    if parameters_alone(path):
        layout = _read_json(path / "layout.json")
        parameters = safetensors.torch.load_file(path / PARAMETERS)
        return parameters | {alias: parameters[name] for alias, name in layout["tied"].items()}
    layout = _read_layout(path)
    reader = tensorfile.Reader(path, state_file, layout["slices"])
    parameters = {}
    for name, shape in layout["parameters"].items():
        parameters[name] = reader.read("master", name, 0, math.prod(shape)).view(shape)
    return parameters | {alias: parameters[name] for alias, name in layout["tied"].items()}


# What is in a checkpoint.

ENGINE = ("global_steps", "skipped_steps", "global_samples")  # DeepSpeed's counters


def _share_out(engine) -> tuple[list[slices.Slice], dict]:
    """The slices that this rank writes, and the layout of the checkpoint. All ranks together."""
    if next(engine.module.buffers(), None) is not None:
        raise RuntimeError("the model has buffers; checkpoints hold parameters only")
    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    held = slices.held_slices(engine)
    if int(engine.zero_optimization_stage()) == 0:  # all ranks hold everything: each writes a part
        cuts = [(s.length * rank // world_size, s.length * (rank + 1) // world_size) for s in held]
        held = [replace(s, offset=low, start=low, length=high - low) for s, (low, high) in zip(held, cuts) if low < high]
    claims = on_every_rank(lambda: [(s.name, s.offset, s.length) for s in held])
    shapes, seen = slices.shapes(engine), {}
    for writer, claimed in enumerate(claims):
        for name, offset, length in claimed:
            seen.setdefault((name, offset), (writer, offset, length))  # held by several ranks: the first one writes it
    table = {name: [] for name in shapes}
    for (name, _), part in sorted(seen.items()):
        table[name].append(part)
    for name, parts in table.items():
        ends = [0, *(offset + length for _, offset, length in parts)]
        if ends[:-1] != [offset for _, offset, _ in parts] or ends[-1] != math.prod(shapes[name]):
            raise RuntimeError(f"the ranks do not hold {name} once and whole: {parts}")
    layout = {
        "format": FORMAT, "zero_stage": int(engine.zero_optimization_stage()), "world_size": world_size,
        "adam_steps": slices.adam_steps(engine), "engine": {name: getattr(engine, name) for name in ENGINE},
        "parameters": shapes, "tied": slices.tied_names(engine), "slices": table,
    }
    return [s for s in held if seen[s.name, s.offset][0] == rank], layout


def _to_host(tensors: dict[str, torch.Tensor], copies: dict[str, torch.Tensor] | None, ready) -> dict[str, torch.Tensor]:
    """On the CPU, and with `copies` in memory that training will not write to."""
    devices = {tensor.device for tensor in tensors.values() if tensor.is_cuda}
    found, stream = {}, torch.cuda.Stream(devices.pop()) if devices else None
    if stream is not None:
        stream.wait_event(ready)
    with torch.cuda.stream(stream):  # does nothing for None
        for name, tensor in tensors.items():
            if copies is None and not tensor.is_cuda:
                found[name] = tensor
                continue
            found[name] = (copies or {}).get(name)
            if found[name] is None:
                found[name] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            found[name].copy_(tensor, non_blocking=True)
    if stream is not None:
        stream.synchronize()
    if copies is not None:
        copies.update(found)
    return found


def _check_same_parameters(engine, layout: dict, path: Path) -> None:
    theirs, ours = layout["parameters"], slices.shapes(engine)
    for name in [*theirs, *ours]:
        if theirs.get(name) != ours.get(name):
            raise UserError(
                f"{path}: parameter {name} is {theirs.get(name, 'absent')} in it and {ours.get(name, 'absent')} in this "
                f"model; use the model section of {path / 'config.yaml'}"
            )
    if layout["tied"] != slices.tied_names(engine):
        raise UserError(f"{path}: other parameters are tied in it than in this model; use the version that wrote it")


def _read_layout(path: Path) -> dict:
    layout = _read_json(path / "layout.json")
    if layout.get("format") != FORMAT:
        raise UserError(f"{path}: its layout has format {layout.get('format', 1)}, not {FORMAT}; use the version that wrote it")
    return layout


def _read_json(file: Path) -> dict:
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError):
        raise UserError(f"{file}: missing or not JSON; {manifest.MEND}") from None


def _read_rng(file: Path) -> dict[str, torch.Tensor]:
    try:
        return safetensors.torch.load(file.read_bytes())
    except (OSError, safetensors.SafetensorError):
        raise UserError(f"{file}: missing or not safetensors; {manifest.MEND}") from None


# Folders.


def folders(checkpoints: Path) -> list[tuple[int, Path]]:
    """(step, checkpoint folder), oldest first. An `.old` one counts if its replacement never took its place."""
    if not checkpoints.is_dir():
        return []
    found = {}
    for path in checkpoints.iterdir():
        match = re.fullmatch(r"step-(\d{8,})(\.old)?", path.name)
        if match and path.is_dir() and not (match[2] and path.with_suffix("").exists()):
            found[int(match[1])] = path
    return sorted(found.items())


def _prepare(staging: Path, size: int) -> None:
    """Clear what crashed saves left, and make the staging folder if there is room for `size` bytes."""
    checkpoints = staging.parent
    with _cannot_write(checkpoints):
        checkpoints.mkdir(mode=0o700, parents=True, exist_ok=True)
        for leftover in checkpoints.glob("step-*.partial"):
            shutil.rmtree(leftover, onerror=_unless_gone)
        for old in checkpoints.glob("step-*.old"):
            if old.with_suffix("").exists():
                shutil.rmtree(old)
            else:
                old.rename(old.with_suffix(""))
        free = shutil.disk_usage(checkpoints).free
        if free < size + SPARE:
            raise UserError(
                f"{checkpoints}: {free / 1e9:.2f} GB free, a checkpoint needs {(size + SPARE) / 1e9:.2f} GB; free space there, "
                "lower checkpoint.keep_last or set run.folder to another disk"
            )
        staging.mkdir(mode=0o700)


def _unless_gone(function, path, failure) -> None:
    """For rmtree: a thread of the save before may still be removing the same folder."""
    if not isinstance(failure[1], FileNotFoundError):
        raise failure[1]


def _rename_over(staging: Path, final: Path) -> None:
    old = final.with_suffix(".old")
    replaces = final.exists()
    if replaces:
        final.rename(old)
    staging.rename(final)
    manifest.sync(final.parent)
    if replaces:
        shutil.rmtree(old)


def _prune(checkpoints: Path, step: int, keep_last: int, keep_every: int | None, waits: bool) -> None:
    """Keep the `keep_last` newest up to `step`, which was just written and is whole, and those of every `keep_every`-th step.

    Later ones stay: we resumed before them because they are damaged, or by hand; neither is ours to remove, and counting
    them could remove the only whole one. Files are removed in a thread unless training `waits`.
    """
    past = [(saved_step, path) for saved_step, path in folders(checkpoints) if saved_step <= step]
    with _cannot_write(checkpoints):
        for saved_step, path in past[:-keep_last]:
            if keep_every and saved_step % keep_every == 0:
                continue
            doomed = path.with_suffix(".partial")  # a removal that is cut short leaves no folder by a final name
            path.rename(doomed)
            if waits:
                shutil.rmtree(doomed)
            else:  # what is left, the next save clears
                threading.Thread(target=shutil.rmtree, args=(doomed, True)).start()


@contextlib.contextmanager
def _cannot_write(folder: Path, mend: str = "set run.folder to another disk"):
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{error.filename or folder}: cannot be written ({error.strerror or error}); free space there or {mend}"
        ) from error
