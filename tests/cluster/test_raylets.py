"""A Ray cluster of several raylets on this machine: nodes come, are told to leave, are lost; nothing is left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from cluster.raylets import LocalCluster

ROOT = Path(__file__).parents[2]

# A driver that is told to look tells how many nodes live, and which one it is on.
LOOK = """
import json, os, sys, ray
ray.init(address=sys.argv[1], logging_level="ERROR", log_to_driver=False)
print("SEEN null", flush=True)
for line in sys.stdin:
    alive = sorted(node["NodeID"] for node in ray.nodes() if node["Alive"])
    task = ray.remote(num_cpus=1)(lambda: os.environ.get("ASKED_FOR"))
    seen = [alive, ray.get_runtime_context().get_node_id(), ray.get(task.remote())]
    print("SEEN", json.dumps(seen), flush=True)
"""


class Looker:
    def __init__(self, cluster: LocalCluster) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", LOOK, cluster.address],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | cluster.environment,
        )
        self.answer()

    def answer(self) -> list[object]:
        assert self.process.stdout is not None
        assert self.process.stderr is not None
        for line in self.process.stdout:  # Ray tells of lost nodes there too
            if line.startswith("SEEN "):
                return json.loads(line.removeprefix("SEEN "))  # type: ignore[no-any-return]
        raise AssertionError(self.process.stderr.read())

    def look(self) -> list[object]:
        assert self.process.stdin is not None
        self.process.stdin.write("look\n")
        self.process.stdin.flush()
        return self.answer()

    def wait_for(self, node_ids: set[str], timeout_s: float = 60) -> None:
        deadline_s = time.monotonic() + timeout_s
        while set(self.look()[0]) != node_ids:  # type: ignore[call-overload]
            assert time.monotonic() < deadline_s, (self.look(), node_ids)
            time.sleep(0.2)


def living(pids: set[int]) -> set[int]:
    found = set()
    for pid in pids:
        try:
            if psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
                found.add(pid)
        except psutil.NoSuchProcess:
            continue
    return found


def tree(pid: int) -> set[int]:
    return {process.pid for process in psutil.Process(pid).children(recursive=True)}


@pytest.mark.ray_cluster
def test_nodes_come_and_go_and_nothing_is_left() -> None:
    before = tree(os.getpid())
    with LocalCluster({"ASKED_FOR": "by the workers"}) as cluster:
        head, second = cluster.add(1), cluster.add(1)
        looker = Looker(cluster)
        alive, here, asked_for = looker.look()
        assert (alive, here) == (sorted([head.node_id, second.node_id]), head.node_id)
        assert asked_for == "by the workers"

        # Lost: the raylet and its workers at once; the others learn of it.
        of_second = tree(second.raylet_pid) | {second.raylet_pid}
        cluster.lose(second)
        assert not living(of_second)
        looker.wait_for({head.node_id})

        # Another joins, and is told to leave: with nothing to do there, it goes at once.
        third = cluster.add(1)
        looker.wait_for({head.node_id, third.node_id})
        cluster.drain(third, 30)
        looker.wait_for({head.node_id})
        cluster.lose(third)

        # Without the token nobody gets in.
        token = Path(cluster.environment["RAY_AUTH_TOKEN_PATH"])
        assert token.stat().st_mode & 0o777 == 0o600
        stranger = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")} | {"HOME": str(token.parent)}
        code = f"import ray; ray.init(address={cluster.address!r}, logging_level='ERROR')"
        refused = subprocess.run([sys.executable, "-c", code], env=stranger, capture_output=True, text=True, timeout=90)
        assert refused.returncode != 0
        assert "token" in refused.stderr.lower()

        # A session started elsewhere on this machine does not end up in it.
        assert not Path("/tmp/ray/ray_current_cluster").exists() or (
            cluster.address not in Path("/tmp/ray/ray_current_cluster").read_text()
        )
        of_cluster = tree(os.getpid()) - before - {looker.process.pid}
        assert len(of_cluster) >= 3
        cluster.lose_all()
        assert not living(of_cluster)
        with pytest.raises(OSError, match="the local Ray cluster does not add a node: "):
            cluster.add(1)
        looker.process.kill()
        looker.process.wait()
    assert not token.parent.exists()
    assert not living(tree(os.getpid()) - before)


@pytest.mark.ray_cluster
def test_the_cluster_ends_with_whoever_asked_for_it() -> None:
    code = (
        "import sys, time; from cluster.raylets import LocalCluster\n"
        "c = LocalCluster(); c.add(1); print(c._process.pid, c.environment['RAY_AUTH_TOKEN_PATH'], flush=True)\n"
        "time.sleep(600)"
    )
    asker = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert asker.stdout is not None
    pid, token = asker.stdout.readline().split()
    pids = {int(pid)}
    pids |= tree(min(pids))
    assert len(living(pids)) >= 3
    asker.send_signal(signal.SIGKILL)
    asker.wait()
    deadline_s = time.monotonic() + 30
    while living(pids):
        assert time.monotonic() < deadline_s, [psutil.Process(pid).cmdline() for pid in living(pids)]
        time.sleep(0.1)
    assert not Path(token).parent.exists()
