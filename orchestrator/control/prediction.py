"""How long a run, or a campaign, will take on how many workers, what it stores, how often a checkpoint pays: on paper.

Pure: numbers in, numbers out. A step is computing (the passes of the batch-norm groups through the network, one after
another, as training/step.py does them), what of the gradients' reduction the backward pass does not hide, and no less
than the input side takes. A run is its steps and forward passes, over the goodput under faults.

Left out: workers that differ in speed, traffic of others, the cost of synchronized statistics beyond their reductions,
a learning rate policy that ends a run sooner. What is assumed stands below with its source.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass

from orchestrator.world import share_of

# -- what is assumed where nothing was measured ---------------------------------------------------------------------

# NVIDIA's published figure: ResNet-50 v1.5, PyTorch, mixed precision, synthetic images, NCHW, one H200.
GPU_IMAGES_PER_S, GPU_PASS_IMAGES = 3080.0, 256
GPU_FLOPS, GPU_LAYERS = 4_089_184_256, 50  # multiply-adds of that network for one image, and its layers
# Of a pass of ResNet-50, whatever its images: from groups of 32 and of 256 on an H100 (benchmarks/RESULTS.md):
# 32 / 1,782 s = fixed + 32 / speed and 256 / 4,112 s = fixed + 256 / speed. Most likely kernel launches.
GPU_FIXED_S = 0.0116
# ResNet-18 at 64 pixels (148 million multiply-adds forward), 130 to 139 images/s on 2 cores (benchmarks/RESULTS.md).
CPU_FLOPS_PER_CORE_S = 10e9
# 419 unexpected interruptions in 54 days of 2,048 nodes of 8 GPUs (The Llama 3 Herd of Models, 2024, section 3.3.4).
NODE_MTBF_S = 54 * 86_400 * 2048 / 419
STALL_S_PER_BYTE = 0.18 / 205e6  # what a checkpoint of 205 MB takes from training on 2 cores (benchmarks/RESULTS.md)

_BACKWARD_SHARE = 2 / 3  # of a pass: two products for each of the forward pass's one
_FORWARD_SHARE = 1 / 3
_BUCKET_BYTES = 25 << 20  # DDP's default
_SCORE_BYTES = 4
_AS_SOON = 1.02  # of the shortest time: no more workers are taken for the last 2 %


@dataclass(frozen=True)
class ModelCost:
    """A network, as time and storage see it. flops: multiply-adds forward for one image; bytes are of float32."""

    flops: int
    layers: int
    parameters: int
    buffers: int = 0  # numbers of batch norm's running statistics
    batch_norms: int = 0

    @property
    def gradient_bytes(self) -> int:
        return 4 * self.parameters

    @property
    def model_bytes(self) -> int:
        return 4 * (self.parameters + self.buffers)

    @property
    def checkpoint_bytes(self) -> int:
        """Weights, buffers, momentum."""
        return self.model_bytes + self.gradient_bytes


@dataclass(frozen=True)
class Chip:
    """How fast a worker trains one network: a pass of n images takes fixed_s + n / images_per_s."""

    fixed_s: float
    images_per_s: float

    def pass_s(self, images: int) -> float:
        """Forward and backward."""
        return self.fixed_s + images / self.images_per_s

    @staticmethod
    def measured(images_per_s: float, pass_images: int, fixed_s: float) -> Chip:
        """From the speed of passes of ``pass_images``, the fixed part of which is known. Raises ValueError."""
        rest_s = pass_images / images_per_s - fixed_s
        if rest_s <= 0:
            raise ValueError(
                f"{images_per_s:g} images/s leave {pass_images / images_per_s:.4f} s to a pass of {pass_images} "
                f"images, less than the fixed {fixed_s:g} s: lower one of the two"
            )
        return Chip(fixed_s, pass_images / rest_s)

    def scaled(self, cost: ModelCost, flops: int = GPU_FLOPS, layers: int = GPU_LAYERS) -> Chip:
        """For another network than that of ``flops`` and ``layers``: speed by FLOPs, the fixed part by layers."""
        return Chip(self.fixed_s * cost.layers / layers, self.images_per_s * flops / cost.flops)


def assumed_chip(cost: ModelCost, *, cpus: int = 0) -> Chip:
    """A worker that nobody has measured: a GPU, or ``cpus`` cores."""
    if cpus:
        return Chip(0.0, cpus * CPU_FLOPS_PER_CORE_S / cost.flops)
    return Chip.measured(GPU_IMAGES_PER_S, GPU_PASS_IMAGES, GPU_FIXED_S).scaled(cost)


# -- a step ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Wires:
    """What joins workers: within a node, bytes/s of a worker in each direction; between nodes, bytes/s of a node.

    Latencies are those of a hop; launch_s: what a reduction takes before anything is sent.
    """

    workers_per_node: int
    inner_bytes_per_s: float
    node_bytes_per_s: float
    inner_latency_s: float
    latency_s: float
    launch_s: float

    def nodes(self, workers: int) -> int:
        return -(-workers // self.workers_per_node)

    def reduce_s(self, nbytes: int, workers: int) -> float:
        """A sum over ``workers``: a ring within each node, then rings of the parts between nodes (hierarchical)."""
        if workers == 1:
            return 0.0
        inner, nodes = min(workers, self.workers_per_node), self.nodes(workers)
        within_s = _ring_s(nbytes, inner, self.inner_bytes_per_s, self.inner_latency_s)
        return self.launch_s + within_s + _ring_s(nbytes, nodes, self.node_bytes_per_s, self.latency_s)


def _ring_s(nbytes: int, members: int, bytes_per_s: float, latency_s: float) -> float:
    return 2 * (members - 1) / members * nbytes / bytes_per_s + 2 * (members - 1) * latency_s


@dataclass(frozen=True)
class StepTime:
    """Seconds of one step: computing, the reductions that nothing hides, and what the input side takes for it."""

    compute_s: float
    exposed_s: float
    input_s: float

    @property
    def seconds(self) -> float:
        return max(self.compute_s + self.exposed_s, self.input_s)


def step_time(
    cost: ModelCost,
    chip: Chip,
    wires: Wires,
    workers: int,
    global_batch_size: int,
    bn_group_size: int,
    input_images_per_s: float = math.inf,
) -> StepTime:
    """Of the worker that has most to do. Raises ValueError where ``workers`` cannot share the groups."""
    share = share_of(0, workers, global_batch_size, bn_group_size)
    pass_s = chip.pass_s(share.images_per_group)
    if share.sharers > 1:  # each batch norm sums twice forward, and again backward
        pass_s += 4 * cost.batch_norms * wires.reduce_s(0, share.sharers)
    input_s = share.num_groups * share.images_per_group / input_images_per_s
    if workers == 1:
        return StepTime(share.num_groups * pass_s, 0.0, input_s)
    # Gradients are reduced during the backward pass of the last group only, bucket after bucket as they are ready.
    buckets = max(1, -(-cost.gradient_bytes // _BUCKET_BYTES))
    bucket_s = wires.reduce_s(cost.gradient_bytes // buckets, workers)
    window_s = _BACKWARD_SHARE * pass_s
    exposed_s = max(bucket_s, buckets * bucket_s - window_s * (buckets - 1) / buckets)
    exposed_s += wires.reduce_s(4 * cost.buffers, workers)  # running statistics, after it
    return StepTime(share.num_groups * pass_s, exposed_s, input_s)


# -- a run under faults ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Faults:
    """Of a run. mtbf_s: mean time between failures that stop it; stall_s: what a checkpoint takes from training;
    restart_s: from a failure to the first step after it; publish_s: from a checkpoint until it counts.
    """

    mtbf_s: float
    stall_s: float
    restart_s: float
    publish_s: float = 0.0


def young_s(stall_s: float, mtbf_s: float) -> float:
    """Seconds of training between two checkpoints that cost least, to first order (Young, CACM 17, 1974)."""
    return math.sqrt(2 * stall_s * mtbf_s)


def daly_s(stall_s: float, mtbf_s: float) -> float:
    """The same to higher order (Daly, Future Generation Computer Systems 22, 2006)."""
    if stall_s >= 2 * mtbf_s:
        return mtbf_s
    small = math.sqrt(stall_s / (2 * mtbf_s))
    return young_s(stall_s, mtbf_s) * (1 + small / 3 + small**2 / 9) - stall_s


def goodput(interval_s: float, faults: Faults) -> float:
    """Useful time of all time, with a checkpoint after every ``interval_s`` of training and failures at random (Daly
    2006, the complete cost function: restarts fail too). What is not yet published is lost beside the interval begun.
    """
    exponent = (interval_s + faults.stall_s) / faults.mtbf_s
    lost = (faults.restart_s + faults.publish_s) / faults.mtbf_s
    if exponent + lost > 700:  # exp would overflow: it never gets anywhere
        return 0.0
    return interval_s / (faults.mtbf_s * math.exp(lost) * math.expm1(exponent))


# -- a campaign -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Site:
    """Where members run: wires, images/s that a worker can be fed, and what fails there."""

    wires: Wires
    input_images_per_s: float
    node_mtbf_s: float
    restart_s: float
    publish_s: float
    stall_s_per_byte: float

    def faults(self, cost: ModelCost, workers: int) -> Faults:
        mtbf_s = self.node_mtbf_s / self.wires.nodes(workers)
        return Faults(mtbf_s, self.stall_s_per_byte * cost.checkpoint_bytes, self.restart_s, self.publish_s)


@dataclass(frozen=True)
class Work:
    """A member. images: all that it trains on, each time counted; forward_images: views of validations and tests.

    largest_batch_size: the batch grows with the workers, a group each, up to this; 0: it does not.
    """

    name: str
    cost: ModelCost
    chip: Chip
    images: int
    forward_images: int
    global_batch_size: int
    bn_group_size: int
    largest_batch_size: int = 0

    def workers(self, most: int) -> int:
        """The most workers up to ``most`` that a campaign gives it: one for each batch-norm group."""
        return min(most, max(self.global_batch_size, self.largest_batch_size) // self.bn_group_size)

    def batch_size(self, workers: int) -> int:
        return max(self.global_batch_size, min(workers * self.bn_group_size, self.largest_batch_size))


@dataclass(frozen=True)
class RunTime:
    """A member on its workers. efficiency: speed of a worker against one that has the batch for itself; interval_s:
    training between two checkpoints that costs least; useful_s: without faults and checkpoints.
    """

    work: Work
    workers: int
    batch_size: int
    steps: int
    step: StepTime
    efficiency: float
    interval_s: float
    goodput: float
    useful_s: float

    @property
    def wall_s(self) -> float:
        return self.useful_s / self.goodput

    @property
    def worker_s(self) -> float:
        return self.workers * self.wall_s


def run_time(work: Work, workers: int, site: Site) -> RunTime:
    """``work`` on ``workers``, with the checkpoint interval that costs least."""
    batch_size = work.batch_size(workers)
    groups = batch_size // work.bn_group_size
    step = step_time(work.cost, work.chip, site.wires, workers, batch_size, work.bn_group_size, site.input_images_per_s)
    steps = -(-work.images // batch_size)
    forward_s = _FORWARD_SHARE * work.forward_images / work.chip.images_per_s / workers
    faults = site.faults(work.cost, workers)
    interval_s = daly_s(faults.stall_s, faults.mtbf_s)
    return RunTime(
        work,
        workers,
        batch_size,
        steps,
        step,
        efficiency=groups * work.chip.pass_s(work.bn_group_size) / (workers * step.seconds),
        interval_s=interval_s,
        goodput=goodput(interval_s, faults),
        useful_s=steps * step.seconds + forward_s,
    )


@dataclass(frozen=True)
class CampaignTime:
    """Members on a cluster, and when the last of them ends."""

    runs: tuple[RunTime, ...]
    wall_s: float
    busy: int  # workers at work at the same time, at most

    @property
    def worker_s(self) -> float:
        return sum(run.worker_s for run in self.runs)

    @property
    def goodput(self) -> float:
        """Of all members' worker seconds."""
        return sum(run.workers * run.useful_s for run in self.runs) / self.worker_s


def in_turn(runs: Sequence[RunTime], slots: int) -> CampaignTime:
    """Members on ``slots`` workers, the longest first, each as soon as there is room for it."""
    ends: list[tuple[float, int]] = []  # of those at work: when, and with how many workers
    now_s, free, busy, last_s = 0.0, slots, 0, 0.0
    for run in sorted(runs, key=lambda run: -run.wall_s):
        while run.workers > free:
            now_s, freed = heapq.heappop(ends)
            free += freed
        heapq.heappush(ends, (now_s + run.wall_s, run.workers))
        free -= run.workers
        busy, last_s = max(busy, slots - free), max(last_s, now_s + run.wall_s)
    return CampaignTime(tuple(runs), last_s, busy)


def campaign_time(works: Sequence[Work], slots: int, site: Site) -> CampaignTime:
    """The same number of workers for each member, as far as they are of use to it: of those with which the campaign
    is done soonest (to 2 %), the fewest.
    """
    most = min(slots, max(work.workers(slots) for work in works))
    counts = {tuple(work.workers(each) for work in works): each for each in range(most, 0, -1)}
    found = {
        each: in_turn([run_time(work, n, site) for work, n in zip(works, workers, strict=True)], slots)
        for workers, each in counts.items()
    }
    soonest_s = min(one.wall_s for one in found.values())
    return found[min(each for each, one in found.items() if one.wall_s <= _AS_SOON * soonest_s)]


# -- storage --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stored:
    """Bytes that a run leaves: checkpoints (with the one that is being written), the finished model, scores."""

    checkpoints: int
    model: int
    scores: int

    @property
    def total(self) -> int:
        return self.checkpoints + self.model + self.scores


def stored(checkpoint_bytes: int, model_bytes: int, keep_last: int, scored_images: int, num_classes: int) -> Stored:
    """The newest ``keep_last``, the best, the next one; float32 scores of ``scored_images``, over all tests."""
    tested = scored_images > 0
    return Stored((keep_last + 2) * checkpoint_bytes, model_bytes * tested, scored_images * num_classes * _SCORE_BYTES)
