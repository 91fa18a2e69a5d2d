"""Peak memory of a worker and of the driver, and whether it grows over a long run.

    python -m benchmarks.memory [--what workers driver loop] [--recipes resnet18 …] [--data URL] [--quick]

workers  each recipe in a process of its own: a few steps, a validation, checkpoints, the end; one batch-norm group a
         step, as a worker of eight has. Resident memory on a CPU, beside it what torch has allocated on a GPU.
driver   the process that starts a run under Ray and watches it, until its end (a small network: nothing of the network
         is in the driver).
loop     a small network, thousands of steps with a measurement every 20, a validation and a checkpoint every 40. What
         the process holds for itself is sampled: kB (10^3 bytes) a thousand steps, by least squares over the means of
         equal stretches after the first third, with the 95 % interval of the slope. ``journal``: what of it are the
         events that a run keeps by design, as Python objects.

Without --data drawings of 375 to 500 pixels are used. The last line is machine-readable.
"""

from __future__ import annotations

import math
import os
import sys
import tempfile
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro
from scipy.special import stdtrit

from benchmarks.machine import about, line_of, record
from benchmarks.recovery import NEVER, in_own_process, small, train_here
from data_prep import demo, ilsvrc
from jobs import command_line
from jobs.imagenet import RECIPES
from orchestrator.config import Family, ModelConfig, PlacementConfig, TrainConfig
from orchestrator.data.shards import DataSet
from orchestrator.storage import Storage
from orchestrator.training.notices import Event

WORKERS = ("resnet18_64px", "resnet18", "resnet34", "resnet50", "resnet101", "resnet152")
STRETCHES = 12
EVERY_STEPS = 40  # of the long loop: a validation and a checkpoint


class What(Enum):
    """What is measured."""

    WORKERS = "workers"
    DRIVER = "driver"
    LOOP = "loop"


@dataclass(frozen=True)
class Arguments:
    """What is measured."""

    what: Annotated[tuple[What, ...], tyro.conf.EnumChoicesFromValues] = tuple(What)
    recipes: tuple[str, ...] = WORKERS
    """recipes of jobs/imagenet.py whose workers are looked at"""
    data: str = ""
    """URL of a prepared data set; empty: drawings"""
    steps: int = 2
    """of each worker"""
    loop_steps: int = 4000
    cpus: int = 0
    """threads of a worker; 0: all processors"""
    scratch: Path = Path(tempfile.gettempdir())
    """where data and runs are kept meanwhile"""
    quick: bool = False
    """only to see that it works: a small worker, 120 steps; the driver where --what names it"""
    record: str = ""
    """file of Markdown that a table is appended to"""


@dataclass(frozen=True)
class Held:
    """What a process held, MB (10^6 bytes): resident at most, of that for itself now, when all was imported."""

    peak_mb: float
    own_mb: float
    imports_mb: float
    gpu_peak_mb: float = 0.0


def status_mb(name: str) -> float:
    """A field of /proc/self/status in 10^6 bytes: VmHWM, VmRSS, RssAnon."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(f"{name}:")).split()[1]) * 1024 / 1e6


def object_bytes(value: object) -> int:
    """What a tree of dictionaries and lists holds, without the names of fields, which all events share."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return sys.getsizeof(value) + sum(map(object_bytes, inner))


def send(ready: Any, result: object) -> None:
    """Send it, and end this process."""
    ready.send(result)
    ready.close()
    os._exit(0)


# -- workers and driver ---------------------------------------------------------------------------------------------


def worker(config: TrainConfig, cpus: int, ready: Any) -> None:
    """In a process of its own: sends ``Held``."""
    import torch

    from orchestrator.training import trainer  # noqa: F401
    from orchestrator.world import World

    imports_mb = status_mb("VmRSS")
    on_gpu = torch.cuda.is_available()
    world = World(device="cuda" if on_gpu else "cpu")
    train_here(config, lambda event: None, lambda step, images: None, world=world, cpus=cpus)
    gpu_mb = torch.cuda.max_memory_allocated() / 1e6 if on_gpu else 0.0
    send(ready, Held(status_mb("VmHWM"), status_mb("RssAnon"), imports_mb, gpu_mb))


def worker_config(recipe: str, data: str, folder: Path, steps: int) -> TrainConfig:
    base = RECIPES[recipe]()
    return replace(
        base,
        data=data,
        storage=str(folder),
        name=f"worker-{recipe}",
        batch=replace(base.batch, global_batch_size=base.batch.bn_group_size),
        schedule=replace(base.schedule, max_steps=steps, max_epochs=0.0),
        rhythm=replace(base.rhythm, log_every_steps=1, checkpoint_every_steps=1, validate_every_epochs=1e6),
    )


def driver(config: TrainConfig, ready: Any) -> None:
    """In a process of its own: sends ``Held``."""
    from orchestrator.control.supervisor import run_job

    imports_mb = status_mb("VmRSS")
    run_job(config, lambda event: None)
    send(ready, Held(status_mb("VmHWM"), status_mb("RssAnon"), imports_mb))


# -- the long loop --------------------------------------------------------------------------------------------------


def loop_config(data: str, folder: Path, steps: int) -> TrainConfig:
    """A step takes some ms; every ``EVERY_STEPS`` there is a validation, which makes a checkpoint."""
    config = small(data, folder, "loop", 18, 8, checkpoint_every_steps=NEVER, log_every_steps=EVERY_STEPS // 2)
    images = len(DataSet(Storage(data)).split("train"))
    return replace(
        config,
        model=ModelConfig(family=Family.CIFAR_RESNET, depth=8),
        schedule=replace(config.schedule, max_steps=steps),
        rhythm=replace(
            config.rhythm,
            validate_every_epochs=EVERY_STEPS * config.batch.global_batch_size / images,
            validation_batch_size=8,
        ),
    )


def loop(config: TrainConfig, ready: Any) -> None:
    """In a process of its own: sends samples of RssAnon [n, 2] (step, MB), and bytes of the journal a step."""
    samples, kept = list[tuple[int, float]](), 0

    def emit(event: Event) -> None:
        nonlocal kept
        if event["kind"] in ("train", "validation", "decision"):
            kept += object_bytes(event)

    def seen(step: int, images: np.ndarray) -> None:
        if step % 10 == 0:
            samples.append((step, status_mb("RssAnon")))

    train_here(config, emit, seen)
    send(ready, (np.array(samples), kept / config.schedule.max_steps))


@dataclass(frozen=True)
class Growth:
    """kB a thousand steps, its 95 % interval, and the journal's part; MB at the end; steps looked at."""

    kb: float
    low_kb: float
    high_kb: float
    journal_kb: float
    end_mb: float
    steps: int


def growth_of(samples: np.ndarray, journal_bytes_per_step: float) -> Growth:
    """``samples`` [n, 2]: step, MB."""
    late = samples[len(samples) // 3 :]
    stretches = np.array([part.mean(0) for part in np.array_split(late, min(STRETCHES, len(late)))])
    steps, megabytes = (stretches - stretches.mean(0)).T
    slope = float(steps @ megabytes / (steps @ steps))
    freedom = len(stretches) - 2
    error = math.sqrt(float(np.square(megabytes - slope * steps).sum()) / freedom / float(steps @ steps))
    half = float(stdtrit(freedom, 0.975)) * error
    kb, low_kb, high_kb = (1e6 * each for each in (slope, slope - half, slope + half))  # of MB a step
    return Growth(kb, low_kb, high_kb, journal_bytes_per_step, float(late[-1, 1]), int(late[-1, 0] - late[0, 0]))


# -- all of it ------------------------------------------------------------------------------------------------------


def make_data(folder: Path, *, small_ones: bool) -> str:
    """URL of a set of drawings."""
    sides = (80, 120) if small_ones else (375, 500)
    demo.generate(demo.Arguments(str(folder / "archives"), 8, 12, 4, 1, 0, *sides))
    ilsvrc.prepare(ilsvrc.Arguments(str(folder / "archives"), str(folder / "set"), num_tasks=0, max_undecodable=0.1))
    return str(folder / "set")


def told(what: str, held: Held, note: str) -> list[str]:
    gpu = f"{held.gpu_peak_mb:.0f}" if held.gpu_peak_mb else ""
    return [what, f"{held.peak_mb:.0f}", f"{held.own_mb:.0f}", f"{held.imports_mb:.0f}", gpu, note]


def main() -> int:
    a = tyro.cli(Arguments, description=__doc__)
    if a.quick:
        whats = a.what if a.what != tuple(What) else (What.WORKERS, What.LOOP)
        a = replace(a, recipes=("resnet18_64px",), steps=1, loop_steps=120, what=whats)
    if unknown := set(a.recipes) - RECIPES.keys():
        raise ValueError(f"unknown recipe {', '.join(sorted(unknown))}: choose of {', '.join(RECIPES)}")
    cpus = a.cpus or len(os.sched_getaffinity(0))
    rows, notes, figures = list[list[str]](), list[str](), dict[str, float]()
    print(about())
    with tempfile.TemporaryDirectory(prefix="memory-", dir=a.scratch) as name:
        folder = Path(name)
        data = Storage(a.data).url if a.data else make_data(folder, small_ones=a.quick)
        if What.WORKERS in a.what:
            for recipe in a.recipes:
                config = worker_config(recipe, data, folder, a.steps)
                held: Held = in_own_process(worker, config, cpus)
                note = f"{config.batch.global_batch_size} images of {config.input.crop_px} pixels a step"
                rows.append(told(f"worker, {recipe}", held, note))
                figures |= {f"{recipe}_peak_mb": held.peak_mb, f"{recipe}_gpu_mb": held.gpu_peak_mb}
                print(" | ".join(rows[-1]), flush=True)
        if What.DRIVER in a.what:
            config = loop_config(data, folder, 200)
            config = replace(config, name="driver", placement=PlacementConfig(num_workers=1, cpus_per_worker=1))
            held = in_own_process(driver, config)
            rows.append(told("driver", held, "a run of 200 steps under Ray"))
            figures["driver_peak_mb"] = held.peak_mb
            print(" | ".join(rows[-1]), flush=True)
        if What.LOOP in a.what:
            samples, journal = in_own_process(loop, loop_config(data, folder, a.loop_steps))
            g = growth_of(samples, journal)
            notes.append(
                f"The long loop: {g.kb:.0f} kB ({g.low_kb:.0f} to {g.high_kb:.0f}) a thousand steps over {g.steps:,} "
                f"steps, {g.end_mb:.0f} MB at the end; 50 measurements, 25 validations and 25 checkpoints a thousand "
                f"steps, whose journal is {g.journal_kb:.0f} kB of it."
            )
            figures |= {"growth_kb": g.kb, "growth_low_kb": g.low_kb, "growth_high_kb": g.high_kb}
            figures |= {"journal_kb": g.journal_kb}
            print(notes[-1], flush=True)
    if a.record:
        header = ("process", "peak resident, MB", "own at the end, MB", "after imports, MB", "on the GPU, MB", "")
        record(Path(a.record), "Memory", header, rows, " ".join([f"{cpus} threads a worker.", *notes]))
    print(line_of(figures))
    return 0


if __name__ == "__main__":
    sys.exit(command_line.exit_code(main))
