"""Images a second of training: real JPEGs against the same step on one batch that stays on the device.

    python benchmarks/train_step.py --data URL [--recipe resnet50] [--steps 30] [--repeats 3]

Side by side in one process and one run, alternating, medians and ratios; the last line is machine-readable. ``input``
is the input side alone (DALI, nothing trained).
"""

from __future__ import annotations

import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import tyro

from jobs import command_line
from jobs.imagenet import RECIPES
from orchestrator.config import Precision
from orchestrator.data.pipeline import Batch, TrainInput
from orchestrator.data.sampling import SampleStream
from orchestrator.data.shards import DataSet
from orchestrator.storage import Storage
from orchestrator.training.assembly import autocast_dtype, build_model, decode_settings, set_arithmetic, views_of
from orchestrator.training.step import ClassificationStep
from orchestrator.world import World


@dataclass(frozen=True)
class Arguments:
    """What is measured."""

    data: str
    """URL of a prepared data set"""
    recipe: str = "resnet50"
    """recipe of jobs/imagenet.py"""
    steps: int = 30
    """optimizer steps in one measurement"""
    repeats: int = 3
    """measurements of each kind"""
    bn_group_size: int = 0
    """images in a batch-norm group; 0: the recipe's"""
    global_batch_size: int = 0
    """images in a step; 0: the recipe's"""
    cpus: int = 0
    """threads; 0: all"""
    hw_decoder_share: float = 0.65
    """part of a batch for the GPU's JPEG engine"""
    precision: Precision = Precision.AUTO
    """arithmetic"""


def main() -> int:
    a = tyro.cli(Arguments, description=__doc__)
    config = RECIPES[a.recipe]()
    batch = replace(
        config.batch,
        global_batch_size=a.global_batch_size or config.batch.global_batch_size,
        bn_group_size=a.bn_group_size or config.batch.bn_group_size,
    )
    numerics = replace(config.numerics, hw_decoder_share=a.hw_decoder_share, precision=a.precision)
    config = replace(config, batch=batch, numerics=numerics)
    world = World.from_environment()
    cpus = a.cpus or len(os.sched_getaffinity(0))
    set_arithmetic(world.device, num_threads=cpus, deterministic=False, precision=a.precision)
    data = DataSet(Storage(a.data))
    split = data.split("train")
    view, _, mean, axes = views_of(config, data)
    model = build_model(config, data.num_classes).to(world.device)
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    step = ClassificationStep(
        model,
        world,
        batch,
        config.optimizer,
        autocast=autocast_dtype(a.precision, world.device),
        crop_px=config.input.crop_px,
        seed=0,
    )
    stream = SampleStream(len(split), 0)
    source = TrainInput(
        split, stream, view, axes, mean, decode_settings(config, world.device, cpus), step.positions, 0, 0
    )
    fixed = next(source)

    def measure(take: Callable[[], Batch], train: bool) -> float:
        for measured in (False, True):  # the first round fills queues and caches
            if world.device.type == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
            for number in range(a.steps if measured else 5):
                current = take()
                if train:
                    step(current, number, 1e-3)
            if world.device.type == "cuda":
                torch.cuda.synchronize()
        return a.steps * batch.global_batch_size / (time.perf_counter() - start)

    kinds: dict[str, Callable[[], float]] = {
        "real": lambda: measure(lambda: next(source), True),
        "synthetic": lambda: measure(lambda: fixed, True),
        "input": lambda: measure(lambda: next(source), False),
    }
    speeds: dict[str, list[float]] = {kind: [] for kind in kinds}
    for _ in range(a.repeats):
        for kind, run in kinds.items():
            speeds[kind].append(run())
    chip = torch.cuda.get_device_name() if world.device.type == "cuda" else platform.processor() or "CPU"
    print(f"{a.recipe}, batch {batch.global_batch_size} in groups of {batch.bn_group_size}, {chip}, {cpus} CPU threads")
    for kind, values in speeds.items():
        print(f"{kind:>10}: {statistics.median(values):8.0f} images/s  (of {[round(v) for v in values]})")
    if world.device.type == "cuda":
        print(f"peak GPU memory {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB")
    medians = {kind: statistics.median(values) for kind, values in speeds.items()}
    print(
        f"real={medians['real']:.0f} synthetic={medians['synthetic']:.0f} input={medians['input']:.0f} "
        f"ratio_real_to_synthetic={medians['real'] / medians['synthetic']:.3f}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(command_line.exit_code(main))
