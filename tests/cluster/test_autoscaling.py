"""Ray's own autoscaler, with its provider of nodes on one machine: a run that asks for workers gets its machines."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from cluster.allocation import free_port
from orchestrator.config import PlacementConfig
from tests.cluster.ray_head import Head, ray_head
from tests.training.group import options, run_to_end, small_config, weights_digest

ROOT = Path(__file__).parents[2]

pytestmark = [
    pytest.mark.skipif("TEST_CLUSTER" not in os.environ, reason="a minute: make test-cluster"),
    pytest.mark.ray_cluster,
    pytest.mark.timeout(600),
]


@pytest.fixture
def head(tmp_path: Path) -> Iterator[Head]:
    """A head without a CPU, and up to two machines of one, started when they are asked for."""
    empty: tuple[str, ...] = ("initialization_commands", "setup_commands", "head_setup_commands")
    empty += ("worker_setup_commands", "cluster_synced_files", "rsync_exclude", "rsync_filter")
    empty += ("head_start_ray_commands", "worker_start_ray_commands")
    kinds = {
        "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
        "machine": {"resources": {"CPU": 1}, "node_config": {}, "min_workers": 0, "max_workers": 2},
    }
    port = free_port()
    config = {
        "cluster_name": "grows",
        "max_workers": 2,
        "upscaling_speed": 1.0,
        "idle_timeout_minutes": 5,
        "provider": {"type": "fake_multinode", "gcs_address": f"127.0.0.1:{port}", "launch_multiple": True},
        "available_node_types": kinds,
        "head_node_type": "ray.head.default",
        "auth": {},
        "docker": {},
        "file_mounts": {},
        "file_mounts_sync_continuously": False,
        **{name: [] for name in empty},
    }
    path = tmp_path / "autoscaler.json"
    path.write_text(json.dumps(config))
    variables = {"AUTOSCALER_UPDATE_INTERVAL_S": "1", "RAY_FAKE_CLUSTER": "1", "PYTHONPATH": str(ROOT)}
    with ray_head(0, (f"--autoscaling-config={path}",), variables, port) as found:
        yield found


def test_machines_are_asked_for_and_waited_for(head: Head, prepared: Path, tmp_path: Path) -> None:
    config = small_config(prepared, tmp_path / "runs", "grown")
    config = replace(config, schedule=replace(config.schedule, max_steps=4))
    words = [sys.executable, "jobs/imagenet.py", "resnet18", *options(config), "--placement.num-workers", "2"]
    words += ["--placement.cpus-per-worker", "1", "--placement.ray-address", head.address]
    words += ["--tracking.uri", f"sqlite:///{tmp_path}/mlflow.db"]
    environment = head.environment | {"COLUMNS": "200"}

    def run(*more: str) -> subprocess.CompletedProcess[str]:
        command = [*words, *more]
        return subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False
        )

    refused = run()
    assert refused.returncode == 2
    assert "2 workers need more CPUs than the cluster's 0" in refused.stderr
    unsaid = run("--placement.autoscaling", "True")
    assert unsaid.returncode == 2
    assert "give --placement.use-gpu True to wait for them, or False to train on CPUs" in unsaid.stderr
    words += ["--placement.use-gpu", "False"]
    late = run(
        "--placement.autoscaling", "True", "--guard.wait-for-workers-s", "0.1", "--placement.cpus-per-worker", "2"
    )
    assert late.returncode == 1
    assert "machines did not come within 0 s" in late.stderr
    done = run("--placement.autoscaling", "True", "--guard.wait-for-workers-s", "120")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "waiting for machines" in done.stdout
    alone = run_to_end(replace(config, name="alone", placement=PlacementConfig()), 2)
    assert weights_digest(tmp_path / "runs" / "grown") == weights_digest(alone)
