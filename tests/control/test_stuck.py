"""A process that is stuck, looked at from outside and ended: real processes."""

from __future__ import annotations

import multiprocessing
import os
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import psutil
import pytest

from orchestrator.control.stuck import Place, end_worker, tells_its_stacks
from orchestrator.training import trainer

_CONTEXT = multiprocessing.get_context("spawn")


def sleeps_in_the_trainer(ready: Path) -> None:
    """Stands where a worker stands whose network never returns."""
    code = compile(f"def train(wait):\n{chr(10) * 60}    wait()\n", trainer.__file__, "exec")
    names: dict[str, object] = {}
    exec(code, names)

    def a_network_that_never_returns() -> None:
        ready.touch()
        time.sleep(600)

    with tells_its_stacks():
        names["train"](a_network_that_never_returns)  # type: ignore[operator]


@pytest.fixture
def stuck(tmp_path: Path) -> BaseProcess:
    ready = tmp_path / "ready"
    process = _CONTEXT.Process(target=sleeps_in_the_trainer, args=(ready,), daemon=True)
    process.start()
    deadline_s = time.monotonic() + 60
    while not ready.exists():
        assert time.monotonic() < deadline_s
        time.sleep(0.05)
    return process


def place_of(process: BaseProcess) -> Place:
    assert process.pid is not None
    return Place.of(3, process.pid, "node")


def test_it_is_told_where_it_stands_and_ended(stuck: BaseProcess) -> None:
    place = place_of(stuck)
    words = end_worker(place)
    assert "its process is sleeping" in words
    assert f"{__file__}" in words
    assert "a_network_that_never_returns" in words
    assert words.endswith("it was killed")
    stuck.join(10)
    assert stuck.exitcode == -9
    assert end_worker(place) == "its process has ended"


def test_a_stopped_one_is_ended_without_a_stack(stuck: BaseProcess) -> None:
    place = place_of(stuck)
    process = psutil.Process(stuck.pid)
    process.suspend()
    while process.status() != psutil.STATUS_STOPPED:  # a signal takes its time on a busy machine
        time.sleep(0.01)
    assert end_worker(place) == "its process is stopped; it was killed"
    stuck.join(10)
    assert stuck.exitcode == -9


def test_another_process_of_that_number_is_left_alone(stuck: BaseProcess) -> None:
    place = place_of(stuck)
    other = Place(place.rank, place.pid, place.started + "0", place.host, place.node)
    assert end_worker(other) == "its process has ended"
    assert stuck.is_alive()
    assert str(place) == f"worker 3 (process {stuck.pid} on {os.uname().nodename})"
    stuck.kill()
