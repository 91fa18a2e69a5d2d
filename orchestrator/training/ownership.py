"""Whose a run is: numbered starts, created exclusively, the highest of which owns the run; life signs of drivers.

::

    attempts/000001.json    one a start, also of restarted workers: token, host and process of the driver
    attempts/000001.lease   rewritten by the driver that took number 1 for as long as it lives; at its end: released

What is published carries the number, so whoever lost a run and does not know it yet can do no harm (``checkpoint``).
The lease only decides whether a newcomer may take the run. It holds a counter, and a newcomer measures its silence by
its own monotonic clock: clocks of two machines are never compared.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path, PurePosixPath
from types import TracebackType

from orchestrator.storage import Storage

_BEATS_PER_LEASE = 5
_RELEASE_S = 10.0  # at the end of a run its storage may be away: whoever comes next waits instead
_LONG_SILENT_S = 600.0  # far more than any lease, or than two clocks may differ
_TORN_S = 1.0  # longer than any writer leaves a record half-written


class SupersededError(RuntimeError):
    """Another driver has started the same run: this one must not write any more."""


class AtWorkError(ValueError):
    """Another driver of the run lives: the same command goes on when that one has ended."""


@dataclass(frozen=True)
class Process:
    """A process of some machine: ``started`` in clock ticks since the machine's ``boot``, "" where unknown."""

    host: str
    boot: str
    pid_namespace: str
    pid: int
    started: str

    @staticmethod
    def of(pid: int) -> Process:
        """Process ``pid`` of this machine."""
        return Process(socket.gethostname(), _boot(), _pid_namespace(), pid, process_started(pid) or "")

    def lives(self) -> bool | None:
        """Whether it still runs; None where that cannot be known from here."""
        here = (socket.gethostname(), _boot(), _pid_namespace())
        if (self.host, self.boot, self.pid_namespace) != here or not (self.boot and self.pid_namespace):
            return None
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return False
        except PermissionError:
            pass  # another user's
        started = process_started(self.pid)
        if started is None or not self.started:
            return None  # /proc does not show other users' processes everywhere
        return started == self.started


@dataclass(frozen=True)
class Start:
    """One start of a run. ``claim``: the number that its driver took first, whose lease is the driver's.

    The rest is the driver's process: ``started`` in clock ticks since its machine's ``boot``, "" where unknown.
    """

    token: str
    claim: int
    host: str
    boot: str
    pid_namespace: str
    pid: int
    started: str
    time_s: int
    nonce: str  # no other start writes the same bytes

    @property
    def driver(self) -> str:
        return f"the driver on {self.host} (pid {self.pid})"

    def to_bytes(self) -> bytes:
        return json.dumps(asdict(self), indent=1, sort_keys=True).encode()

    @staticmethod
    def from_bytes(data: bytes) -> Start:
        return Start(**json.loads(data))


# -- numbers --------------------------------------------------------------------------------------------------------


def newest_attempt(run: Storage) -> int:
    """The highest number so far, 0 before the first start."""
    names = [PurePosixPath(name) for name in run.files("attempts")]
    return max((int(n.stem) for n in names if n.suffix == ".json" and n.stem.isdecimal()), default=0)


def check_ownership(run: Storage, number: int) -> None:
    """Raises SupersededError where a newer start owns the run."""
    newest = newest_attempt(run)
    if newest > number:
        raise SupersededError(
            f"run {run.url} was started again (start number {newest}); this is start number {number}: it stops here, "
            "and the newer one goes on"
        )


def next_start(run: Storage, token: str) -> int:
    """A fresh number for restarted workers of the driver with ``token``: what the old ones still publish is void.

    Raises SupersededError where another driver has claimed the run.
    """
    while True:
        newest = newest_attempt(run)
        start = _read_patiently(run, newest)
        if start is None:  # torn by a kill: whoever wrote it takes no part
            start = next((s for n in range(newest - 1, 0, -1) if (s := _read(run, n)) is not None), None)
        if start is None or start.token != token:
            raise SupersededError(
                f"run {run.url} was claimed by another driver (start number {newest}): this one stops here, and the "
                "newer one goes on"
            )
        if _take(run, newest + 1, start):
            return newest + 1


def _name(number: int) -> str:
    return f"attempts/{number:06d}.json"


def _lease_name(claim: int) -> str:
    return f"attempts/{claim:06d}.lease"


def _take(run: Storage, number: int, start: Start) -> bool:
    """Create the record of ``number``; False where somebody else has."""
    data = replace(start, time_s=int(time.time()), nonce=secrets.token_hex(8)).to_bytes()
    return run.create(_name(number), data) and run.read(_name(number)) == data


def _read(run: Storage, number: int) -> Start | None:
    """The record of ``number``; None where there is none or it is torn."""
    try:
        return Start.from_bytes(run.read(_name(number)))
    except (FileNotFoundError, json.JSONDecodeError, UnicodeDecodeError, TypeError):
        return None


def _read_patiently(run: Storage, number: int) -> Start | None:
    """As ``_read``; a disk without hard links shows a record before it is whole."""
    until_s = time.monotonic() + _TORN_S
    while (start := _read(run, number)) is None and number and time.monotonic() < until_s:
        time.sleep(0.1)
    return start


# Tokens of the claims that this process holds.
_HELD: set[str] = set()


# -- a driver's claim -----------------------------------------------------------------------------------------------


def claim(run: Storage, *, lease_s: float, take_over: bool, tell: Callable[[str], None], what: str = "run") -> Claim:
    """Take the run for this process, and keep up the life sign until ``release``. A context manager.

    what: how messages call what the folder holds, where that is no run.

    A driver of this machine that is gone is succeeded at once. One of another machine (or container) is watched for
    ``lease_s`` seconds, which ``tell`` is told; with ``take_over`` nobody is waited for. Raises AtWorkError where
    another driver lives, ValueError where this store cannot keep two apart and the last one has not said that it ended.
    """
    if not run.creates_exclusively:
        tell(
            f"storage {run.url} cannot create a file exclusively: two drivers of a run that are started in the same "
            "moment may both write: start one at a time"
        )
    token = secrets.token_hex(8)
    judged: set[str | None] = set()  # drivers that are known not to go on
    while True:
        newest = newest_attempt(run)
        if newest:
            start = _read(run, newest)
            who = start.token if start else None
            if who not in judged:
                if not take_over:
                    _wait_for_the_end_of(run, newest, start, lease_s, tell, what)
                judged.add(who)
                continue  # somebody else may have come meanwhile
        if _take(run, newest + 1, _this_process(token, newest + 1)):
            return Claim(run, newest + 1, token, lease_s)


class Claim:
    """A driver's hold on a run. ``lost`` turns True, at the next beat, when another driver has taken it."""

    def __init__(self, run: Storage, number: int, token: str, lease_s: float) -> None:
        self.number, self.token, self.lost = number, token, False
        self._run, self._interval_s = run, lease_s / _BEATS_PER_LEASE
        self._end = threading.Event()
        _HELD.add(token)
        self._thread = threading.Thread(target=self._live, name="lease", daemon=True)
        self._thread.start()

    def __enter__(self) -> Claim:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.release()

    def release(self) -> None:
        """Say that this driver has ended: the next one need not wait. May be called twice."""
        _HELD.discard(self.token)
        self._end.set()
        self._thread.join(_RELEASE_S)

    def _live(self) -> None:
        beat, seen = 0, self.number
        while not self._end.is_set():
            # A store that is away must not end a driver, and its setting may be mended: tried again at the next beat.
            with suppress(OSError, ValueError):
                self._write({"beat": beat, "time_s": int(time.time())})
            with suppress(OSError, ValueError):
                seen = self._look(seen)
            beat += 1
            self._end.wait(self._interval_s)
        with suppress(OSError, ValueError):  # written here too: a late beat must not undo it
            self._write({"released": True})

    def _write(self, state: dict[str, int]) -> None:
        self._run.publish(_lease_name(self.number), json.dumps(state | {"token": self.token}).encode())

    def _look(self, seen: int) -> int:
        """Notice another driver; returns the newest number that is known to be this driver's."""
        newest = newest_attempt(self._run)
        if newest == seen or (start := _read(self._run, newest)) is None:
            return seen
        self.lost = start.token != self.token
        return seen if self.lost else newest


def driver_at_work(run: Storage) -> Start | None:
    """The newest driver, unless it has ended, as far as that can be told at a glance: for whoever looks on.

    One of another machine that was killed is found by its life signs: its clock is compared with this one, roughly.
    """
    start = _read(run, newest_attempt(run))
    if start is None or _released(run, start.claim):
        return None
    lives = _process_lives(start)
    if lives is None:
        lives = time.time() - _last_sign_s(run, start) < _LONG_SILENT_S
    return start if lives else None


def _last_sign_s(run: Storage, start: Start) -> float:
    """When the driver of ``start`` last gave one, seconds since 1970 by its machine's clock."""
    with suppress(FileNotFoundError, json.JSONDecodeError, UnicodeDecodeError, AttributeError):
        return float(json.loads(run.read(_lease_name(start.claim))).get("time_s", start.time_s))
    return start.time_s


# -- the driver before ----------------------------------------------------------------------------------------------


def _wait_for_the_end_of(
    run: Storage, number: int, start: Start | None, lease_s: float, tell: Callable[[str], None], what: str
) -> None:
    """Until the driver of ``start`` is known not to go on; None: its record is torn. Raises ValueError if it lives."""
    if start is not None and _released(run, start.claim):
        return
    driver = start.driver if start else f"the driver that began start number {number}"
    if not run.creates_exclusively:
        raise ValueError(
            f"{what} {run.url}: {driver} has not said that it ended, and this store cannot keep two drivers apart: "
            "when you know that it is dead, give --guard.take-over True"
        )
    alive = _process_lives(start) if start else None
    if alive is None:
        tell(f"{what} {run.url}: waiting {lease_s:.0f} s to see whether {driver} still lives")
        alive = not _is_silent(run, number, start, lease_s)
    if alive:
        raise AtWorkError(
            f"{what} {run.url} is at work: {driver} is alive. Stop that one, or wait for its end: then the same "
            "command goes on"
        )


def _is_silent(run: Storage, number: int, start: Start | None, lease_s: float) -> bool:
    """Whether the lease stays as it is for ``lease_s`` seconds of this process's clock, or is released."""
    below = start
    for earlier in range(number - 1, 0, -1):  # a torn record: its driver's lease is that of the one before, perhaps
        below = below or _read(run, earlier)
    claimed = below.claim if below else number

    def look() -> tuple[bytes | None, Start | None]:
        lease = None
        with suppress(FileNotFoundError):
            lease = run.read(_lease_name(claimed))
        return lease, _read(run, number)

    first, pause_s, silent_s = look(), min(0.5, lease_s / (2 * _BEATS_PER_LEASE)), 0.0
    last_s = time.monotonic()
    while silent_s < lease_s:
        time.sleep(pause_s)
        now = look()
        if now != first:
            return _released(run, claimed)
        # A store that was away, or a process that was stopped, has seen nothing: that time proves nothing.
        now_s = time.monotonic()
        silent_s += min(now_s - last_s, 2 * pause_s)
        last_s = now_s
    return True


def _released(run: Storage, claimed: int) -> bool:
    try:
        return bool(json.loads(run.read(_lease_name(claimed))).get("released"))
    except (FileNotFoundError, json.JSONDecodeError, UnicodeDecodeError, AttributeError):
        return False


# -- processes ------------------------------------------------------------------------------------------------------


def _this_process(token: str, number: int) -> Start:
    return Start(token, number, **asdict(Process.of(os.getpid())), time_s=int(time.time()), nonce="")


def _process_lives(start: Start) -> bool | None:
    """Whether the process of ``start`` lives; None where that cannot be known from here."""
    lives = Process(start.host, start.boot, start.pid_namespace, start.pid, start.started).lives()
    # A claim of this process may have failed half-way.
    return lives and (start.pid != os.getpid() or start.token in _HELD)


def process_started(pid: int) -> str | None:
    """When process ``pid`` was started, in clock ticks since the boot; "" for one that has ended; None if unknown."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    fields = text.rpartition(")")[2].split()  # what stands before may hold blanks
    return "" if fields[0] in "ZX" else fields[19]


def _boot() -> str:
    with suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return ""


def _pid_namespace() -> str:
    with suppress(OSError):
        return os.readlink("/proc/self/ns/pid")  # noqa: PTH115 - no path: pid:[4026531836]
    return ""
