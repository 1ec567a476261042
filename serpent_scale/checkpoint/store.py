"""Checkpoints: save one atomically, find the newest whole one, resume from it, read its parameters.

A checkpoint is a folder `step-00000100`. It is written as `step-00000100.partial` and renamed when all of it is on the disk
and its manifest is written: a folder by the final name is whole, unless something damaged it later, which its hashes tell.

    state/            DeepSpeed's files: parameters and optimizer, sharded as the ZeRO stage has it
    layout.json       ZeRO stage, world size, name and shape of each parameter in the optimizer's order, tied names
    trainer.json      what the training loop wants back
    rng-00000.safetensors, ...   states of the random number generators, one file per rank
    config.yaml, tokenizer.json  the texts handed to `save`
    manifest.json     size and sha256 of all these

A folder of parameters alone, which `save_parameters` writes, has model.safetensors in place of state/, trainer.json and the
states of generators. A run that begins with it begins at step 0.

Nothing in a checkpoint is executed: pickles are read by torch's `weights_only` unpickler, with three DeepSpeed classes that
only hold values let in. All ranks call `save` and `load` together, and when one of them fails, all raise.
"""
from __future__ import annotations

import contextlib
import json
import math
import os
import pickle
import random
import re
import shutil
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
import torch.distributed

from serpent_scale.checkpoint import manifest
from serpent_scale.errors import UserError
from serpent_scale.parallel.processes import on_every_rank, on_rank_zero

STATE = "state"  # DeepSpeed's tag
PARAMETERS = "model.safetensors"


def folder_name(step: int) -> str:
    return f"step-{step:08d}"


def save(engine, checkpoints: Path, step: int, trainer: dict, texts: dict[str, str], keep_last: int) -> Path:
    """Write the checkpoint of `step`, then remove all but the `keep_last` newest up to it; its folder.

    `trainer` is anything JSON holds; `texts` maps file names to contents. An existing folder of this step is replaced, and
    kept until the new one is whole. Raises UserError on all ranks if anything cannot be written.
    """
    checkpoints = Path(checkpoints)
    final = checkpoints / folder_name(step)
    staging = final.with_suffix(".partial")
    on_rank_zero(lambda: _prepare(staging))
    written, failures = _write_state(engine, staging)

    def write_rest() -> dict[str, dict]:
        rank = torch.distributed.get_rank()
        with _cannot_write(staging):
            if failures:
                raise failures[0]
            written.append(_rng_file(staging, rank))
            written[-1].write_bytes(safetensors.torch.save(_rng_state()))
            if rank == 0:
                own = {"layout.json": json.dumps(_layout(engine)), "trainer.json": json.dumps(trainer), **texts}
                for name, text in own.items():
                    written.append(staging / name)
                    written[-1].write_text(text)
            # Each rank syncs and hashes what it wrote: another host's fsync would not reach its pages.
            for path in written:
                manifest.sync(path)
            return {path.relative_to(staging).as_posix(): manifest.hash_file(path) for path in written}

    hashes = on_every_rank(write_rest)
    stage, world_size = int(engine.zero_optimization_stage()), torch.distributed.get_world_size()
    expected = {"layout.json", "trainer.json", *texts}
    for rank in range(world_size):
        expected |= {f"{STATE}/{name}" for name in _state_files(stage, rank)} | {_rng_file(staging, rank).name}

    def publish() -> None:
        merged = {name: entry for entries in hashes for name, entry in entries.items()}
        seen = {path.relative_to(staging).as_posix() for path in staging.rglob("*") if path.is_file()}
        if not merged.keys() == seen == expected:
            odd = sorted((merged.keys() ^ expected) | (seen ^ expected))[0]
            raise UserError(
                f"{staging / odd}: expected, written and seen by rank 0 do not agree on this file; run.folder must be on a "
                "filesystem that all hosts share"
            )
        with _cannot_write(staging):
            manifest.write_manifest(staging, merged)
            manifest.sync(staging / STATE)
            manifest.sync(staging)
            _rename_over(staging, final)
            _prune(checkpoints, step, keep_last)

    on_rank_zero(publish)
    return final


def newest(checkpoints: Path) -> tuple[Path | None, list[tuple[Path, str]]]:
    """The newest checkpoint that verifies, or None, and the newer ones that do not, with the reason. Needs no other rank."""
    skipped = []
    for _, path in reversed(_folders(Path(checkpoints))):
        try:
            manifest.verify(path)
            return path, skipped
        except (UserError, OSError) as error:  # OSError: removed while we read it
            skipped.append((path, str(error)))
    return None, skipped


def load(engine, path: Path) -> dict:
    """Resume a fresh engine from a checkpoint, bitwise; what was saved as `trainer`.

    Raises UserError on all ranks, before the engine is touched: the folder is not whole, was saved at another world size or
    ZeRO stage, by another model, or holds a pickle of more than tensors.
    """
    path = Path(path)
    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()

    states, rng = {}, {}

    def read() -> dict:
        _check_layout(engine, path, world_size)
        for name in _state_files(int(engine.zero_optimization_stage()), rank):
            states[f"{path}/{STATE}/{name}"] = _load_tensors(path / STATE / name)
        rng.update(_read_rng(path, rank))
        return _read_json(path / "trainer.json")

    on_every_rank(lambda: manifest.verify(path, share=(rank, world_size)))
    trainer = on_every_rank(read)[rank]
    # DeepSpeed would unpickle the files itself, with weights_only=False; it gets what we read.
    with _replaced(engine.checkpoint_engine, load=lambda file, map_location=None: states[str(file)]):
        loaded, _ = engine.load_checkpoint(str(path), tag=STATE)
    if loaded is None:  # DeepSpeed's way to say that it found nothing; training would start over
        raise UserError(f"{path}: DeepSpeed loaded nothing from it; {manifest.MEND}")
    _set_rng_state(rng)
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
    with _cannot_write(folder):
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
    layout = _read_json(path / "layout.json")
    if parameters_alone(path):
        parameters = safetensors.torch.load_file(path / PARAMETERS)
        return parameters | {alias: parameters[name] for alias, name in layout["tied"].items()}
    state = _load_tensors(path / STATE / _state_files(layout["zero_stage"], 0)[0], mmap=True)
    if layout["zero_stage"] < 3:
        return dict(state["module"])
    parameters = {name: state["module"][name] for name in state["buffer_names"]}
    shards = []
    for rank in range(layout["world_size"]):
        file = path / STATE / _state_files(3, rank)[1]
        shards.append(_load_tensors(file, mmap=True)["optimizer_state_dict"]["fp32_flat_groups"])
    for i, group in enumerate(layout["groups"]):
        offset = 0  # every rank holds an equal slice of each parameter, the last one padded
        for name, shape in group:
            length = math.ceil(math.prod(shape) / layout["world_size"])
            slices = [shard[i][offset : offset + length] for shard in shards]
            parameters[name] = torch.cat(slices)[: math.prod(shape)].view(shape)
            offset += length
    return parameters | {alias: parameters[name] for alias, name in layout["tied"].items()}


# Folders.


def _folders(checkpoints: Path) -> list[tuple[int, Path]]:
    """(step, checkpoint folder), oldest first. An `.old` one counts if its replacement never took its place."""
    if not checkpoints.is_dir():
        return []
    found = {}
    for path in checkpoints.iterdir():
        match = re.fullmatch(r"step-(\d{8,})(\.old)?", path.name)
        if match and path.is_dir() and not (match[2] and path.with_suffix("").exists()):
            found[int(match[1])] = path
    return sorted(found.items())


def _prepare(staging: Path) -> None:
    """Clear what crashed saves left, and make the staging folder."""
    checkpoints = staging.parent
    with _cannot_write(checkpoints):
        checkpoints.mkdir(parents=True, exist_ok=True)
        for leftover in checkpoints.glob("step-*.partial"):
            shutil.rmtree(leftover)
        for old in checkpoints.glob("step-*.old"):
            if old.with_suffix("").exists():
                shutil.rmtree(old)
            else:
                old.rename(old.with_suffix(""))
        (staging / STATE).mkdir(parents=True)


def _rename_over(staging: Path, final: Path) -> None:
    old = final.with_suffix(".old")
    replaces = final.exists()
    if replaces:
        final.rename(old)
    staging.rename(final)
    manifest.sync(final.parent)
    if replaces:
        shutil.rmtree(old)


def _prune(checkpoints: Path, step: int, keep_last: int) -> None:
    """Keep the `keep_last` newest up to `step`, which was just written and is whole.

    Later ones stay: we resumed before them because they are damaged, or by hand; neither is ours to remove, and counting
    them could remove the only whole one.
    """
    past = [path for saved_step, path in _folders(checkpoints) if saved_step <= step]
    for path in past[:-keep_last]:
        doomed = path.with_suffix(".partial")  # a removal that is cut short leaves no folder by a final name
        path.rename(doomed)
        shutil.rmtree(doomed)


@contextlib.contextmanager
def _cannot_write(folder: Path):
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{error.filename or folder}: checkpoint cannot be written ({error.strerror or error}); "
            "free space there or set run.folder to another disk"
        ) from error


# DeepSpeed's files.


def _state_files(stage: int, rank: int) -> list[str]:
    """The files that a rank reads, its parameters' first. Up to stage 2 all read the one that rank 0 writes."""
    model = f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt" if stage == 3 else "mp_rank_00_model_states.pt"
    return [model] + ([f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"] if stage else [])


def _write_state(engine, staging: Path) -> tuple[list[Path], list[OSError]]:
    """Have DeepSpeed write its files: those this rank wrote, and the errors met.

    An error must not leave `save_checkpoint` early: it has barriers, where the other ranks would wait for ever.
    """
    written, failures = [], []

    def write(state_dict: dict, path: str) -> None:
        try:
            torch.save(state_dict, path)
            written.append(Path(path))
        except (OSError, RuntimeError) as error:  # torch's zip writer says RuntimeError on a full disk
            failures.append(error if isinstance(error, OSError) else OSError(None, str(error).splitlines()[0], path))

    # The other replacement: no copies of DeepSpeed's conversion scripts, a checkpoint holds no code.
    with _replaced(engine.checkpoint_engine, save=write), _replaced(engine, _copy_recovery_script=lambda folder: None):
        engine.save_checkpoint(str(staging), tag=STATE, save_latest=False)
    return written, failures


@contextlib.contextmanager
def _replaced(target, **methods):
    """Hide methods of an object behind others for the time of a call."""
    for name, method in methods.items():
        setattr(target, name, method)
    try:
        yield
    finally:
        for name in methods:
            delattr(target, name)


def _load_tensors(file: Path, mmap: bool = False) -> dict:
    """torch.load on the CPU that executes nothing of the file. Raises UserError."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed warns that it found no GPU
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    try:
        with torch.serialization.safe_globals([LossScaler, ZeroStageEnum, fragment_address]):
            return torch.load(file, map_location="cpu", mmap=mmap, weights_only=True)
    except pickle.UnpicklingError:
        raise UserError(f"{file}: refused, it holds more than tensors and plain values; do not use it") from None
    except (RuntimeError, EOFError, OSError, ValueError) as error:
        raise UserError(f"{file}: cannot be read ({str(error).splitlines()[0]}); {manifest.MEND}") from None


def _layout(engine) -> dict:
    """What a checkpoint must agree on with the engine that loads it: DeepSpeed's flat buffers do not name their parts."""
    stage = int(engine.zero_optimization_stage())
    if stage:
        groups = [list(group.items()) for group in engine._get_zero_param_shapes()]
    else:
        names = {parameter: name for name, parameter in engine.module.named_parameters()}
        groups = [[(names[p], p.shape) for p in group["params"]] for group in engine.optimizer.param_groups]
    first, tied = {}, {}
    for name, parameter in engine.module.named_parameters(remove_duplicate=False):
        if first.setdefault(parameter, name) != name:
            tied[name] = first[parameter]
    return {
        "zero_stage": stage, "world_size": torch.distributed.get_world_size(), "tied": tied,
        "groups": [[[name, list(shape)] for name, shape in group] for group in groups],
    }


def _check_layout(engine, path: Path, world_size: int) -> None:
    saved, own = _read_json(path / "layout.json"), _layout(engine)
    if saved["world_size"] != world_size:
        n = saved["world_size"]
        raise UserError(
            f"{path}: saved by {n} ranks, this run has {world_size}; start it on {n} devices (deepspeed --num_gpus {n})"
        )
    if saved["zero_stage"] != own["zero_stage"]:
        raise UserError(
            f"{path}: saved at ZeRO stage {saved['zero_stage']}, this run is at {own['zero_stage']}; "
            f"set training.zero_stage={saved['zero_stage']}"
        )
    theirs, ours = ({name: shape for group in layout["groups"] for name, shape in group} for layout in (saved, own))
    for name in [*theirs, *ours]:
        if theirs.get(name) != ours.get(name):
            raise UserError(
                f"{path}: parameter {name} is {theirs.get(name, 'absent')} in it and {ours.get(name, 'absent')} in this "
                f"model; use the model section of {path / 'config.yaml'}"
            )
    if saved["groups"] != own["groups"] or saved["tied"] != own["tied"]:
        raise UserError(
            f"{path}: its parameters are grouped or ordered otherwise than this run's; use the version of the code that "
            f"wrote it, and the deepspeed section of {path / 'config.yaml'}"
        )


def _read_json(file: Path) -> dict:
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError):
        raise UserError(f"{file}: missing or not JSON; {manifest.MEND}") from None


# Random number generators: as tensors, since pickled states would have to be trusted.


def _rng_file(folder: Path, rank: int) -> Path:
    return folder / f"rng-{rank:05d}.safetensors"


def _rng_state() -> dict[str, torch.Tensor]:
    _, words, gauss = random.getstate()
    _, keys, position, has_gauss, cached = np.random.get_state()
    states = {
        "torch": torch.get_rng_state(),
        "python": torch.tensor(words),
        "python_gauss": torch.tensor([] if gauss is None else [gauss], dtype=torch.float64),
        "numpy": torch.tensor([*keys.tolist(), position, has_gauss]),
        "numpy_gauss": torch.tensor([cached], dtype=torch.float64),
    }
    if torch.cuda.is_initialized():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def _read_rng(path: Path, rank: int) -> dict[str, torch.Tensor]:
    file = _rng_file(path, rank)
    try:
        return safetensors.torch.load(file.read_bytes())
    except (OSError, safetensors.SafetensorError):
        raise UserError(f"{file}: missing or not safetensors; {manifest.MEND}") from None


def _set_rng_state(states: dict[str, torch.Tensor]) -> None:
    torch.set_rng_state(states["torch"])
    gauss = states["python_gauss"].tolist()
    random.setstate((3, tuple(states["python"].tolist()), gauss[0] if gauss else None))
    *keys, position, has_gauss = states["numpy"].tolist()
    np.random.set_state(("MT19937", np.array(keys, dtype=np.uint32), position, has_gauss, states["numpy_gauss"].item()))
    if "cuda" in states and torch.cuda.is_initialized():
        torch.cuda.set_rng_state(states["cuda"])
