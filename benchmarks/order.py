"""How well the windowed order mixes, beside the full one: ``python -m benchmarks.order [--data URL] [--quick]``.

For batches of 256: the classes that a batch holds, how often two neighbours in the stream are of one class, and by how
much the classes of a batch differ from those of the whole set (half the sum of absolute differences of frequencies: 0
equal, 1 disjoint). Without --data the layouts are made up: 1000 classes of 1281 images, in shards of one class as
data_prep.ilsvrc writes them, and in shards that mix classes as data_prep.image_folder does. The last line is
machine-readable: classes in a batch, by layout and shards in a window.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace

import numpy as np
import tyro

from jobs import command_line
from orchestrator.config import Order
from orchestrator.data.sampling import SampleStream
from orchestrator.data.shards import DataSet
from orchestrator.storage import Storage

BATCH = 256


@dataclass(frozen=True)
class Arguments:
    """What is measured."""

    data: str = ""
    """URL of a prepared data set; empty: made-up layouts"""
    batches: int = 400
    """batches of 256 images that are looked at, from all over two epochs"""
    quick: bool = False
    """20 batches"""


def measure(labels: np.ndarray, stream: SampleStream, batches_looked_at: int) -> tuple[float, float, float]:
    """Classes in a batch, share of equal neighbours, distance to the whole set; labels [N] of all images."""
    overall = np.bincount(labels) / len(labels)
    starts = np.linspace(0, 2 * len(labels) - BATCH, batches_looked_at).astype(np.int64)
    batches = [labels[stream.images(start + np.arange(BATCH))] for start in starts]
    classes = np.mean([len(np.unique(batch)) for batch in batches])
    neighbours = np.mean([np.mean(batch[1:] == batch[:-1]) for batch in batches])
    counts = [np.bincount(batch, minlength=len(overall)) / BATCH for batch in batches]
    return float(classes), float(neighbours), float(np.mean([np.abs(c - overall).sum() / 2 for c in counts]))


def main() -> int:
    a = tyro.cli(Arguments, description=__doc__)
    if a.quick:
        a = replace(a, batches=20)
    layouts: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    if a.data:
        split = DataSet(Storage(a.data)).split("train")
        layouts["data"] = (np.array(split.label), split.shard_counts)
    else:
        labels = np.repeat(np.arange(1000), 1281)
        layouts["one_class_a_shard"] = (labels, np.full(1000, 1281))
        mixed = np.random.default_rng(0).permutation(labels)
        layouts["mixed_shards"] = (mixed, np.full(1281, 1000))
    print(f"{'layout':18} {'order':24} {'classes':>8} {'neighbours':>11} {'distance':>9}")
    line = []
    for layout, (labels, counts) in layouts.items():
        windows = sorted({w for w in (4, 16, 64, 256) if w < len(counts)})
        for window in (0, *windows):
            order = Order.WINDOWED if window else Order.FULL
            found = measure(labels, SampleStream(len(labels), 0, order, counts, window), a.batches)
            name = f"windowed, {window} shards" if window else "full"
            print(f"{layout:18} {name:24} {found[0]:8.1f} {found[1]:11.4f} {found[2]:9.3f}")
            line.append(f"{layout}_{window or 'full'}={found[0]:.1f}")
    print(" ".join(line))
    return 0


if __name__ == "__main__":
    sys.exit(command_line.exit_code(main))
