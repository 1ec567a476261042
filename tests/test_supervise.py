"""The supervisor, over stand-ins for launch/pretrain.py, and once over the real one with a rank killed."""
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ranks import run_ranks
from runs import lines, run_config, train, write_data

ROOT = Path(__file__).parents[1]
# Each start of it reads its line of `plan`: the exit code of each rank, the step it reaches, what it says.
STAND_IN = """
import json, os, sys, time
from pathlib import Path
folder, rank = Path(sys.argv[0]).parent, int(os.environ["RANK"])
starts = folder / f"starts-{rank}"
n = len(starts.read_text().split()) if starts.exists() else 0
starts.open("a").write(sys.argv[sys.argv.index("--resume") + 1] + " ")
codes, step, said = json.loads((folder / "plan").read_text())[n]
if rank == 0:
    (folder / "runs" / "run").mkdir(parents=True, exist_ok=True)
    (folder / "runs" / "run" / "metrics.jsonl").open("a").write(json.dumps({"kind": "train", "step": step, "loss": 1}) + "\\n")
print(said, file=sys.stderr, flush=True)
if codes[rank] is None:
    time.sleep(1000)
if codes[rank] < 0:
    os.kill(os.getpid(), -codes[rank])
sys.exit(codes[rank])
"""


def supervise(folder, plan, *options):
    (folder / "pretrain.py").write_text(STAND_IN)
    (folder / "supervise.py").write_text((ROOT / "launch" / "supervise.py").read_text())
    (folder / "plan").write_text(json.dumps(plan))
    (folder / "run.yaml").write_text(f"run: {{folder: {folder}/runs}}\ntraining: {{max_steps: 500}}")
    command = [sys.executable, folder / "supervise.py", "--ranks", "2", "--pause", "0", "--config", folder / "run.yaml", *options]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=60)
    return done.returncode, (folder / "starts-0").read_text().split(), done.stderr


ERROR = "Traceback\nValueError: at 0x7f00"


@pytest.mark.parametrize("plan, code, starts", [
    ([([0, 0], 9, "")], 0, ["none"]),
    ([([2, 2], 9, "error: x.yaml: no such file")], 2, ["none"]),
    ([([75, 75], 9, "")], 75, ["none"]),
    ([([1, -9], 5, ""), ([0, 0], 9, "")], 0, ["none", "auto"]),
    ([([1, -12], 5, "")], 75, ["none"]),  # a signal that asks to end, before the rank could catch it
    ([([1, 3], 5, ERROR), ([1, 3], 5, ERROR)], 1, ["none", "auto"]),
    ([([1, 3], 5, ERROR), ([1, 3], 6, ERROR), ([0, 0], 9, "")], 0, ["none", "auto", "auto"]),
    ([([1, -9], 5, ""), ([1, -9], 5, ""), ([0, 0], 9, "")], 0, ["none", "auto", "auto"]),
    ([([71, 71], 5, "watchdog: rank 0 of 2 has been at 'step 6' for 3 s"),
      ([71, 71], 5, "watchdog: rank 0 of 2 has been at 'step 6' for 9 s")], 1, ["none", "auto"]),
    ([([1, -11], step, "") for step in range(9)], 1, ["none", "auto", "auto", "auto"]),  # --restarts 3
])
def test_what_is_started_again(tmp_path, plan, code, starts):
    assert supervise(tmp_path, plan, "--resume", "none", "--restarts", "3")[:2] == (code, starts)


def test_ranks_that_do_not_end_are_killed(tmp_path):
    started = time.monotonic()
    code, starts, said = supervise(tmp_path, [([None, -11], 5, ""), ([0, 0], 9, "")])
    assert code == 0 and len(starts) == 2 and "failed at step 5 with exit code -11" in said
    assert time.monotonic() - started < 25  # it starts six interpreters, and waits 3 s


def test_a_run_with_a_rank_killed_is_the_run_without(tmp_path):
    """Teardown within 5 s; then a signal to the supervisor, and the rest of the run."""
    data = write_data(tmp_path / "data")
    training = {"max_steps": 60, "global_batch": 8, "micro_batch": 4}
    whole, broken = (run_config(data, tmp_path / name, training=training, checkpoint={"every": 10}) for name in ("a", "b"))
    run_ranks(2, train, whole)
    (tmp_path / "b.yaml").write_text(broken.to_yaml())
    command = [sys.executable, "launch/supervise.py", "--ranks", "2", "--pause", "0.1", "--config", tmp_path / "b.yaml"]
    metrics, out = broken.run_folder / "metrics.jsonl", open(tmp_path / "out", "w+")

    def until(condition):
        deadline = time.monotonic() + 60
        while not condition():
            assert time.monotonic() < deadline, (tmp_path / "out").read_text()[-3000:]
            time.sleep(0.02)

    process = subprocess.Popen(command, cwd=ROOT, env={**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"},
                               stdout=out, stderr=out)
    until(lambda: metrics.exists() and '"step": 15,' in metrics.read_text())
    victim = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()[1]
    killed = time.monotonic()
    os.kill(int(victim), signal.SIGKILL)
    until(lambda: "starting again" in (tmp_path / "out").read_text())
    assert time.monotonic() - killed < 5
    until(lambda: '"step": 32,' in metrics.read_text())
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 75
    assert run_ranks(2, train, broken) == [True, True]
    assert lines(broken) == lines(whole)
