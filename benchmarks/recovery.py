"""What checkpoints cost, what resuming costs, and where the time goes after a worker is killed.

    python benchmarks/recovery.py checkpoints --data URL [--quick]
    python benchmarks/recovery.py resume --data URL [--quick]
    python benchmarks/recovery.py restart --data URL [--quick]

checkpoints: what a checkpoint takes from training (ResNet-50's state, 200 MB, on small images so that steps are short):
the steps right after each are compared with those that follow, by the clock and in seconds of a processor (lost in full
where none is idle); the same sums of runs without checkpoints, which take turns, show the noise. resume: seconds from
the start of a process to its first new step, 1 % and 99 % into an epoch, alternating. restart: seconds from the SIGKILL
of one of two workers under Ray to the next new step, part by part. Ratios within a run can be compared, figures of two
runs of a busy machine cannot. The last line is machine-readable. CPU, one thread a worker, files in --scratch.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import datetime
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import tyro

from jobs import command_line
from orchestrator.config import (
    BatchConfig,
    InputConfig,
    ModelConfig,
    PlacementConfig,
    PolicyKind,
    RhythmConfig,
    ScheduleConfig,
    TrainConfig,
)
from orchestrator.data.shards import DataSet
from orchestrator.storage import Storage
from orchestrator.training.notices import Event

if TYPE_CHECKING:
    from orchestrator.world import World

NEVER = 10**9


class What(Enum):
    CHECKPOINTS = "checkpoints"
    RESUME = "resume"
    RESTART = "restart"


@dataclass(frozen=True)
class Arguments:
    what: Annotated[What, tyro.conf.Positional, tyro.conf.EnumChoicesFromValues]
    """what is measured"""
    data: str
    """URL of a prepared data set"""
    scratch: Path = Path(tempfile.gettempdir())
    """where the runs are kept meanwhile"""
    quick: bool = False
    """only to see that it works"""


def small(data: str, folder: Path, name: str, depth: int, batch_size: int, **rhythm: Any) -> TrainConfig:
    """Images of 32 × 32 pixels; nothing but the end of the run validates."""
    return TrainConfig(
        data=data,
        storage=str(folder),
        name=name,
        model=ModelConfig(depth=depth),
        input=InputConfig(crop_px=32, scale_min_px=36, scale_max_px=68, test_shorter_side_px=36),
        batch=BatchConfig(global_batch_size=batch_size, bn_group_size=batch_size),
        schedule=ScheduleConfig(max_steps=NEVER, lr=1e-4, policy=PolicyKind.COSINE),
        rhythm=RhythmConfig(validate_every_epochs=1e6, log_every_steps=rhythm.pop("log_every_steps", NEVER), **rhythm),
    )


class EnoughError(Exception):
    """Ends a run that has shown what was asked."""


def train_here(
    config: TrainConfig,
    emit: Callable[[Event], None],
    seen: Callable[[int, np.ndarray], None],
    *,
    world: World | None = None,
    cpus: int = 1,
) -> None:
    """One start of ``config`` with this process as its only worker (``world``; None: on a CPU), on one thread: two that
    wait for each other time whatever else the machine does."""
    from orchestrator.training.ownership import claim
    from orchestrator.training.run import fix_identity, run_storage
    from orchestrator.training.trainer import train
    from orchestrator.world import World

    run = run_storage(config)
    fix_identity(run, config, DataSet(Storage(config.data)))
    with claim(run, lease_s=30, take_over=True, tell=lambda text: None) as owner:
        train(config, world or World(0, 1), attempt=owner.number, cpus=cpus, emit=emit, seen=seen)


# -- checkpoints ------------------------------------------------------------------------------------------------------


def timed_steps(config: TrainConfig, num_steps: int, ready: Any) -> None:
    """In a process of its own: sends clock and processor seconds [2, steps] of each step, and each save's stall."""
    times, stalls = [(time.perf_counter(), time.process_time())], list[float]()

    def emit(event: Event) -> None:
        if event["kind"] == "saving":
            stalls.append(event["stall_s"])

    def seen(step: int, images: np.ndarray) -> None:
        times.append((time.perf_counter(), time.process_time()))
        if len(times) > num_steps:
            raise EnoughError

    try:
        train_here(config, emit, seen)
    except EnoughError:
        ready.send((np.diff(np.array(times).T), stalls))
        ready.close()
    os._exit(0)


def in_own_process(target: Callable[..., None], *arguments: Any) -> Any:
    """What ``target(*arguments, connection)`` sends from a new process."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=target, args=(*arguments, there))
    process.start()
    there.close()
    try:
        return here.recv()
    finally:
        process.join()


def checkpoints(a: Arguments, folder: Path) -> str:
    """With and without, alternating. The steps before a run's first save are left out."""
    repeats, every, num_saves = (1, 12, 2) if a.quick else (4, 20, 4)
    num_steps = every * (num_saves + 1)
    lost: dict[bool, list[np.ndarray]] = {True: [], False: []}  # of each save: clock, processor seconds
    speeds: dict[bool, list[float]] = {True: [], False: []}
    stalls: list[float] = []
    for repeat in range(repeats):
        for with_saves in (True, False) if repeat % 2 else (False, True):
            name = f"checkpoints-{repeat}-{with_saves}"
            config = small(a.data, folder, name, 50, 8, checkpoint_every_steps=every if with_saves else NEVER)
            seconds, stalled = in_own_process(timed_steps, config, num_steps)
            periods = seconds[:, every:].reshape(2, num_saves, every)  # each begins with a save
            after, quiet = periods[:, :, : every // 2], periods[:, :, every // 2 :]
            lost[with_saves] += list((after - np.median(quiet, axis=2, keepdims=True)).sum(axis=2).T)
            speeds[with_saves].append(1 / periods[0].mean())
            stalls += stalled[1:]
            shutil.rmtree(folder / name)
    (lost_s, cpu_s), (noise_s, noise_cpu_s) = (np.median(lost[with_saves], axis=0) for with_saves in (True, False))
    stall_s = statistics.median(stalls)
    ratio = statistics.median(some / none for some, none in zip(speeds[True], speeds[False], strict=True))
    print(f"a checkpoint costs {lost_s:.2f} s by the clock (without one: {noise_s:.2f})", end="")
    print(f"  (of {np.round([one[0] for one in lost[True]], 1).tolist()})")
    print(f"                   {cpu_s:.2f} s of a processor (without one: {noise_cpu_s:.2f})", end="")
    print(f"  (of {np.round([one[1] for one in lost[True]], 1).tolist()})")
    print(f"the loop itself stands still {stall_s:.3f} s (worst of {len(stalls)}: {max(stalls):.3f})")
    print(f"steps a second with one every {every} steps: {ratio:.3f} of those without")
    return (
        f"lost_s={lost_s:.3f} cpu_s={cpu_s:.3f} stall_s={stall_s:.3f} "
        f"noise_s={noise_s:.3f} ratio_steps_per_s={ratio:.3f} "
        f"share_at_one_a_minute={lost_s / 60:.4f} cpu_share={cpu_s / 60:.4f} stall_share={stall_s / 60:.5f}"
    )


# -- resume -----------------------------------------------------------------------------------------------------------


def train_until(config: TrainConfig, step: int, ready: Any) -> None:
    """In a process of its own: train to the checkpoint of ``step``."""
    saved = threading.Event()

    def emit(event: Event) -> None:
        if event["kind"] == "checkpoint":
            saved.set()

    def seen(done: int, images: np.ndarray) -> None:
        if done >= step:
            saved.wait()
            raise EnoughError

    try:
        train_here(config, emit, seen)
    except EnoughError:
        ready.send(step)
        ready.close()
    os._exit(0)


def first_step(config: TrainConfig, ready: Any) -> None:
    """In a process of its own: the step that is done first, and when."""

    def seen(step: int, images: np.ndarray) -> None:
        ready.send((step, time.monotonic()))
        ready.close()
        raise EnoughError

    try:
        train_here(config, lambda event: None, seen)
    except EnoughError:
        os._exit(0)


def resume(a: Arguments, folder: Path) -> str:
    """An epoch is 100 steps of 1 % each, on any data set."""
    repeats = 2 if a.quick else 7
    if (num_images := len(DataSet(Storage(a.data)).split("train"))) < 200:
        raise ValueError(f"--data has {num_images} training images: 200 at least make an epoch of 100 steps")
    batch_size = num_images // 100
    points = {"1": 1, "99": 99}
    configs = {}
    for name, step in points.items():
        configs[name] = small(a.data, folder, f"resume-{name}", 18, batch_size, checkpoint_every_steps=step)
        assert in_own_process(train_until, configs[name], step) == step
    seconds: dict[str, list[float]] = {name: [] for name in points}
    for repeat in range(repeats):
        for name in list(points)[:: -1 if repeat % 2 else 1]:
            start_s = time.monotonic()
            step, done_s = in_own_process(first_step, configs[name])
            assert step == points[name], (step, points[name])
            seconds[name].append(done_s - start_s)
    for name, values in seconds.items():
        print(f"resumed at {name:>2} % of an epoch: first step after {statistics.median(values):6.2f} s", end="")
        print(f"  (of {[round(v, 1) for v in values]})")
    ratios = [late / early for early, late in zip(seconds["1"], seconds["99"], strict=True)]
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return f"at_1_s={medians['1']:.2f} at_99_s={medians['99']:.2f} ratio_99_to_1={statistics.median(ratios):.3f}"


# -- restart ----------------------------------------------------------------------------------------------------------

# What Ray Train's controller writes into its log when a part is over, in order.
_RAY_SAYS = {
    "death noticed": "[FailurePolicy]",
    "group shut down": "Worker group shutdown successful",
    "places reserved": "Placement group ready",
    "processes started, ray.train imported": "worker actors created",
    "torch and the project imported": "Train context initialized",
    "process group": "after_worker_group_start callbacks completed",
    "loop entered": "Train function launched",
}
_WE_SAY = ("network, DDP, checkpoint read", "input side built", "first batch and step")


def restart(a: Arguments, folder: Path) -> str:
    """Kills rank 1 of two workers some steps after the group has begun, several times in one run."""
    import ray

    from orchestrator.control.supervisor import run_job

    num_kills = 1 if a.quick else 5
    config = small(a.data, folder, "restart", 18, 16, checkpoint_every_steps=5, log_every_steps=1)
    config = replace(
        config,
        batch=replace(config.batch, bn_group_size=8),
        schedule=replace(config.schedule, max_steps=20 * (num_kills + 1)),
        placement=PlacementConfig(num_workers=2, cpus_per_worker=1),
    )
    kills: list[float] = []
    said: list[tuple[float, str]] = []
    victim = [0]
    logs: list[Path] = []

    def listen(event: Event) -> None:
        now = time.time()
        match event["kind"]:
            case "workers":
                victim[0] = event["workers"][1]["pid"]
                if not logs:
                    session = Path(ray._private.worker._global_node.get_session_dir_path())
                    logs.extend((session / "logs" / "train").glob("ray-train-sys-controller-*.log"))
            case "notice" if event["text"].startswith("going on from"):
                said.append((now, _WE_SAY[0]))
            case "start":
                said.append((now, _WE_SAY[1]))
            case "train":
                if len(said) % 3 == 2 and kills:
                    said.append((event["time_ms"] / 1000, _WE_SAY[2]))
                # The first group goes from step 0; each kill costs at most the steps since the last checkpoint.
                if len(kills) < num_kills and event["step"] >= 20 * (len(kills) + 1) and victim[0]:
                    pid, victim[0] = victim[0], 0
                    if not kills:
                        said.clear()
                    kills.append(time.time())
                    os.kill(pid, 9)

    run_job(config, listen)
    for line in logs[0].read_text().splitlines():
        record = json.loads(line)
        when = datetime.strptime(record["asctime"], "%Y-%m-%d %H:%M:%S,%f").timestamp()
        part = next((part for part, words in _RAY_SAYS.items() if words in record["message"]), None)
        if part:
            said.append((when, part))
    parts: dict[str, list[float]] = {part: [] for part in (*_RAY_SAYS, *_WE_SAY)}
    totals: list[float] = []
    for number, killed in enumerate(kills):
        until = kills[number + 1] if number + 1 < len(kills) else float("inf")
        last = killed
        for part, lengths in parts.items():
            when = next(t for t, name in sorted(said) if name == part and killed <= t < until)
            lengths.append(max(0.0, when - last))
            last = max(last, when)
        totals.append(last - killed)
    for part, lengths in parts.items():
        print(f"{part:40} {statistics.median(lengths):6.2f} s  (of {[round(s, 1) for s in lengths]})")
    total_s = statistics.median(totals)
    print(f"{'killed worker to the next new step':40} {total_s:6.2f} s  (of {[round(s, 1) for s in totals]})")
    longest = max(parts, key=lambda part: statistics.median(parts[part]))
    return f"killed_to_step_s={total_s:.2f} worst_s={max(totals):.2f} longest_part={longest.replace(' ', '_')!r}"


def main() -> int:
    a = tyro.cli(Arguments, description=__doc__)
    load = os.getloadavg()[0]
    print(f"{len(os.sched_getaffinity(0))} CPUs, load {load:.1f} at the start")
    measure = {What.CHECKPOINTS: checkpoints, What.RESUME: resume, What.RESTART: restart}[a.what]
    with tempfile.TemporaryDirectory(prefix="recovery-", dir=a.scratch) as folder:
        print(f"{measure(replace(a, data=Storage(a.data).url), Path(folder))} load={load:.1f}")
    return 0


if __name__ == "__main__":
    sys.exit(command_line.exit_code(main))
