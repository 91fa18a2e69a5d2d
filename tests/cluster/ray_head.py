"""A real Ray head of its own on this machine, which asks for a token: ended by the processes that name its folder."""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from cluster.allocation import free_port

RAY = str(Path(sys.executable).parent / "ray")


@dataclass(frozen=True)
class Head:
    """``environment``: of whoever may use it, the token included."""

    address: str
    dashboard: str
    environment: dict[str, str]
    folder: Path

    def stranger(self, home: Path) -> dict[str, str]:
        """The environment of somebody without the token."""
        found = {k: v for k, v in self.environment.items() if not k.startswith("RAY_AUTH")}
        return found | {"HOME": str(home)}


@contextmanager
def ray_head(
    num_cpus: int = 2, words: tuple[str, ...] = (), variables: Mapping[str, str] | None = None, port: int = 0
) -> Iterator[Head]:
    folder = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))  # short: unix sockets lie in it
    token = folder / "token"
    token.touch(0o600)
    token.write_text(secrets.token_hex(32))
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")} | dict(variables or {})
    environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token), "RAY_USAGE_STATS_ENABLED": "0"}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    port, dashboard = port or free_port(), free_port()
    command = [RAY, "start", "--head", f"--port={port}", "--dashboard-host=127.0.0.1", f"--num-cpus={num_cpus}"]
    command += [f"--dashboard-port={dashboard}", f"--temp-dir={folder}/s", "--object-store-memory=100000000"]
    # The agent that takes jobs has a port that all heads of a machine would share: where another has it, none comes up.
    command += [f"--dashboard-agent-listen-port={free_port()}", *words]
    try:
        subprocess.run(command, check=True, env=environment, capture_output=True, timeout=120)
        yield Head(f"127.0.0.1:{port}", f"http://127.0.0.1:{dashboard}", environment, folder)
    finally:
        for process in psutil.process_iter(["cmdline"]):
            if any(str(folder) in part for part in process.info["cmdline"] or []):
                process.kill()
        shutil.rmtree(folder, ignore_errors=True)
