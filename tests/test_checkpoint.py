"""Checkpoints: exact resume at every ZeRO stage, and no fault that leaves a run without a whole checkpoint."""
import json
import os
import random
import resource
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from ranks import run_ranks
from serpent_scale.checkpoint import manifest, store
from serpent_scale.errors import UserError
from toy import build, parameters, toy_config, train

STAGES = (0, 1, 2, 3)
TEXTS = {"config.yaml": "run: {}\n", "tokenizer.json": "{}"}
TRAINER = {"tokens": 123, "data": {"sample": 7, "index": "abc"}, "wandb_id": None}


def save(engine, checkpoints, step, keep_last=2, keep_every=None):
    return store.save(engine, Path(checkpoints), step, {"step": step, **TRAINER}, TEXTS, keep_last, keep_every)


def random_numbers() -> list:
    return [torch.rand(3).tolist(), np.random.rand(3).tolist(), np.random.normal(), random.random(), random.gauss(0, 1)]


def equal(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def seed_all(seed: int) -> None:
    torch.manual_seed(seed), np.random.seed(seed), random.seed(seed)
    np.random.normal(), random.gauss(0, 1)  # both generators now hold a second value back


# Whole checkpoints.


def save_and_resume(processes, folder: Path) -> list[dict]:
    found = []
    for stage in STAGES:
        checkpoints, config = folder / f"stage{stage}", toy_config(stage, grad_clip=1.0)
        engine = build(config, 2)
        for step in (1, 2):
            train(engine, step - 1, step, processes)
            seed_all(10 * step + processes.rank)
            path = save(engine, checkpoints, step)
        saved, drawn = parameters(engine), random_numbers()
        unbroken = train(engine, 2, 5, processes), float(engine.get_global_grad_norm()), parameters(engine)

        seed_all(99)
        fresh = build(config, 2)
        assert not equal(parameters(fresh), saved)
        trainer = store.load(fresh, path)
        assert trainer == {"step": 2, **TRAINER}
        assert equal(parameters(fresh), saved) and random_numbers() == drawn
        resumed = train(fresh, 2, 5, processes), float(fresh.get_global_grad_norm()), parameters(fresh)
        assert resumed[:2] == unbroken[:2] and equal(resumed[2], unbroken[2]), f"stage {stage}"
        found.append(saved)
    return found


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """(folder with stage0 ... stage3, each with step 1 and 2; the parameters at step 2 by stage)."""
    folder = tmp_path_factory.mktemp("saved")
    zero, one = run_ranks(2, save_and_resume, folder)
    assert all(equal(a, b) for a, b in zip(zero, one))
    return folder, zero


def test_resume_is_bitwise(saved):
    """The comparisons are in `save_and_resume`; the stages also agree with each other."""
    for other in saved[1][1:]:
        for name, value in saved[1][0].items():
            torch.testing.assert_close(other[name], value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("stage", STAGES)
def test_full_state_of_any_stage(saved, stage):
    """Also without RANK and WORLD_SIZE, in this one process; against the engine."""
    folder, expected = saved
    path = folder / f"stage{stage}" / "step-00000002"
    state = store.read_full_state(path)
    assert equal(state, expected[stage] | {"readout.weight": expected[stage]["embedding.weight"]})
    assert {value.dtype for value in state.values()} == {torch.float32}


@pytest.mark.parametrize("stage", STAGES)
def test_files(saved, stage):
    checkpoints = saved[0] / f"stage{stage}"
    assert sorted(path.name for path in checkpoints.iterdir()) == ["step-00000001", "step-00000002"], "no `latest`"
    path = checkpoints / "step-00000002"
    names = {p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file()}
    assert names == {
        "config.yaml", "tokenizer.json", "trainer.json", "layout.json", "manifest.json",
        *(f"{kind}-0000{rank}.safetensors" for kind in ("state", "rng") for rank in (0, 1)),
    }, "nothing that holds a pickle"
    assert path.stat().st_mode & 0o777 == checkpoints.stat().st_mode & 0o777 == 0o700
    elements = [sum(t.numel() for t in load_file(path / f"state-0000{rank}.safetensors").values()) for rank in (0, 1)]
    assert sum(elements) == 3 * sum(value.numel() for value in saved[1][stage].values()), "each element once"
    assert max(elements) < 1.2 * min(elements), "the ranks share the work"
    assert (path / "config.yaml").read_text() == TEXTS["config.yaml"]
    manifest.verify(path)
    assert store.newest(checkpoints) == (path, [])


# Damaged checkpoints.


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    bit = random.randrange(8 * len(content))
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


@pytest.mark.parametrize("stage", STAGES)
def test_damage_is_found_and_the_older_is_used(saved, stage, tmp_path):
    random.seed(stage)
    shutil.copytree(saved[0] / f"stage{stage}", tmp_path / "c")
    older, newer = (tmp_path / "c" / f"step-0000000{step}" for step in (1, 2))
    for file in [path for path in newer.rglob("*") if path.is_file()]:
        content = file.read_bytes()
        for damage in (truncate, Path.unlink, *[flip_a_bit] * 3):
            damage(file)
            found, skipped = store.newest(tmp_path / "c")
            assert found == older and [path for path, _ in skipped] == [newer], f"{damage} {file}"
            assert str(file) in skipped[0][1] or file.name == manifest.NAME  # a flipped bit in it may rename a file
            with pytest.raises(UserError):
                store.read_full_state(newer)
            file.write_bytes(content)
    assert store.newest(tmp_path / "c") == (newer, [])


def test_surprises_in_a_folder(saved, tmp_path):
    path = tmp_path / "c" / "step-00000002"
    shutil.copytree(saved[0] / "stage1" / path.name, path)
    extra = path / "extra.pt"
    extra.write_text("")
    with pytest.raises(UserError, match="extra.pt: the manifest does not list it"):
        manifest.verify(path)
    extra.unlink()
    extra.symlink_to(path)
    with pytest.raises(UserError, match="extra.pt: a link"):
        manifest.verify(path)
    extra.unlink()
    config = path / "config.yaml"
    shutil.move(config, tmp_path / "config.yaml")
    config.symlink_to(tmp_path / "config.yaml")
    with pytest.raises(UserError, match="config.yaml: a link"):
        manifest.verify(path)
    config.unlink()
    entries = manifest.read_manifest(path)
    for name in ("../config.yaml", str(tmp_path / "config.yaml"), "a/../../config.yaml", ""):
        manifest.write_manifest(path, {**entries, name: entries["config.yaml"]})
        with pytest.raises(UserError, match="is not allowed"):
            manifest.verify(path)
    assert store.newest(tmp_path / "nothing here") == (None, [])
    assert store.newest(tmp_path / "c")[0] is None


def test_a_signed_manifest(saved, tmp_path, monkeypatch):
    path = tmp_path / "c" / "step-00000002"
    shutil.copytree(saved[0] / "stage1" / path.name, path)
    monkeypatch.setenv(manifest.KEY, "secret")
    with pytest.raises(UserError, match="not signed with the key"):
        manifest.verify(path)
    sign(path)
    manifest.verify(path)
    assert "secret" not in (path / manifest.NAME).read_text()
    monkeypatch.setenv(manifest.KEY, "another")
    assert store.newest(tmp_path / "c")[0] is None
    sign(path, "xxh3_128")
    with pytest.raises(UserError, match="has no sha256, so it could be forged"):
        manifest.verify(path)
    monkeypatch.delenv(manifest.KEY)
    manifest.verify(path)


def test_a_checkpoint_of_the_first_format(saved, tmp_path):
    path = tmp_path / "step-00000002"
    shutil.copytree(saved[0] / "stage1" / path.name, path)
    sign(path, "sha256")
    old = json.loads((path / manifest.NAME).read_text()) | {"format": 1}
    (path / manifest.NAME).write_text(json.dumps(old))
    manifest.verify(path)
    with open(path / "config.yaml", "r+b") as file:
        file.write(b"#")
    with pytest.raises(UserError, match="config.yaml: damaged, its sha256 is not the manifest's"):
        manifest.verify(path)


# What `load` and `save` refuse, on all ranks and before anything is touched.


def sign(path: Path, by: str | None = None) -> None:
    """Give a changed checkpoint a right manifest."""
    files = [file for file in path.rglob("*") if file.is_file() and file.name != manifest.NAME]
    manifest.write_manifest(path, {file.relative_to(path).as_posix(): manifest.hash_file(file, by) for file in files})


def refusal(fn) -> str:
    try:
        fn()
    except UserError as error:
        return str(error)
    raise AssertionError("not refused")


def refused(processes, folder: Path, changed: list[Path]) -> list[str]:
    found = []
    engine = build(toy_config(1), 2)
    before = parameters(engine)
    found.append(refusal(lambda: store.load(engine, folder / "none" / "step-00000002")))
    wide = build(toy_config(1), 2, width=7)
    found.append(refusal(lambda: store.load(wide, folder / "stage1" / "step-00000002")))
    found += [refusal(lambda: store.load(engine, path)) for path in changed]
    assert equal(parameters(engine), before)

    # A rank that cannot write: a limit on its files stands for a disk that fills up meanwhile.
    engine, checkpoints = build(toy_config(1), 2), folder / "full"
    save(engine, checkpoints, 1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for rank in (0, 1):
        if processes.rank == rank:
            resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
        found.append(refusal(lambda: save(engine, checkpoints, 2)))
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    found.append(refusal(lambda: save(engine, folder / "a file" / "checkpoints", 1)))
    usage, shutil.disk_usage = shutil.disk_usage, lambda path: usage(path)._replace(free=store.SPARE)
    found.append(refusal(lambda: save(engine, checkpoints, 2)))
    shutil.disk_usage = usage
    assert [path.name for path in checkpoints.iterdir()] == ["step-00000001"], "what could not be written is gone"
    save(engine, checkpoints, 2)
    assert sorted(path.name for path in checkpoints.iterdir()) == ["step-00000001", "step-00000002"]
    return found


def test_refusals(saved, tmp_path):
    folder = tmp_path / "c"
    shutil.copytree(saved[0], folder)
    (folder / "a file").write_text("")
    changed = []

    def change(**values):
        changed.append(folder / f"changed{len(changed)}")
        shutil.copytree(folder / "stage1" / "step-00000002", changed[-1])
        layout = json.loads((changed[-1] / "layout.json").read_text())
        (changed[-1] / "layout.json").write_text(json.dumps({**layout, **values}))
        sign(changed[-1])

    change(tied={})
    change(format=1)
    change(parameters={"embedding.weight": [17, 6]})
    zero, one = run_ranks(2, refused, folder, changed)
    assert zero == one, "all ranks say the same"
    missing, wide, tied, old, fewer, *rest = zero
    assert "manifest.json: missing, so step-00000002 is not a whole checkpoint" in missing
    assert "parameter A_log is [6, 3] in it and [7, 3] in this model" in wide
    assert "other parameters are tied" in tied and "format 1, not 2" in old and "is absent in it" in fewer
    full, unwritable, small = rest[:2], *rest[2:]
    assert all("cannot be written" in message and "free space there or set run.folder" in message for message in full)
    assert "a file" in unwritable and "cannot be written" in unwritable
    assert "0.02 GB free, a checkpoint needs 0.02 GB" in small


# Crashes while saving.


class Crash(BaseException):
    """Stands for a kill: nothing of ours handles it."""


def crash_everywhere(processes, folder: Path) -> int:
    """Crash at the first, second, ... change to the disk of a save, until a save needs no more; how many."""
    engine = build(toy_config(1, world_size=1), 1)
    countdown = [10**9]

    def counted(fn):
        def wrapped(*args, **kwargs):
            countdown[0] -= 1
            if countdown[0] < 0:
                if fn is write:  # a part reaches the disk
                    fn(args[0], args[1][: len(args[1]) // 2])
                raise Crash
            return fn(*args, **kwargs)

        return wrapped

    write = os.write
    for owner, name in ((os, "write"), (os, "fsync"), (os, "rename"), (os, "mkdir"), (os, "unlink"), (os, "rmdir"),
                        (Path, "write_text")):
        setattr(owner, name, counted(getattr(owner, name)))
    crashes = {}
    for case in ("new step", "same step"):
        checkpoints, step = folder / case, 3
        for first in (1, 2, 3):
            save(engine, checkpoints, first)
        while True:
            names = {path.name for path in checkpoints.iterdir()}
            assert len(names) <= 4, names  # leftovers do not pile up
            step += case == "new step"
            countdown[0] = crashes[case] = crashes.get(case, -1) + 1
            try:
                save(engine, checkpoints, step)
                countdown[0] = 10**9
                break
            except Crash:
                countdown[0] = 10**9
                found, skipped = store.newest(checkpoints)
                assert found is not None and not skipped, (skipped, crashes)
                store.load(engine, found)
        names = sorted(path.name for path in checkpoints.iterdir())
        assert len(names) == 2 and names[-1] == store.folder_name(step), names
    return crashes


def test_a_crash_at_any_moment_leaves_the_newest_whole(tmp_path):
    (crashes,) = run_ranks(1, crash_everywhere, tmp_path)
    assert min(crashes.values()) > 20, crashes


def prune_around_damage(processes, folder: Path) -> None:
    engine = build(toy_config(0, world_size=1), 1)
    for step in (10, 20, 30, 40):
        save(engine, folder, step, keep_last=3)
    for step in (30, 40):
        (folder / store.folder_name(step) / "trainer.json").unlink()
    path, skipped = store.newest(folder)
    assert path.name == "step-00000020" and len(skipped) == 2
    assert save(engine, folder, 25, keep_last=2).name == "step-00000025"
    assert sorted(p.name for p in folder.iterdir()) == [store.folder_name(step) for step in (20, 25, 30, 40)]
    assert store.newest(folder)[0].name == "step-00000025"
    save(engine, folder, 30, keep_last=2)  # takes the place of the damaged one
    assert sorted(p.name for p in folder.iterdir()) == [store.folder_name(step) for step in (25, 30, 40)]
    assert store.newest(folder)[0].name == "step-00000030"
    save(engine, folder, 123456789, keep_last=2)
    assert store.newest(folder)[0].name == "step-123456789"

    for step in range(1, 9):
        save(engine, folder / "every", step, keep_last=2, keep_every=3)
    assert sorted(int(p.name[5:]) for p in (folder / "every").iterdir()) == [3, 6, 7, 8]


def test_pruning_never_removes_the_newest_whole_one(tmp_path):
    run_ranks(1, prune_around_damage, tmp_path)
