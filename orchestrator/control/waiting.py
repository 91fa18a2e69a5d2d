"""Waiting for the machines of a cluster that grows: an elastic run's, or an autoscaler's."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

from orchestrator.config import TrainConfig
from orchestrator.control.placement import Placement, may_grow, place, resources_of_worker, uses_gpu
from orchestrator.ray_session import Cluster, ClusterError, cluster_now

_POLL_S = 2.0


def place_in_time(
    config: TrainConfig, cluster: Cluster, tell: Callable[[str], None], leave: Callable[[], None]
) -> Placement:
    """``place``; a cluster that may grow is waited for, for ``guard.wait_for_workers_s``.

    ``leave`` is called often, and raises where the wait is to end. Raises ClusterError where the cluster is too small,
    TimeoutError where it still is after the wait, ValueError where it cannot be known what to wait for.
    """
    # Decided once: what the cluster has changes while its machines come.
    config = replace(config, placement=replace(config.placement, use_gpu=uses_gpu(config, cluster)))
    try:
        return place(config, cluster)
    except ClusterError as error:
        if not may_grow(config):
            raise
        why = error
    limit_s, until_s = config.guard.wait_for_workers_s, time.monotonic() + config.guard.wait_for_workers_s
    tell(f"waiting for machines, for up to {limit_s:.0f} s (guard.wait_for_workers_s): {why}")
    with _asked_for(config):
        while time.monotonic() < until_s:
            leave()
            time.sleep(_POLL_S)
            try:
                return place(config, cluster_now())
            except ClusterError as error:
                why = error
    raise TimeoutError(f"machines did not come within {limit_s:.0f} s (guard.wait_for_workers_s): {why}")


@contextmanager
def _asked_for(config: TrainConfig) -> Iterator[None]:
    """An autoscaler starts machines for what is asked for and cannot be placed: here as many workers as are wanted."""
    p = config.placement
    if not p.autoscaling:
        yield
        return
    from ray.util import placement_group, remove_placement_group

    worker = resources_of_worker(bool(p.use_gpu), max(1, p.cpus_per_worker), p.runs_per_gpu)
    group = placement_group([worker] * (p.num_workers or p.min_workers), strategy="PACK")
    try:
        yield
    finally:
        remove_placement_group(group)
