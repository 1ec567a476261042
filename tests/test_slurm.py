"""Training under a real SLURM: two nodes on this machine, where slurm-wlm and munge are installed."""
import contextlib
import os
import signal
import sys
import time
from pathlib import Path

import pytest
import slurm
from ranks import run_ranks
from runs import lines, run_config, train, write_data

ROOT = Path(__file__).parents[1]
pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(slurm.missing()), reason=f"not installed: {slurm.missing()}")]
STEPS = 60


def settings(data, folder):
    training = {"max_steps": STEPS, "global_batch": 32, "micro_batch": 2}
    return run_config(data, folder, training=training, checkpoint={"every": 7}, evaluation={"every": 20, "max_windows": 16})


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data") / "data")


@pytest.fixture(scope="module")
def unbroken(data, tmp_path_factory):
    config = settings(data, tmp_path_factory.mktemp("unbroken"))
    run_ranks(2, train, config)
    return lines(config)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    cluster = slurm.Slurm(tmp_path_factory.mktemp("slurm"))
    cluster.env |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1"}
    cluster.env["PATH"] = f"{Path(sys.executable).parent}:{cluster.env['PATH']}"
    yield cluster
    cluster.stop()


def submit(cluster, config, *options) -> str:
    """Two nodes, one rank on each; the job's number."""
    file = config.run_folder.with_suffix(".yaml")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(config.to_yaml())
    done = cluster.run(sys.executable, "launch/submit.py", str(file), "--nodes", "2", "--ranks-per-node", "1", "--cpu",
                       "--cpus-per-rank", "1", *options, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()[-1]


def output(config, job: str) -> str:
    path = config.run_folder / f"slurm-{job}.out"
    return path.read_text() if path.exists() else ""


def ended(job: dict) -> bool:
    return job["JobState"] in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")


def wait_for_step_10(cluster, config, job: str) -> None:
    deadline = time.monotonic() + 180
    while "step 10/" not in output(config, job):
        assert time.monotonic() < deadline, output(config, job)[-3000:]
        time.sleep(0.2)


def test_a_killed_step_is_started_again(cluster, data, unbroken, tmp_path):
    config = settings(data, tmp_path / "a folder")
    job = submit(cluster, config)
    wait_for_step_10(cluster, config, job)
    cluster.run("scancel", "--signal=KILL", f"{job}.0")
    assert cluster.wait_for(job, ended, 300)["JobState"] == "COMPLETED", output(config, job)[-3000:]
    assert "supervise: starting again in 5 s, restart 1 of 20" in output(config, job)
    assert "resumed from" in output(config, job) and lines(config) == unbroken


def ranks_of(job: str) -> list[int]:
    """Process numbers of a job's ranks: python at work on launch/pretrain.py, not the srun that names it too."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            words = (folder / "cmdline").read_bytes().split(b"\0")
            own = f"SLURM_JOB_ID={job}\0".encode() in (folder / "environ").read_bytes()
            if own and len(words) > 1 and words[1].endswith(b"launch/pretrain.py"):
                found.append(int(folder.name))
    assert len(found) == 2, found
    return found


def test_the_time_limit_requeues(cluster, data, unbroken, tmp_path):
    config = settings(data, tmp_path)
    job = submit(cluster, config, "--warn", "600")
    wait_for_step_10(cluster, config, job)
    # Else the run might be done before SLURM, which looks twice a minute, sends its warning; with it, it wakes them up.
    for rank in ranks_of(job):
        os.kill(rank, signal.SIGSTOP)
    cluster.run("scontrol", "update", f"JobId={job}", "TimeLimit=10")
    requeued = cluster.wait_for(job, lambda found: int(found["Restarts"]) == 1, 120)
    assert requeued["JobState"] in ("PENDING", "RUNNING"), output(config, job)[-3000:]
    cluster.run("scontrol", "update", f"JobId={job}", "TimeLimit=60")
    assert cluster.wait_for(job, ended, 300)["JobState"] == "COMPLETED", output(config, job)[-3000:]
    assert "ended by SIGUSR2 after step" in output(config, job) and lines(config) == unbroken


def test_an_array_prepares_the_bytes_of_a_single_job(cluster, data, tmp_path):
    (tmp_path / "train.txt").write_text("".join(f"text {i}: the quick brown fox\n" for i in range(2000)))
    arguments = ["launch/slurm/prepare_data.sbatch", "--source", f"train={tmp_path}/train.txt", "--split-documents", "line",
                 "--tokenizer", str(data / "tokenizer.json"), "--shard-tokens", "5000", "--out"]

    def sbatch(*options):
        done = cluster.run("sbatch", "--parsable", "--cpus-per-task=1", f"--output={tmp_path}/%A_%a.out", *options, cwd=ROOT)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    alone = sbatch(*arguments, f"{tmp_path}/alone")
    array = sbatch("--array=3-5", *arguments, f"{tmp_path}/together")
    last = sbatch(f"--dependency=afterok:{array}", *arguments, f"{tmp_path}/together", "--merge")
    for job in (alone, last):
        state = cluster.wait_for(job, ended, 120)["JobState"]
        assert state == "COMPLETED", [path.read_text() for path in tmp_path.glob("*.out")]
    content = [{path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
               for folder in (tmp_path / "alone", tmp_path / "together")]
    assert len(content[0]) > 5 and content[0] == content[1]
    tasks = [path.read_text() for path in tmp_path.glob(f"{array}_*.out")]
    assert len(tasks) == 3 and all("-of-00003.part: done" in text for text in tasks)
