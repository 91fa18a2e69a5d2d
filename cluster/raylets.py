"""A Ray cluster of several raylets on this machine, to lose nodes of, to drain them, and to lose whole.

    with LocalCluster() as cluster:
        cluster.add(num_cpus=1)
        second = cluster.add(num_cpus=1)
        subprocess.run([*job, "--placement.ray-address", cluster.address], env=os.environ | cluster.environment)
        cluster.lose(second)

The raylets belong to a process of their own (``python -m cluster.raylets``) that reads orders from a pipe: they end
with it, and it ends with whoever holds the pipe, however that ends. The process that asks for a cluster never imports
Ray.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import psutil

if TYPE_CHECKING:
    from orchestrator.control.faults import Worker

_ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class LocalNode:
    """One raylet: Ray's id of the node, and the process."""

    node_id: str
    raylet_pid: int


class LocalCluster:
    """The cluster. Its first node is the head: a driver of this machine lives there."""

    def __init__(self, environment: Mapping[str, str] | None = None) -> None:
        """``environment`` is set for the workers, beside that of this process. Nothing listens without a token."""
        self.nodes: list[LocalNode] = []
        self.address = ""
        self._folder = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))  # short: unix sockets lie in it
        token = self._folder / "token"
        token.touch(0o600)
        token.write_text(secrets.token_hex(32))
        self.environment = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token), "RAY_USAGE_STATS_ENABLED": "0"}
        path = os.pathsep.join(filter(None, [str(_ROOT), os.environ.get("PYTHONPATH")]))
        plain = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
        own = {"RAY_TMPDIR": str(self._folder), "PYTHONPATH": path}  # a bare ray.init() elsewhere must not find it
        self._log = (self._folder / "cluster.log").open("wb")
        self._process = subprocess.Popen(
            [sys.executable, "-m", "cluster.raylets"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env=plain | dict(environment or {}) | own | self.environment,
            cwd=_ROOT,
            start_new_session=True,  # Ctrl-C is for whoever asked
        )

    def __enter__(self) -> LocalCluster:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def add(self, num_cpus: int) -> LocalNode:
        """Another node, alive when this returns. Raises OSError where it does not start."""
        answer = self._ask({"order": "add", "num_cpus": num_cpus})
        self.address = answer["address"]
        node = LocalNode(answer["node_id"], answer["raylet_pid"])
        self.nodes.append(node)
        return node

    def drain(self, node: LocalNode, deadline_s: float, why: str = "a rehearsal") -> None:
        """Ray's notice of a preemption: the node will be gone in ``deadline_s`` seconds. It is for the caller to
        lose it then, as a cloud does. Raises OSError where Ray does not take the notice.
        """
        self._ask({"order": "drain", "node_id": node.node_id, "deadline_s": deadline_s, "why": why})

    def lose(self, node: LocalNode) -> None:
        """SIGKILL for the raylet and everything that it started, at once. The head takes the cluster with it."""
        if node == self.nodes[0]:
            return self.lose_all()
        self.nodes.remove(node)
        with suppress(psutil.NoSuchProcess):
            _kill_tree(psutil.Process(node.raylet_pid))
        with suppress(OSError):  # reap it, and let the others' processes know as Ray would
            self._ask({"order": "forget", "node_id": node.node_id})

    def lose_all(self) -> None:
        """SIGKILL for every process of the cluster, at once."""
        self.nodes.clear()
        with suppress(psutil.NoSuchProcess):
            _kill_tree(psutil.Process(self._process.pid))
        self._process.wait()

    def close(self) -> None:
        """End all of it, and delete its folder."""
        self.lose_all()
        for pipe in (self._process.stdin, self._process.stdout, self._log):
            assert pipe is not None
            with suppress(OSError):
                pipe.close()
        for _ in range(50):  # what the kernel is still ending may write once more
            shutil.rmtree(self._folder, ignore_errors=True)
            if not self._folder.exists():
                return
            time.sleep(0.1)

    def _ask(self, order: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        line = b""
        with suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(order).encode() + b"\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        answer = json.loads(line) if line else {"error": self._last_words()}
        if "error" in answer:
            raise OSError(f"the local Ray cluster does not {order['order']} a node: {answer['error']}")
        return dict(answer)

    def _last_words(self) -> str:
        lines = (self._folder / "cluster.log").read_text(errors="replace").strip().splitlines()
        return lines[-1] if lines else "its process has ended"


class LocalNodes:
    """A local cluster of nodes with one CPU each, begun afresh after it was lost; for ``control.faults``."""

    def __init__(self, size: int, environment: Mapping[str, str]) -> None:
        self._size, self._variables = size, environment
        self.renew()

    def renew(self) -> None:
        self._cluster = LocalCluster(self._variables)
        self.lives = True
        try:
            for _ in range(self._size):
                self._cluster.add(1)
        except BaseException:
            self._cluster.close()
            raise

    @property
    def address(self) -> str:
        return self._cluster.address

    @property
    def environment(self) -> Mapping[str, str]:
        return self._cluster.environment

    def node_of(self, worker: Worker) -> LocalNode | None:
        return next((node for node in self._cluster.nodes[1:] if node.node_id == worker.node), None)

    def add(self, num_cpus: int) -> LocalNode:
        return self._cluster.add(num_cpus)

    def lose(self, node: LocalNode) -> None:
        self._cluster.lose(node)

    def drain(self, node: LocalNode, deadline_s: float) -> None:
        self._cluster.drain(node, deadline_s)

    def lose_all(self) -> None:
        self.close()

    def close(self) -> None:
        self.lives = False
        self._cluster.close()


def _kill_tree(process: psutil.Process) -> None:
    """SIGKILL; stopped first, so that no process of the tree sees another one go and reacts."""
    with suppress(psutil.NoSuchProcess):
        process.suspend()
    tree = [process]
    with suppress(psutil.NoSuchProcess):
        tree += process.children(recursive=True)
    for each in tree:
        with suppress(psutil.NoSuchProcess):
            each.kill()
    # A child of another process stays a zombie until that one has seen it.
    deadline_s = time.monotonic() + 10
    while any(_is_running(each) for each in tree) and time.monotonic() < deadline_s:
        time.sleep(0.02)


def _is_running(process: psutil.Process) -> bool:
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


# -- the process that the raylets belong to -------------------------------------------------------------------------


class _Keeper:
    """Ray's own cluster of several raylets, under orders."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster

        # shutdown_at_exit: the kernel ends the raylets with this process, even where that is killed.
        self._cluster = Cluster(shutdown_at_exit=True)
        self._nodes: dict[str, Any] = {}

    def add(self, num_cpus: int) -> dict[str, Any]:
        # object_store_memory, bytes: nothing large passes through it
        node = self._cluster.add_node(num_cpus=num_cpus, include_dashboard=False, object_store_memory=80 << 20)
        self._nodes[node.node_id] = node
        pid = node.all_processes["raylet"][0].process.pid
        return {"address": self._cluster.address, "node_id": node.node_id, "raylet_pid": pid}

    def drain(self, node_id: str, deadline_s: float, why: str) -> dict[str, Any]:
        from ray._raylet import GcsClient  # type: ignore[attr-defined]
        from ray.core.generated import autoscaler_pb2

        reason = autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
        deadline_ms = time.time_ns() // 1_000_000 + int(deadline_s * 1000)
        accepted, message = GcsClient(address=self._cluster.address).drain_node(node_id, reason, why, deadline_ms)
        return {} if accepted else {"error": message}

    def forget(self, node_id: str) -> dict[str, Any]:
        self._cluster.remove_node(self._nodes.pop(node_id), allow_graceful=False)
        return {}


def _main() -> None:
    answers = os.fdopen(os.dup(1), "w")  # whatever else prints goes to the log
    os.dup2(2, 1)
    keeper = _Keeper()
    orders: dict[str, Callable[..., dict[str, Any]]] = {
        "add": keeper.add,
        "drain": keeper.drain,
        "forget": keeper.forget,
    }
    for line in sys.stdin:
        order = json.loads(line)
        try:
            answer = orders[order.pop("order")](**order)
        except Exception as error:  # told to whoever asked
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)
    for process in psutil.Process().children(recursive=True):  # Ray's agents outlive the raylets that started them
        with suppress(psutil.NoSuchProcess):
            process.kill()
    shutil.rmtree(os.environ["RAY_TMPDIR"], ignore_errors=True)
    os._exit(0)


if __name__ == "__main__":
    _main()
