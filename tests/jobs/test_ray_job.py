"""``ray job submit --working-dir . -- python jobs/imagenet.py`` on a head that asks for a token."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.ray_head import RAY, Head, ray_head
from tests.training.group import small_config

ROOT = Path(__file__).parents[2]


@pytest.fixture
def head() -> Iterator[Head]:
    with ray_head() as found:
        yield found


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
    # What its workers printed, in one place.
    (log,) = (tmp_path / "runs" / "submitted" / "logs").iterdir()
    for rank in (0, 1):
        said = [line.partition(" | ")[2] for line in log.read_text().splitlines() if f"  rank {rank}  " in line]
        assert said[0].startswith(f"worker of rank {rank} of 2, process ")
        assert said[-1] == "INFO orchestrator.control.supervisor: done"

    # Without the token nobody gets in.
    stranger = head.stranger(tmp_path)
    refused = subprocess.run(
        [RAY, "job", "list", "--address", head.dashboard], env=stranger, capture_output=True, text=True, timeout=120
    )
    assert refused.returncode != 0
    assert "token" in (refused.stdout + refused.stderr).lower()
