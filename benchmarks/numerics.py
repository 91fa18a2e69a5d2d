"""Whether fast modes of training compute the same: loss curves on real images against eager float32.

    python -m benchmarks.numerics --data URL [--recipe resnet50] [--steps 50] [--ways eager compile graphs] [--quick]

Every mode starts from the same weights and sees the same batches. The reference does one batch-norm group after
another in float32. What rounding alone does to a curve is measured too: the reference once more, its weights changed by
one part in 10^6. A mode passes where its first loss is within 10^-3 of the reference's (bf16, tf32: 2 %), and the mean
relative difference of its curve is at most 1 % (bf16, tf32: 3 %), or 3 times that of the changed reference.

Exit code 1 where one does not. The last line is machine-readable: the difference of each mode in percent.
"""

from __future__ import annotations

import os
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import tyro

from benchmarks.machine import about, line_of, record
from benchmarks.modes import REFERENCE, Mode, Way, step_of
from jobs import command_line
from jobs.imagenet import RECIPES
from orchestrator.config import Precision, TrainConfig
from orchestrator.data.pipeline import Batch, TrainInput
from orchestrator.data.sampling import SampleStream
from orchestrator.data.shards import DataSet
from orchestrator.storage import Storage
from orchestrator.training.assembly import decode_settings, views_of
from orchestrator.world import World

_CHANGE = 1e-6
_TIMES = 3.0
_FIRST = {True: 0.02, False: 1e-3}  # by whether numbers are shorter than float32
_MEAN = {True: 0.03, False: 0.01}


@dataclass(frozen=True)
class Arguments:
    """What is compared."""

    data: str
    """URL of a prepared data set"""
    recipe: str = "resnet50"
    """recipe of jobs/imagenet.py"""
    steps: int = 50
    ways: tuple[Way, ...] = (Way.EAGER, Way.COMPILE, Way.GRAPHS)
    precisions: tuple[Precision, ...] = (Precision.FP32, Precision.BF16)
    lr: float = 0.01
    global_batch_size: int = 0
    """images in a step; 0: the recipe's"""
    bn_group_size: int = 0
    """images in a batch-norm group; 0: the recipe's"""
    seed: int = 0
    quick: bool = False
    """ten steps"""
    record: str = ""
    """file of Markdown that a table is appended to"""


@dataclass(frozen=True)
class Verdict:
    """Of a mode: relative differences of its first loss, and of its curve on average."""

    name: str
    first: float
    mean: float
    passes: bool


def batches_of(config: TrainConfig, data: DataSet, count: int, world: World, cpus: int) -> list[Batch]:
    """The first ``count`` training batches, with float32 images."""
    split = data.split("train")
    view, _, mean, axes = views_of(config, data)
    step = config.batch.global_batch_size
    settings = replace(decode_settings(config, world.device, cpus), half=False)

    def positions_of(number: int) -> np.ndarray:
        return np.arange(number * step, (number + 1) * step)

    source = TrainInput(split, SampleStream(len(split), config.seed), view, axes, mean, settings, positions_of, 0, 0)
    found = [next(source) for _ in range(count)]
    source.close()
    return found


def curve(
    config: TrainConfig,
    mode: Mode,
    batches: Sequence[Batch],
    num_classes: int,
    world: World,
    lr: float,
    change: float = 0,
) -> list[float]:
    """The training loss of each step, nats."""
    step = step_of(config, mode, world, num_classes, config.seed)
    if change:
        generator = torch.Generator(world.device).manual_seed(1)
        with torch.no_grad():
            for parameter in step.model.parameters():
                noise = torch.randn(parameter.shape, generator=generator, device=world.device)
                parameter.mul_(1 + change * noise)
    losses = []
    for number, batch in enumerate(batches):
        step(batch, number, lr)
        losses.append(step.take_totals().loss)
    return losses


def judge(name: str, losses: Sequence[float], reference: Sequence[float], noise: float, *, is_short: bool) -> Verdict:
    """``noise``: mean relative difference that rounding alone makes; is_short: of numbers shorter than float32."""
    first, mean = abs(losses[0] / reference[0] - 1), difference(losses, reference)
    passes = first <= _FIRST[is_short] and mean <= max(_MEAN[is_short], _TIMES * noise)
    return Verdict(name, first, mean, passes)


def difference(losses: Sequence[float], reference: Sequence[float]) -> float:
    """Mean of the relative differences; a loss that is not finite is infinitely wrong."""
    found = statistics.fmean(abs(a / b - 1) for a, b in zip(losses, reference, strict=True))
    return found if found == found else float("inf")


def check(
    config: TrainConfig, modes: Sequence[Mode], data: DataSet, world: World, steps: int, lr: float, cpus: int
) -> tuple[list[Verdict], float, list[float]]:
    """A verdict on each mode; what rounding alone does; the reference's losses."""
    batches = batches_of(config, data, steps, world, cpus)
    REFERENCE.set_arithmetic(world, cpus)
    reference = curve(config, REFERENCE, batches, data.num_classes, world, lr)
    noise = difference(curve(config, REFERENCE, batches, data.num_classes, world, lr, _CHANGE), reference)
    verdicts = []
    for mode in modes:
        mode.set_arithmetic(world, cpus)
        torch.compiler.reset()
        losses = curve(config, mode, batches, data.num_classes, world, lr)
        is_short = mode.precision is not Precision.FP32
        verdicts.append(judge(mode.name, losses, reference, noise, is_short=is_short))
    return verdicts, noise, reference


def main() -> int:
    a = tyro.cli(Arguments, description=__doc__, config=(tyro.conf.EnumChoicesFromValues,))
    config = replace(RECIPES[a.recipe](), seed=a.seed)
    batch = replace(
        config.batch,
        global_batch_size=a.global_batch_size or config.batch.global_batch_size,
        bn_group_size=a.bn_group_size or config.batch.bn_group_size,
    )
    config, world, cpus = replace(config, batch=batch), World.from_environment(), len(os.sched_getaffinity(0))
    modes = [Mode(way, precision) for precision in a.precisions for way in a.ways]
    steps = 10 if a.quick else a.steps
    verdicts, noise, reference = check(config, modes, DataSet(Storage(a.data)), world, steps, a.lr, cpus)
    what = (
        f"{a.recipe}, batch {batch.global_batch_size} in groups of {batch.bn_group_size}, {steps} steps at lr {a.lr:g}"
    )
    print(f"{what}; {about()}")
    print(f"reference: loss {reference[0]:.4f} → {reference[-1]:.4f}; rounding alone: {100 * noise:.4f} % on average")
    rows = [
        (v.name, f"{100 * v.first:.4f}", f"{100 * v.mean:.4f}", "same" if v.passes else "**DIFFERS**") for v in verdicts
    ]
    for row in rows:
        print(f"{row[0]:>16}: first loss {row[1]} % off, curve {row[2]} % on average: {row[3].strip('*')}")
    if a.record:
        note = (
            f"Loss {reference[0]:.3f} → {reference[-1]:.3f}; weights changed by 10⁻⁶: {100 * noise:.4f} % on average."
        )
        header = ("mode", "first loss, % off", "curve, % off on average", "verdict")
        record(Path(a.record), f"Numerics of fast modes: {what}", header, rows, note)
    print(line_of({v.name.replace(", ", "_"): 100 * v.mean for v in verdicts}))
    if failed := [v.name for v in verdicts if not v.passes]:
        print(
            f"error: {'; '.join(failed)}: the losses are not those of eager float32: do not train so", file=sys.stderr
        )
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(command_line.exit_code(main))
