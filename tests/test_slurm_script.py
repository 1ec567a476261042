"""The SLURM script, run with stand-ins for srun and scontrol that record how they were called."""
import os
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "launch" / "slurm" / "pretrain.sbatch"


@pytest.fixture
def project(tmp_path):
    bin_folder = tmp_path / "bin"
    bin_folder.mkdir()
    (bin_folder / "srun").write_text('#!/bin/bash\necho "$MASTER_ADDR:$MASTER_PORT"\nprintf "%s\\n" "$@"\n')
    (bin_folder / "scontrol").write_text('#!/bin/bash\n[ "$*" = "show hostnames n[3-4]" ] && printf "n3\\nn4\\n"\n')
    for stand_in in bin_folder.iterdir():
        stand_in.chmod(0o755)
    (tmp_path / "my run.yaml").write_text("")
    return tmp_path


def submit(project, *arguments):
    env = {"PATH": f"{project}/bin:{os.environ['PATH']}", "SLURM_JOB_ID": "123456", "SLURM_JOB_NODELIST": "n[3-4]",
           "SLURM_SUBMIT_DIR": str(project), "SLURM_CPUS_PER_TASK": "8"}
    return subprocess.run(["bash", str(SCRIPT), *arguments], env=env, capture_output=True, text=True)


def test_starts_one_task_per_device_with_everything_quoted(project):
    done = submit(project, "my run.yaml", "run.name=a b", "model.pattern=[mamba, serpent]")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "n3:23456", "--kill-on-bad-exit=1", "--cpus-per-task=8", "python3", "launch/pretrain.py", "--config", "my run.yaml",
        "--resume", "auto", "run.name=a b", "model.pattern=[mamba, serpent]"]


def test_says_what_is_missing(project):
    assert submit(project).returncode == 2 and "no config given" in submit(project).stderr
    assert submit(project, "x.yaml").returncode == 2 and "x.yaml: no such config file" in submit(project, "x.yaml").stderr
