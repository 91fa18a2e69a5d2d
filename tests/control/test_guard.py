"""Failure classes, the budget of restarts, and who holds the others up: decisions without a cluster."""

from __future__ import annotations

from dataclasses import replace

import pytest
import ray
import torch

from orchestrator.config import GuardConfig
from orchestrator.control.guard import Beat, Ending, Failure, FailureClass, Guard, Watchdog, classify
from orchestrator.remote import StoreRefusedError, StoreUnreachableError
from orchestrator.training.failures import NotFiniteError, PreemptedError, StorageFailedError
from orchestrator.training.ownership import SupersededError
from orchestrator.training.pulse import Phase

LIMITS = GuardConfig(max_failures=4, max_stalled_restarts=2)
PEER = "[gloo/transport/tcp/pair.cc:537] Read error [127.0.0.1]:54183: Connection reset by peer"
SHAPES = "mat1 and mat2 shapes cannot be multiplied (8x64 and 32x10)"


@pytest.mark.parametrize(
    ("error", "phase", "kind"),
    [
        (ValueError("input.crop_px is wrong"), Phase.START, FailureClass.USER),
        (StoreRefusedError("no such bucket"), Phase.INPUT, FailureClass.USER),
        (AttributeError("no such thing"), Phase.COMPUTE, FailureClass.USER),
        (RuntimeError(SHAPES), Phase.COMPUTE, FailureClass.USER),
        (RuntimeError(PEER), Phase.COMPUTE, FailureClass.INFRASTRUCTURE),  # a batch-norm group that is shared
        (RuntimeError("CUDA error: uncorrectable ECC error encountered"), Phase.COMPUTE, FailureClass.INFRASTRUCTURE),
        (torch.OutOfMemoryError("no room"), Phase.COMPUTE, FailureClass.INFRASTRUCTURE),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), Phase.COMPUTE, FailureClass.INFRASTRUCTURE),
        (RuntimeError("could not create a primitive"), Phase.COMPUTE, FailureClass.INFRASTRUCTURE),
        (RuntimeError("can't start new thread"), Phase.COMPUTE, FailureClass.INFRASTRUCTURE),
        (KeyError("LastModified"), Phase.INPUT, FailureClass.INFRASTRUCTURE),  # of some library
        (ray.exceptions.RayActorError(), Phase.COMPUTE, FailureClass.INFRASTRUCTURE),
        (EOFError(), Phase.COMPUTE, FailureClass.INFRASTRUCTURE),
        (RuntimeError(SHAPES), Phase.REDUCE, FailureClass.INFRASTRUCTURE),  # in doubt
        (ConnectionResetError("peer"), Phase.MEASURE, FailureClass.INFRASTRUCTURE),
        (StoreUnreachableError("no answer for 300 s"), Phase.INPUT, FailureClass.INFRASTRUCTURE),
        (MemoryError(), Phase.INPUT, FailureClass.INFRASTRUCTURE),
        (StorageFailedError("disk full"), Phase.SAVE, FailureClass.STORAGE),
        (NotFiniteError("6 steps"), Phase.MEASURE, FailureClass.NOT_FINITE),
        (PreemptedError("left"), Phase.SAVE, FailureClass.PREEMPTED),
        (SupersededError("another"), Phase.SAVE, FailureClass.SUPERSEDED),
    ],
)
def test_every_error_has_its_class(error: Exception, phase: Phase, kind: FailureClass) -> None:
    assert classify(error, phase) is kind


def failure(kind: FailureClass = FailureClass.INFRASTRUCTURE, text: str = PEER, rank: int = 0) -> Failure:
    return Failure(kind, f"worker {rank}", text)


def started(limits: GuardConfig = LIMITS) -> Guard:
    guard = Guard("r50", limits)
    guard.begin(2)
    return guard


def fail(guard: Guard, *failures: Failure, silent: tuple[str, ...] = ("worker 1",)) -> None:
    """A whole group fails, and the next one begins."""
    for each in failures:
        guard.failed(each)
    guard.begin(2, silent)


def test_no_progress_stops_the_run_and_says_what_was_tried() -> None:
    guard = started()
    guard.saved(100)
    for _ in range(LIMITS.max_stalled_restarts):
        fail(guard, failure())
        assert guard.refusal is None
    fail(guard, failure())
    assert guard.refusal is not None
    assert guard.refusal.ending is Ending.FAILED
    for words in ("'r50'", "no new checkpoint after 2 restarts", "3. worker 1", "step 100 is kept", "the same command"):
        assert words in guard.refusal.text


def test_a_checkpoint_starts_the_count_of_restarts_anew() -> None:
    guard = started()
    for step in range(20):
        for _ in range(LIMITS.max_stalled_restarts):
            fail(guard, failure()) if step % 5 == 0 else None
        guard.saved(step)
    assert guard.refusal is None
    fail(guard, failure())
    guard.saved(7)  # older than the newest: no progress
    fail(guard, failure())
    guard.saved(19)
    fail(guard, failure())
    assert guard.refusal is not None


def test_more_scores_are_progress_and_the_same_again_are_none() -> None:
    guard = started()
    for images in range(8, 160, 8):
        for _ in range(LIMITS.max_stalled_restarts):
            fail(guard, failure()) if images % 40 == 0 else None
        guard.scored("val ten_crop", images)
        guard.scored("test ten_crop", images)
    assert guard.refusal is None
    for _ in range(LIMITS.max_stalled_restarts + 1):
        guard.scored("val ten_crop", 152)  # what the group before has done
        assert guard.refusal is None
        fail(guard, failure())
    assert guard.refusal is not None


def test_the_budget_refills_with_progress_and_only_with_it() -> None:
    guard = started()
    for step in range(50):  # a failure a checkpoint: for ever
        fail(guard, failure())
        guard.saved(step)
    assert guard.refusal is None
    for step in range(50, 60):  # two a checkpoint: the budget of 4 is drawn down by one each time
        fail(guard, failure())
        fail(guard, failure())
        if guard.refusal:
            break
        guard.saved(step)
    assert guard.refusal is not None
    assert "more failures than guard.max_failures 4" in guard.refusal.text
    assert 52 <= step <= 54


def test_what_the_user_must_mend_is_refused_at_once() -> None:
    guard = started()
    guard.saved(8)
    guard.failed(failure())  # the peer hears of it first
    guard.failed(failure(FailureClass.USER, "AttributeError: no such thing"))
    assert guard.refusal is not None
    assert guard.refusal.ending is Ending.USER
    assert "no such thing" in guard.refusal.text
    assert "checkpoint of step 8 is kept" in guard.refusal.text


def test_a_store_that_failed_and_another_driver_end_the_run() -> None:
    for kind, ending in ((FailureClass.STORAGE, Ending.FAILED), (FailureClass.SUPERSEDED, Ending.SUPERSEDED)):
        guard = started()
        guard.failed(failure(kind, "the disk is full"))
        assert guard.refusal is not None
        assert guard.refusal.ending is ending


def test_a_loss_that_is_not_finite_goes_back_once_and_then_stops() -> None:
    guard = started()
    guard.saved(100)
    not_finite = failure(FailureClass.NOT_FINITE, "6 steps were left out: lower schedule.lr")
    fail(guard, not_finite, not_finite, silent=())
    assert guard.refusal is None
    guard.saved(200)  # it was a machine's fault: it did not come again
    fail(guard, not_finite, silent=())
    assert guard.refusal is None
    guard.failed(not_finite)
    assert guard.refusal is not None
    assert guard.refusal.ending is Ending.USER
    assert "it came again" in guard.refusal.text


def test_preemptions_and_resizes_are_free() -> None:
    guard = started(replace(LIMITS, max_failures=0, max_stalled_restarts=0))
    for _ in range(5):
        fail(guard, failure(FailureClass.PREEMPTED, "left"), failure(), silent=())
    guard.saved(5)
    guard.begin(3, ("worker 0", "worker 1"))  # Ray has found a place for a third
    assert guard.refusal is None
    guard.saved(6)
    guard.begin(3, ("worker 0", "worker 1", "worker 2"))  # all of them fell: no change of the number explains it
    assert guard.refusal is not None


def test_groups_of_changing_size_that_come_to_nothing_are_given_up() -> None:
    guard = started()
    for size in (3, 2, 3, 2, 3):
        guard.begin(size, ("worker 0",))
    assert guard.refusal is not None


def test_the_one_to_blame_is_named() -> None:
    """Not those that lost it, and not those that were ended before they could speak."""
    guard = started(replace(LIMITS, max_stalled_restarts=0))
    fail(guard, failure(rank=0), failure(text="OSError: a bad disk", rank=2), silent=("worker 1",))
    assert guard.refusal is not None
    assert "1. worker 2: OSError: a bad disk" in guard.refusal.text
    silent = started(replace(LIMITS, max_stalled_restarts=0))
    fail(silent, failure(rank=0))
    assert silent.refusal is not None
    assert "1. worker 1: ended without a word" in silent.refusal.text


def test_after_going_back_what_comes_next_is_progress() -> None:
    guard = started()
    guard.goes_on_from(1000)
    for step in range(500, 600, 10):  # the checkpoint of 1000 was damaged
        fail(guard, failure())
        guard.goes_on_from(step)
        guard.saved(step + 10)
    assert guard.refusal is None
    fail(guard, failure(), failure(), silent=())
    guard.failed(failure(FailureClass.USER, "TypeError: no"))
    assert guard.refusal is not None
    assert "checkpoint of step 600 is kept" in guard.refusal.text


def test_a_machine_that_fails_at_once_is_given_time() -> None:
    guard = started(GuardConfig(max_failures=100, max_stalled_restarts=100))
    pauses = []
    for _ in range(8):
        fail(guard, failure())
        pauses.append(guard.pause_s)
    assert pauses[0] == 0
    assert pauses == sorted(pauses)
    assert pauses[-1] == 30
    guard.saved(1)
    assert guard.pause_s == 0


# -- the watchdog ---------------------------------------------------------------------------------------------------


def beat(rank: int, step: int, phase: Phase, count: int, heard_s: float, waits: bool = False) -> Beat:
    return Beat(rank, step, phase, count, heard_s, waits)


def running(watchdog: Watchdog, until_s: float, step: int = 5) -> None:
    """Two workers that step once a second."""
    for second in range(int(until_s)):
        beats = [beat(r, step + second, Phase.COMPUTE, 10 + second, second) for r in (0, 1)]
        assert watchdog.look(second, "g", beats) is None


def test_who_has_not_arrived_is_named() -> None:
    watchdog = Watchdog(20)
    running(watchdog, 10)
    found = []
    for now in range(10, 60):
        beats = [
            beat(0, 15, Phase.REDUCE, 31, now),
            beat(1, 15, Phase.INPUT, 30, now),
            beat(2, 15, Phase.REDUCE, 31, now),
        ]
        found.append(watchdog.look(now, "g", beats))
    hangs = [hang for hang in found if hang is not None]
    assert [b.rank for b in hangs[0].late] == [1]
    assert not hangs[0].silent
    assert found.index(hangs[0]) == pytest.approx(20, abs=1)
    assert len(hangs) == 2  # told once, and again as the killing did not help


def test_a_silent_worker_is_named_even_where_another_is_behind() -> None:
    watchdog = Watchdog(20)
    running(watchdog, 10)
    for now in range(10, 60):
        # Worker 1 is stopped in the middle of its step; worker 0 is not even there, but talks.
        beats = [beat(0, 15, Phase.INPUT, 30, now), beat(1, 15, Phase.COMPUTE, 30, 10)]
        if hang := watchdog.look(now, "g", beats):
            assert hang.silent
            assert [b.rank for b in hang.late] == [1]
            return
    raise AssertionError("no hang was seen")


def test_all_are_named_where_nobody_is_behind() -> None:
    watchdog = Watchdog(20)
    running(watchdog, 10)
    for now in range(10, 60):
        if hang := watchdog.look(now, "g", [beat(r, 15, Phase.REDUCE, 30, now) for r in (0, 1)]):
            assert [b.rank for b in hang.late] == [0, 1]
            return
    raise AssertionError("no hang was seen")


def test_waiting_for_storage_a_start_and_a_new_group_are_no_hang() -> None:
    watchdog = Watchdog(20)
    running(watchdog, 10)
    for now in range(10, 300):
        beats = [beat(0, 15, Phase.SAVE, 30, now, waits=True), beat(1, 15, Phase.REDUCE, 30, now)]
        assert watchdog.look(now, "g", beats) is None
    for now in range(300, 390):  # five times the patience while nobody has stepped
        assert watchdog.look(now, "h", [beat(r, 0, Phase.START, 1, now) for r in (0, 1)]) is None
    assert watchdog.look(420, "h", [beat(r, 0, Phase.START, 1, 420) for r in (0, 1)]) is not None


def test_a_long_validation_that_moves_is_no_hang() -> None:
    watchdog = Watchdog(20)
    running(watchdog, 10)
    for now in range(10, 300):
        beats = [beat(0, 15, Phase.VALIDATE, now // 10, now), beat(1, 15, Phase.VALIDATE, 7, now)]
        assert watchdog.look(now, "g", beats) is None


def test_a_test_that_hangs_is_seen_also_where_nothing_was_trained_before() -> None:
    watchdog = Watchdog(20)
    for now in range(80):  # patience with the start
        assert watchdog.look(now, "g", [beat(r, 0, Phase.FINISH, 1, now) for r in (0, 1)]) is None
    for now in range(80, 200):
        # The first worker waits for the scores of the other.
        beats = [beat(0, 15, Phase.GATHER, 30, now), beat(1, 15, Phase.SCORE, 30, now)]
        if hang := watchdog.look(now, "g", beats):
            assert [b.rank for b in hang.late] == [1]
            assert now == pytest.approx(100, abs=1)
            return
    raise AssertionError("no hang was seen")


# -- leaving --------------------------------------------------------------------------------------------------------


def test_asked_to_leave_a_run_ends_with_a_checkpoint_and_no_new_group() -> None:
    guard = started()
    guard.saved(6)
    guard.leave(is_at_work=True)
    assert guard.refusal is None  # its workers make a checkpoint first
    guard.failed(failure(FailureClass.PREEMPTED, "run 'r50' left its place at step 8, whose checkpoint is kept"))
    assert guard.refusal is not None
    assert guard.refusal.ending is Ending.LEFT
    assert "left its place at step 8" in guard.refusal.text


@pytest.mark.parametrize("is_at_work", [True, False])
def test_asked_to_leave_between_two_groups_none_begins(is_at_work: bool) -> None:
    guard = started()
    guard.saved(6)
    guard.failed(failure())
    guard.leave(is_at_work=is_at_work)
    guard.begin(2)
    assert guard.refusal is not None
    assert guard.refusal.ending is Ending.LEFT
    assert "the checkpoint of step 6 is kept: the same command goes on from it" in guard.refusal.text


def test_a_preemption_without_being_asked_goes_on() -> None:
    guard = started()
    guard.failed(failure(FailureClass.PREEMPTED, "left"))
    guard.begin(2)
    assert guard.refusal is None
