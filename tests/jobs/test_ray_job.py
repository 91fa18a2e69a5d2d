"""``ray job submit --working-dir . -- python jobs/imagenet.py`` on a head that asks for a token."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from tests.training.group import small_config

ROOT = Path(__file__).parents[2]
RAY = str(Path(sys.executable).parent / "ray")


@dataclass(frozen=True)
class Head:
    address: str
    dashboard: str
    environment: dict[str, str]


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@pytest.fixture
def head() -> Iterator[Head]:
    """A Ray head of its own, ended by the pids that name its folder."""
    folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")  # short: unix sockets lie in it
    token = Path(folder) / "token"
    token.touch(0o600)
    token.write_text(secrets.token_hex(32))
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token), "RAY_USAGE_STATS_ENABLED": "0"}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    port, dashboard = free_port(), free_port()
    command = [RAY, "start", "--head", f"--port={port}", "--dashboard-host=127.0.0.1", "--num-cpus=2"]
    command += [f"--dashboard-port={dashboard}", f"--temp-dir={folder}/s", "--object-store-memory=100000000"]
    # The agent that takes jobs has a port that all heads of a machine would share: where another has it, none comes up.
    command += [f"--dashboard-agent-listen-port={free_port()}"]
    try:
        subprocess.run(command, check=True, env=environment, capture_output=True, timeout=120)
        yield Head(f"127.0.0.1:{port}", f"http://127.0.0.1:{dashboard}", environment)
    finally:
        for process in psutil.process_iter(["cmdline"]):
            if any(folder in part for part in process.info["cmdline"] or []):
                process.kill()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.ray_cluster
@pytest.mark.timeout(900)
def test_a_submitted_job_trains(head: Head, prepared: Path, tmp_path: Path) -> None:
    config = small_config(prepared, tmp_path / "runs", "submitted")
    variables = {"IMAGENET_DATA": config.data, "IMAGENET_STORAGE": config.storage}
    runtime = json.dumps({"env_vars": variables})
    plain = config.to_json()
    fields = [
        word
        for part in ("model", "input", "batch", "rhythm")
        for key, value in plain[part].items()
        if value is not None
        for word in (f"--{part}.{key.replace('_', '-')}", str(value))
    ]
    job = [sys.executable, "jobs/imagenet.py", "resnet18", "--name", "submitted", "--schedule.max-steps", "2", *fields]
    job += ["--tracking.uri", f"sqlite:///{tmp_path}/mlflow.db"]
    environment = head.environment | variables | {"RAY_ADDRESS": head.address}
    rehearsal = subprocess.run(
        [*job, "--dry-run"], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120
    )
    assert rehearsal.returncode == 0, rehearsal.stdout + rehearsal.stderr
    page = " ".join(rehearsal.stdout.split())
    assert f"the Ray cluster at {head.address}: 1 node with 2 CPUs and 0 GPUs 2 CPU workers with 1 CPU each" in page
    assert not list(tmp_path.iterdir())

    submit = [RAY, "job", "submit", "--address", head.dashboard, "--working-dir", ".", "--runtime-env-json", runtime]
    until = time.monotonic() + 100
    while True:
        done = subprocess.run(
            [*submit, "--", *job], cwd=ROOT, env=head.environment, capture_output=True, text=True, timeout=300
        )
        text = done.stdout + done.stderr
        if "No available agent" not in text or time.monotonic() > until:  # a head's job agent starts after the head
            break
        time.sleep(2)
    assert done.returncode == 0, text
    assert "start number 1 of this run" in text
    outcome = json.loads((tmp_path / "runs" / "submitted" / "finished.json").read_text())
    assert outcome["steps"] == 2

    # Without the token nobody gets in.
    stranger = {k: v for k, v in head.environment.items() if not k.startswith("RAY_AUTH")}
    stranger["HOME"] = str(tmp_path)
    refused = subprocess.run(
        [RAY, "job", "list", "--address", head.dashboard], env=stranger, capture_output=True, text=True, timeout=120
    )
    assert refused.returncode != 0
    assert "token" in (refused.stdout + refused.stderr).lower()
