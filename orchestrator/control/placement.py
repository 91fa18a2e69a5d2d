"""How many workers, and what each is given: the config against the machines of a cluster."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass

from orchestrator.config import TrainConfig
from orchestrator.ray_session import Cluster, ClusterError
from orchestrator.world import largest_share, share_of


@dataclass(frozen=True)
class Placement:
    """Workers of a run: how many now, what each is given, and the range in which an elastic run stays."""

    num_workers: int
    cpus_per_worker: int
    use_gpu: bool
    least_workers: int
    most_workers: int
    workers_per_node: tuple[int, ...] = ()  # of the nodes that have some, packed; () where that is another's to say

    @property
    def is_elastic(self) -> bool:
        return self.least_workers < self.most_workers


def place(config: TrainConfig, cluster: Cluster) -> Placement:
    """Workers for this cluster. Raises ClusterError where it has too few CPUs or GPUs; see ``uses_gpu`` as well."""
    p, batch = config.placement, config.batch
    use_gpu = uses_gpu(config, cluster)
    sharing = p.runs_per_gpu if use_gpu else 1
    slots = slots_of(cluster, use_gpu, max(1, p.cpus_per_worker), sharing)
    slots = min(1, slots) if sharing > 1 else slots  # two workers of a run cannot share a GPU: NCCL refuses
    each = f", {p.cpus_per_worker} for each on one node" if p.cpus_per_worker > 1 else ""
    least = p.min_workers or p.num_workers
    if least > slots:
        kind = "GPUs" if use_gpu and least > cluster.gpus else "CPUs"
        have = f"{cluster.gpus}" if kind == "GPUs" else f"{cluster.cpus}{each}"
        raise ClusterError(
            f"{least} workers need more {kind} than the cluster's {have}: lower --placement.num-workers "
            "(0 takes what is there)" + (" or --placement.cpus-per-worker" if each else "")
        )
    if slots < 1 and use_gpu and not cluster.gpus:
        raise ClusterError("the cluster has no GPUs for a worker: start one with some, or change --placement.use-gpu")
    if slots < 1:
        raise ClusterError(
            f"no node of the cluster has the CPUs for a worker{each}: start one with some, or lower "
            "--placement.cpus-per-worker"
        )
    most = p.num_workers or largest_share(slots, batch.global_batch_size, batch.bn_group_size)
    share_of(0, most, batch.global_batch_size, batch.bn_group_size)
    num_workers = largest_share(min(most, slots), batch.global_batch_size, batch.bn_group_size)
    cpus = p.cpus_per_worker
    if not cpus and use_gpu:
        cpus = max(1, min(node.cpus // (node.gpus * sharing) for node in cluster.nodes if node.gpus))
    elif not cpus:
        cpus = max(n for n in range(1, cluster.cpus + 1) if slots_of(cluster, use_gpu, n) >= num_workers)
    per_node, left = [], num_workers
    for slots in sorted(_slots(cluster, use_gpu, cpus, sharing), reverse=True):
        per_node.append(min(slots, left))
        left -= per_node[-1]
    packed = tuple(workers for workers in per_node if workers)
    return Placement(num_workers, cpus, use_gpu, p.min_workers or most, most, packed)


def uses_gpu(config: TrainConfig, cluster: Cluster) -> bool:
    """Whether each worker has a GPU. Raises ValueError where nobody has said so, and what is there does not tell: a
    cluster whose GPUs are still to come would be trained on with its CPUs, for weeks.
    """
    asked = config.placement.use_gpu
    if asked is None and not cluster.gpus and may_grow(config):
        raise ValueError(
            "the cluster has no GPUs yet, and machines that have some may still come: give --placement.use-gpu True to "
            "wait for them, or False to train on CPUs"
        )
    return cluster.gpus > 0 if asked is None else asked


def slots_of(cluster: Cluster, use_gpu: bool, cpus_per_worker: int, runs_per_gpu: int = 1) -> int:
    """Workers that fit, node by node."""
    return sum(_slots(cluster, use_gpu, cpus_per_worker, runs_per_gpu))


def resources_of_worker(use_gpu: bool, cpus: int, runs_per_gpu: int) -> dict[str, float]:
    """What Ray is to keep for a worker. Its numbers have four decimals: three thirds must fit."""
    return {"CPU": cpus} | ({"GPU": math.floor(10_000 / runs_per_gpu) / 10_000} if use_gpu else {})


def _slots(cluster: Cluster, use_gpu: bool, cpus_per_worker: int, runs_per_gpu: int = 1) -> list[int]:
    return [
        min(node.gpus * runs_per_gpu, node.cpus // cpus_per_worker) if use_gpu else node.cpus // cpus_per_worker
        for node in cluster.nodes
    ]


def may_grow(config: TrainConfig, environment: Mapping[str, str] = os.environ) -> bool:
    """Whether a cluster that is too small now may be the right one soon; one that is started here never is."""
    address = config.placement.ray_address or environment.get("RAY_ADDRESS", "")
    return address not in ("", "local") and (config.placement.autoscaling or config.placement.min_workers > 0)
