"""A Ray cluster on the nodes that a scheduler has given, for as long as one job runs: one process a node.

The first node starts the head, on ports and with a token of its own, and says so in the job's folder; the others join.
Nothing of another job's Ray is touched, so jobs may share a node. Files of start number S of job J:

    ray-J-S/token           0600, as long as the job runs
    ray-J-S/head.json       the head's address, once it answers
    ray-J-S/joined-N.json   node N has joined
    ray-J-S/alive-N         a number that grows as long as node N's process lives
    ray-J-S/lost-N.json     Ray has ended on node N before the job's end
    ray-J-S/done            the job has ended: nodes leave
    ray-J-S/node-N.log      what Ray prints
"""

from __future__ import annotations

import json
import math
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from orchestrator.control.interface import variables_of

_POLL_S = 0.5
_START_S = 120.0  # for Ray's own processes on a busy machine
_BEAT_S = 5.0
_SILENT_S = 60.0  # without a sign of life a node is lost
_QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_DISABLE_IMPORT_WARNING": "1"}


class AllocationError(RuntimeError):
    """The nodes did not become a cluster, or did not stay one."""


@dataclass(frozen=True)
class Node:
    """This process' place. ``rank``: 0 is the head; ``host``: a name or address by which another node is reached."""

    rank: int
    size: int
    cpus: int
    gpus: int
    other_host: str = ""


class RayOnNodes:
    """Ray on this node, as part of the job's cluster."""

    def __init__(self, folder: Path, node: Node, *, join_timeout_s: float, interface: str = "") -> None:
        """``folder``: the same for all nodes of this start; seen by all. ``interface``: of the network to use."""
        self._folder, self._node, self._join_timeout_s = folder, node, join_timeout_s
        self._address = address_of(interface, node.other_host)
        self._interface = interface
        self._temp: Path | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self.is_lost = False  # a node has lost Ray, or is gone
        self._beats, self._beat_s = 0, -math.inf
        self._looked_s, self._silent = -math.inf, list[str]()
        self._heard: dict[str, tuple[str, float]] = {}  # of each other node: its last number, and when that was new

    # -- both kinds of nodes ------------------------------------------------------------------------------------

    @property
    def environment(self) -> dict[str, str]:
        """For whatever joins this cluster."""
        found = {
            **_QUIET,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(self._folder / "token"),
        }
        if self._interface:
            found |= variables_of(self._interface)
        return found

    def has_ended(self) -> bool:
        """Whether Ray has ended on this node."""
        return self._process is None or self._process.poll() is not None

    def _start(self, words: list[str]) -> None:
        node = self._node
        command = ["env", "--ignore-signal=USR2"]  # the scheduler's warning, which is for this process alone
        command += [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", *words]
        command += [f"--node-ip-address={self._address}", f"--num-cpus={node.cpus}", f"--num-gpus={node.gpus}"]
        # Fixed ports would clash with another job's: 0 takes a free one.
        command += ["--min-worker-port=0", "--max-worker-port=0", "--object-store-memory=104857600"]
        command += [f"--{name}={free_port()}" for name in ("dashboard-agent-listen-port", "metrics-export-port")]
        plain = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
        with (self._folder / f"node-{node.rank}.log").open("ab") as log:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=plain | self.environment,
                start_new_session=True,
            )

    def end(self) -> None:
        """End Ray on this node: what this object has started, and nothing else."""
        if self._process is None:
            return
        tree: list[psutil.Process] = []
        if self._process.poll() is None:
            with suppress(psutil.Error):
                root = psutil.Process(self._process.pid)
                tree = [root, *root.children(recursive=True)]
        with suppress(ProcessLookupError):
            self._process.send_signal(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(10)
        if self._temp is not None:
            mark = str(self._temp)
            for process in psutil.process_iter(["cmdline"]):
                if any(mark in word for word in process.info["cmdline"] or []):
                    tree.append(process)
        for process in tree:
            with suppress(psutil.Error):
                process.kill()
        self._process.wait()
        self._process = None
        if self._temp is not None:
            shutil.rmtree(self._temp, ignore_errors=True)

    def mark(self, name: str) -> None:
        """Leave a file of this name in the start's folder."""
        (self._folder / name).touch()

    # -- the head -----------------------------------------------------------------------------------------------

    @contextmanager
    def head(self) -> Iterator[str]:
        """The cluster, all of whose nodes have joined; its address. Raises AllocationError."""
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        token = self._folder / "token"
        token.touch(0o600)
        token.write_text(secrets.token_hex(32))
        self._temp = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))  # short: unix sockets lie in it
        port = free_port()
        words = ["--head", f"--port={port}", f"--temp-dir={self._temp}", "--dashboard-host=127.0.0.1"]
        words += [f"--dashboard-port={free_port()}", f"--ray-client-server-port={free_port()}"]
        address = f"{self._address}:{port}"
        try:
            self._start(words)
            self._wait(lambda: _answers(self._address, port), _START_S, "Ray's head did not start")
            here = {"address": address, "temp": str(self._temp), "host": socket.gethostname()}
            _publish(self._folder / "head.json", here)
            self._wait(self._all_joined, self._join_timeout_s, self._missing)
            yield address
        finally:
            (self._folder / "done").touch()
            self.end()
            token.unlink()

    def lost(self) -> str:
        """Which nodes are lost, in words; empty: none. To be asked often: it is this node's own sign of life, too."""
        self.beat()
        if self.has_ended():
            self.is_lost = True
            return "Ray has ended on the first node"
        told = [json.loads(path.read_text()) for path in sorted(self._folder.glob("lost-*.json"))]
        found = {one["rank"]: f"node {one['rank']} ({one['host']}): {one['said']}" for one in told}
        if time.monotonic() - self._looked_s > _BEAT_S:  # a file of each node: not at every call
            self._looked_s, self._silent = time.monotonic(), self.silent_nodes()
        for rank in self._silent:
            found.setdefault(rank, f"node {rank} has given no sign of life for {_SILENT_S:.0f} s")
        self.is_lost |= bool(found)
        return "; ".join(found.values())

    def beat(self) -> None:
        """Show the other nodes that this one lives."""
        if time.monotonic() - self._beat_s > _BEAT_S:
            self._beats, self._beat_s = self._beats + 1, time.monotonic()
            (self._folder / f"alive-{self._node.rank}").write_text(str(self._beats))

    def silent_nodes(self) -> list[str]:
        """Of the nodes that have joined, those without a sign of life for a minute."""
        joined = (path.stem.removeprefix("joined-") for path in self._folder.glob("joined-*.json"))
        return [rank for rank in joined if self._is_silent(rank)]

    def _is_silent(self, rank: str) -> bool:
        """By this node's clock alone."""
        beat = ""
        with suppress(OSError):
            beat = (self._folder / f"alive-{rank}").read_text()
        if rank not in self._heard or self._heard[rank][0] != beat:
            self._heard[rank] = beat, time.monotonic()
        return time.monotonic() - self._heard[rank][1] > _SILENT_S

    def _all_joined(self) -> bool:
        if lost := self.lost():
            raise AllocationError(lost)
        return len(self._joined()) == self._node.size - 1

    def _joined(self) -> list[str]:
        return [path.name for path in self._folder.glob("joined-*.json")]

    def _missing(self) -> str:
        return (
            f"{len(self._joined()) + 1} of {self._node.size} nodes joined within {self._join_timeout_s:.0f} s; the "
            "others' logs tell why"
        )

    # -- the others ---------------------------------------------------------------------------------------------

    def join(self, alive: Callable[[], None] = lambda: None) -> None:
        """Join the head's cluster, and stay until the job has ended, or Ray on this node. ``alive``: told often."""
        rank, here = self._node.rank, socket.gethostname()
        try:
            self._wait(lambda: bool(self._head()), self._join_timeout_s, "the first node's Ray head did not start")
            head = self._head()
            if head["host"] != here:
                self._temp = Path(head["temp"])  # Ray makes a folder of the same name on this machine
            self._start([f"--address={head['address']}"])
            log = self._folder / f"node-{rank}.log"
            began = "--block"  # what `ray start` prints once its processes run
            self._wait(lambda: began in log.read_text(errors="replace"), _START_S, "Ray did not start on this node")
            _publish(self._folder / f"joined-{rank}.json", {"host": here})
            while not self._is_done():
                if self.has_ended():
                    raise AllocationError("Ray has ended")
                if self._is_silent("0"):
                    raise AllocationError("the first node is gone")
                self.beat()
                alive()
                time.sleep(_POLL_S)
        except AllocationError as error:
            if not self._is_done():
                _publish(self._folder / f"lost-{rank}.json", {"rank": str(rank), "host": here, "said": str(error)})
        finally:
            self.end()

    def _is_done(self) -> bool:
        return (self._folder / "done").exists()

    def _head(self) -> dict[str, str]:
        with suppress(FileNotFoundError):
            return dict(json.loads((self._folder / "head.json").read_text()))
        return {}

    def _wait(self, reached: Callable[[], bool], timeout_s: float, otherwise: str | Callable[[], str]) -> None:
        until_s = time.monotonic() + timeout_s
        while not reached():
            if self._process is not None and self._process.poll() is not None:
                log = self._folder / f"node-{self._node.rank}.log"
                raise AllocationError(f"Ray ended on node {self._node.rank}: its words are in {log}")
            if time.monotonic() > until_s or self._is_done():
                raise AllocationError(otherwise if isinstance(otherwise, str) else otherwise())
            time.sleep(_POLL_S)


def free_port() -> int:
    """A port that is free now."""
    with socket.socket() as listener:
        listener.bind(("", 0))
        return int(listener.getsockname()[1])


def address_of(interface: str, other_host: str) -> str:
    """This machine's address: of ``interface``, else on the way to another node, else of its own name.

    Raises AllocationError for an interface that it lacks.
    """
    if interface:
        for each in psutil.net_if_addrs().get(interface, []):
            if each.family == socket.AF_INET:
                return str(each.address)
        known = ", ".join(sorted(psutil.net_if_addrs()))
        raise AllocationError(f"{socket.gethostname()} has no IPv4 address on interface {interface!r}: it has {known}")
    for host in filter(None, (other_host, socket.gethostname())):
        with suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((host, 9))  # sends nothing
            return str(probe.getsockname()[0])
    return "127.0.0.1"


def visible_gpus(environment: Mapping[str, str]) -> int:
    """GPUs that the scheduler has given to this process."""
    for name in ("CUDA_VISIBLE_DEVICES", "SLURM_STEP_GPUS", "SLURM_JOB_GPUS"):
        if environment.get(name):
            return len([word for word in environment[name].split(",") if word.strip()])
    return int(environment.get("SLURM_GPUS_ON_NODE") or 0)


def _answers(host: str, port: int) -> bool:
    with suppress(OSError):
        socket.create_connection((host, port), timeout=2).close()
        return True
    return False


def _publish(path: Path, content: Mapping[str, str]) -> None:
    written = path.with_suffix(".new")
    written.write_text(json.dumps(content))
    written.replace(path)
