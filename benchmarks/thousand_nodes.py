"""What a launch on 1,000 nodes of 8 GPUs costs: ``python -m benchmarks.thousand_nodes [--nodes N] [--quick]``.

No GPU and no node is there: the code that plans and watches is run for as many of them, and timed. Each line: seconds,
peak of the memory that Python holds beside what it held before, and what was done. The last line is machine-readable.
"""

from __future__ import annotations

import json
import pickle
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import tyro

from cluster.allocation import Node as AllocatedNode
from cluster.allocation import RayOnNodes
from cluster.launch import Job, Where
from cluster.settings import SlurmSettings
from cluster.slurm import Slurm
from jobs import command_line
from jobs.campaign_recipes import ilsvrc2015
from orchestrator.campaign.plan import Plan, pack
from orchestrator.config import BatchConfig, GuardConfig, TrainConfig
from orchestrator.control import dry_run
from orchestrator.control.facts import batch_facts, placement_facts
from orchestrator.control.guard import Watchdog
from orchestrator.control.mailbox import Mailbox, beat_interval_s
from orchestrator.control.stuck import Place
from orchestrator.data.sampling import SampleStream
from orchestrator.ray_session import ray_session
from orchestrator.training.pulse import Phase
from orchestrator.world import share_of

GPUS, CPUS, GROUP = 8, 96, 32
IMAGES = 1_281_167
STEPS = 3


class Costs:
    """Of what was done so far: seconds, and the largest peak in MB (10^6 bytes)."""

    def __init__(self) -> None:
        self.seconds, self.peak_mb = 0.0, 0.0

    def of(self, what: str, work: Callable[[], str]) -> None:
        began_s = time.perf_counter()
        told = work()
        seconds = time.perf_counter() - began_s
        tracemalloc.start()  # it slows what it measures: in a run of its own
        work()
        peak_mb = tracemalloc.get_traced_memory()[1] / 1e6
        tracemalloc.stop()
        self.seconds, self.peak_mb = self.seconds + seconds, max(self.peak_mb, peak_mb)
        print(f"{what:<10} {seconds:7.3f} s {peak_mb:7.1f} MB  {told}", flush=True)


@dataclass(frozen=True)
class Arguments:
    """What is measured."""

    nodes: int = 1000
    actor: bool = False
    """also the signs of life that a real Ray actor takes a second"""
    quick: bool = False
    """20 nodes"""


def main() -> int:
    a = tyro.cli(Arguments, description=__doc__)
    nodes = 20 if a.quick else a.nodes
    workers = nodes * GPUS
    config = replace(TrainConfig(), batch=BatchConfig(workers * GROUP, GROUP))
    costs = Costs()
    costs.of("placement", lambda: placement(config, nodes))
    costs.of("campaign", lambda: campaign(nodes))
    costs.of("samples", lambda: samples(config, workers))
    costs.of("watch", lambda: watch(nodes))
    costs.of("rendezvous", lambda: rendezvous(nodes))
    costs.of("script", lambda: script(nodes))
    if a.actor:
        actor(workers)
    print(f"nodes={nodes} workers={workers} seconds={costs.seconds:.3f} peak_mb={costs.peak_mb:.1f}")
    return 0


def placement(config: TrainConfig, nodes: int) -> str:
    """What a dry run finds out of a run on all of them."""
    found = placement_facts(config, dry_run.described([f"{nodes}x{CPUS}x{GPUS}"]))
    counts = batch_facts(config.batch.global_batch_size, GROUP).worker_counts
    per_node = set(found.placement.workers_per_node)
    assert per_node == {GPUS}
    return f"{found.placement.num_workers:,} workers, {GPUS} a node; {len(counts):,} numbers of workers would fit"


def campaign(nodes: int) -> str:
    """Six members packed onto all of them."""
    recipe = ilsvrc2015()
    cluster = dry_run.described([f"{nodes}x{CPUS}x{GPUS}"]).cluster
    assert cluster is not None
    packing = pack(Plan(recipe, {member.name: 600_000 for member in recipe.members}), cluster)
    return f"{packing.slots:,} workers fit; {sum(packing.workers.values()):,} are used (batches of 256 in groups of 32)"


def samples(config: TrainConfig, workers: int) -> str:
    """Which images each worker reads in its first steps: every image of an epoch once."""
    size, stream = config.batch.global_batch_size, SampleStream(IMAGES, seed=0)
    steps = min(STEPS, IMAGES // size)
    shares = [share_of(rank, workers, size, GROUP) for rank in range(workers)]
    seen = np.zeros(IMAGES, np.int8)
    for step in range(steps):
        positions = np.concatenate([share.positions(step, size, GROUP) for share in shares])
        seen[stream.images(positions)] += 1
        assert np.array_equal(stream.images(shares[-1].positions(step, size, GROUP)), stream.images(positions[-GROUP:]))
    assert seen.max() == 1
    assert int(seen.sum()) == steps * size
    return f"{steps} steps of {size:,} images dealt out to {workers:,} workers, none twice"


def watch(nodes: int) -> str:
    """A minute of signs of life, as the mailbox and the driver's watchdog take them."""
    workers = nodes * GPUS
    box, dog = Mailbox("r", asdict(GuardConfig())), Watchdog(GuardConfig().hang_timeout_s)
    for rank in range(workers):
        box.begin("g", workers, Place(rank, 1000 + rank, "1", f"host{rank // GPUS:04d}", f"{rank // GPUS:056x}"))
    beats = int(60 / beat_interval_s(workers)) + 1
    size = 0
    for count in range(beats):
        for rank in range(workers):
            beat = {"rank": rank, "step": count, "phase": Phase.COMPUTE, "count": count, "waits_for_storage": False}
            box.beat("g", beat)
        post = box.take(0)
        size = len(pickle.dumps(post))
        assert dog.look(post.now_s, post.group, post.beats) is None
    return f"{beats * workers:,} signs of life, one each {beat_interval_s(workers):.0f} s; {size / 1e6:.2f} MB a look"


def rendezvous(nodes: int) -> str:
    """All nodes of an allocation have joined, and none is lost: two looks of the first node at its folder."""
    with tempfile.TemporaryDirectory() as folder:
        ray = RayOnNodes(Path(folder), AllocatedNode(0, nodes, CPUS, GPUS), join_timeout_s=1)
        for rank in range(1, nodes):
            (Path(folder) / f"joined-{rank}.json").write_text(json.dumps({"host": f"host{rank:04d}"}))
            (Path(folder) / f"alive-{rank}").write_text("1")
        for _ in range(2):
            assert not ray.silent_nodes()
    return f"{nodes:,} nodes joined, looked at twice"


def script(nodes: int) -> str:
    """SLURM's batch script."""
    settings = SlurmSettings(nodes=nodes, cpus_per_node=CPUS, gpus_per_node=GPUS)
    job = Job("six", 1, Where.SLURM, ("jobs/campaign.py", "ilsvrc2015"), ".", "", {})
    text = Slurm(settings).preview(job, Path("launches"))
    assert f"--nodes={nodes}" in text
    return f"{len(text)} bytes"


def actor(workers: int) -> None:
    """Signs of life that one mailbox takes, sent by one process as fast as it can."""
    import ray

    with ray_session():
        box = ray.remote(num_cpus=0)(Mailbox).remote("r", asdict(GuardConfig()))
        beat = {"rank": 0, "step": 0, "phase": Phase.COMPUTE, "count": 0, "waits_for_storage": False}
        ray.get(box.begin.remote("g", workers, Place(0, 1, "1", "host", "node")))
        rates = []
        for _ in range(5):
            began_s = time.perf_counter()
            ray.get([box.beat.remote("g", beat) for _ in range(4000)])
            rates.append(4000 / (time.perf_counter() - began_s))
    needed, told = workers / beat_interval_s(workers), f"{min(rates):.0f}–{max(rates):.0f}"
    print(f"actor      {np.median(rates):.0f} signs of life a second ({told}); {needed:.0f} come")


if __name__ == "__main__":
    sys.exit(command_line.exit_code(main))
