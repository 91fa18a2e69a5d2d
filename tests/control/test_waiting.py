"""Machines that are not there yet: waited for where the cluster may grow, on a real cluster that does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cluster.raylets import LocalCluster
from orchestrator.config import PlacementConfig, TrainConfig
from orchestrator.control import waiting
from orchestrator.control.placement import Placement, may_grow, place
from orchestrator.ray_session import Cluster, ClusterError, Node

ROOT = Path(__file__).parents[2]

WAITS = """
import sys
from orchestrator.config import GuardConfig, PlacementConfig, TrainConfig
from orchestrator.control.waiting import place_in_time
from orchestrator.ray_session import ray_session

least, most, wait_s = int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4])
placement = PlacementConfig(
    ray_address=sys.argv[1], min_workers=least, num_workers=most, cpus_per_worker=1, use_gpu=False
)
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


def test_whether_to_wait_for_gpus_is_to_be_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """A head without a GPU says nothing of the machines that will come: of an elastic run or an autoscaler."""
    head, eight = Cluster((Node(4, 0),)), Cluster((Node(4, 0), Node(64, 8)))
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    for fields in ({"autoscaling": True, "num_workers": 2}, {"min_workers": 2, "num_workers": 4}):

        def place_on(cluster: Cluster, use_gpu: bool | None, fields: Any = fields) -> Placement:
            return place(TrainConfig(placement=PlacementConfig(use_gpu=use_gpu, **fields)), cluster)

        with pytest.raises(ValueError, match=r"no GPUs yet.*--placement.use-gpu True") as refused:
            place_on(head, None)
        assert not isinstance(refused.value, ClusterError)  # which would be waited for
        assert place_on(head, False).use_gpu is False
        with pytest.raises(ClusterError, match="2 workers need more GPUs than the cluster's 0"):
            place_on(head, True)
        assert place_on(eight, None).use_gpu is True
    fixed = TrainConfig(placement=PlacementConfig(num_workers=2))
    assert place(fixed, head).use_gpu is False  # what is there is all there is
    monkeypatch.delenv("RAY_ADDRESS")
    assert place(TrainConfig(placement=PlacementConfig(min_workers=2, num_workers=4)), head).use_gpu is False


@pytest.mark.parametrize("number", [{"num_workers": 4}, {"min_workers": 4}])
def test_what_an_autoscaler_is_asked_for(number: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers with GPUs, also where that was left to the cluster; which may lose its only one in the meantime."""
    asked: list[list[dict[str, float]]] = []
    seen = iter([Cluster((Node(8, 0),)), Cluster((Node(8, 2), Node(8, 2)))])
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    monkeypatch.setattr(waiting, "_POLL_S", 0.0)
    monkeypatch.setattr(waiting, "cluster_now", lambda: next(seen))
    monkeypatch.setattr("ray.util.placement_group", lambda workers, strategy: asked.append(workers))
    monkeypatch.setattr("ray.util.remove_placement_group", lambda group: None)
    config = TrainConfig(placement=PlacementConfig(autoscaling=True, cpus_per_worker=3, **number))
    placed = waiting.place_in_time(config, Cluster((Node(8, 1),)), lambda text: None, lambda: None)
    assert asked == [[{"CPU": 3, "GPU": 1}] * 4]
    assert (placed.num_workers, placed.use_gpu) == (4, True)


def test_an_autoscaler_has_to_be_asked_for_a_number() -> None:
    with pytest.raises(ValueError, match=r"asks for no machine: give placement\.num_workers"):
        TrainConfig(placement=PlacementConfig(autoscaling=True))


def test_only_a_cluster_of_others_may_grow() -> None:
    elastic = TrainConfig(placement=PlacementConfig(min_workers=1))
    autoscaled = TrainConfig(placement=PlacementConfig(autoscaling=True, num_workers=1))
    address = {"RAY_ADDRESS": "10.0.0.1:6379"}
    assert may_grow(elastic, address)
    assert may_grow(autoscaled, address)
    assert not may_grow(TrainConfig(), address)
    assert not may_grow(elastic, {})
    assert not may_grow(elastic, {"RAY_ADDRESS": "local"})
