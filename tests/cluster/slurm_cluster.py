"""A real SLURM on this machine: controller and two nodes, with keys, ports and folders of its own.

Debian packages: slurm-wlm munge.
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from cluster.allocation import free_port

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "squeue", "scontrol", "scancel")
_CONF = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.sock
ProctrackType=proctrack/linuxproc
ReturnToService=2
SlurmdSpoolDir={folder}/spool-%n
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldPidFile={folder}/slurmctld.pid
StateSaveLocation={folder}/state
SlurmUser=root
SlurmdUser=root
SwitchType=switch/none
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
JobRequeue=1
SlurmdTimeout=15
KillWait=30
MinJobAge=20
SchedulerParameters=batch_sched_delay=1,sched_interval=5,sched_min_interval=100000
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={first} CPUs=4 RealMemory=10000
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={second} CPUs=4 RealMemory=10000
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP PreemptMode=REQUEUE
"""


def missing() -> list[str]:
    """Programs that are not installed."""
    path = f"{os.environ['PATH']}:/usr/sbin"
    return [name for name in PROGRAMS if shutil.which(name, path=path) is None]


class SlurmCluster:
    """Controller, two nodes, and what they run: ended together, whatever became of them."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))
        self.environment = {"SLURM_CONF": str(self.folder / "slurm.conf")}
        self._own = os.environ | self.environment | {"PATH": f"{os.environ['PATH']}:/usr/sbin"}
        self._processes: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> SlurmCluster:
        f = self.folder
        (f / "state").mkdir()
        key = f / "munge.key"
        key.touch(0o600)
        key.write_bytes(secrets.token_bytes(128))
        ports = {name: free_port() for name in ("controller", "first", "second")}
        host = socket.gethostname().partition(".")[0]
        (f / "slurm.conf").write_text(_CONF.format(folder=f, host=host, **ports))
        files = {"key-file": "munge.key", "socket": "munge.sock", "pid-file": "munge.pid", "log-file": "munge.log"}
        munged = ["munged", "--foreground", "--force", *(f"--{name}={f / file}" for name, file in files.items())]
        try:
            self._start("munged", [*munged, f"--seed-file={f / 'munge.seed'}"])
            wait_for(lambda: (f / "munge.sock").exists(), "munged does not start")
            self._start("slurmctld", ["slurmctld", "-D"])
            for node in ("n1", "n2"):
                self.start_node(node)
            wait_for(lambda: self.run("sinfo", "-h", "-o", "%T %D").split() == ["idle", "2"], self._trouble, 90)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def start_node(self, node: str) -> None:
        self._start(f"slurmd-{node}", ["slurmd", "-D", "-N", node])

    def kill_node(self, node: str) -> None:
        """SIGKILL to its slurmd and all that runs on it, as when the machine is gone."""
        victims = [psutil.Process(self._processes[f"slurmd-{node}"].pid)]
        for process in psutil.process_iter(["environ", "name", "cmdline"]):
            environment = process.info["environ"] or {}
            is_ours = environment.get("SLURM_CONF") == self._own["SLURM_CONF"]
            is_step = process.info["name"] == "slurmstepd" and any(node in w for w in process.info["cmdline"] or [])
            if is_ours and (is_step or environment.get("SLURMD_NODENAME") == node):
                victims.append(process)
        for process in victims:
            try:
                for each in [*process.children(recursive=True), process]:
                    each.send_signal(signal.SIGKILL)
            except psutil.Error:
                continue
        self._processes.pop(f"slurmd-{node}").wait()

    def kill_ray(self, job_id: str) -> None:
        """SIGKILL to the Ray of a job, which may be an array's element (ID_N)."""
        number, _, element = job_id.partition("_")
        wanted = {"SLURM_ARRAY_JOB_ID": number, "SLURM_ARRAY_TASK_ID": element} if element else {"SLURM_JOB_ID": number}
        wanted |= self.environment
        victims = [
            process
            for process in psutil.process_iter(["environ", "name"])
            if process.info["name"] == "raylet" and wanted.items() <= (process.info["environ"] or {}).items()
        ]
        assert victims, f"job {job_id} has no Ray"
        for process in victims:
            process.kill()

    def run(self, *words: str) -> str:
        """What one of SLURM's commands prints."""
        done = subprocess.run(words, env=self._own, capture_output=True, text=True, timeout=60, check=False)
        return done.stdout + done.stderr

    def close(self) -> None:
        if "slurmctld" in self._processes:
            self.run("scancel", "--state=PENDING", "--user=root")
            self.run("scancel", "--user=root")
            until_s = time.monotonic() + 20
            while self.run("squeue", "-h").strip() and time.monotonic() < until_s:
                time.sleep(0.5)
        mark = str(self.folder)
        for process in psutil.process_iter(["cmdline", "environ"]):
            environment = process.info["environ"] or {}
            if environment.get("SLURM_CONF") == self._own["SLURM_CONF"] and process.pid != os.getpid():
                if process.pid not in {p.pid for p in psutil.Process().parents()}:
                    _kill(process)
            elif any(mark in word for word in process.info["cmdline"] or []):
                _kill(process)
        for process in self._processes.values():
            process.kill()
            process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _start(self, name: str, command: list[str]) -> None:
        with (self.folder / f"{name}.log").open("ab") as log:
            self._processes[name] = subprocess.Popen(
                command, env=self._own, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )

    def _trouble(self) -> str:
        logs = [f"{path.name}: {path.read_text()[-500:]}" for path in self.folder.glob("*.log")]
        return "\n".join(["SLURM does not start", self.run("sinfo"), *logs])


def _kill(process: psutil.Process) -> None:
    try:
        process.kill()
    except psutil.Error:
        return


def wait_for(reached: Callable[[], bool], otherwise: str | Callable[[], str], timeout_s: float = 60) -> None:
    until_s = time.monotonic() + timeout_s
    while not reached():
        assert time.monotonic() < until_s, otherwise if isinstance(otherwise, str) else otherwise()
        time.sleep(0.3)


if __name__ == "__main__":  # until it is killed; the argument is a file, for where its configuration is
    with SlurmCluster() as cluster:
        Path(sys.argv[1]).write_text(cluster.environment["SLURM_CONF"])
        signal.pause()
