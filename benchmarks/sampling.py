"""What drawing samples costs, by the number of images: ``python -m benchmarks.sampling [--quick]``.

Ours computes the image at any position of the stream from (seed, position); torch's DistributedSampler, beside it in
the same run, makes a permutation of all images at each epoch. A start is a resume in the middle of an epoch: from
nothing to the first batch of that place.
"""

from __future__ import annotations

import statistics
import sys
import time
import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import numpy as np
import tyro
from torch.utils.data import Dataset, DistributedSampler

from benchmarks.machine import about, line_of, record
from jobs import command_line
from orchestrator.data.sampling import Purpose, SampleStream


@dataclass(frozen=True)
class Arguments:
    """What is measured."""

    images: tuple[int, ...] = (1_000_000, 10_000_000, 1_000_000_000)
    """images of the set"""
    batch_size: int = 256
    batches: int = 2000
    """timed, in each repetition"""
    repeats: int = 5
    most_of_torch: int = 10_000_000
    """images up to which torch's sampler is measured: a list of them is made"""
    quick: bool = False
    """fewer batches, one repetition"""
    record: str = ""
    """file of Markdown that a table is appended to"""


def _peak_mb(work: Callable[[], object]) -> float:
    """Of what Python and NumPy allocate meanwhile."""
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1] / 1e6
    finally:
        tracemalloc.stop()


def seconds_of(work: Callable[[], object]) -> float:
    """By the clock."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def ours(images: int, a: Arguments) -> dict[str, Callable[[], object]]:
    """A start in the middle of the third epoch, a batch of images, and a batch with the draws of its views."""
    stream = SampleStream(images, 0)
    middle = 2 * images + images // 2

    def positions(batch: int) -> np.ndarray:
        return middle + batch * a.batch_size + np.arange(a.batch_size)

    def start() -> object:
        return SampleStream(images, 0).images(positions(0))

    def stretch() -> object:
        return [stream.images(positions(batch)) for batch in range(a.batches)]

    def draws() -> object:
        return [stream.uniforms(positions(batch), Purpose.SCALE_AND_CROP, 3) for batch in range(a.batches)]

    return {"start": start, "batch": stretch, "draws": draws}


class _Images(Dataset[int]):
    """So many of them, none of which is looked at."""

    def __init__(self, count: int) -> None:
        self._count = count

    def __len__(self) -> int:
        return self._count


def torchs(images: int, a: Arguments) -> dict[str, Callable[[], object]]:
    """The same start, and the indices of a batch."""

    def sampler() -> DistributedSampler[int]:
        made = DistributedSampler(_Images(images), num_replicas=1, rank=0, shuffle=True, seed=0)
        made.set_epoch(2)
        return made

    def start() -> object:
        return list(islice(sampler(), images // 2, images // 2 + a.batch_size))

    indices = iter(sampler())

    def stretch() -> object:
        return [list(islice(indices, a.batch_size)) for _ in range(a.batches)]

    return {"start": start, "batch": stretch}


def main() -> int:
    a = tyro.cli(Arguments, description=__doc__)
    if a.quick:
        a = replace(a, batches=200, repeats=1, images=(1_000_000, 1_000_000_000), most_of_torch=1_000_000)
    rows, figures = [], dict[str, float]()
    for images in a.images:
        for who, kinds in (("ours", ours), ("DistributedSampler", torchs)):
            if who != "ours" and images > a.most_of_torch:
                continue
            works = kinds(images, a)
            seconds = {name: statistics.median(seconds_of(w) for _ in range(a.repeats)) for name, w in works.items()}
            megabytes = _peak_mb(works["start"])
            batch_us = seconds["batch"] / a.batches * 1e6
            draws = f"{seconds['draws'] / a.batches * 1e6:.0f}" if "draws" in seconds else ""
            rows.append(
                (f"{images:,}", who, f"{seconds['start'] * 1e3:.2f}", f"{megabytes:.2f}", f"{batch_us:.0f}", draws)
            )
            figures |= {f"{who}_start_s_{images:.0e}": seconds["start"], f"{who}_batch_us_{images:.0e}": batch_us}
            figures[f"{who}_start_mb_{images:.0e}"] = megabytes
    header = (
        "images",
        "who",
        "start, ms",
        "its peak, MB",
        f"indices of a batch of {a.batch_size}, µs",
        "its draws, µs",
    )
    print(about())
    for row in (header, *rows):
        print(" | ".join(f"{cell:>20}" for cell in row))
    if a.record:
        record(Path(a.record), "Sampling", header, rows, f"Medians of {a.repeats}.")
    print(line_of(figures))
    return 0


if __name__ == "__main__":
    sys.exit(command_line.exit_code(main))
