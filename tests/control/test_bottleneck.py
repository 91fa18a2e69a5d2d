"""Where the time went: parts that are known by construction, and the advice that follows."""

from __future__ import annotations

import time

import pytest
import torch

from orchestrator.control import bottleneck
from orchestrator.control.entries import Account
from orchestrator.training.clock import Clock, StepTimes
from orchestrator.training.time_parts import CHECKPOINT, PARTS, VALIDATION


def journal_of(**seconds: float) -> list[dict[str, object]]:
    return [{"kind": "train", "seconds": dict.fromkeys(PARTS, 0.0) | seconds}, {"kind": "validation"}]


def test_seconds_of_a_step_are_of_its_parts() -> None:
    clock, times = Clock(), StepTimes(torch.device("cpu"))
    times.between()
    for _ in range(2):
        time.sleep(0.05)  # input
        times.copies()
        time.sleep(0.05)
        times.begins()
        time.sleep(0.03)
        times.ready()
        time.sleep(0.03)
        times.ready()  # the last bucket
        assert times.own_seconds() == pytest.approx(0.06, abs=0.05)
        time.sleep(0.04)
        times.reduced()
        time.sleep(0.02)
        times.ended()
        clock.stepped(8)
        with clock.stalled(VALIDATION):
            time.sleep(0.05)
        with clock.stalled(CHECKPOINT):
            time.sleep(0.02)
        times.between()
    seconds = clock.seconds(times.take())
    expected = {"input": 0.1, "copy": 0.1, "compute": 0.12, "all_reduce": 0.08, "optimizer": 0.04}
    expected |= {"checkpoint": 0.04, "validation": 0.0, "other": 0.0}  # a validation's own event tells of its time
    assert set(seconds) == set(PARTS)
    assert seconds == pytest.approx(expected, abs=0.05)
    assert times.take() == {}


def test_a_single_worker_reduces_nothing() -> None:
    times = StepTimes(torch.device("cpu"))
    times.begins()
    time.sleep(0.02)
    times.reduced()
    times.ended()
    found = times.take()
    assert found["all_reduce"] == 0
    assert found["compute"] >= 0.02


def test_steps_that_are_not_timed_are_taken_to_be_like_the_others() -> None:
    clock, times = Clock(), StepTimes(torch.device("cpu"))
    for _ in range(1000):
        times.begins()
        times.reduced()
        times.ended()
        clock.stepped(1)
    assert len(times._steps) == 256
    assert clock.seconds({"input": 1e-9})["input"] == pytest.approx(1e-6, abs=1e-4)


def test_parts_never_take_more_than_there_was() -> None:
    clock = Clock()
    clock.stepped(1)
    with clock.stalled(CHECKPOINT):
        time.sleep(0.02)
    time.sleep(0.02)
    seconds = clock.seconds({"input": 100.0, "compute": 300.0})
    assert sum(seconds.values()) == pytest.approx(0.04, abs=0.01)
    assert seconds["compute"] == pytest.approx(3 * seconds["input"], rel=0.01)


def test_validations_tell_of_their_own_time() -> None:
    validation = {"kind": "validation", "seconds": {VALIDATION: 30.0}}
    account = bottleneck.account_of([*journal_of(compute=70.0), validation])
    assert account.shares()["validation"] == pytest.approx(0.3)
    assert account.advice().startswith("bottleneck: validation")


@pytest.mark.parametrize(
    ("seconds", "worst"),
    [
        ({"compute": 90.0, "input": 4.0}, "the network itself takes the time, as it should"),
        ({"compute": 60.0, "input": 40.0}, "bottleneck: input: training waits for images: give each worker"),
        ({"compute": 60.0, "all_reduce": 30.0, "input": 6.0}, "bottleneck: all-reduce: workers wait for each other's"),
        ({"compute": 60.0, "checkpoint": 10.0}, "bottleneck: checkpoints: make checkpoints less often"),
    ],
)
def test_the_bottleneck_has_a_name_and_advice(seconds: dict[str, float], worst: str) -> None:
    account = bottleneck.account_of(journal_of(**seconds))
    assert account.line().startswith("forward and backward ")
    assert account.advice().startswith(worst)
    assert account.seconds == pytest.approx(sum(seconds.values()))
    named = worst.split(": ")[1] if worst.startswith("bottleneck") else "none"
    assert account.bottleneck().startswith(named)


def test_intervals_count_by_their_length() -> None:
    account = bottleneck.account_of(journal_of(compute=90.0) + journal_of(input=10.0))
    assert account.shares()["input"] == pytest.approx(0.1)
    assert account.line() == "forward and backward 90.0 %, input 10.0 %"


def test_a_journal_without_times_tells_nothing() -> None:
    account = bottleneck.account_of([{"kind": "train", "metrics": {"images_per_s": 3.0}}])
    assert (account.shares(), account.line(), account.advice(), account.bottleneck()) == ({}, "", "", "")


def test_mlflow_has_it_in_a_tag() -> None:
    account = Account()
    event = {"step": 1, "epoch": 0.1, "time_ms": 5, "metrics": {}}
    for each in journal_of(compute=30.0) + journal_of(input=10.0):
        if each["kind"] == "train":
            entry = account.entry(event | each)
    assert entry is not None
    assert entry.tags == {"time": "forward and backward 75.0 %, input 25.0 %"}
