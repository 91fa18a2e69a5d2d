"""What the trainer costs beside the network: its step against a bare loop's, with the same network and input.

    python -m benchmarks.overhead --data URL [--recipe resnet18_64px] [--cpus 1] [--quick] [--record FILE]

``trainer`` is ``orchestrator.training.trainer.train`` with journal, meters, pulse, guard and checkpoints at the
recipe's rhythm (no validations: they are work of their own). ``bare`` is a plain loop: same model class, TrainInput and
SGD; nothing is measured, told, checked or saved. They take turns within one process, a block of steps each: the trainer
stands still in its ``seen`` hook meanwhile. Neither's start is counted. A checkpoint or measurement comes at the head
of a block, so what it leaves to the background is in that block too. Overheads are by the clock, and in seconds of a
processor, which other work on the machine hardly changes; intervals are 95 % bootstraps over pairs of blocks.
The last line is machine-readable.
"""

from __future__ import annotations

import gc
import os
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import tyro

from benchmarks.machine import about, line_of, record
from benchmarks.recovery import NEVER, EnoughError, train_here
from jobs import command_line
from jobs.imagenet import RECIPES
from orchestrator.config import TrainConfig
from orchestrator.data.pipeline import TrainInput
from orchestrator.data.shards import DataSet
from orchestrator.storage import Storage
from orchestrator.training.assembly import autocast_dtype, build_model, decode_settings, sample_stream, views_of
from orchestrator.training.meters import cross_entropy
from orchestrator.training.notices import Event
from orchestrator.training.optimization import SGD
from orchestrator.world import World

GOAL_PERCENT = 2.0


@dataclass(frozen=True)
class Arguments:
    """What is measured."""

    data: str
    """URL of a prepared data set"""
    recipe: str = "resnet18_64px"
    """recipe of jobs/imagenet.py"""
    steps: int = 0
    """steps of each kind; 0: as many as there are between three checkpoints"""
    block_steps: int = 5
    """steps of one kind before it is the other's turn"""
    global_batch_size: int = 0
    """images in a step; 0: the recipe's"""
    bn_group_size: int = 0
    """images in a batch-norm group; 0: the recipe's"""
    cpus: int = 1
    """threads of each kind; 0: all processors"""
    scratch: Path = Path(tempfile.gettempdir())
    """where checkpoints are written"""
    quick: bool = False
    """only to see that it works: 20 steps of 8 images"""
    record: str = ""
    """file of Markdown that a table is appended to"""


class Bare:
    """The plain loop."""

    def __init__(self, config: TrainConfig, world: World, cpus: int) -> None:
        data = DataSet(Storage(config.data))
        split, (view, _, mean, axes) = data.split("train"), views_of(config, data)
        batch = config.batch.global_batch_size
        self._group, self._lr, self._batch = config.batch.bn_group_size, config.schedule.lr, batch
        self._device = world.device.type
        self._autocast = autocast_dtype(config.numerics.precision, world.device)
        torch.manual_seed(config.seed)
        self._model = build_model(config, data.num_classes).to(world.device)
        self._model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # missing in torch's stubs
        self._model.train()
        o = config.optimizer
        self._optimizer = SGD(
            self._model,
            momentum=o.momentum,
            weight_decay=o.weight_decay,
            decay_batch_norm=o.decay_batch_norm,
            caffe_momentum=o.caffe_momentum,
        )
        self._batches = TrainInput(
            split,
            sample_stream(config, split),
            view,
            axes,
            mean,
            decode_settings(config, world.device, cpus),
            lambda step: np.arange(step * batch, (step + 1) * batch),
            0,
            config.input.max_undecodable,
        )

    def steps(self, count: int) -> None:
        for _ in range(count):
            batch = next(self._batches)
            for first in range(0, self._batch, self._group):
                images, labels = batch.images[first : first + self._group], batch.labels[first : first + self._group]
                with torch.autocast(self._device, self._autocast, enabled=self._autocast is not None):
                    logits = self._model(images)
                (cross_entropy(logits, labels).sum() / self._batch).backward()
            self._optimizer.step(self._lr)
            self._optimizer.forget_gradients(in_place=False)

    def close(self) -> None:
        self._batches.close()


@dataclass(frozen=True)
class Blocks:
    """Seconds of blocks of steps that took turns: [pairs, 2] float64, by the clock and of a processor."""

    trainer: np.ndarray
    bare: np.ndarray
    block_steps: int
    measured: np.ndarray  # [pairs] bool: the trainer's block began with a training measurement
    saved: np.ndarray  # [pairs] bool: … and with a checkpoint

    def step_s(self) -> list[float]:
        """Mean seconds of a step of the bare loop, by the clock and of a processor."""
        return [float(seconds) for seconds in self.bare.mean(0) / self.block_steps]

    def percent(self, which: int) -> np.ndarray:
        """Overhead over all blocks and the ends of its 95 % interval: [3]; ``which``: 0 the clock, 1 processors."""
        ours, bare = self.trainer[:, which], self.bare[:, which]
        drawn = np.random.default_rng(0).integers(0, len(ours), (2000, len(ours)))
        low, high = np.percentile(ours[drawn].sum(1) / bare[drawn].sum(1), [2.5, 97.5])
        return 100 * (np.array([ours.sum() / bare.sum(), low, high]) - 1)

    def ordinary_percent(self, which: int) -> float:
        """Median over the pairs in which nothing was measured or saved."""
        plain = ~(self.measured | self.saved)
        ours, bare = self.trainer[plain, which], self.bare[plain, which]
        return float(100 * (np.median(ours / bare) - 1)) if len(ours) else float("nan")

    def extra_s(self, chosen: np.ndarray, which: int) -> float:
        """Mean seconds that the ``chosen`` blocks ([pairs] bool) take beyond ordinary ones."""
        beyond = self.trainer[:, which] - self.bare[:, which]
        plain = ~(self.measured | self.saved)
        if not chosen.any() or not plain.any():
            return float("nan")
        return float(beyond[chosen].mean() - np.median(beyond[plain]))


def rows_of(blocks: Blocks) -> list[tuple[str, ...]]:
    """What, by the clock, of a processor."""
    percents = [f"{percent:.2f} ({low:.2f} to {high:.2f})" for percent, low, high in map(blocks.percent, (0, 1))]
    only_measured = blocks.measured & ~blocks.saved
    rows = {
        "a step of the bare loop, s": [f"{seconds:.3f}" for seconds in blocks.step_s()],
        "all steps of the trainer: overhead, %": percents,
        "a step without measurement or checkpoint: overhead, %": [f"{blocks.ordinary_percent(w):.2f}" for w in (0, 1)],
        "a measurement, s": [f"{blocks.extra_s(only_measured, w):.3f}" for w in (0, 1)],
        "a checkpoint, s": [f"{blocks.extra_s(blocks.saved, w):.3f}" for w in (0, 1)],
    }
    return [(what, *cells) for what, cells in rows.items()]


def _now(world: World) -> np.ndarray:
    """[2] float64: seconds of the clock and of processors, when the device is done with all before."""
    if world.device.type == "cuda":
        torch.cuda.synchronize()
    return np.array([time.perf_counter(), time.process_time()])


def measure(config: TrainConfig, steps: int, block_steps: int, cpus: int) -> Blocks:
    """Trains in ``config.storage`` until ``steps`` steps of each kind are measured."""
    world = World(device="cuda" if torch.cuda.is_available() else "cpu")
    bare = Bare(config, world, cpus)
    spent: dict[str, list[np.ndarray]] = {"trainer": [], "bare": []}
    measured, saved = set[int](), set[int]()
    begin = _now(world)

    def emit(event: Event) -> None:
        # What belongs to the end of a block is done at the head of the next one: the hook comes first.
        if event["kind"] == "train":
            measured.add(event["step"] // block_steps)
        if event["kind"] == "saving":
            saved.add(event["step"] // block_steps)

    def seen(step: int, images: np.ndarray) -> None:
        nonlocal begin
        if (step + 1) % block_steps:
            return
        end = _now(world)
        spent["trainer"].append(end - begin)
        bare.steps(block_steps)
        begin = _now(world)
        spent["bare"].append(begin - end)
        if (step + 1) >= steps + block_steps:
            raise EnoughError

    try:
        train_here(config, emit, seen, world=world, cpus=cpus)
    except EnoughError:
        bare.close()
        gc.collect()
    # The first blocks hold the start, and fill caches.
    ours, plain = (np.array(spent[kind])[1:] for kind in ("trainer", "bare"))
    which = np.arange(1, len(ours) + 1)
    flags = [np.isin(which, sorted(numbers)) for numbers in (measured, saved)]
    return Blocks(ours, plain, block_steps, *flags)


def main() -> int:
    a = tyro.cli(Arguments, description=__doc__)
    if a.recipe not in RECIPES:
        raise ValueError(f"unknown recipe {a.recipe!r}: choose one of {', '.join(RECIPES)}")
    config = RECIPES[a.recipe]()
    if a.quick:
        a = replace(a, global_batch_size=8, bn_group_size=8, steps=20)
        config = replace(config, rhythm=replace(config.rhythm, log_every_steps=10, checkpoint_every_steps=20))
    batch, group = config.batch.global_batch_size, config.batch.bn_group_size
    size = a.global_batch_size or batch
    config = replace(
        config,
        data=Storage(a.data).url,
        name="overhead",
        batch=replace(config.batch, global_batch_size=size, bn_group_size=a.bn_group_size or min(group, size)),
        schedule=replace(config.schedule, max_steps=NEVER, max_epochs=0.0),
        rhythm=replace(config.rhythm, validate_every_epochs=1e6),
        placement=replace(config.placement, tune_input=False),  # the bare loop has the same input side
    )
    cpus = a.cpus or len(os.sched_getaffinity(0))
    steps = a.steps or 2 * config.rhythm.checkpoint_every_steps
    with tempfile.TemporaryDirectory(prefix="overhead-", dir=a.scratch) as folder:
        blocks = measure(replace(config, storage=folder), steps, a.block_steps, cpus)
    r, what = config.rhythm, f"{a.recipe}, batch {size} in groups of {config.batch.bn_group_size}, {cpus} threads"
    note = (
        f"{len(blocks.bare)} pairs of blocks of {a.block_steps} steps, a measurement every {r.log_every_steps} steps, "
        f"a checkpoint every {r.checkpoint_every_steps} ({int(blocks.saved.sum())} seen). "
        f"Goal: {GOAL_PERCENT:.0f} % at 0.3 s a step."
    )
    rows = rows_of(blocks)
    print(f"{what}; {about()}\n{note}")
    for row in rows:
        print(f"{row[0]:>54}: {row[1]:>24} by the clock, {row[2]:>24} of a processor")
    if a.record:
        header = ("what", "by the clock", "of a processor")
        record(Path(a.record), f"The trainer's overhead: {what}", header, rows, note)
    (percent, low, high), (cpu, cpu_low, cpu_high) = blocks.percent(0), blocks.percent(1)
    figures = {"step_s": blocks.step_s()[0], "overhead_percent": percent, "low": low, "high": high}
    figures |= {"cpu_overhead_percent": cpu, "cpu_low": cpu_low, "cpu_high": cpu_high}
    figures |= {"ordinary_percent": blocks.ordinary_percent(0), "ordinary_cpu_percent": blocks.ordinary_percent(1)}
    print(line_of(figures))
    return 0


if __name__ == "__main__":
    sys.exit(command_line.exit_code(main))
