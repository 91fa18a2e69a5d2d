"""A connection to Ray: the only place that starts or joins a cluster. Quiet, with a token, on loopback."""

from __future__ import annotations

import logging
import os
import secrets
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Node:
    """A machine of the cluster: what it offers to workers."""

    cpus: int
    gpus: int


@dataclass(frozen=True)
class Cluster:
    """What a connected Ray cluster has, and whether this process started it."""

    nodes: tuple[Node, ...]
    is_ours: bool

    @property
    def cpus(self) -> int:
        return sum(node.cpus for node in self.nodes)

    @property
    def gpus(self) -> int:
        return sum(node.gpus for node in self.nodes)


@contextmanager
def ray_session(address: str | None = None, num_cpus: int | None = None) -> Iterator[Cluster]:
    """A connection to the Ray cluster at ``address`` or RAY_ADDRESS, else to one started here.

    Raises ValueError where the cluster cannot be reached.
    """
    address = address or os.environ.get("RAY_ADDRESS")
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    with tempfile.TemporaryDirectory(prefix="ray-token-") as folder:
        if not address and not os.environ.keys() & {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"}:
            # Else ray.init makes one that the whole machine can read. A cluster that is joined has its own.
            token = Path(folder) / "token"
            descriptor = os.open(token, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(descriptor, "w") as stream:
                stream.write(secrets.token_hex(32))
            os.environ["RAY_AUTH_TOKEN_PATH"] = str(token)
        # Ray reads its settings from the environment when it is imported.
        import ray

        quiet = {"logging_level": logging.ERROR, "log_to_driver": False}
        try:
            if address:
                ray.init(address=address, **quiet)
            else:
                ray.init(
                    num_cpus=num_cpus,
                    include_dashboard=False,
                    object_store_memory=100 << 20,  # bytes; nothing large passes through it
                    **quiet,
                )
        except (ConnectionError, RuntimeError, ValueError) as error:
            where = f"the Ray cluster at {address}" if address else "a local Ray cluster"
            raise ValueError(f"{where} cannot be used: {error}") from None
        try:
            alive = [n["Resources"] for n in ray.nodes() if n["Alive"]]
            nodes = tuple(Node(int(r.get("CPU", 0)), int(r.get("GPU", 0))) for r in alive)
            yield Cluster(nodes, is_ours=not address)
        finally:
            ray.shutdown()
            if os.environ.get("RAY_AUTH_TOKEN_PATH", "").startswith(folder):
                del os.environ["RAY_AUTH_TOKEN_PATH"]
