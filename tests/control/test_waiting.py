"""Machines that are not there yet: waited for where the cluster may grow, on a real cluster that does."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from cluster.raylets import LocalCluster
from orchestrator.config import PlacementConfig, TrainConfig
from orchestrator.control.placement import may_grow, place
from orchestrator.ray_session import Cluster, ClusterError, Node

ROOT = Path(__file__).parents[2]

WAITS = """
import sys
from orchestrator.config import GuardConfig, PlacementConfig, TrainConfig
from orchestrator.control.waiting import place_in_time
from orchestrator.ray_session import ray_session

least, most, wait_s = int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4])
placement = PlacementConfig(ray_address=sys.argv[1], min_workers=least, num_workers=most, cpus_per_worker=1)
config = TrainConfig(placement=placement, guard=GuardConfig(wait_for_workers_s=wait_s))
with ray_session(sys.argv[1]) as cluster:
    try:
        placed = place_in_time(config, cluster, lambda text: print("TOLD", text, flush=True), lambda: None)
        print("PLACED", placed.num_workers, placed.workers_per_node)
    except (ValueError, TimeoutError) as error:
        print(type(error).__name__, error)
"""


def begin(cluster: LocalCluster, least: int, most: int, wait_s: float) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", WAITS, cluster.address, str(least), str(most), str(wait_s)]
    environment = os.environ | cluster.environment
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment, cwd=ROOT)


@pytest.mark.ray_cluster
@pytest.mark.timeout(300)
def test_an_elastic_run_waits_for_its_least_machines() -> None:
    with LocalCluster() as cluster:
        cluster.add(num_cpus=1)
        waiting, late = begin(cluster, 2, 3, 200), begin(cluster, 3, 3, 1)
        fixed = begin(cluster, 0, 2, 200)
        assert waiting.stdout is not None
        told = waiting.stdout.readline()
        assert told.startswith("TOLD waiting for machines, for up to 200 s (guard.wait_for_workers_s): 2 workers"), told
        assert "TimeoutError machines did not come within 1 s" in late.communicate(timeout=100)[0]
        assert "ClusterError 2 workers need more CPUs than the cluster's 1" in fixed.communicate(timeout=100)[0]
        cluster.add(num_cpus=1)
        assert waiting.communicate(timeout=100)[0] == "PLACED 2 (1, 1)\n"


def test_an_autoscaler_is_not_asked_for_the_wrong_machines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    placement = PlacementConfig(autoscaling=True, num_workers=8)
    head = Cluster((Node(16, 0),))
    with pytest.raises(ValueError, match="may start machines with some or without"):
        place(TrainConfig(placement=placement), head)
    assert not place(TrainConfig(placement=replace(placement, use_gpu=False)), head).use_gpu
    with pytest.raises(ClusterError, match="8 workers need more GPUs"):
        place(TrainConfig(placement=replace(placement, use_gpu=True)), head)
    with pytest.raises(ValueError, match=r"placement\.autoscaling needs placement\.num_workers"):
        TrainConfig(placement=PlacementConfig(autoscaling=True))


def test_only_a_cluster_of_others_may_grow() -> None:
    elastic = TrainConfig(placement=PlacementConfig(min_workers=1))
    autoscaled = TrainConfig(placement=PlacementConfig(autoscaling=True, num_workers=2))
    address = {"RAY_ADDRESS": "10.0.0.1:6379"}
    assert may_grow(elastic, address)
    assert may_grow(autoscaled, address)
    assert not may_grow(TrainConfig(), address)
    assert not may_grow(elastic, {})
    assert not may_grow(elastic, {"RAY_ADDRESS": "local"})
