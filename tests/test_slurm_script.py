"""The SLURM script and its submission, with stand-ins that record how they were called."""
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "launch" / "slurm" / "pretrain.sbatch"


@pytest.fixture
def project(tmp_path):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "scontrol").write_text(
        '#!/bin/bash\nif [ "$*" = "show hostnames n[3-4]" ]; then printf "n3\\nn4\\n"; else echo "scontrol $*"; fi\n')
    (tmp_path / "bin" / "sbatch").write_text('#!/bin/bash\ncat > submitted; echo "Submitted batch job 7"\n')
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "python").write_text(
        '#!/bin/bash\necho "$MASTER_ADDR:$MASTER_PORT"\nprintf "%s\\n" "$@"\nexit ${CODE:-0}\n')
    for stand_in in (*tmp_path.glob("bin/*"), tmp_path / ".venv" / "bin" / "python"):
        stand_in.chmod(0o755)
    (tmp_path / "my run.yaml").write_text("")
    return tmp_path


def run(project, script, *arguments, **env):
    env = {"PATH": f"{project}/bin:{os.environ['PATH']}", "SLURM_JOB_ID": "123456", "SLURM_JOB_NODELIST": "n[3-4]", **env}
    return subprocess.run(["bash", script, *arguments], env=env, cwd=project, capture_output=True, text=True)


def test_starts_the_supervisor_with_everything_quoted(project):
    done = run(project, SCRIPT, "my run.yaml", "run.name=a b", "model.pattern=[mamba, serpent]")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["n3:23456", "launch/supervise.py", "--srun", "--config", "my run.yaml", "run.name=a b",
                                        "model.pattern=[mamba, serpent]"]


@pytest.mark.parametrize("code, requeued", [(0, False), (1, False), (2, False), (75, True), (137, False)])
def test_requeues_what_a_signal_ended(project, code, requeued):
    done = run(project, SCRIPT, "my run.yaml", CODE=str(code))
    assert done.returncode == code and ("scontrol requeue 123456" in done.stdout) == requeued


def test_says_what_is_missing(project):
    assert run(project, SCRIPT).returncode == 2 and "no config given" in run(project, SCRIPT).stderr
    assert run(project, SCRIPT, "x.yaml").returncode == 2 and "no such config file" in run(project, SCRIPT, "x.yaml").stderr


def submit(project, *arguments):
    env = {**os.environ, "PATH": f"{project}/bin:{os.environ['PATH']}"}
    return subprocess.run([sys.executable, "launch/submit.py", *arguments], cwd=ROOT, env=env, capture_output=True, text=True)


def test_submission_is_filled_in_from_the_config(project):
    config = project / "it's a run.yaml"
    config.write_text(f"run: {{name: small, folder: '{project}/my runs'}}\n"
                      "training: {max_steps: 500, global_batch: 64, micro_batch: 4}")
    arguments = [str(config), "--nodes", "2", "--ranks-per-node", "4", "--time", "1:00:00", "--option", "partition=gpu",
                 "model.pattern=[mamba, serpent]", "logging.wandb_project=$(touch x) `y` \"z\""]
    done = submit(project, *arguments, "--dry-run")
    assert done.returncode == 0, done.stderr
    options = [line.removeprefix("#SBATCH --") for line in done.stdout.splitlines() if line.startswith("#SBATCH")]
    assert sorted(options) == [
        "cpus-per-task=8", "exclusive", "gpus-per-node=4", "job-name=small", "nodes=2", "ntasks-per-node=4",
        "open-mode=append", f'output="{project}/my runs/small/slurm-%j.out"', "partition=gpu", "requeue", "signal=USR2@180",
        "time=1:00:00"]
    assert not (project / "my runs").exists()
    (project / "script").write_text(done.stdout)
    ran = run(project, "script")
    assert ran.stdout.splitlines()[1:] == ["launch/supervise.py", "--srun", "--config", str(config), *arguments[-2:]]
    assert not (project / "x").exists()
    # For CPUs, and what is refused.
    on_cpus = submit(project, *arguments, "--dry-run", "--cpu").stdout
    assert "#SBATCH --gpus" not in on_cpus and "#SBATCH --exclusive" not in on_cpus and "export DS_ACCELERATOR=cpu" in on_cpus
    for extra, words in ((["--nodes", "3"], "training.global_batch=64 is not a multiple"), (["--option", "a b=c"], "--option"),
                         (["run.folder=a\"b"], "cannot be in an option of sbatch"), (["--nodes", "0"], "--nodes 0")):
        refused = submit(project, *arguments, *extra)
        assert refused.returncode == 2 and words in refused.stderr, refused.stderr


def test_submission_hands_the_script_to_sbatch(project):
    config = project / "run.yaml"
    config.write_text(f"run: {{folder: '{project}/runs'}}\ntraining: {{max_steps: 500, global_batch: 8, micro_batch: 1}}")
    (project / "bin" / "sbatch").write_text(f'#!/bin/bash\ncat > {shlex.quote(str(project))}/submitted; echo "batch job 7"\n')
    done = submit(project, str(config), "--nodes", "1")
    assert done.returncode == 0 and done.stdout == "batch job 7\n", done.stderr
    assert (project / "submitted").read_text() == submit(project, str(config), "--nodes", "1", "--dry-run").stdout
    assert (project / "runs" / "run").is_dir()
