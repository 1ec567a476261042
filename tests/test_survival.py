"""What a run meets and outlives: signals, steps that go wrong, replicas that drift, a full disk."""
import contextlib
import io
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from faults.attempt import Attempt
from ranks import CONTEXT, run_ranks, run_script
from runs import history, lines, run_config, train, write_data
from serpent_scale.checkpoint import store
from serpent_scale.errors import EXIT_REQUEUE, UserError
from serpent_scale.training import badsteps, signals
from serpent_scale.training.run_folder import prepare_run_folder

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("survival") / "data")


def regular(data, folder, **sections):
    """12 steps with checkpoints and evaluations."""
    sections = {"checkpoint": {"every": 4}, "evaluation": {"every": 4, "max_windows": 64}} | sections
    return run_config(data, folder, **sections)


@pytest.fixture(scope="module")
def unbroken(data, tmp_path_factory):
    config = regular(data, tmp_path_factory.mktemp("unbroken"))
    assert run_ranks(2, train, config) == [True, True]
    return lines(config)


# Signals.


def train_and_be_asked_to_stop(processes, config, where: str, number: int):
    """The signal comes to rank 1 within the call of `where` that follows the fifth step, or at the very start."""
    from serpent_scale.training import trainer as module

    signals.install()
    seen = []

    def meddle(owner, name):
        function = getattr(owner, name)

        def wrapped(*args, **kwargs):
            if processes.rank == 1 and not seen and (where == "start" or made_steps(args) >= 5):
                seen.append(os.kill(os.getpid(), number))
            return function(*args, **kwargs)

        setattr(owner, name, wrapped)

    made_steps = lambda args: current[0].step  # noqa: E731
    current = []
    owner, name = {"start": (module, "LanguageModel"), "step": (module.Trainer, "_loss"), "saving": (module.store, "begin"),
                   "evaluation": (module.Trainer, "_totals"), "loading": (module.store, "load")}[where]
    if where != "evaluation":
        meddle(owner, name)

    def prepare(trainer):
        current.append(trainer)
        if where == "evaluation":  # _totals of training comes first
            evaluate = trainer.evaluate

            def evaluate_and_be_asked():
                if trainer.step >= 5:
                    meddle(module.Trainer, "_totals")
                return evaluate()

            trainer.evaluate = evaluate_and_be_asked

    finished = train(processes, config, prepare)
    return finished, signals.received(), current[0].step


@pytest.mark.parametrize("where, number, stopped_at", [
    ("start", signal.SIGTERM, 0), ("step", signal.SIGUSR2, 6), ("evaluation", signal.SIGTERM, 8), ("saving", signal.SIGTERM, 9)])
def test_a_signal_leads_to_a_checkpoint_within_a_step(data, unbroken, tmp_path, where, number, stopped_at):
    config = regular(data, tmp_path)
    zero, one = run_ranks(2, train_and_be_asked_to_stop, config, where, number.value)
    assert zero == (False, None, stopped_at) and one == (False, number.name, stopped_at)
    newest, skipped = store.newest(config.run_folder / "checkpoints")
    assert not skipped and (newest is None if stopped_at == 0 else newest.name == store.folder_name(stopped_at))
    assert run_ranks(2, train, config) == [True, True]
    assert lines(config) == unbroken, "to the bit, evaluations too"


def catches(pid: int, number: int) -> bool:
    caught = next(line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("SigCgt"))
    return bool(int(caught.split()[1], 16) >> (number - 1) & 1)


def test_a_signal_to_the_entry_point_ends_in_the_exit_code_to_requeue(data, tmp_path):
    """During its imports, and in the first step, which compiles where there is something to compile."""
    file = tmp_path / "run.yaml"
    file.write_text(regular(data, tmp_path, training={"max_steps": 5000, "global_batch": 8}).to_yaml())
    process = subprocess.Popen([sys.executable, "launch/pretrain.py", "--config", file], cwd=ROOT, text=True,
                               env={**os.environ, "DS_ACCELERATOR": "cpu"}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    while not catches(process.pid, signal.SIGTERM):
        assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == EXIT_REQUEUE and "ended by SIGTERM after step" in out, out[-2000:]
    attempt = Attempt(file)
    while not attempt.begun():
        assert not attempt.ended()
        time.sleep(0.01)
    attempt.processes[0].send_signal(signal.SIGUSR2)
    assert attempt.wait()[0] == EXIT_REQUEUE and attempt.said("ended by SIGUSR2 after step") == 1


# Bad steps.


def poison(processes, config, kind: str, bad_steps: tuple) -> tuple:
    """Rank 1's loss is not finite in the second pass of these steps; whether parameters changed in each step."""
    found, passes = [], [0]

    def prepare(trainer):
        loss, step = trainer._loss, trainer.train_step

        def poisoned(batch):
            passes[0] += 1
            bad = processes.rank == 1 and trainer.step + 1 in bad_steps and passes[0] % 2 == 0
            value = loss(batch)
            if bad and kind == "loss":  # its gradient stays as it is
                return value + torch.tensor(math.inf)
            return value * (torch.where(torch.tensor(True), math.nan, 1.0) if bad else 1.0)

        def recorded():
            before = [p.detach().clone() for p in trainer.engine.module.parameters()]
            try:
                return step()
            finally:
                after = list(trainer.engine.module.parameters())
                found.append(not all(torch.equal(a, b) for a, b in zip(before, after)))

        trainer._loss, trainer.train_step = poisoned, recorded

    try:
        train(processes, config, prepare)
    except UserError as error:
        return found, str(error)
    return found, None


@pytest.mark.parametrize("kind", ["loss", "gradient"])
def test_a_loss_that_is_not_finite_skips_the_step_on_all_ranks(data, tmp_path, kind):
    config = run_config(data, tmp_path, training={"max_steps": 8, "global_batch": 8, "micro_batch": 2, "max_bad_steps": 2})
    for changed, error in run_ranks(2, poison, config, kind, (3, 5, 6)):
        assert changed == [True, True, False, True, False, False]
        # Of step 6, the samples 40 to 47: the second pass, rank 1.
        assert "step 6: loss" in error and "not finite 2 steps in a row (samples 46 to 47;" in error
    dumped = json.loads((config.run_folder / badsteps.NAME).read_text())
    assert [(bad["step"], bad["samples"]) for bad in dumped] == [(5, [[38, 40]]), (6, [[46, 48]])]
    assert not (config.run_folder / "checkpoints").exists()


def spike(processes, config, samples: range) -> bool:
    """These samples have a loss 3 higher."""
    def prepare(trainer):
        loss, batch = trainer._loss, trainer._batch
        first = []

        def noted(*turn):
            first[:] = [trainer._first_sample(*turn)]
            return batch(*turn)

        trainer._batch = noted
        trainer._loss = lambda b: loss(b) + (3.0 * (b.labels >= 0).sum() if first and first[0] in samples else 0.0)

    return train(processes, config, prepare)


def test_a_spike_rolls_back_and_skips_its_samples(data, tmp_path, monkeypatch):
    monkeypatch.setattr(badsteps, "WINDOW", 8)
    settings = dict(checkpoint={"every": 4}, evaluation={"every": 0, "max_windows": 8})
    training = {"max_steps": 12, "global_batch": 8, "micro_batch": 2, "spike_zscore": 8.0, "max_rollbacks": 1,
                "stages": [{"steps": 4, "seq_len": 16}]}
    config = run_config(data, tmp_path, training=training, **settings)
    run_ranks(2, small_window, config, range(72, 80))  # step 10
    back = [line for line in history(config) if line["kind"] == "rollback"]
    assert [(line["step"], line["spike_step"], line["skips"], line["rollbacks"]) for line in back] == [(8, 10, [64, 80], 1)]
    assert sorted(lines(config)) == [("evaluation", 12), ("rollback", 8)] + [("train", step) for step in range(1, 13)]
    moved = (config.run_folder / "metrics.superseded.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in moved if '"train"' in line] == [9, 10]
    state = json.loads((store.newest(config.run_folder / "checkpoints")[0] / "trainer.json").read_text())
    assert (state["skipped"], state["rollbacks"], state["data"]["next_sample"]) == (16, 1, 12 * 8 + 16)
    assert max(loss for (kind, _), loss in lines(config).items() if kind == "train") < 6.5, "no spike is left"
    # It goes on from there, and the second spike is over the limit.
    training["max_steps"] = 16
    config = run_config(data, tmp_path, training=training, **settings)
    run_ranks(2, small_window, config, range(120, 128))
    assert len([line for line in history(config) if line["kind"] == "rollback"]) == 1
    assert lines(config)["train", 14] > 8


@pytest.mark.parametrize("samples", [range(72, 80), range(128, 136)], ids=["in them", "since"])
def test_a_spike_in_stages_or_with_no_checkpoint_since_moves_no_sample(data, tmp_path, samples):
    training = {"max_steps": 17, "global_batch": 8, "micro_batch": 2, "spike_zscore": 8.0,
                "stages": [{"steps": 6, "seq_len": 16}, {"steps": 6, "seq_len": 8}]}
    config = run_config(data, tmp_path, training=training, checkpoint={"every": 10}, evaluation={"every": 0, "max_windows": 8})
    (said,) = run_ranks(1, warnings_of, config, samples)
    assert sorted(lines(config)) == [("evaluation", 17)] + [("train", step) for step in range(1, 18)]
    assert ("is a spike; there is no checkpoint since training.stages ended" in said) == (samples == range(128, 136)), said


def warnings_of(processes, config, samples: range) -> str:
    with contextlib.redirect_stderr(io.StringIO()) as said:
        assert small_window(processes, config, samples)
    return said.getvalue()


def small_window(processes, config, samples: range) -> bool:
    badsteps.WINDOW = 8
    return spike(processes, config, samples)


def test_the_spike_detector_is_robust():
    detector = badsteps.SpikeDetector(6.0)
    noise = torch.randn(1000, generator=torch.Generator().manual_seed(0)).tolist()
    assert not any(detector.is_spike(5 - 0.002 * i + 0.05 * x) for i, x in enumerate(noise))
    assert detector.is_spike(4.0) and detector.is_spike(3.8) and not detector.is_spike(3.2)
    assert not detector.is_spike(1.0) and not detector.is_spike(math.nan), "falling is fine, NaN has its own rule"
    assert not any(badsteps.SpikeDetector(None).is_spike(x) for x in [1.0] * 60 + [100.0])
    assert badsteps.merged([(4, 6), (0, 2), (2, 4), (8, 9), (0, 2)]) == [(0, 6), (8, 9)]


# Replicas.


def drift(processes, config, name: str) -> str:
    from serpent_scale.training.replicas import ReplicaError

    def prepare(trainer):
        step = trainer.train_step

        def flipped():
            values = step()
            if trainer.step == 3 and processes.rank == 1:
                parameter = dict(trainer.engine.module.named_parameters())[name]
                parameter.detach().view(-1)[5:6].view(torch.int32).bitwise_xor_(1)  # the last bit of one number
            return values

        trainer.train_step = flipped

    try:
        train(processes, config, prepare)
    except ReplicaError as error:
        return str(error)
    return ""


def test_one_bit_that_differs_between_replicas_is_found(data, tmp_path):
    training = {"max_steps": 6, "global_batch": 8, "micro_batch": 2, "zero_stage": 0, "check_replicas": 2}
    config = run_config(data, tmp_path, training=training)
    zero, one = run_ranks(2, drift, config, "embedding.weight")
    assert zero == one and "after step 4 rank 1 and rank 0 hold different parameters: embedding.weight" in zero
    assert not (config.run_folder / "checkpoints").exists()
    training["check_replicas"] = 1
    assert run_ranks(2, train, run_config(data, tmp_path / "same", training=training)) == [True, True]


# Two runs in one folder.


def enter(folder, answer) -> None:
    try:
        prepare_run_folder(folder)
        answer.send("in")
    except UserError as error:
        answer.send(str(error))
    time.sleep(1000)


def test_a_second_run_in_the_same_folder_is_refused(tmp_path):
    def start():
        ours, theirs = CONTEXT.Pipe()
        process = CONTEXT.Process(target=enter, args=(tmp_path / "run", theirs), daemon=True)
        process.start()
        return process, ours.recv()

    first, said = start()
    assert said == "in"
    second, said = start()
    assert "another process trains in it" in said
    first.kill()
    first.join()
    third, said = start()
    assert said == "in", "the lock went with the process"
    second.kill()
    third.kill()


# Saving while training goes on.


def train_with_a_slow_disk(processes, config, killed: bool = False) -> None:
    """The checkpoint of step 4 takes until two more steps are made; `killed`: when that of step 8 is half written."""
    from serpent_scale.checkpoint import tensorfile

    current, write, copy = [], tensorfile.write, store._to_host

    def slow_copy(*args):
        time.sleep(0.2)  # the next update waits for it
        return copy(*args)

    def slow(path, tensors):
        while path.parent.name == "step-00000004.partial" and current[0].step < 6:
            time.sleep(0.3)
        if killed and path.parent.name == "step-00000008.partial":
            path.write_bytes(b"half")
            os.kill(os.getpid(), signal.SIGKILL)
        return write(path, tensors)

    tensorfile.write, store._to_host = slow, slow_copy
    train(processes, config, current.append)


def manifest_of(config, step: int) -> dict:
    return json.loads((config.run_folder / "checkpoints" / store.folder_name(step) / "manifest.json").read_text())["files"]


def test_what_is_written_in_the_background_is_the_state_at_its_step(data, tmp_path):
    training = {"max_steps": 11, "stop_at_step": 10, "global_batch": 8, "micro_batch": 2}
    still, moving, killed = (
        run_config(data, tmp_path / name, checkpoint={"every": 4, "background": name != "still"}, training=training)
        for name in ("still", "moving", "killed"))
    run_ranks(2, train, still)
    run_ranks(2, train_with_a_slow_disk, moving)
    for step in (4, 8, 10):
        ours, theirs = manifest_of(moving, step), manifest_of(still, step)
        same = {name for name in ours if name.startswith("state")}
        assert len(same) == 2 and all(ours[name] == theirs[name] for name in same)
    saves = [line for line in history(moving) if line["kind"] == "checkpoint"]
    assert [line["step"] for line in saves] == [4, 8, 10] and saves[0]["stall_seconds"] < saves[0]["seconds"]
    with pytest.raises(AssertionError):
        run_ranks(2, train_with_a_slow_disk, killed, True)
    path, skipped = store.newest(killed.run_folder / "checkpoints")
    assert path.name == store.folder_name(4) and not skipped and manifest_of(killed, 4)


# A full disk.


def train_on_a_full_disk(data, disk) -> None:
    """30 steps, of which 6 to 25 find not a byte left."""
    from serpent_scale.parallel import processes

    ranks, disk, filler = processes.start(), Path(disk), Path(disk, "filler")
    config = run_config(data, disk, checkpoint={"every": 4}, training={"max_steps": 30, "global_batch": 8, "micro_batch": 2})

    def prepare(trainer):
        step = trainer.train_step

        def fill():
            if trainer.step == 5:
                with open(filler, "wb", buffering=0) as file, contextlib.suppress(OSError):
                    while file.write(bytes(4096)):
                        pass
            if trainer.step == 25:
                filler.unlink()
            return step()

        trainer.train_step = fill

    print("finished", train(ranks, config, prepare), store.newest(config.run_folder / "checkpoints"))
    print("order", [line["step"] for line in history(config) if line["kind"] == "train"])


def test_a_disk_that_is_full_at_the_start_ends_in_one_line_and_keeps_the_config_file(tmp_path):
    from serpent_scale.training.trainer import Trainer

    (tmp_path / "config.yaml").write_text("of the run before")
    (tmp_path / "config.yaml.partial").symlink_to("/dev/full")
    trainer = SimpleNamespace(config=SimpleNamespace(run_folder=tmp_path), texts={"config.yaml": "of this run"})
    with pytest.raises(UserError, match="cannot be written .No space left on device.; free space there"):
        Trainer._begin_record(trainer)
    assert (tmp_path / "config.yaml").read_text() == "of the run before"


def test_a_full_disk_leaves_the_run_alive_and_the_old_checkpoint_whole(data, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    (tmp_path / "code.py").write_text(f"""
import os, sys
sys.path.insert(0, {str(ROOT / 'tests')!r})
import test_survival
from faults.injected import mount_small_disk
if failed := mount_small_disk({str(disk)!r}, 40 << 20):
    sys.exit("no small disk here: " + os.strerror(failed))
test_survival.train_on_a_full_disk({str(data)!r}, {str(disk)!r})
""")
    done = run_script(tmp_path / "code.py")
    if "no small disk here: " in done.stderr:
        pytest.skip(done.stderr.strip())
    assert "finished True" in done.stdout and "step-00000030" in done.stdout, done.stderr[-3000:]
    assert f"order {list(range(1, 31))}" in done.stdout, "no line is lost"
    assert done.stderr.count("warning: a checkpoint is not saved, training goes on:") == 5, done.stderr[-3000:]
    assert "GB free, a checkpoint needs" in done.stderr and "metrics.jsonl cannot be written" in done.stderr
