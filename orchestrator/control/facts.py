"""What a dry run finds out, as plain data, and the part of it that follows from config and numbers alone."""

from __future__ import annotations

import math
import os
import statistics
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum

import numpy as np

from orchestrator.config import (
    Order,
    PlateauError,
    PolicyKind,
    Precision,
    ScheduleConfig,
    Tested,
    TrainConfig,
    WarmupKind,
)
from orchestrator.control import prediction
from orchestrator.control.checks import Finding, Space, Verdict
from orchestrator.control.placement import Placement, place
from orchestrator.control.prediction import ModelCost, Stored, Wires
from orchestrator.evaluation.results import Test
from orchestrator.ray_session import Cluster
from orchestrator.training.optimization import total_steps
from orchestrator.training.run import Outcome
from orchestrator.world import Share, share_of


class RunState(Enum):
    """Where a run stands before a start."""

    NEW = "new"
    GOES_ON = "goes on"
    FINISHED = "finished"
    TESTED = "tested"  # as it stands; it is not trained
    UNKNOWN = "unknown"  # refused, or its storage cannot be read


@dataclass(frozen=True)
class RunFacts:
    """The run in storage. ``step``: of the newest verified checkpoint; ``attempt``: number of the newest start."""

    url: str
    state: RunState
    step: int = 0
    attempt: int = 0
    attempt_by: str = ""
    outcome: Outcome | None = None


@dataclass(frozen=True)
class ModelFacts:
    """The network as the data needs it. ``flops``: multiply-adds for one image of crop_px × crop_px pixels."""

    layers: int
    parameters: int
    flops: int
    crop_px: int
    num_classes: int


@dataclass(frozen=True)
class TestFacts:
    """What comes after training: whether the finished model is there; each test, and whether its scores are there."""

    __test__ = False  # no class of tests for pytest

    tested: Tested
    precise_bn_images: int
    is_finished: bool
    tests: tuple[tuple[Test, bool], ...]

    @property
    def are_done(self) -> bool:
        return self.is_finished and all(is_done for _, is_done in self.tests)


@dataclass(frozen=True)
class SplitFacts:
    """One split: images, bytes and number of its shards, images that preparation found undecodable."""

    name: str
    images: int
    nbytes: int
    shards: int
    undecodable: int


@dataclass(frozen=True)
class DataFacts:
    """The data set. ``odd``: how many files of which split are what; ``sha256``: its digest; ``window_classes``: those
    of the first window of the windowed order, else 0.
    """

    url: str
    is_local: bool
    name: str
    sha256: str
    num_classes: int
    splits: tuple[SplitFacts, ...]
    odd: tuple[tuple[str, str, int], ...]  # split, what, number of files
    statistics_crop_px: int
    order: Order
    window_classes: int = 0


@dataclass(frozen=True)
class ScheduleFacts:
    """Length of the run, at most: a plateau may end it sooner."""

    steps: int
    epochs: float
    steps_per_epoch: float
    images_seen: int
    validations: int
    checkpoints: int
    policy: str


@dataclass(frozen=True)
class BatchFacts:
    """The batch-norm groups, and every number of workers that can share them."""

    global_batch_size: int
    num_groups: int
    bn_group_size: int
    worker_counts: tuple[int, ...]


@dataclass(frozen=True)
class PlacementFacts:
    """Workers on the machines described, and what each does of a batch (shares[rank])."""

    placement: Placement
    shares: tuple[Share, ...]


@dataclass(frozen=True)
class Speed:
    """Images a second of all workers. step: of the newest measurement in the run's journal; 0: assumed, and nothing
    that goes between workers is counted.
    """

    images_per_s: float
    step: int = 0


@dataclass(frozen=True)
class PredictionFacts:
    """What is left of the run, on paper (prediction.py). ``trouble``: why its time cannot be foretold, then seconds
    and the rest that needs a speed are 0; ``seconds``: training and validations, without failures; ``every_s``:
    training between two checkpoints as configured, ``best_s``: as costs least where ``nodes`` fail at times and each
    takes ``stall_s`` from training. ``stored``: None: not known.
    """

    trouble: str = ""
    speed: Speed = Speed(0.0)
    steps_left: int = 0
    seconds: float = 0.0
    nodes: int = 1
    stall_s: float = 0.0
    every_s: float = 0.0
    best_s: float = 0.0
    step_s: float = 0.0
    stored: Stored | None = None


@dataclass(frozen=True)
class Machines:
    """Where the workers would be. ``cluster`` None: it cannot be looked at, see ``trouble``.

    world_size: workers that torchrun has started, which no cluster limits; 0 under Ray.
    """

    words: str
    cluster: Cluster | None
    trouble: str = ""
    world_size: int = 0
    local_world_size: int = 1
    is_described: bool = False  # on the command line: they need not be there


@dataclass(frozen=True)
class Plan:
    """What a start of ``config`` would do. None: what could not be found out, see the findings."""

    config: TrainConfig
    machines: Machines
    batch: BatchFacts
    run: RunFacts | None
    model: ModelFacts | None
    data: DataFacts | None
    trains: bool
    schedule: ScheduleFacts | None
    space: Space | None
    placement: PlacementFacts | None
    tests: TestFacts | None  # none are asked for
    prediction: PredictionFacts | None  # nothing is left to train
    findings: tuple[Finding, ...]

    @property
    def refusals(self) -> tuple[Finding, ...]:
        """Why a start would be refused; () where it would go on."""
        return tuple(f for f in self.findings if f.verdict is Verdict.REFUSED)


# -- from config and numbers ---------------------------------------------------------------------------------------


def batch_facts(global_batch_size: int, bn_group_size: int) -> BatchFacts:
    """The groups of a batch and all numbers of workers, up to one an image, that can share them."""
    counts = []
    for size in range(1, global_batch_size + 1):
        with suppress(ValueError):
            share_of(0, size, global_batch_size, bn_group_size)
            counts.append(size)
    return BatchFacts(global_batch_size, global_batch_size // bn_group_size, bn_group_size, tuple(counts))


def placement_facts(config: TrainConfig, machines: Machines) -> PlacementFacts:
    """Workers of ``config`` on ``machines``. Raises ValueError where a start would be refused."""
    if machines.cluster is None:
        raise ValueError(machines.trouble)
    size, cpus = machines.world_size, config.placement.cpus_per_worker
    if size:
        cpus = cpus or max(1, len(os.sched_getaffinity(0)) // machines.local_world_size)
        placement = Placement(size, cpus, machines.cluster.gpus > 0, size, size)
    else:
        placement = place(config, machines.cluster)
    b, size = config.batch, placement.num_workers
    shares = tuple(share_of(rank, size, b.global_batch_size, b.bn_group_size) for rank in range(size))
    return PlacementFacts(placement, shares)


def schedule_facts(config: TrainConfig, num_images: int) -> ScheduleFacts:
    """Length and rhythm of a run on ``num_images`` training images."""
    rhythm, batch_size = config.rhythm, config.batch.global_batch_size
    steps = total_steps(config.schedule, num_images, batch_size)
    images_between, every = num_images * rhythm.validate_every_epochs, rhythm.checkpoint_every_steps
    # The trainer's rule, counted: a validation where a step crosses a multiple of ``images_between``, and at the end.
    crossed = steps if batch_size > images_between else int(steps * batch_size // images_between)
    validations = crossed + (not _is_due(np.array([steps]), batch_size, images_between)[0])
    checkpoints = validations
    for first in range(every, steps, every * _AT_A_TIME):
        ends = np.arange(first, min(first + every * _AT_A_TIME, steps), every)
        checkpoints += int((~_is_due(ends, batch_size, images_between)).sum())
    return ScheduleFacts(
        steps=steps,
        epochs=steps * batch_size / num_images,
        steps_per_epoch=num_images / batch_size,
        images_seen=steps * batch_size,
        validations=validations,
        checkpoints=checkpoints,
        policy=policy_in_words(config.schedule, steps),
    )


def prediction_facts(
    config: TrainConfig,
    machines: Machines,
    run: RunFacts | None,
    model: ModelFacts | None,
    data: DataFacts | None,
    schedule: ScheduleFacts | None,
    placement: PlacementFacts | None,
    space: Space | None,
    tests: TestFacts | None,
    measured: Speed | None,
) -> PredictionFacts | None:
    """Time, storage and checkpoints of what is left; None where nothing is left to train."""
    if run is not None and run.state in (RunState.FINISHED, RunState.TESTED):
        return None
    if run is None or run.state is RunState.UNKNOWN:
        return PredictionFacts(trouble="unknown: see the checks")
    if model is None or data is None or schedule is None or placement is None or space is None:
        return PredictionFacts(trouble="unknown: see the checks")
    images = {split.name: split.images for split in data.splits}
    scored = sum(images.get(test.split, 0) for test, _ in tests.tests) if tests else 0
    model_bytes = space.checkpoint_bytes - 4 * model.parameters
    keep_last = config.rhythm.keep_last
    stored = prediction.stored(space.checkpoint_bytes, model_bytes, keep_last, scored, model.num_classes)
    found = measured or _assumed_speed(config, model, placement.placement)
    if isinstance(found, str):
        return PredictionFacts(trouble=found, stored=stored)
    left = max(0, schedule.steps - run.step)
    step_s = config.batch.global_batch_size / found.images_per_s
    # A forward pass takes a third of a step's time for an image.
    validations = math.ceil(schedule.validations * left / schedule.steps)
    validation_s = validations * images.get("val", 0) / found.images_per_s / 3
    nodes = len(placement.placement.workers_per_node) or 1
    if machines.world_size:
        nodes = -(-machines.world_size // machines.local_world_size)
    stall_s = prediction.STALL_S_PER_BYTE * space.checkpoint_bytes
    return PredictionFacts(
        speed=found,
        steps_left=left,
        seconds=left * step_s + validation_s,
        nodes=nodes,
        stall_s=stall_s,
        every_s=config.rhythm.checkpoint_every_steps * step_s,
        best_s=prediction.daly_s(stall_s, prediction.NODE_MTBF_S / nodes),
        step_s=step_s,
        stored=stored,
    )


def measured_speed(journal: Iterable[dict]) -> Speed | None:
    """The median of the newest measurements of training in a run's journal; None where there is none."""
    found = [(e["metrics"].get("images_per_s", 0.0), e["step"]) for e in journal if e.get("kind") == "train"]
    newest = [(speed, step) for speed, step in found if speed > 0][-_NEWEST:]
    return Speed(statistics.median(speed for speed, _ in newest), newest[-1][1]) if newest else None


_NEWEST = 10  # measurements


def _assumed_speed(config: TrainConfig, model: ModelFacts, placement: Placement) -> Speed | str:
    """By multiply-adds; or why not."""
    if config.model.factory:
        return "unknown before it has trained: what an own network costs is not known"
    if placement.use_gpu and config.numerics.precision is Precision.FP32:
        return "unknown before it has trained: what is known of GPUs is of bf16"
    size, group, workers = config.batch.global_batch_size, config.batch.bn_group_size, placement.num_workers
    if workers > size // group:
        return f"unknown before it has trained: {workers} workers share {size // group} batch-norm groups, never timed"
    cost = ModelCost(model.flops, model.layers, model.parameters)
    chip = prediction.assumed_chip(cost, cpus=0 if placement.use_gpu else placement.cpus_per_worker)
    return Speed(size / prediction.step_time(cost, chip, _NO_WIRES, workers, size, group).seconds)


_NO_WIRES = Wires(1, math.inf, math.inf, 0.0, 0.0, 0.0)  # nothing is known of them


_AT_A_TIME = 1 << 20


def _is_due(steps: np.ndarray, batch_size: int, images_between: float) -> np.ndarray:
    """Whether a validation follows each of ``steps`` [n] int64, the last of a run apart: [n] bool."""
    return np.asarray(steps * batch_size // images_between > (steps - 1) * batch_size // images_between)


def policy_in_words(schedule: ScheduleConfig, steps: int) -> str:
    """The learning rate over the ``steps`` of a run, in one line."""
    s = schedule
    match s.warmup:
        case WarmupKind.NONE:
            start = ""
        case WarmupKind.LINEAR:
            start = f"rises from {s.warmup_lr:g} in {s.warmup_steps:,} steps; then "
        case WarmupKind.UNTIL_ERROR:
            start = f"{s.warmup_lr:g} until the training error is below {s.warmup_error_percent:g} %; then "
    match s.policy:
        case PolicyKind.CONSTANT:
            return f"{start}{s.lr:g} throughout"
        case PolicyKind.COSINE:
            return f"{start}{s.lr:g}, falling to 0 as half a cosine until step {steps:,}"
        case PolicyKind.STEPS:
            at = ", ".join(f"{step:,}" for step in s.drop_steps)
            return f"{start}{s.lr:g}, times {s.lr_factor:g} at steps {at}"
        case PolicyKind.PLATEAU:
            watched = "validation" if s.plateau_error is PlateauError.VALIDATION else "training"
            drops = f"times {s.lr_factor:g} (at most {s.plateau_max_drops} times)" if s.plateau_max_drops else "no drop"
            rule = f"{drops} where {s.plateau_window} validations do not better the {watched} error"
            rule += f" by {s.plateau_threshold_percent:g} points"
            apart = f", {s.plateau_min_steps:,} steps apart" if s.plateau_min_steps else ""
            stop = "; the next plateau ends the run" if s.plateau_stop else ""
            return f"{start}{s.lr:g}, {rule}{apart}{stop}"
