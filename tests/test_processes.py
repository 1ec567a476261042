"""Who am I, under each launcher; and acting together without hanging."""
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ranks import run_ranks
from serpent_scale.errors import UserError
from serpent_scale.parallel import processes

ROOT = Path(__file__).parents[1]
SLURM = {
    "SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_NTASKS": "4", "SLURM_JOB_ID": "123456", "SLURM_JOB_NODELIST": "n[0-1]"
}
STEP = {"SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_NODELIST": "n[0-1]"}


def test_rank_variables():
    given = {"RANK": "1", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "h", "MASTER_PORT": "1"}
    assert processes.rank_variables({**given, **SLURM, **STEP, "HOME": "/"}) == given
    alone = processes.rank_variables({})
    assert (alone["RANK"], alone["WORLD_SIZE"]) == ("0", "1")
    assert processes.rank_variables(SLURM) == alone, "a batch script without srun is a world of one"
    with pytest.raises(UserError, match="WORLD_SIZE is set but not RANK, LOCAL_RANK"):
        processes.rank_variables({"WORLD_SIZE": "2", "MASTER_ADDR": "h", "MASTER_PORT": "1"})


def test_a_port_in_use_is_one_line():
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        code = ("from serpent_scale.parallel import processes; from serpent_scale.errors import exit_on_user_error; "
                "exit_on_user_error(processes.start)()")  # fmt: skip
        env = {**os.environ, "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
               "DS_ACCELERATOR": "cpu"}  # fmt: skip
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode != 0 and done.stderr.splitlines()[-1].startswith(f"error: port {port} is in use"), done.stderr


def test_rank_variables_of_slurm(tmp_path, monkeypatch):
    env = {**SLURM, **STEP}
    expected = {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "n0", "MASTER_PORT": "23456"}
    assert processes.rank_variables({**env, "MASTER_ADDR": "n0", "MASTER_PORT": "5"}) == {**expected, "MASTER_PORT": "5"}
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="export MASTER_ADDR"):
        processes.rank_variables(env)
    scontrol = tmp_path / "scontrol"
    scontrol.write_text('#!/bin/sh\n[ "$*" = "show hostnames n[0-1]" ] && echo n0 && echo n1\n')
    scontrol.chmod(0o755)
    assert processes.rank_variables(env) == expected


SCRIPT = """
import sys
sys.path.insert(0, {root!r})
from serpent_scale.parallel import processes
p = processes.start()
import torch
total = processes.all_reduce_sum(torch.ones(1)).item()
sys.stdout.write(f"rank {{p.rank}} of {{p.world_size}} on {{p.device}}: {{total:.0f}}\\n")  # in one piece
processes.stop()
"""


def test_launchers(tmp_path):
    """But for DeepSpeed's, by which tests/test_training.py trains."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(root=str(ROOT)))
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "MASTER"))}
    clean |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    start = lambda command, **env: subprocess.Popen(  # noqa: E731
        command, env={**clean, **env}, cwd=tmp_path, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    slurm = {**SLURM, "SLURM_STEP_NUM_TASKS": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29741"}
    runs = {
        "python": [start([sys.executable, script])],
        "srun": [start([sys.executable, script], **{**slurm, "SLURM_PROCID": i, "SLURM_LOCALID": i}) for i in "01"],
    }
    outputs = {name: [run.communicate(timeout=100) for run in started] for name, started in runs.items()}
    lines = {name: sorted("".join(out for out, _ in pairs).splitlines()) for name, pairs in outputs.items()}
    assert lines["python"] == ["rank 0 of 1 on cpu: 1"], outputs["python"]
    assert lines["srun"] == ["rank 0 of 2 on cpu: 2", "rank 1 of 2 on cpu: 2"], outputs["srun"]
    assert not any(err for pairs in outputs.values() for _, err in pairs), outputs  # DeepSpeed is quiet


def outcome(fn):
    try:
        return fn()
    except (UserError, RuntimeError, ZeroDivisionError) as error:
        return type(error).__name__, str(error)


def act_together(ranks):
    def fail_on(rank, error):
        if ranks.rank == rank:
            raise error
        return ranks.rank

    results = [
        outcome(lambda: processes.broadcast_object({"from": ranks.rank})),
        processes.all_reduce_sum(torch.tensor([1.0 + ranks.rank])).item(),
        outcome(lambda: processes.on_rank_zero(lambda: ranks.rank)),
        outcome(lambda: processes.on_rank_zero(lambda: fail_on(0, UserError("mend it")))),
        outcome(lambda: processes.on_rank_zero(lambda: 1 // 0)),
        outcome(lambda: processes.on_every_rank(lambda: ranks.rank)),
        outcome(lambda: processes.on_every_rank(lambda: fail_on(1, UserError("mend it")))),
        outcome(lambda: processes.on_every_rank(lambda: fail_on(1, ZeroDivisionError("division")))),
    ]
    processes.barrier()
    return results


def test_ranks_act_and_fail_together():
    zero, one = run_ranks(2, act_together)
    mend = ("UserError", "mend it")
    assert zero[:4] == one[:4] == [{"from": 0}, 3.0, 0, mend]
    assert zero[4][0] == "ZeroDivisionError" and one[4][1].startswith("rank 0 failed: ZeroDivisionError")
    assert zero[5:7] == one[5:7] == [[0, 1], mend]
    assert zero[7] == ("RuntimeError", "rank 1 failed: ZeroDivisionError: division") and one[7][0] == "ZeroDivisionError"
