"""Images a second of training steps: ours in every mode, a bare PyTorch loop, timm's; real JPEGs and one fixed batch.

    python -m benchmarks.step --data URL [--recipes resnet50 resnet101] [--ways serial eager compile graphs]
                              [--precisions bf16 tf32] [--crop-style random_area] [--bn-group-size 256] [--quick]

Side by side in one process and one run, alternating, several repetitions; medians and ratios of medians:

    ours       the product's own step on one batch that stays on the device
    real       the same fed from JPEGs by the product's input side
    input      the input side alone
    bare       the same network with PyTorch's own batch norm and SGD on that batch: no groups, meters or guard
    timm       timm's network of that depth in the bare loop (`pip install timm` where there is torchvision)

A fast mode is measured only where its losses are those of eager float32 (benchmarks/numerics.py); else the exit code is
1. The last line is machine-readable: images/s of each, and for the fastest of ours ratio_to_bare, ratio_to_timm and
ratio_real_to_synthetic.
"""

from __future__ import annotations

import gc
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import tyro
from torch import nn

from benchmarks.machine import about, line_of, record
from benchmarks.modes import BareStep, Mode, Way, step_of
from benchmarks.numerics import check
from jobs import command_line
from jobs.imagenet import RECIPES
from orchestrator.config import CropStyle, Precision, StrideOn, TrainConfig
from orchestrator.data.pipeline import Batch, TrainInput
from orchestrator.data.sampling import SampleStream
from orchestrator.data.shards import DataSet
from orchestrator.storage import Storage
from orchestrator.training.assembly import build_model, decode_settings, views_of
from orchestrator.world import World

_WARM_UP_STEPS = 5


@dataclass(frozen=True)
class Arguments:
    """What is measured."""

    data: str
    """URL of a prepared data set"""
    recipes: tuple[str, ...] = ("resnet50",)
    """recipes of jobs/imagenet.py"""
    ways: tuple[Way, ...] = (Way.SERIAL, Way.EAGER, Way.COMPILE, Way.GRAPHS)
    precisions: tuple[Precision, ...] = (Precision.BF16,)
    kinds: tuple[str, ...] = ("ours", "real", "input", "bare", "timm")
    crop_style: CropStyle | None = None
    """None: the recipe's"""
    stride_on: StrideOn | None = None
    """where a bottleneck strides; None: the recipe's (the paper's); conv3x3: v1.5, as torchvision's and timm's"""
    global_batch_size: int = 0
    """images in a step; 0: the recipe's"""
    bn_group_size: int = 0
    """images in a batch-norm group; 0: the recipe's"""
    steps: int = 30
    """in one measurement"""
    repeats: int = 3
    cpus: int = 0
    """threads; 0: all"""
    hw_decoder_share: float = 0.65
    """part of a batch for the GPU's JPEG engine"""
    check_steps: int = 20
    """steps over which losses are compared first; 0: they are not, and the table says so"""
    quick: bool = False
    """few steps, one repetition"""
    record: str = ""
    """file of Markdown that a table is appended to"""


@dataclass(frozen=True)
class Row:
    """Images a second of one kind of one recipe in one mode, a value a repetition; peak memory of the GPU, GiB."""

    recipe: str
    mode: Mode
    kind: str
    speeds: list[float]
    memory_gib: float

    @property
    def median(self) -> float:
        return statistics.median(self.speeds)


def config_of(a: Arguments, recipe: str) -> TrainConfig:
    config = RECIPES[recipe]()
    batch = replace(
        config.batch,
        global_batch_size=a.global_batch_size or config.batch.global_batch_size,
        bn_group_size=a.bn_group_size or config.batch.bn_group_size,
    )
    model = replace(config.model, stride_on=a.stride_on) if a.stride_on else config.model
    seen = replace(config.input, crop_style=a.crop_style) if a.crop_style else config.input
    numerics = replace(config.numerics, hw_decoder_share=a.hw_decoder_share)
    return replace(config, batch=batch, model=model, input=seen, numerics=numerics)


class Runs:
    """All kinds of one recipe in one mode, on one batch or on what the input side gives."""

    def __init__(self, a: Arguments, recipe: str, config: TrainConfig, mode: Mode, data: DataSet, cpus: int) -> None:
        self._world, self._mode, self._cpus, config = World.from_environment(), mode, cpus, mode.applied(config)
        mode.set_arithmetic(self._world, cpus)
        torch.compiler.reset()
        self._source = _input(config, data, self._world, cpus)
        self.batch_size, fixed = config.batch.global_batch_size, next(self._source)
        self.kinds: dict[str, Callable[[], object]] = {}
        wanted = set(a.kinds)
        if wanted & {"ours", "real"}:
            step = step_of(config, mode, self._world, data.num_classes)
            self.kinds["ours"] = lambda: step(fixed, 0, 1e-3)
            self.kinds["real"] = lambda: step(next(self._source), 0, 1e-3)
        self.kinds["input"] = lambda: next(self._source)
        if mode.way is not Way.SERIAL:
            if "bare" in wanted:
                self.kinds["bare"] = self._bare(build_model(config, data.num_classes), config, fixed)
            if "timm" in wanted and (network := _timm(config, data.num_classes)) is not None:
                self.kinds["timm"] = self._bare(network, config, fixed)
        self.kinds = {kind: run for kind, run in self.kinds.items() if kind in wanted}

    def _bare(self, network: nn.Module, config: TrainConfig, fixed: Batch) -> Callable[[], object]:
        o = config.optimizer
        step = BareStep(network, self._mode, self._world, weight_decay=o.weight_decay, momentum=o.momentum)
        return lambda: step(fixed.images, fixed.labels)

    def measure(self, kind: str, steps: int) -> tuple[float, float]:
        """Images a second, and the peak memory of the GPU in GiB."""
        self._mode.set_arithmetic(self._world, self._cpus)
        run, on_gpu = self.kinds[kind], self._world.device.type == "cuda"
        for _ in range(_WARM_UP_STEPS):
            run()
        if on_gpu:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        start_s = time.perf_counter()
        for _ in range(steps):
            run()
        if on_gpu:
            torch.cuda.synchronize()
        speed = steps * self.batch_size / (time.perf_counter() - start_s)
        return speed, torch.cuda.max_memory_allocated() / 2**30 if on_gpu else 0.0

    def close(self) -> None:
        self._source.close()
        self.kinds.clear()


def _input(config: TrainConfig, data: DataSet, world: World, cpus: int) -> TrainInput:
    split, size = data.split("train"), config.batch.global_batch_size
    view, _, mean, axes = views_of(config, data)

    def positions_of(step: int) -> np.ndarray:
        return np.arange(step * size, (step + 1) * size)

    settings = decode_settings(config, world.device, cpus)
    return TrainInput(split, SampleStream(len(split), 0), view, axes, mean, settings, positions_of, 0, 0)


def _timm(config: TrainConfig, num_classes: int) -> nn.Module | None:
    """timm's network of this depth; None where timm cannot be imported or has none."""
    try:
        import timm
    except Exception as error:  # it takes torchvision along, which ends in errors of many kinds
        print(f"timm is not here ({type(error).__name__}: {error})", file=sys.stderr)
        return None
    name = f"resnet{config.model.depth}"
    return timm.create_model(name, num_classes=num_classes) if timm.is_model(name) else None


def measure(a: Arguments, recipe: str, mode: Mode, data: DataSet, cpus: int) -> list[Row]:
    runs = Runs(a, recipe, config_of(a, recipe), mode, data, cpus)
    speeds: dict[str, list[float]] = {kind: [] for kind in runs.kinds}
    memory = dict.fromkeys(runs.kinds, 0.0)
    for _ in range(a.repeats):
        for kind in runs.kinds:
            speed, gib = runs.measure(kind, a.steps)
            speeds[kind].append(speed)
            memory[kind] = max(memory[kind], gib)
    runs.close()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return [Row(recipe, mode, kind, values, memory[kind]) for kind, values in speeds.items()]


def checked(a: Arguments, recipe: str, modes: list[Mode], data: DataSet, cpus: int) -> tuple[list[Mode], list[str]]:
    """The modes whose losses are those of eager float32, and the names of the others."""
    if not a.check_steps:
        return modes, []
    verdicts, _, _ = check(config_of(a, recipe), modes, data, World.from_environment(), a.check_steps, 0.01, cpus)
    for v in verdicts:
        print(f"{recipe}, {v.name}: losses {100 * v.mean:.3f} % off on average: {'same' if v.passes else 'DIFFERS'}")
    passed = {v.name for v in verdicts if v.passes}
    return [m for m in modes if m.name in passed], [f"{recipe}, {m.name}" for m in modes if m.name not in passed]


def main() -> int:
    a = tyro.cli(Arguments, description=__doc__, config=(tyro.conf.EnumChoicesFromValues,))
    if a.quick:
        a = replace(a, steps=min(a.steps, 5), repeats=1, check_steps=min(a.check_steps, 5))
    cpus, data = a.cpus or len(os.sched_getaffinity(0)), DataSet(Storage(a.data))
    rows, failed = list[Row](), list[str]()
    for recipe in a.recipes:
        modes, wrong = checked(a, recipe, [Mode(way, p) for p in a.precisions for way in a.ways], data, cpus)
        failed += wrong
        for mode in modes:
            rows += measure(a, recipe, mode, data, cpus)
    batch = config_of(a, a.recipes[0]).batch
    what = f"batch {batch.global_batch_size} in groups of {batch.bn_group_size}, {cpus} CPU threads"
    print(f"{what}; {about()}")
    cells = [
        (
            *(row.recipe, row.mode.name, row.kind),
            f"{row.median:.0f} ({min(row.speeds):.0f}–{max(row.speeds):.0f})",
            f"{row.memory_gib:.1f}" if row.memory_gib else "",
        )
        for row in rows
    ]
    for cell in cells:
        print(f"{cell[0]:>14}  {cell[1]:<16} {cell[2]:<6} {cell[3]} images/s  {cell[4] and cell[4] + ' GiB'}")
    if a.record:
        header = (
            "recipe",
            "mode",
            "kind",
            "images/s, median (all)",
            "peak GPU memory, GiB (all kinds of a mode are there)",
        )
        note = f"{a.repeats} repetitions of {a.steps} steps; losses compared over {a.check_steps} steps first."
        record(Path(a.record), f"Training step: {what}", header, cells, note)
    figures = {f"{row.recipe}_{row.mode.name.replace(', ', '_')}_{row.kind}": row.median for row in rows}
    print(line_of(figures | _ratios(rows)))
    if failed:
        print(f"error: {'; '.join(failed)}: losses are not those of eager float32: not measured", file=sys.stderr)
        return 1
    return 0


def _ratios(rows: list[Row]) -> dict[str, float]:
    """The fastest of each kind against each other, whatever their modes."""
    best = {kind: max((row.median for row in rows if row.kind == kind), default=0.0) for kind in {r.kind for r in rows}}
    ratios = {f"ratio_to_{kind}": best["ours"] / best[kind] for kind in ("bare", "timm") if best.get(kind)}
    if best.get("real") and best.get("ours"):
        ratios["ratio_real_to_synthetic"] = best["real"] / best["ours"]
    return ratios if best.get("ours") else {}


if __name__ == "__main__":
    sys.exit(command_line.exit_code(main))
