"""Workers of a job on Ray are placed, or refused."""

from __future__ import annotations

import pytest

from orchestrator.config import BatchConfig, PlacementConfig, TrainConfig
from orchestrator.control.placement import place, resources_of_worker, slots_of
from orchestrator.ray_session import Cluster, Node

EIGHT_GPUS = Cluster((Node(cpus=64, gpus=4), Node(cpus=48, gpus=4)))
TWO_CPUS = Cluster((Node(cpus=2, gpus=0),))


def placed(placement: PlacementConfig, cluster: Cluster, batch: BatchConfig | None = None) -> tuple[int, int, bool]:
    config = TrainConfig(placement=placement, batch=batch or BatchConfig(256, 32))
    p = place(config, cluster)
    return p.num_workers, p.cpus_per_worker, p.use_gpu


def test_workers_are_placed_one_a_gpu_or_cpu() -> None:
    assert placed(PlacementConfig(), EIGHT_GPUS) == (8, 12, True)
    assert placed(PlacementConfig(num_workers=3), EIGHT_GPUS) == (3, 12, True)
    assert placed(PlacementConfig(), TWO_CPUS) == (2, 1, False)
    assert placed(PlacementConfig(num_workers=1), TWO_CPUS) == (1, 2, False)
    assert placed(PlacementConfig(use_gpu=False), EIGHT_GPUS) == (64, 1, False)
    # node by node: three CPUs cannot hold two workers of two
    assert placed(PlacementConfig(num_workers=3), Cluster((Node(8, 0), Node(8, 0))))[:2] == (3, 4)
    # 12 GPUs cannot share 8 groups: 8 of them are taken
    assert placed(PlacementConfig(), Cluster((Node(64, 12),)))[0] == 8


def test_a_cluster_that_is_too_small_is_refused() -> None:
    for placement, cluster, saying in (
        (PlacementConfig(num_workers=9), EIGHT_GPUS, "9 workers need more GPUs than the cluster's 8"),
        (PlacementConfig(num_workers=3), TWO_CPUS, "3 workers need more CPUs"),
        (PlacementConfig(num_workers=2, cpus_per_worker=2), TWO_CPUS, "2 workers need more CPUs"),
        (
            PlacementConfig(num_workers=3, cpus_per_worker=2),
            Cluster((Node(3, 0), Node(3, 0))),
            "3 workers need more CPUs",
        ),
        (PlacementConfig(num_workers=8, cpus_per_worker=16), EIGHT_GPUS, "8 workers need more"),
        (PlacementConfig(use_gpu=True), TWO_CPUS, "no GPUs for a worker"),
        (PlacementConfig(num_workers=9), Cluster((Node(64, 64),)), "cannot share 8 batch-norm groups"),
    ):
        with pytest.raises(ValueError, match=saying):
            placed(placement, cluster)


def test_an_elastic_run_takes_what_is_there() -> None:
    def elastic(least: int, most: int, cluster: Cluster) -> tuple[int, int, int, bool]:
        config = TrainConfig(placement=PlacementConfig(num_workers=most, min_workers=least, cpus_per_worker=1))
        p = place(config, cluster)
        return p.num_workers, p.least_workers, p.most_workers, p.is_elastic

    assert elastic(1, 4, TWO_CPUS) == (2, 1, 4, True)
    assert elastic(2, 8, EIGHT_GPUS) == (8, 2, 8, True)
    assert elastic(8, 8, EIGHT_GPUS)[3] is False
    # 8 groups: of 12 workers 8 work and 4 stand by, until there are 16
    assert elastic(8, 16, Cluster((Node(64, 12),))) == (8, 8, 16, True)
    with pytest.raises(ValueError, match="3 workers need more CPUs than the cluster's 2"):
        elastic(3, 8, TWO_CPUS)
    with pytest.raises(ValueError, match=r"min_workers 9 is more than placement\.num_workers 8"):
        elastic(9, 8, EIGHT_GPUS)
    with pytest.raises(ValueError, match="cannot share 8 batch-norm groups"):
        elastic(8, 12, Cluster((Node(64, 12),)))


def test_runs_share_a_gpu_with_one_worker_each() -> None:
    assert placed(PlacementConfig(runs_per_gpu=4), EIGHT_GPUS) == (1, 3, True)  # 48 CPUs for 16 runs
    assert placed(PlacementConfig(runs_per_gpu=4), TWO_CPUS) == (2, 1, False)  # there is none to share
    assert slots_of(EIGHT_GPUS, True, 3, 4) == 32
    assert slots_of(EIGHT_GPUS, True, 6, 4) == 10 + 8  # CPUs run out first
    with pytest.raises(ValueError, match=r"placement\.runs_per_gpu: runs that share a GPU have one worker each"):
        placed(PlacementConfig(runs_per_gpu=2, num_workers=2), EIGHT_GPUS)
    for runs in (2, 3, 7):  # all of them fit, as Ray counts: four decimals
        share = resources_of_worker(True, 1, runs)["GPU"]
        assert 1 / (runs + 1) < share
        assert runs * round(share * 10_000) <= 10_000
    assert resources_of_worker(True, 5, 1) == {"CPU": 5, "GPU": 1}
    assert resources_of_worker(False, 5, 3) == {"CPU": 5}
