"""Images a second of the multi-scale test: all scales of an image from one decoding, against a pass for each scale.

    python benchmarks/evaluation.py --data URL [--recipe resnet50] [--images 0] [--repeats 3] [--quick]

Three ways to the same scores (compared: the output says how far they are apart), side by side in one process and one
run, taking turns, medians and ratios, by the clock and in seconds of a processor: ``together``, as the evaluation does
it: every image decoded once for all scales, batches of one size; ``five_passes``: the whole split once for each scale,
decoded every time, batches of one size; ``one_by_one``: every image decoded once, a batch of its own. ``decode`` and
``decode_five`` are the input sides of the first two alone: what is left of the difference where the network is fast. An
untrained network: what it says does not change how long it takes. The last line is machine-readable.
"""

from __future__ import annotations

import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, replace

import numpy as np
import torch
import tyro

from jobs import command_line
from jobs.imagenet import RECIPES
from orchestrator.config import Precision, Protocol
from orchestrator.data.scoring_input import ScoringInput
from orchestrator.data.shards import DataSet
from orchestrator.evaluation.protocols import Procedure, plan, procedure_of
from orchestrator.evaluation.tested_network import TestedNetwork
from orchestrator.storage import Storage
from orchestrator.training.assembly import autocast_dtype, build_model, decode_settings, set_arithmetic, views_of
from orchestrator.world import World


@dataclass(frozen=True)
class Arguments:
    """What is measured."""

    data: str
    """URL of a prepared data set"""
    recipe: str = "resnet50"
    """recipe of jobs/imagenet.py"""
    split: str = "val"
    """split that is scored"""
    images: int = 0
    """images of it; 0: all"""
    repeats: int = 3
    """measurements of each kind"""
    batch_megapixels: float = 4.0
    """10^6 pixels of views that go through the network at a time"""
    cpus: int = 0
    """threads; 0: all"""
    precision: Precision = Precision.AUTO
    """arithmetic"""
    quick: bool = False
    """only to see that it works: 8 images, once"""


def main() -> int:
    a = tyro.cli(Arguments, description=__doc__)
    if a.quick:
        a = replace(a, images=8, repeats=1)
    config = RECIPES[a.recipe]()
    numerics = replace(config.numerics, precision=a.precision)
    config = replace(config, numerics=numerics)
    world = World.from_environment()
    cpus = a.cpus or len(os.sched_getaffinity(0))
    set_arithmetic(world.device, num_threads=cpus, deterministic=False, precision=a.precision)
    data = DataSet(Storage(a.data))
    split = data.split(a.split)
    mean = torch.from_numpy(views_of(config, data)[2].value)
    torch.manual_seed(0)
    model = build_model(config, data.num_classes).to(world.device)
    decode, autocast = decode_settings(config, world.device, cpus), autocast_dtype(a.precision, world.device)
    whole = procedure_of(Protocol.MULTI_SCALE, config)
    chosen = np.flatnonzero(split.decodable)[:: max(1, len(split) // (a.images or len(split)))][: a.images or None]
    scored = np.zeros((len(split), data.num_classes), np.float32)
    among = np.isin(np.arange(len(split)), chosen)

    def batches_of(procedure: Procedure) -> list[np.ndarray]:
        parts = plan(
            procedure, replace(split, decodable=(split.decodable & among).astype(np.uint8)), a.batch_megapixels
        )
        return [batch for part in parts.parts for batch in part]

    def go(procedure: Procedure, batches: list[np.ndarray], with_network: bool = True) -> np.ndarray:
        """Scores [all images, C]."""
        said = np.zeros_like(scored)
        source = ScoringInput(split, procedure.view, decode, max(map(len, batches)), 0)
        network = TestedNetwork(model, mean, procedure, a.batch_megapixels, autocast)
        with closing(source), network:
            for batch in source.batches(batches):
                if with_network:
                    said[batch.indices] = network(batch).cpu().numpy()
        return said

    def five_passes(with_network: bool = True) -> np.ndarray:
        each = [replace(whole, shorter_sides_px=(px,)) for px in whole.shorter_sides_px]
        return np.mean([go(procedure, batches_of(procedure), with_network) for procedure in each], 0)

    together = batches_of(whole)
    kinds: dict[str, Callable[[], np.ndarray]] = {
        "together": lambda: go(whole, together),
        "five_passes": five_passes,
        "one_by_one": lambda: go(whole, [chosen[i : i + 1] for i in range(len(chosen))]),
        "decode": lambda: go(whole, together, with_network=False),
        "decode_five": lambda: five_passes(with_network=False),
    }
    speeds: dict[str, list[float]] = {kind: [] for kind in kinds}
    work_s: dict[str, list[float]] = {kind: [] for kind in kinds}  # of processors, for one image
    scores: dict[str, np.ndarray] = {}
    go(whole, together[:2])  # libraries are loaded, caches filled
    for repeat in range(a.repeats):
        for kind in list(kinds)[:: 1 if repeat % 2 == 0 else -1]:
            start, worked = time.perf_counter(), time.process_time()
            scores[kind] = kinds[kind]()
            speeds[kind].append(len(chosen) / (time.perf_counter() - start))
            work_s[kind].append((time.process_time() - worked) / len(chosen))
    chip = torch.cuda.get_device_name() if world.device.type == "cuda" else platform.processor() or "CPU"
    print(
        f"{a.recipe}, {len(chosen)} images in {len(together)} batches of up to {max(map(len, together))}, scales "
        f"{', '.join(map(str, whole.shorter_sides_px))}, {a.batch_megapixels} megapixels, {chip}, {cpus} CPU threads"
    )
    for kind, values in speeds.items():
        work = statistics.median(work_s[kind])
        print(
            f"{kind:>12}: {statistics.median(values):8.2f} images/s (of {[round(v, 2) for v in values]}), {work:.4f} "
            f"processor seconds an image (of {[round(v, 4) for v in work_s[kind]]})"
        )
    for kind in ("five_passes", "one_by_one"):
        print(f"{kind}: scores within {np.abs(scores[kind] - scores['together']).max():.1e} of those of together")
    if world.device.type == "cuda":
        print(f"peak GPU memory {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB")
    medians = {kind: statistics.median(values) for kind, values in speeds.items()}
    works = {kind: statistics.median(values) for kind, values in work_s.items()}
    print(
        " ".join(f"{kind}={value:.2f}" for kind, value in medians.items()),
        f"ratio_to_five_passes={medians['together'] / medians['five_passes']:.3f}",
        f"ratio_to_one_by_one={medians['together'] / medians['one_by_one']:.3f}",
        f"work_ratio_to_five_passes={works['five_passes'] / works['together']:.3f}",
        f"work_ratio_to_one_by_one={works['one_by_one'] / works['together']:.3f}",
        f"work_ratio_of_decoding={works['decode_five'] / works['decode']:.3f}",
    )
    return 0


if __name__ == "__main__":
    sys.exit(command_line.exit_code(main))
