"""What workers and driver leave for each other: the actor's class, without a cluster."""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import Any

import pytest

from orchestrator.config import GuardConfig
from orchestrator.control import mailbox as module
from orchestrator.control.guard import Failure, FailureClass
from orchestrator.control.mailbox import Mailbox
from orchestrator.control.stuck import Place
from orchestrator.training.pulse import Phase, Wish


def place(rank: int) -> Place:
    return Place(rank, 100 + rank, "1", "host", "node")


def opened(size: int = 2, **limits: Any) -> Mailbox:
    mailbox = Mailbox("r50", asdict(GuardConfig(**limits)))
    begin(mailbox, "a", size)
    return mailbox


def begin(mailbox: Mailbox, group: str, size: int) -> list[tuple[bool, int, float]]:
    return [mailbox.begin(group, size, place(rank)) for rank in range(size)]


def beat(rank: int) -> dict[str, Any]:
    return {"rank": rank, "step": 3, "phase": Phase.COMPUTE, "count": 7}


def texts(mailbox: Mailbox) -> list[str]:
    return [event["text"] for event in mailbox.take(0).events if event["kind"] == "notice"]


def test_events_are_given_until_they_are_received() -> None:
    mailbox = opened()
    mailbox.put([{"kind": "train", "step": 1}])
    first = mailbox.take(0).events
    assert [event["kind"] for event in first] == ["workers", "train"]
    mailbox.put([{"kind": "train", "step": 2}])
    assert mailbox.take(0).events == [*first, {"kind": "train", "step": 2}]  # the answer was lost
    assert mailbox.take(2).events == [{"kind": "train", "step": 2}]
    assert mailbox.take(3).events == []


def test_a_straggler_of_a_group_that_is_gone_does_not_come_back() -> None:
    mailbox = opened()
    assert begin(mailbox, "b", 2) == [(True, 2, 0.0)] * 2
    assert mailbox.begin("a", 2, place(1)) == (False, 0, 0.0)
    assert mailbox.take(0).group == "b"
    assert mailbox.beat("a", beat(0)) is Wish.NONE
    assert mailbox.take(0).beats == []


def test_who_fell_silent_first_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [1000.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: clock[0])
    mailbox = opened(3)
    for clock[0], alive in ((1001.0, (0, 1, 2)), (1005.0, (0, 2))):  # these two Ray has not ended yet
        for rank in alive:
            mailbox.beat("a", beat(rank))
    mailbox.failed("a", 2, Failure(FailureClass.INFRASTRUCTURE, "worker 2", "Connection reset by peer"))
    begin(mailbox, "b", 3)
    assert texts(mailbox) == ["worker 1 (process 101 on host) ended without a word; all workers start again"]


def test_those_whom_ray_ended_are_not_told_of_where_the_reason_is_known() -> None:
    mailbox = opened()
    mailbox.failed("a", 1, Failure(FailureClass.INFRASTRUCTURE, "worker 1", "no progress for 120 s; it was killed"))
    begin(mailbox, "b", 2)
    assert texts(mailbox) == []


def test_a_change_of_the_number_is_told_as_one() -> None:
    mailbox = opened()
    mailbox.put([{"kind": "checkpoint", "step": 4}])
    begin(mailbox, "b", 3)
    assert texts(mailbox) == ["Ray changes the number of workers from 2 to 3"]


def test_who_stands_by_is_not_watched() -> None:
    mailbox = opened()
    mailbox.beat("a", beat(0))
    mailbox.beat("a", beat(1))
    mailbox.stand_by("a", 1)
    mailbox.beat("a", beat(1))
    assert [b.rank for b in mailbox.take(0).beats] == [0]
    assert not mailbox.is_over("a")
    mailbox.end("a")
    assert mailbox.is_over("a")


def test_a_checkpoint_is_asked_of_the_first_worker_once_and_leaving_of_all() -> None:
    mailbox = opened()
    mailbox.wish("a", Wish.SAVE)
    assert [mailbox.beat("a", beat(rank)) for rank in (1, 0, 1, 0)] == [Wish.NONE, Wish.SAVE, Wish.NONE, Wish.NONE]
    mailbox.wish("a", Wish.LEAVE)
    mailbox.wish("gone", Wish.SAVE)
    assert [mailbox.beat("a", beat(rank)) for rank in (1, 0, 1, 0)] == [Wish.LEAVE] * 4


def test_after_a_refusal_nobody_starts() -> None:
    mailbox = opened()
    assert not mailbox.failed("a", 1, Failure(FailureClass.USER, "worker 1", "TypeError: no"))
    assert [may_start for may_start, _, _ in begin(mailbox, "b", 2)] == [False, False]
    assert texts(mailbox) == []
    refusal = mailbox.take(0).refusal
    assert refusal is not None
    assert "TypeError: no" in refusal.text
    before = time.monotonic()
    assert mailbox.take(0).now_s >= before - 1


def test_scores_are_progress_for_the_guard() -> None:
    mailbox = opened(max_stalled_restarts=1, max_failures=100)
    for number in range(1, 8):
        scored = {"split": "val", "protocol": "ten_crop", "done": min(8 * number, 40), "total": 48}
        mailbox.put([{"kind": "scoring", **scored, "images_per_s": 1.0}])
        mailbox.failed(f"{number - 1}" if number > 1 else "a", 0, Failure(FailureClass.INFRASTRUCTURE, "worker 0", "?"))
        begun = begin(mailbox, str(number), 2)
        assert begun[0][0] == (number < 6), number  # nothing new after the 5th
