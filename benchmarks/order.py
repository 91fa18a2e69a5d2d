"""How well the windowed order mixes, beside the full one: ``python benchmarks/order.py [--data URL]``.

For batches of 256: the classes that a batch holds, how often two neighbours in the stream are of one class, and by how
much the classes of a batch differ from those of the whole set (half the sum of absolute differences of frequencies: 0
equal, 1 disjoint). Without --data the layouts are made up: 1000 classes of 1281 images, in shards of one class as
data_prep.ilsvrc writes them, and in shards that mix classes as data_prep.image_folder does.
"""

from __future__ import annotations

import argparse

import numpy as np

from orchestrator.config import Order
from orchestrator.data.sampling import SampleStream
from orchestrator.data.shards import DataSet
from orchestrator.storage import Storage

BATCH, NUM_BATCHES = 256, 400


def measure(labels: np.ndarray, stream: SampleStream) -> tuple[float, float, float]:
    """Classes in a batch, share of equal neighbours, distance to the whole set; labels [N] of all images."""
    overall = np.bincount(labels) / len(labels)
    # Batches from all over two epochs.
    starts = np.linspace(0, 2 * len(labels) - BATCH, NUM_BATCHES).astype(np.int64)
    batches = [labels[stream.images(start + np.arange(BATCH))] for start in starts]
    classes = np.mean([len(np.unique(batch)) for batch in batches])
    neighbours = np.mean([np.mean(batch[1:] == batch[:-1]) for batch in batches])
    counts = [np.bincount(batch, minlength=len(overall)) / BATCH for batch in batches]
    return float(classes), float(neighbours), float(np.mean([np.abs(c - overall).sum() / 2 for c in counts]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="URL of a prepared data set")
    arguments = parser.parse_args()
    layouts: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    if arguments.data:
        split = DataSet(Storage(arguments.data)).split("train")
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
            found = measure(labels, SampleStream(len(labels), 0, order, counts, window))
            name = f"windowed, {window} shards" if window else "full"
            print(f"{layout:18} {name:24} {found[0]:8.1f} {found[1]:11.4f} {found[2]:9.3f}")
            line.append(f"{layout}_{window or 'full'}={found[0]:.1f}")
    print(" ".join(line))


if __name__ == "__main__":
    main()
