"""A worker that is stuck, looked at from its own machine: what its process does, where its code stands; its end."""

from __future__ import annotations

import faulthandler
import os
import re
import signal
import socket
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from orchestrator.training.ownership import process_started

_DUMP_S = 10.0  # in which a process has written its stacks, on a machine that is busy


@dataclass(frozen=True)
class Place:
    """Where a worker runs: ``started`` tells its process from a later one of the same number."""

    rank: int
    pid: int
    started: str
    host: str
    node: str

    @staticmethod
    def of(rank: int, pid: int, node: str) -> Place:
        """Of process ``pid`` on this machine, which Ray calls ``node``."""
        return Place(rank, pid, process_started(pid) or "", socket.gethostname(), node)

    def __str__(self) -> str:
        return f"worker {self.rank} (process {self.pid} on {self.host})"


@contextmanager
def tells_its_stacks() -> Iterator[None]:
    """Within it, this process writes where its threads are when it gets SIGUSR1, even if all of them are stuck."""
    path = _stack_file(os.getpid())
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with path.open("w") as stream:
        faulthandler.register(signal.SIGUSR1, stream, all_threads=True)  # in C: needs no interpreter
        try:
            yield
        finally:
            faulthandler.unregister(signal.SIGUSR1)
            path.unlink(missing_ok=True)


def end_worker(place: Place) -> str:
    """On the worker's machine: what its process does, with its stack where it answers; then SIGKILL. In words."""
    # Not by its time of creation, which moves with the clock.
    if process_started(place.pid) != place.started:
        return "its process has ended"
    path = _stack_file(place.pid)
    try:
        process = psutil.Process(place.pid)
        words = f"its process is {process.status()}"
        if process.status() != psutil.STATUS_STOPPED and path.exists():
            process.send_signal(signal.SIGUSR1)
            words += f"; {_frames(_whole(path))}"
        process.kill()
    except psutil.NoSuchProcess:
        return "its process has ended"
    except psutil.AccessDenied:
        return "its process cannot be ended from here"
    path.unlink(missing_ok=True)
    return f"{words}; it was killed"


def end_on(place: Place, timeout_s: float) -> str:
    """``end_worker`` on its node, from anywhere in the cluster."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    there = NodeAffinitySchedulingStrategy(place.node, soft=False)
    task = ray.remote(num_cpus=0, max_retries=0)(end_worker).options(scheduling_strategy=there).remote(place)
    try:
        return str(ray.get(task, timeout=timeout_s))
    except ray.exceptions.RayError:
        return "its machine does not answer"


def _whole(path: Path) -> str:
    """What is written to ``path`` from now on, when no more comes."""
    text, until_s = "", time.monotonic() + _DUMP_S
    while time.monotonic() < until_s:
        time.sleep(0.25)
        before, text = text, path.read_text()
        if text and text == before:
            break
    return text


def _stack_file(pid: int) -> Path:
    return Path(tempfile.gettempdir()) / f"resnet-orchestrator-{os.getuid()}" / "stacks" / f"{pid}.txt"


_FRAME = re.compile(r'File "(.+)", line (\d+) in (\S+)')


def _frames(dump: str) -> str:
    """Where the working thread of a faulthandler dump is, innermost frame first, on one line; torch's own left out."""
    at_work = "orchestrator/evaluation/stages.py", "orchestrator/training/trainer.py"
    threads = [_FRAME.findall(block) for block in dump.split("\n\n") if any(path in block for path in at_work)]
    frames = [f"{path}:{line} {name}" for thread in threads[:1] for path, line, name in thread if "/torch/" not in path]
    return "its stack: " + " < ".join(frames[:4]) if frames else "no stack could be had"
