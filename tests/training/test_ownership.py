"""One driver of a run at a time: numbers, life signs, and who may take over from whom. Drivers are real processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from orchestrator.storage import Storage
from orchestrator.training import ownership
from orchestrator.training.ownership import (
    Claim,
    SupersededError,
    check_ownership,
    claim,
    newest_attempt,
    next_start,
)
from tests import object_store

ROOT = Path(__file__).parents[2]
LEASE_S = 1.0

DRIVER = """
import sys, time
from orchestrator.storage import Storage
from orchestrator.training.ownership import claim
with claim(Storage(sys.argv[1]), lease_s=float(sys.argv[2]), take_over=False, tell=print) as owner:
    print("number", owner.number, flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def run(tmp_path: Path) -> Storage:
    return Storage(str(tmp_path / "run"))


def take(run: Storage, *, take_over: bool = False, lease_s: float = LEASE_S) -> tuple[Claim, list[str]]:
    told: list[str] = []
    return claim(run, lease_s=lease_s, take_over=take_over, tell=told.append), told


class Driver:
    """A process that claims a run and holds it until it is told to end."""

    def __init__(self, run: Storage) -> None:
        command = [sys.executable, "-c", DRIVER, run.url, str(LEASE_S)]
        self.process = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def number(self) -> int:
        assert self.process.stdout is not None
        words = self.process.stdout.readline().split()
        assert words[:1] == ["number"], words
        return int(words[1])

    def end(self) -> str:
        return self.process.communicate(timeout=30)[1]


@pytest.fixture
def driver(run: Storage) -> Iterator[Driver]:
    driver = Driver(run)
    assert driver.number() == 1
    yield driver
    driver.process.kill()
    driver.process.wait()


def moved(run: Storage, number: int = 1, **fields: Any) -> None:
    """The record of a start, as another machine would have written it."""
    record = json.loads(run.read(f"attempts/{number:06d}.json"))
    run.publish(f"attempts/{number:06d}.json", json.dumps(record | {"host": "elsewhere", **fields}).encode())


def dead_elsewhere(run: Storage) -> None:
    """A driver of another machine that was killed: its record, its last life sign, and silence."""
    start = ownership._this_process("theirs", 1)
    run.publish("attempts/000001.json", start.to_bytes())
    run.publish("attempts/000001.lease", b'{"beat": 7, "token": "theirs"}')
    moved(run, boot="another")


def test_who_looks_on_sees_which_driver_is_at_work(run: Storage, driver: Driver) -> None:
    found = ownership.driver_at_work(run)
    assert found is not None
    assert found.pid == driver.process.pid
    # Of another machine: by its life signs, long silent ones apart.
    moved(run, boot="another")
    assert ownership.driver_at_work(run) == found.__class__(
        **(found.__dict__ | {"host": "elsewhere", "boot": "another"})
    )
    driver.process.send_signal(signal.SIGKILL)
    driver.process.wait()
    sign = json.loads(run.read("attempts/000001.lease"))
    assert ownership.driver_at_work(run) is not None
    run.publish("attempts/000001.lease", json.dumps(sign | {"time_s": sign["time_s"] - 700}).encode())
    assert ownership.driver_at_work(run) is None


def until(condition: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.02)


# -- the same machine -------------------------------------------------------------------------------------------------


def test_a_driver_that_was_killed_is_succeeded_at_once(run: Storage, driver: Driver) -> None:
    driver.process.send_signal(signal.SIGKILL)  # and is not waited for: it stays as a zombie
    until(lambda: Path(f"/proc/{driver.process.pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z")
    began_s = time.monotonic()
    with take(run, lease_s=60)[0] as second:
        assert second.number == 2
        assert time.monotonic() - began_s < 2
    driver.process.wait()


def test_a_driver_that_ended_orderly_is_succeeded_at_once(run: Storage, driver: Driver) -> None:
    driver.end()
    moved(run, boot="another")  # nothing but its word tells
    owner, told = take(run, lease_s=60)
    assert (owner.number, told) == (2, [])
    owner.release()


@pytest.mark.parametrize("state", ["at work", "stopped"])
def test_a_living_driver_is_not_disturbed(run: Storage, driver: Driver, state: str) -> None:
    if state == "stopped":
        driver.process.send_signal(signal.SIGSTOP)
        time.sleep(2 * LEASE_S)  # no life sign, but it may go on at any moment
    with pytest.raises(ValueError, match=r"is alive\. Stop that one, or wait for its end") as caught:
        take(run)
    assert f"pid {driver.process.pid}" in str(caught.value)
    assert run.url in str(caught.value)
    assert newest_attempt(run) == 1


def test_a_living_driver_can_be_superseded_by_hand(run: Storage, driver: Driver) -> None:
    with take(run, take_over=True)[0] as second:
        assert second.number == 2
        with pytest.raises(SupersededError, match="start number 2"):
            check_ownership(run, 1)
        check_ownership(run, 2)


def test_another_process_of_the_same_number_is_another(run: Storage, driver: Driver) -> None:
    """Process numbers come round: the time of its start tells."""
    record = json.loads(run.read("attempts/000001.json"))
    run.publish("attempts/000001.json", json.dumps(record | {"started": "1"}).encode())
    with take(run, lease_s=60)[0] as second:
        assert second.number == 2


def test_two_drivers_at_once_have_one_winner(run: Storage) -> None:
    drivers = [Driver(run) for _ in range(4)]
    try:
        until(lambda: sum(d.process.poll() is not None for d in drivers) == 3)
        (winner,) = [d for d in drivers if d.process.poll() is None]
        assert winner.number() == 1
        for loser in drivers:
            if loser is not winner:
                assert f"is at work: the driver on {os.uname().nodename} (pid {winner.process.pid})" in loser.end()
        winner.end()
        assert newest_attempt(run) == 1
    finally:
        for driver in drivers:
            driver.process.kill()
            driver.process.wait()


# -- another machine --------------------------------------------------------------------------------------------------


def test_a_silent_driver_elsewhere_is_waited_for_and_succeeded(run: Storage) -> None:
    dead_elsewhere(run)
    began_s = time.monotonic()
    owner, told = take(run)
    assert owner.number == 2
    assert time.monotonic() - began_s >= LEASE_S
    assert told == [
        f"run {run.url}: waiting 1 s to see whether the driver on elsewhere (pid {os.getpid()}) still lives"
    ]
    owner.release()
    dead_elsewhere(other := Storage(run.url + "-2"))
    with take(other, take_over=True, lease_s=60)[0] as second:
        assert second.number == 2


def test_a_driver_elsewhere_that_gives_life_signs_is_not_disturbed(run: Storage, driver: Driver) -> None:
    moved(run, boot="another")
    with pytest.raises(ValueError, match="the driver on elsewhere"):
        take(run)
    assert newest_attempt(run) == 1


def test_a_driver_elsewhere_that_ends_meanwhile_is_succeeded(run: Storage, driver: Driver) -> None:
    moved(run, boot="another")
    driver.process.send_signal(signal.SIGSTOP)
    time.sleep(LEASE_S / 2)  # what it was writing is written

    def end() -> None:
        run.publish("attempts/000001.lease", b'{"released": true}')

    timer = threading.Timer(0.5, end)
    timer.start()
    began_s = time.monotonic()
    with take(run, lease_s=60)[0] as second:
        assert second.number == 2
        assert time.monotonic() - began_s < 30


@pytest.mark.parametrize("jump_s", [-1e6, 1e6])
def test_a_clock_that_jumps_changes_nothing(
    run: Storage, driver: Driver, monkeypatch: pytest.MonkeyPatch, jump_s: float
) -> None:
    moved(run, boot="another")
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + jump_s)
    with pytest.raises(ValueError, match="is alive"):
        take(run)
    dead_elsewhere(other := Storage(run.url + "-2"))
    began_s = time.monotonic()
    with take(other)[0] as second:
        assert second.number == 2
        assert 0.9 * LEASE_S < time.monotonic() - began_s < 10 * LEASE_S


def test_time_in_which_nothing_could_be_seen_proves_nothing(run: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    """The store answers one question late, by more than the lease: life signs may have been late as well."""
    dead_elsewhere(run)
    read, looks = Storage.read, list[str]()

    def read_slowly(self: Storage, name: str, sha256: str | None = None) -> bytes:
        if name == "attempts/000001.lease":
            looks.append(name)
            if len(looks) == 4:  # well within the watch
                time.sleep(3 * LEASE_S)
        return read(self, name, sha256)

    monkeypatch.setattr(Storage, "read", read_slowly)
    began_s = time.monotonic()
    with take(run, lease_s=2 * LEASE_S)[0]:
        assert time.monotonic() - began_s > (3 + 1.2) * LEASE_S


# -- what can go wrong with the files ---------------------------------------------------------------------------------


@pytest.mark.parametrize("content", [b"", b'{"host": "\xff', b"{}"])
def test_a_torn_record_is_waited_for_and_passed_over(run: Storage, content: bytes) -> None:
    """A kill on a disk without hard links: nobody knows who it was."""
    run.publish("attempts/000001.json", content)
    owner, told = take(run)
    assert owner.number == 2
    assert "the driver that began start number 1" in told[0]
    run.publish("attempts/000003.json", content)
    assert next_start(run, owner.token) == 4  # its own restarted workers are not held up by it
    owner.release()


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'"released"'])
def test_a_torn_lease_is_no_word_of_an_end(run: Storage, content: bytes) -> None:
    dead_elsewhere(run)
    run.publish("attempts/000001.lease", content)
    owner, told = take(run)
    assert owner.number == 2
    assert len(told) == 1
    owner.release()


def test_life_signs_come_back_when_the_store_does(run: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    owner, _ = take(run)
    lease = Path(run.path("attempts/000001.lease"))
    until(lease.exists)
    os.rename(run.path("attempts"), run.path("away"))  # noqa: PTH104
    Path(run.path("attempts")).write_text("a file where the folder should be")
    time.sleep(2 * LEASE_S)
    Path(run.path("attempts")).unlink()
    os.rename(run.path("away"), run.path("attempts"))  # noqa: PTH104
    before = lease.read_bytes()
    until(lambda: lease.read_bytes() != before)
    assert not owner.lost
    owner.release()
    assert json.loads(lease.read_bytes())["released"]


def test_a_superseded_driver_notices_at_its_next_beat(run: Storage) -> None:
    first, _ = take(run)
    assert next_start(run, first.token) == 2
    time.sleep(LEASE_S)
    assert not first.lost  # its own workers, started again
    with take(run, take_over=True)[0] as second:
        assert second.number == 3
        until(lambda: first.lost)
        assert not second.lost
    first.release()


def test_a_claim_that_failed_half_way_does_not_stand_in_its_own_way(
    run: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk fails right after the record was made; a process that goes on may try again."""
    create = Storage.create

    def fail_late(self: Storage, name: str, data: bytes) -> bool:
        create(self, name, data)
        raise OSError("the disk")

    with monkeypatch.context() as patched:
        patched.setattr(Storage, "create", fail_late)
        with pytest.raises(OSError, match="the disk"):
            take(run)
    assert newest_attempt(run) == 1
    with take(run, lease_s=60)[0] as owner:
        assert owner.number == 2


# -- restarted workers ------------------------------------------------------------------------------------------------


def test_restarted_workers_take_fresh_numbers_of_their_driver(run: Storage) -> None:
    first, _ = take(run)
    assert [next_start(run, first.token) for _ in range(3)] == [2, 3, 4]
    with pytest.raises(ValueError, match="is alive"):
        take(run)
    first.release()
    with take(run, lease_s=60)[0] as second:  # the word of the claim holds for all of its numbers
        assert second.number == 5
        with pytest.raises(SupersededError, match="was claimed by another driver"):
            next_start(run, first.token)


def test_workers_that_lose_a_race_look_again(run: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    first, _ = take(run)
    create, others = Storage.create, list[int]()

    def create_late(self: Storage, name: str, data: bytes) -> bool:
        if not others:  # another driver is quicker, by a moment
            others.append(0)
            second, _ = take(run, take_over=True)
            others[0] = second.number
            second.release()
        return create(self, name, data)

    monkeypatch.setattr(Storage, "create", create_late)
    with pytest.raises(SupersededError):
        next_start(run, first.token)
    assert others == [newest_attempt(run)] == [2]
    first.release()


# -- stores that cannot -----------------------------------------------------------------------------------------------


def test_a_store_without_exclusive_creation_says_so_and_is_taken_over_by_hand() -> None:
    object_store.Bucket.objects.clear()
    run = Storage("bucket://bucket/run")
    assert not run.creates_exclusively
    owner, told = take(run)
    assert "cannot create a file exclusively" in told[0]
    with pytest.raises(ValueError, match=r"--guard\.take-over True"):
        take(run)
    second, told = take(run, take_over=True)
    assert (second.number, len(told)) == (2, 1)
    owner.release()
    second.release()
    third, _ = take(run)  # whoever has said that it ended is not asked for
    assert third.number == 3
    third.release()


def test_claims_work_on_s3(s3: object, tmp_path: Path) -> None:
    from tests.s3_server import BUCKET

    run = Storage(f"s3://{BUCKET}/{tmp_path.name}")
    first, told = take(run)
    assert (first.number, told) == (1, [])
    assert next_start(run, first.token) == 2
    with pytest.raises(ValueError, match="is alive"):
        take(run)
    moved(run, 2, boot="another")
    with pytest.raises(ValueError, match="is alive"):
        take(run)
    first.release()
    with take(run, lease_s=60)[0] as second:
        assert second.number == 3
