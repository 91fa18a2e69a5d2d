"""A few ratios in about a minute, beside those that are committed: what has become slower by a lot shows.

    python -m benchmarks.ratios [--only input overhead sampling start] [--write]

Ratios are of things measured within one run, so that they hold on any machine, roughly; margins are wide, since
machines are shared. All inputs are seeded drawings. What is beyond its margin is only told: the exit code is 0 where
everything could be measured. --write puts what was measured into benchmarks/ratios.json. The last line is
machine-readable.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from enum import Enum
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro
from PIL import Image

from benchmarks import input as input_side
from benchmarks import memory, overhead, sampling, start
from benchmarks.machine import about, line_of
from benchmarks.recovery import NEVER
from data_prep import demo, image_folder
from jobs import command_line
from jobs.imagenet import resnet18_64px
from orchestrator.config import BatchConfig, RhythmConfig
from orchestrator.data.shards import DataSet
from orchestrator.storage import Storage

COMMITTED = Path(__file__).with_name("ratios.json")


class Group(Enum):
    """What is measured together."""

    INPUT = "input"
    OVERHEAD = "overhead"
    SAMPLING = "sampling"
    START = "start"


@dataclass(frozen=True)
class Ratio:
    """What is compared, and how many times as bad as committed it may be before that is told."""

    name: str
    says: str
    margin: float
    more_is_better: bool = False


RATIOS = (
    Ratio("input_to_pil", "images/s of the input side, to Pillow's", 1.4, more_is_better=True),
    Ratio("input_to_dali", "images/s of the input side, to DALI's usual pipeline", 1.4, more_is_better=True),
    Ratio("overhead", "processor time of the trainer's steps, to a bare loop's", 1.1),
    Ratio("sampling_batch", "a batch of 10^9 images, to one of 10^6", 1.6),
    Ratio("sampling_start", "a start half through 10^9 images, to 10^6", 2.0),
    Ratio("start_batch", "opening 10^6 entries to the first batch, to 10^4", 2.0),
)


@dataclass(frozen=True)
class Arguments:
    """What is measured."""

    only: Annotated[tuple[Group, ...], tyro.conf.EnumChoicesFromValues] = tuple(Group)
    """groups of ratios"""
    write: bool = False
    """keep what is measured in benchmarks/ratios.json"""


# -- groups ---------------------------------------------------------------------------------------------------------


def of_input(folder: Path) -> dict[str, float]:
    """48 drawings of 500 × 375 pixels, about 60 kB each."""
    cpus, kinds = len(os.sched_getaffinity(0)), demo.demo_classes(8, 0)
    (folder / "drawings").mkdir()
    for number in range(48):
        picture = demo.render(kinds[number % 8], np.random.default_rng([number, 4]), 375, 500)
        Image.fromarray(picture).save(folder / "drawings" / f"{number}.png")
    input_side.make_pictures(folder / "drawings", folder / "pictures", (500, 375), 60)
    image_folder.prepare(image_folder.Arguments(str(folder / "pictures"), str(folder / "photo_set"), num_tasks=0))
    a = input_side.Arguments(folder, images=192, batch_size=32, repeats=3, kinds=("ours", "pil", "dali"))
    speeds = input_side.measure(a, DataSet(Storage(str(folder / "photo_set"))), folder / "pictures" / "train", cpus)

    def to(kind: str) -> float:
        return statistics.median(ours / other for ours, other in zip(speeds["ours"], speeds[kind], strict=True))

    return {"input_to_pil": to("pil"), "input_to_dali": to("dali")}


def of_overhead(folder: Path) -> dict[str, float]:
    """Steps of 16 images, with a measurement every 10 and a checkpoint every 20."""
    config = resnet18_64px()
    config = replace(
        config,
        data=memory.make_data(folder, small_ones=True),
        storage=str(folder),
        name="overhead",
        batch=BatchConfig(16, 16),
        schedule=replace(config.schedule, max_steps=NEVER, max_epochs=0.0),
        rhythm=RhythmConfig(log_every_steps=10, checkpoint_every_steps=20, validate_every_epochs=1e6),
    )
    blocks = overhead.measure(config, 40, 5, 1)
    return {"overhead": float(1 + blocks.percent(1)[0] / 100)}


def of_sampling(folder: Path) -> dict[str, float]:
    a = sampling.Arguments(batches=200)
    seconds: dict[str, dict[int, list[float]]] = {kind: {10**6: [], 10**9: []} for kind in ("batch", "start")}
    works = {images: sampling.ours(images, a) for images in (10**6, 10**9)}
    for _ in range(7):
        for kind, found in seconds.items():
            for images in found:
                found[images].append(sampling.seconds_of(works[images][kind]))
    return {
        f"sampling_{kind}": statistics.median(found[10**9]) / statistics.median(found[10**6])
        for kind, found in seconds.items()
    }


def of_start(folder: Path) -> dict[str, float]:
    found = start.measure(folder, (10**4, 10**6), 64, 2)
    few, many = (start.medians_of(starts).batch_s for starts in found.values())
    return {"start_batch": many / few}


GROUPS: dict[Group, Callable[[Path], dict[str, float]]] = {
    Group.INPUT: of_input,
    Group.OVERHEAD: of_overhead,
    Group.SAMPLING: of_sampling,
    Group.START: of_start,
}


# -- comparison -----------------------------------------------------------------------------------------------------


def judged(ratio: Ratio, now: float, committed: float | None) -> str:
    """In words, what has become of it."""
    if committed is None:
        return "not committed yet"
    times_as_bad = committed / now if ratio.more_is_better else now / committed
    if times_as_bad > ratio.margin:
        return f"WORSE: {times_as_bad:.2f} times as bad as committed, {ratio.margin} are put up with"
    return "better: consider --write" if times_as_bad < 1 / ratio.margin else "as committed"


def committed_ratios() -> dict[str, float]:
    """By name; {} where none are committed."""
    if not COMMITTED.exists():
        return {}
    ratios: dict[str, float] = json.loads(COMMITTED.read_text())["ratios"]
    return ratios


def write(ratios: dict[str, float]) -> None:
    """Those that were not measured now stay as they were."""
    kept = {name: round(value, 3) for name, value in (committed_ratios() | ratios).items()}
    known = {ratio.name: kept[ratio.name] for ratio in RATIOS if ratio.name in kept}
    content = {"machine": about(), "measured": f"{datetime.now(UTC):%Y-%m-%d}", "ratios": known}
    COMMITTED.write_text(json.dumps(content, indent=1) + "\n")


def main() -> int:
    a = tyro.cli(Arguments, description=__doc__)
    found, before = dict[str, float](), committed_ratios()
    print(about())
    for group in a.only:
        with tempfile.TemporaryDirectory(prefix="ratios-") as folder:
            found |= GROUPS[group](Path(folder))
    for ratio in RATIOS:
        if ratio.name in found:
            now, committed = found[ratio.name], before.get(ratio.name)
            was = "    -" if committed is None else f"{committed:5.2f}"
            print(f"{ratio.says:60} {now:6.2f}  committed {was}  {judged(ratio, now, committed)}")
    if a.write:
        write(found)
    print(line_of(found))
    return 0


if __name__ == "__main__":
    from benchmarks.ratios import main as importable_main  # processes of the DataLoader import it

    sys.exit(command_line.exit_code(importable_main))
