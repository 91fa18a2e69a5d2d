"""Training runs in plain process groups of real processes, for tests: start, watch, kill, read what is left."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
import uuid
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from orchestrator.config import (
    BatchConfig,
    InputConfig,
    ModelConfig,
    PolicyKind,
    RhythmConfig,
    ScheduleConfig,
    TrainConfig,
)
from orchestrator.data.sampling import SampleStream
from orchestrator.data.shards import DataSet
from orchestrator.storage import Storage
from orchestrator.training.checkpoint import Checkpoints, Snapshot
from orchestrator.training.meters import sample_checksum
from orchestrator.training.ownership import claim
from orchestrator.training.pulse import Pulse
from orchestrator.training.run import finished, fix_identity
from orchestrator.training.trainer import train
from orchestrator.world import World
from tests.training.traps import Trap

# A fork of a process that has imported everything starts in a moment: torch imports its compiler (1.5 s) with the first
# optimizer, pyarrow imports pandas (0.5 s) with the first index.
CONTEXT = multiprocessing.get_context("forkserver")
_DALI = ("nvidia.dali.fn", "nvidia.dali.types", "nvidia.dali._debug_mode")
CONTEXT.set_forkserver_preload(
    ["torch._dynamo", "pandas", "PIL.JpegImagePlugin", *_DALI, "orchestrator.control.supervisor", __name__]
)


def small_config(data: Path, storage: Path, name: str, **fields: Any) -> TrainConfig:
    """ResNet-18 on 32 × 32 pixels: 45 MB of gradients (three buckets), 8 steps of three batch-norm groups of 8."""
    config = TrainConfig(
        data=str(data),
        storage=str(storage),
        name=name,
        model=ModelConfig(depth=18),
        input=InputConfig(crop_px=32, scale_min_px=36, scale_max_px=68, test_shorter_side_px=36),
        batch=BatchConfig(global_batch_size=24, bn_group_size=8),
        schedule=ScheduleConfig(max_steps=8, lr=0.003, policy=PolicyKind.PLATEAU, plateau_window=1),
        rhythm=RhythmConfig(
            log_every_steps=1,
            checkpoint_every_steps=3,
            validate_every_epochs=0.5,
            validation_batch_size=12,
            keep_last=10,
        ),
    )
    return replace(config, **fields)


def options(config: TrainConfig) -> list[str]:
    """The command line's words for what ``small_config`` sets."""
    plain = config.to_json()
    words = ["--data", config.data, "--storage", config.storage, "--name", config.name]
    for part in ("model", "input", "batch", "schedule", "rhythm"):
        for key, value in plain[part].items():
            if value is not None and value != []:
                words += [f"--{part}.{key.replace('_', '-')}", str(value)]
    return words


def take_number(run: Storage) -> int:
    """The number of a start whose driver is this process: it lets go at once, so that the next start need not ask."""
    with claim(run, lease_s=30, take_over=True, tell=lambda text: None) as owner:
        return owner.number


class Group:
    """The processes of one start of a run."""

    def __init__(self, config: TrainConfig, size: int, trap: Trap | None = None) -> None:
        self.trap = trap
        run = Storage(config.storage).sub(config.name)
        self.run_path = Path(run.root)
        self.run_path.mkdir(parents=True, exist_ok=True)
        fix_identity(run, config, DataSet(Storage(config.data)))
        attempt = take_number(run)
        self.events_path = self.run_path / f"events-{attempt}.jsonl"
        rendezvous = self.run_path / f"rendezvous-{attempt}"
        self.processes = [
            CONTEXT.Process(
                target=_work,
                args=(rank, size, str(rendezvous), config.to_json(), attempt, str(self.events_path), trap),
            )
            for rank in range(size)
        ]
        for process in self.processes:
            process.start()

    def events(self) -> list[dict[str, Any]]:
        if not self.events_path.exists():
            return []
        lines = self.events_path.read_text().splitlines(keepends=True)
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def kill_when(self, reached: Callable[[dict[str, Any]], bool], timeout_s: float = 120) -> None:
        """SIGKILL every process once an event satisfies ``reached``."""
        deadline_s = time.monotonic() + timeout_s
        while not any(reached(event) for event in self.events()):
            assert time.monotonic() < deadline_s, self.events()
            assert all(p.is_alive() for p in self.processes), [p.exitcode for p in self.processes]
            time.sleep(0.01)
        for process in self.processes:
            assert process.pid is not None
            os.kill(process.pid, signal.SIGKILL)
        for process in self.processes:
            process.join()

    def wait_for_trap(self, timeout_s: float = 120) -> list[int | None]:
        """Until the trap's worker is dead, and the others are: killed with it, or by themselves. Exit codes by rank."""
        assert self.trap is not None
        caught = self.processes[self.trap.rank]
        caught.join(timeout_s)
        assert caught.exitcode in (-signal.SIGKILL, -signal.SIGXFSZ), (self.trap, caught.exitcode, self.events()[-3:])
        for process in self.processes:
            if self.trap.everyone and process.is_alive():
                process.kill()
        codes = self.wait(timeout_s)
        assert all(codes), f"{self.trap}: a worker ended well beside a dead one: {codes}"
        return codes

    def wait(self, timeout_s: float = 240) -> list[int | None]:
        """Exit codes, rank by rank."""
        deadline_s = time.monotonic() + timeout_s
        for process in self.processes:
            process.join(max(0.1, deadline_s - time.monotonic()))
        codes = [p.exitcode for p in self.processes]
        for process in self.processes:
            if process.is_alive():
                process.kill()
        return codes


def in_group(function: Callable[..., None], size: int, folder: Path, *arguments: Any) -> list[int | None]:
    """``function(world, *arguments)`` in ``size`` processes that are one group; their exit codes, rank by rank."""
    rendezvous = str(folder / f"rendezvous-{uuid.uuid4().hex}")
    processes = [
        CONTEXT.Process(target=_in_group, args=(function, rank, size, rendezvous, arguments)) for rank in range(size)
    ]
    for process in processes:
        process.start()
    deadline_s = time.monotonic() + 240
    for process in processes:
        process.join(max(0.1, deadline_s - time.monotonic()))
    codes = [process.exitcode for process in processes]
    for process in processes:
        if process.is_alive():
            process.kill()
    return codes


def _in_group(function: Callable[..., None], rank: int, size: int, rendezvous: str, arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    if size > 1:
        dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=size)
    world = World(rank, size)
    function(world, *arguments)
    world.leave()


def run_to_end(config: TrainConfig, size: int) -> Path:
    """Train with ``size`` processes; the folder of the run."""
    group = Group(config, size)
    codes = group.wait()
    assert codes == [0] * size, f"{config.name}: exit codes {codes}"
    return group.run_path


def open_run(run_path: Path) -> Checkpoints:
    def fail(notice: str) -> None:
        raise AssertionError(notice)

    return Checkpoints(Storage(str(run_path)), attempt=0, keep_last=1, notice=fail)


def last_snapshot(run_path: Path) -> Snapshot:
    found = open_run(run_path).newest()
    assert found is not None
    return found


def history(journal: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The journal without what a clock says, and what was decided by one."""
    clocks = {"images_per_s", "data_wait_share", "validation_s", "slowest_worker_ratio"}
    return [
        {
            k: ({m: x for m, x in v.items() if m not in clocks} if k == "metrics" else v)
            for k, v in e.items()
            if k not in ("time_ms", "seconds")
        }
        for e in journal
        if e["kind"] != "tuned"
    ]


def weights_digest(run_path: Path) -> str:
    outcome = finished(Storage(str(run_path)))
    assert outcome is not None
    return outcome.weights_sha256


def trained_on(run_path: Path) -> dict[int, list[int]]:
    """Images of each step (0-based), in the order of the workers; of a step that several starts did, the last time."""
    steps: dict[int, dict[int, list[int]]] = {}
    for attempt in sorted(int(p.stem.partition("-")[2]) for p in run_path.glob("events-*.jsonl")):
        logs = {int(p.stem.rpartition("-")[2]): p for p in run_path.glob(f"samples-{attempt}-*.jsonl")}
        lines = {rank: [json.loads(line) for line in log.read_text().splitlines()] for rank, log in logs.items()}
        first = min((seen[0][0] for seen in lines.values() if seen), default=None)
        if first is not None:  # this start went back to there
            steps = {step: images for step, images in steps.items() if step < first}
        for rank, seen in sorted(lines.items()):
            for step, images in seen:
                steps.setdefault(step, {})[rank] = images
    return {step: [i for images in parts.values() for i in images] for step, parts in steps.items()}


def check_samples(config: TrainConfig, run_path: Path) -> None:
    """Each image once an epoch, in the order of the stream, by the workers' own logs and by the journal's checksums.

    The stream is computed here, from the config and the number of images alone.
    """
    num_images = len(DataSet(Storage(config.data)).split("train"))
    size, stream, seen = config.batch.global_batch_size, SampleStream(num_images, config.seed), trained_on(run_path)
    journal = last_snapshot(run_path).journal
    done = max(e["step"] for e in journal)
    assert sorted(seen) == list(range(done)), f"steps {sorted(seen)} of {done}"
    images = np.array([seen[step] for step in range(done)]).reshape(-1)
    positions = np.arange(done * size)
    np.testing.assert_array_equal(images, stream.images(positions))
    for epoch in range(done * size // num_images):
        assert (np.bincount(images[epoch * num_images : (epoch + 1) * num_images], minlength=num_images) == 1).all()
    start = 0
    for event in (e for e in journal if e["kind"] == "train"):
        these = slice(start * size, event["step"] * size)
        checksum = sample_checksum(positions[these], stream.images(positions[these]))
        assert event["samples"] == f"{checksum % 2**64:016x}", event
        start = event["step"]
    assert start == done


def check_equal(run_path: Path, other: Path) -> None:
    """Two finished runs are the same to the last bit: weights, momentum, policy, meters and every measurement."""
    a, b = last_snapshot(run_path), last_snapshot(other)
    assert a.tensors.keys() == b.tensors.keys()
    assert any(name.startswith("momentum/") for name in a.tensors)
    differing = [name for name, tensor in a.tensors.items() if not torch.equal(tensor, b.tensors[name])]
    assert not differing, f"{run_path.name}: {len(differing)} of {len(a.tensors)} tensors differ: {differing[:5]}"
    assert weights_digest(run_path) == weights_digest(other)
    assert (a.step, a.state) == (b.step, b.state), f"{run_path.name}: {a.step} {a.state}, not {b.step} {b.state}"
    events = list(zip(history(a.journal), history(b.journal), strict=True))
    assert all(x == y for x, y in events), f"{run_path.name}: {next((x, y) for x, y in events if x != y)}"


def farthest_number(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], kind: str = "") -> float:
    """Largest difference of any number in any tensor whose name holds ``kind``, relative to the tensor's largest."""
    return max(float((a[n] - b[n]).abs().max() / a[n].abs().max().clamp_min(1e-6)) for n in a if kind in n)


def farthest_norm(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], kind: str) -> float:
    """Largest norm of a difference of two tensors whose name holds ``kind``, relative to the tensor's own."""
    return max(float((a[n] - b[n]).norm() / a[n].norm().clamp_min(1e-6)) for n in a if kind in n)


EVERY_FAULT = "FAULT_SEEDS" in os.environ  # "make test-faults"; "make test" has a small form


def fault_seeds() -> list[int]:
    """Seeds of the fault suite: FAULT_SEEDS of them ("make test-faults"), else one."""
    return list(range(int(os.environ.get("FAULT_SEEDS", "1"))))


def _work(
    rank: int, size: int, rendezvous: str, config: dict[str, Any], attempt: int, events: str, trap: Trap | None
) -> None:
    torch.set_num_threads(1)
    folder = Path(events).parent
    pulse, notice = trap.arm(rank, folder) if trap else (Pulse(), lambda event: None)
    if size > 1:
        dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=size)
    with Path(events).open("a", buffering=1) as stream:

        def emit(event: dict[str, Any]) -> None:
            stream.write(json.dumps(event) + "\n")
            notice(event)

        world = World(rank, size)
        samples = (folder / f"samples-{attempt}-{rank}.jsonl").open("a", buffering=1)

        def seen(step: int, images: np.ndarray) -> None:
            samples.write(json.dumps([step, images.tolist()]) + "\n")

        try:
            train(TrainConfig.from_json(config), world, attempt=attempt, cpus=1, emit=emit, pulse=pulse, seen=seen)
        except Exception as error:
            (folder / "error.txt").write_text(str(error))
            raise
    world.leave()
