"""Seconds and memory from opening a data set to its first batch, by the number of entries.

    python -m benchmarks.start [--entries 10000 10000000] [--quick] [--record FILE]

The sets are made up, in the real format: an index of so many rows, 1000 images a shard. All shards of a set are one
small tar of drawings under many entries of the manifest, so that nothing but the number of entries differs. Each start
is a process of its own, with everything imported and the files in the machine's cache; sizes take turns. Seconds until:
``opened``, the manifest read; ``views``, images and views of a batch in the middle of an epoch drawn; ``batch``, its
pixels there; ``checked``, the digest of the whole index compared: a thread reads it beside, and a training waits for it
before its first step, when its network is built. Own memory is what the process holds for itself, mapped what it has
touched of files. The last line is machine-readable.
"""

from __future__ import annotations

import io
import os
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import tyro
from PIL import Image

from benchmarks.machine import about, line_of, record
from benchmarks.recovery import in_own_process
from data_prep import demo
from data_prep.statistics import PixelSums, centre_view, statistics_bytes
from jobs import command_line
from jobs.imagenet import resnet18_64px
from orchestrator.data.shard_writer import ShardWriter, write_index
from orchestrator.data.shards import ClassInfo, DataSet, Manifest, ShardInfo, SplitInfo
from orchestrator.storage import Storage, sha256_hex

IMAGES_PER_SHARD = 1000
DRAWINGS = 64
WARM_UP = 1000  # entries
CROP_PX = 64


@dataclass(frozen=True)
class Arguments:
    """What is measured."""

    entries: tuple[int, ...] = (10_000, 10_000_000)
    """images of each set"""
    batch_size: int = 256
    repeats: int = 5
    scratch: Path = Path(tempfile.gettempdir())
    """where the sets are made: 75 bytes an entry"""
    quick: bool = False
    """10^4 and 10^6 entries, one repetition"""
    record: str = ""
    """file of Markdown that a table is appended to"""


@dataclass(frozen=True)
class Start:
    """Of one start: seconds from its beginning, MB (10^6 bytes) beyond what the imports took."""

    opened_s: float
    views_s: float
    batch_s: float
    checked_s: float
    views_own_mb: float
    views_mapped_mb: float
    batch_own_mb: float


# -- the sets -------------------------------------------------------------------------------------------------------


def make_set(folder: Path, entries: int) -> None:
    """A data set of ``entries`` training images."""
    out, kinds = Storage(str(folder)), demo.demo_classes(8, 0)
    sums, offsets, sizes, weights = PixelSums(CROP_PX), list[int](), list[tuple[int, int]](), list[int]()
    with ShardWriter(out, "train/all.tar") as shard:
        for number in range(DRAWINGS):
            picture = Image.fromarray(demo.render(kinds[number % 8], np.random.default_rng(number), 80, 120))
            stream = io.BytesIO()
            picture.save(stream, "JPEG", quality=85)
            offsets.append(shard.add(f"drawing_{number}", stream.getvalue(), number % 8))
            weights.append(len(stream.getvalue()))
            sizes.append(picture.size)
            sums.add(centre_view(picture, CROP_PX))
    numbers = np.arange(entries)
    which = numbers % DRAWINGS
    columns = {
        "shard": (numbers // IMAGES_PER_SHARD).astype(np.int32),
        "offset": np.array(offsets)[which],
        "nbytes": np.array(weights, np.int32)[which],
        "width": np.array([size[0] for size in sizes], np.int32)[which],
        "height": np.array([size[1] for size in sizes], np.int32)[which],
        "label": (which % 8).astype(np.int32),
        "decodable": np.ones(entries, np.uint8),
        "name": pc.binary_join_element_wise("n01440764_", pa.array(numbers).cast(pa.string()), ".JPEG", ""),
    }
    digest = write_index(out, "train.arrow", columns)
    info = shard.info
    counts = np.bincount(columns["shard"]).tolist()
    shards = tuple(ShardInfo(info.name, info.nbytes, count, info.sha256) for count in counts)
    about_pixels = statistics_bytes(sums)
    out.publish("statistics.safetensors", about_pixels)
    manifest = Manifest(
        name="made up",
        classes=tuple(ClassInfo(label, kind.wnid) for label, kind in enumerate(kinds)),
        splits={"train": SplitInfo(entries, "train.arrow", digest, shards)},
        statistics="statistics.safetensors",
        statistics_sha256=sha256_hex(about_pixels),
        statistics_crop=CROP_PX,
    )
    out.publish("manifest.json", manifest.to_bytes())


# -- a start --------------------------------------------------------------------------------------------------------


def memory_mb() -> tuple[float, float]:
    """What this process holds for itself, and of files, in 10^6 bytes."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    own, mapped = (int(lines[name].split()[0]) * 1024 / 1e6 for name in ("RssAnon", "RssFile"))
    return own, mapped


def start(folder: Path, entries: int, batch_size: int, ready: Any) -> None:
    """In a process of its own: sends a ``Start`` as a dictionary. One of the smallest set imports everything first."""
    started(str(folder / str(WARM_UP)), WARM_UP, batch_size)
    ready.send(asdict(started(str(folder / str(entries)), entries, batch_size)))
    ready.close()
    os._exit(0)


def started(url: str, entries: int, batch_size: int) -> Start:
    """A start on the set at ``url``, half through its third epoch."""
    import torch

    from orchestrator.data.pipeline import TrainInput
    from orchestrator.training.assembly import decode_settings, sample_stream, views_of

    config = resnet18_64px()
    first = (2 * entries + entries // 2) // batch_size

    def positions_of(step: int) -> np.ndarray:
        return np.arange(step * batch_size, (step + 1) * batch_size)

    began_s, (own_mb, mapped_mb) = time.perf_counter(), memory_mb()
    times, memory = [began_s], [(own_mb, mapped_mb)]

    def mark() -> None:
        times.append(time.perf_counter())
        memory.append(memory_mb())

    data = DataSet(Storage(url))
    mark()
    split = data.split("train", check_beside=True)
    view, _, mean, axes = views_of(config, data)
    stream, positions = sample_stream(config, split), positions_of(first)
    images = stream.images(positions)
    seen = view.views(stream, positions, split.width[images], split.height[images], axes)
    assert len(seen.flip) == batch_size
    mark()
    settings = decode_settings(config, torch.device("cpu"), 1)
    batches = TrainInput(split, stream, view, axes, mean, settings, positions_of, first, 0)
    batch = next(batches)
    assert np.array_equal(batch.indices, images)
    mark()
    split.check()
    mark()
    opened_s, views_s, batch_s, checked_s = (t - began_s for t in times[1:])
    batches.close()
    return Start(
        opened_s,
        views_s,
        batch_s,
        checked_s,
        views_own_mb=memory[2][0] - own_mb,
        views_mapped_mb=memory[2][1] - mapped_mb,
        batch_own_mb=memory[3][0] - own_mb,
    )


def measure(folder: Path, entries: tuple[int, ...], batch_size: int, repeats: int) -> dict[int, list[Start]]:
    """Starts on sets of so many ``entries`` that are made in ``folder``, in turns."""
    for count in {WARM_UP, *entries}:
        make_set(folder / str(count), count)
    found: dict[int, list[Start]] = {count: [] for count in entries}
    for repeat in range(repeats + 1):  # the first fills the machine's cache
        for count in entries[:: -1 if repeat % 2 else 1]:
            one = Start(**in_own_process(start, folder, count, batch_size))
            if repeat:
                found[count].append(one)
    return found


def medians_of(starts: list[Start]) -> Start:
    return Start(**{name: statistics.median(getattr(one, name) for one in starts) for name in asdict(starts[0])})


def main() -> int:
    a = tyro.cli(Arguments, description=__doc__)
    if a.quick:
        a = replace(a, entries=(10_000, 1_000_000), repeats=1)
    with tempfile.TemporaryDirectory(prefix="start-", dir=a.scratch) as folder:
        found = measure(Path(folder), a.entries, a.batch_size, a.repeats)
    rows, figures, medians = [], dict[str, float](), {count: medians_of(starts) for count, starts in found.items()}
    for count, one in medians.items():
        spread = f"{min(s.views_s for s in found[count]):.3f}–{max(s.views_s for s in found[count]):.3f}"
        rows.append(
            (
                f"{count:,}",
                f"{one.opened_s:.3f}",
                f"{one.views_s:.3f} ({spread})",
                f"{one.batch_s:.3f}",
                f"{one.checked_s:.3f}",
                f"{one.views_own_mb:.1f}",
                f"{one.views_mapped_mb:.1f}",
                f"{one.batch_own_mb:.1f}",
            )
        )
        figures |= {f"views_s_{count:.0e}": one.views_s, f"batch_s_{count:.0e}": one.batch_s}
        figures[f"own_mb_{count:.0e}"] = one.views_own_mb
    fewest, most = medians[min(medians)], medians[max(medians)]
    figures |= {"ratio_views": most.views_s / fewest.views_s, "ratio_batch": most.batch_s / fewest.batch_s}
    header = ["entries", "opened, s", "views, s", "batch, s", "checked, s"]
    header += ["own memory at views, MB", "mapped, MB", "own memory at the batch, MB"]
    print(about())
    for row in (header, *rows):
        print(" | ".join(f"{cell:>21}" for cell in row))
    if a.record:
        note = f"Medians of {a.repeats} starts, {a.batch_size} images a batch."
        record(Path(a.record), "A start, by the number of images", header, rows, note)
    print(line_of(figures))
    return 0


if __name__ == "__main__":
    sys.exit(command_line.exit_code(main))
