"""A connection to Ray: the only place that starts or joins a cluster. Quiet, with a token, on loopback."""

from __future__ import annotations

import functools
import logging
import os
import secrets
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Node:
    """A machine of the cluster: what it offers to workers."""

    cpus: int
    gpus: int


@dataclass(frozen=True)
class Cluster:
    """What a connected Ray cluster has."""

    nodes: tuple[Node, ...]

    @property
    def cpus(self) -> int:
        return sum(node.cpus for node in self.nodes)

    @property
    def gpus(self) -> int:
        return sum(node.gpus for node in self.nodes)


class ClusterError(ValueError):
    """There is no cluster, or it is too small: the user's to mend, unless it comes back by itself."""


@contextmanager
def ray_session(address: str | None = None, num_cpus: int | None = None, *, hears: bool = False) -> Iterator[Cluster]:
    """A connection to the Ray cluster at ``address`` or RAY_ADDRESS, else to one started here.

    hears: whether Ray brings what its processes print, to whoever listens (``control.worker_log``).

    The machines of a cluster that is joined have this project installed, or in the job's working directory. A process
    that is connected already stays so. Raises ClusterError where the cluster cannot be reached.
    """
    address = address or os.environ.get("RAY_ADDRESS")
    with tempfile.TemporaryDirectory(prefix="ray-token-") as folder:
        settings = {"RAY_USAGE_STATS_ENABLED": "0"}
        if not address:
            # Started processes inherit it: the project need not be installed, and what lies beside the script is found.
            path = [str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
            path.append(str(Path(sys.argv[0]).absolute().parent))
            settings["PYTHONPATH"] = os.pathsep.join(path)
            if not os.environ.keys() & {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"}:
                # Else ray.init makes one that the whole machine can read. A cluster that is joined has its own.
                settings["RAY_AUTH_TOKEN_PATH"] = f"{folder}/token"
                with os.fdopen(os.open(f"{folder}/token", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as stream:
                    stream.write(_token())
        before = {name: os.environ.get(name) for name in settings}
        os.environ.update(settings)
        try:
            # Ray reads some of its settings when it is imported.
            import ray

            if ray.is_initialized():
                yield cluster_now()
                return
            if address:
                _check_reachable(address)
            quiet = {"logging_level": logging.ERROR, "log_to_driver": hears}
            # local: else Ray joins whatever `ray start` has left here. object_store_memory, bytes: nothing large passes
            start = {
                "address": "local",
                "num_cpus": num_cpus,
                "include_dashboard": False,
                "object_store_memory": 100 << 20,
            }
            on_terminate = signal.getsignal(signal.SIGTERM)
            try:
                ray.init(**({"address": address} if address else start), **quiet)
                if hears:
                    _print_nothing()
                if on_terminate is not None and threading.current_thread() is threading.main_thread():
                    # Ray sets its own.
                    signal.signal(signal.SIGTERM, on_terminate)
            except (ConnectionError, RuntimeError, ValueError) as error:
                if not address:
                    raise ClusterError(
                        f"a local Ray cluster cannot be started ({error}): its logs are in /tmp/ray/session_latest/logs"
                    ) from None
                raise ClusterError(
                    f"the Ray cluster at {address} cannot be used ({error}): its token (RAY_AUTH_MODE=token, "
                    "RAY_AUTH_TOKEN_PATH) and its versions of Ray and Python must be those of this process"
                ) from None
            except Exception as error:
                if type(error) is not Exception:
                    raise
                # Ray's own, bare, where a node of its does not come up in time.
                raise OSError(
                    f"Ray did not start in time ({error}): the machine is busy or short of memory; the same command "
                    "tries again"
                ) from None
            try:
                yield cluster_now()
            finally:
                ray.shutdown()
        finally:
            for name, value in before.items():
                os.environ.pop(name) if value is None else os.environ.update({name: value})


@functools.cache
def _token() -> str:
    """One for all sessions of this process: Ray reads the token once and keeps it."""
    return secrets.token_hex(32)


def cluster_now() -> Cluster:
    """What the cluster that this process is connected to has now."""
    import ray

    alive = [n["Resources"] for n in ray.nodes() if n["Alive"]]
    return Cluster(tuple(Node(int(r.get("CPU", 0)), int(r.get("GPU", 0))) for r in alive))


def _check_reachable(address: str) -> None:
    """Ray itself tries for more than a minute. Raises ClusterError."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if port.isdigit():
        try:
            socket.create_connection((host, int(port)), timeout=10).close()
        except OSError as error:
            raise ClusterError(
                f"no Ray cluster answers at {address} ({error}): start it, or clear the address and RAY_ADDRESS "
                "for a local one"
            ) from None


def _print_nothing() -> None:
    """Of what Ray brings from its processes: here a terminal belongs to the run."""
    with suppress(ImportError, AttributeError):  # Ray's own parts
        from ray._private.ray_logging import global_worker_stdstream_dispatcher as dispatcher

        dispatcher.remove_handler("ray_print_logs")
