"""A SLURM of two nodes on this machine, unprivileged and private to a folder: munged, slurmctld and two slurmd."""
from __future__ import annotations

import getpass
import os
import secrets
import shutil
import socket
import subprocess
import time
from pathlib import Path

from serpent_scale.parallel.ports import free_port

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol")
SBIN = "/usr/sbin:/sbin"


def missing() -> list[str]:
    path = f"{os.environ['PATH']}:{SBIN}"
    return [program for program in PROGRAMS if not shutil.which(program, path=path)]


class Slurm:
    def __init__(self, folder: Path, cpus: int = 4):
        self.folder = folder
        self.env = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf"), "PATH": f"{os.environ['PATH']}:{SBIN}"}
        self._daemons: list[subprocess.Popen] = []
        (folder / "munge.key").write_bytes(secrets.token_bytes(128))
        (folder / "munge.key").chmod(0o600)
        for name in ("state", "spool.n0", "spool.n1"):
            (folder / name).mkdir()
        ports = [free_port() for _ in range(3)]
        host = socket.gethostname()
        nodes = "\n".join(f"NodeName=n{i} NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[i + 1]} CPUs={cpus} RealMemory=4000"
                          for i in range(2))
        # cred_expire: a requeued job waits until its former credential is void, two minutes by default.
        (folder / "slurm.conf").write_text(f"""
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser={getpass.getuser()}
SlurmdUser={getpass.getuser()}
AuthType=auth/munge
CryptoType=crypto/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
SchedulerType=sched/builtin
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
ReturnToService=2
KillWait=10
OverTimeLimit=0
MinJobAge=600
{nodes}
PartitionName=main Nodes=n0,n1 Default=YES MaxTime=INFINITE State=UP
""")
        self._start("munged", "--foreground", "--force", f"--key-file={folder}/munge.key", f"--socket={folder}/munge.socket",
                    f"--pid-file={folder}/munged.pid", f"--log-file={folder}/munged.log", f"--seed-file={folder}/munged.seed")
        _wait(lambda: (folder / "munge.socket").exists(), "munged")
        self._start("slurmctld", "-D", "-c")
        for node in ("n0", "n1"):
            self._start("slurmd", "-D", "-N", node)
        _wait(lambda: self.run("sinfo", "--noheader", "--format=%T %D").stdout.split() == ["idle", "2"], "the nodes", 60)

    def run(self, *command: str, **options) -> subprocess.CompletedProcess:
        return subprocess.run(command, env=self.env, capture_output=True, text=True, **options)

    def job(self, number: str) -> dict[str, str]:
        """What SLURM knows of a job."""
        shown = self.run("scontrol", "--oneliner", "show", "job", number).stdout
        return dict(item.split("=", 1) for item in shown.split() if "=" in item)

    def wait_for(self, number: str, condition, seconds: float) -> dict[str, str]:
        deadline = time.monotonic() + seconds
        while not condition(job := self.job(number)):
            assert time.monotonic() < deadline, job
            time.sleep(0.2)
        return job

    def stop(self) -> None:
        self.run("scancel", "--user", getpass.getuser())
        for daemon in reversed(self._daemons):
            daemon.terminate()
        for daemon in self._daemons:
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()

    def _start(self, program: str, *arguments: str) -> None:
        log = open(self.folder / f"{program}.{len(self._daemons)}.out", "w")
        self._daemons.append(subprocess.Popen([program, *arguments], env=self.env, stdout=log, stderr=log))


def _wait(condition, what: str, seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not come up"
        time.sleep(0.1)
