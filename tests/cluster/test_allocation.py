"""What a SLURM job does on its node, by submitit's local executor: Ray of its own beside another job's, and the end."""

from __future__ import annotations

import json
import os
import signal
import stat
from pathlib import Path

import psutil
import pytest
import submitit

from cluster.allocation import Node, RayOnNodes
from cluster.launch import Job, Where
from cluster.settings import SlurmSettings
from cluster.slurm_start import Start
from tests.cluster.slurm_cluster import wait_for

_JOB = """
import os, pathlib, signal, sys, time
import ray
def leave(number, frame):
    print("a checkpoint", flush=True)
    sys.exit(143)
signal.signal(signal.SIGTERM, leave)
ray.init(address=os.environ["RAY_ADDRESS"], logging_level="ERROR", log_to_driver=False)
resources = ray.cluster_resources()
print("begun on", len(ray.nodes()), "node(s) with", resources["CPU"], "CPUs at", os.environ["RAY_ADDRESS"], flush=True)
print("token", os.environ["RAY_AUTH_TOKEN_PATH"], flush=True)
ray.shutdown()
signal.signal(signal.SIGTERM, leave)
while not pathlib.Path(sys.argv[1]).exists():
    time.sleep(0.1)
"""

pytestmark = [pytest.mark.ray_cluster, pytest.mark.timeout(300)]


class OnNode:
    """A start of a job, as SLURM makes it."""

    def __init__(self, folder: Path, script: Path, end: Path, interface: str = "") -> None:
        self.folder = folder
        folder.mkdir()
        job = Job(folder.name, 1, Where.SLURM, (str(script), str(end)), str(folder), "", {})
        executor = submitit.LocalExecutor(folder=folder / "slurm")
        executor.update_parameters(timeout_min=10)
        settings = SlurmSettings(cpus_per_node=2, interface=interface)
        self.start = executor.submit(Start(job, folder, settings, {"IMAGENET_DATA": "/d"}))

    @property
    def log(self) -> str:
        path = self.folder / "log.txt"
        return path.read_text() if path.exists() else ""

    def wait_for(self, text: str) -> None:
        wait_for(lambda: text in self.log, lambda: f"{text!r} is awaited\n{self.log}\n{self.start.stderr()}", 120)

    def ended(self) -> dict[str, object]:
        path = self.folder / "ended.json"
        wait_for(path.exists, lambda: f"it does not end\n{self.log}\n{self.start.stderr()}", 120)
        wait_for(self.start.done, "its task does not end")
        return dict(json.loads(path.read_text()))


def rays_of(address: str) -> list[psutil.Process]:
    """Processes of the Ray cluster at ``address``."""
    port = address.rpartition(":")[2]
    return [
        process
        for process in psutil.process_iter(["cmdline"])
        if any(word.endswith((f"={port}", f":{port}")) for word in process.info["cmdline"] or [])
    ]


def test_two_jobs_share_a_node_and_one_loses_its_ray(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("RAY_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("RAY_AUTH_TOKEN", "of-another-cluster")
    script, end = tmp_path / "job.py", tmp_path / "end"
    script.write_text(_JOB)
    jobs = [OnNode(tmp_path / name, script, end) for name in ("first", "second")]
    addresses = []
    for job in jobs:
        job.wait_for("token ")
        begun, token = job.log.splitlines()
        assert begun.startswith("begun on 1 node(s) with 2.0 CPUs at ")
        addresses.append(begun.rpartition(" ")[2])
        path = Path(token.removeprefix("token "))
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        secret = path.read_text()
        commands = [" ".join(p.info["cmdline"] or []) for p in psutil.process_iter(["cmdline"])]
        assert not any(secret in command for command in commands)
    assert addresses[0] != addresses[1]

    # The job is asked for a checkpoint. Nobody queues it again here, and that is said.
    heads = [process for process in rays_of(addresses[1]) if "gcs_server" in " ".join(process.cmdline())]
    assert len(heads) == 1
    heads[0].send_signal(signal.SIGKILL)
    ended = jobs[1].ended()
    assert ended["code"] == 143
    assert "a checkpoint" in jobs[1].log
    assert str(ended["said"]).startswith("it could not be queued again (")
    assert "after this: Ray has ended on the first node" in str(ended["said"])

    assert rays_of(addresses[0])
    end.touch()
    assert jobs[0].ended() == {"code": 0, "said": ""}
    assert jobs[0].start.result() == 0
    for address in addresses:
        wait_for(lambda address=address: not rays_of(address), "Ray's processes are left")
    assert not list(tmp_path.rglob("token"))


def test_a_setting_that_cannot_be_right_is_told_at_once(tmp_path: Path) -> None:
    ended = OnNode(tmp_path / "job", tmp_path / "job.py", tmp_path / "end", "nothere0").ended()
    assert ended["code"] == 1
    assert "has no IPv4 address on interface 'nothere0'" in str(ended["said"])
    assert "queued again" not in str(ended["said"])


def test_a_node_is_silent_by_looks_that_were_made_in_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ray, now_s = RayOnNodes(tmp_path, Node(0, 2, 1, 0), join_timeout_s=1), 1000.0
    (tmp_path / "joined-1.json").write_text("{}")
    (tmp_path / "alive-1").write_text("7")
    monkeypatch.setattr("cluster.allocation.time.monotonic", lambda: now_s)
    assert ray.silent_nodes() == []
    now_s += 300.0  # this node was held up itself: by a store that was away for both
    assert ray.silent_nodes() == []
    looks = 0
    while not ray.silent_nodes():
        now_s, looks = now_s + 5.0, looks + 1
    assert 8 <= looks <= 13
    (tmp_path / "alive-1").write_text("8")
    assert ray.silent_nodes() == []
