"""What the workers of a run print, in one place: a line each with time, rank, node.

A file is a driver's, named by the start that it made first; times are when it got a line.

::

    logs/000003-0001.log    of start number 3: 2026-11-24T05:12:03.214Z  rank 7  n1 10.0.0.2 | what it printed

Ray's log monitor reads what each process prints on its node, whatever prints it (Python, NCCL, DALI, a process that
crashes), and brings it to the driver, the last words of a process that was killed too. The driver writes it into the
run's folder. Nothing here can hold a worker up: what comes faster than it is written is dropped, and counted.
"""

from __future__ import annotations

import logging
import os
import re
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from orchestrator.masking import masked
from orchestrator.storage import Storage

FOLDER = "logs"
_log = logging.getLogger(__name__)

_HANDLER = "worker log"
_NOISE = ("autoscaler", "PlacementGroupCleaner")  # of Ray's own processes: they speak every few seconds
_BEGINS = "worker of rank {rank} of {size}, process {pid} on {host}"
_BEGUN = re.compile(r"worker of rank (\d+) of \d+, process \d+ on ([^\s:]+)")
_ENDS = "end of this worker's log"
_WRITE_EVERY_S = 1.0
_PUBLISH_EVERY_S = 30.0  # where a file cannot grow: an object store
_LAST_WORDS_S = 1.5  # Ray brings a line within half a second; a worker that was killed cannot say that it ends
_MOST_LAST_WORDS_S = 5.0
_END_S = 15.0
_SAME_S = 600.0  # lines of a raylet that differ in numbers alone are one in this time
_MAX_LINE = 2000  # characters
_MAX_WAITING = 20_000  # lines
_PART_BYTES = 4 << 20
_MAX_PARTS = 64  # of a run: the oldest are removed

# -- in a worker ----------------------------------------------------------------------------------------------------


@contextmanager
def speaks(rank: int, size: int, what: str) -> Iterator[None]:
    """Within it this worker's process says who it is, and prints what it logs. ``what`` it is made of."""
    begins = _BEGINS.format(rank=rank, size=size, pid=os.getpid(), host=socket.gethostname())
    _say(f"{begins}: {what}")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(levelname)s %(name)s: %(message)s"))
    logger = logging.getLogger("orchestrator")
    before = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False  # Ray's own handler prints it, too
    try:
        yield
    finally:
        logger.level, logger.propagate = before
        logger.removeHandler(handler)
        _say(_ENDS)


def _say(text: str) -> None:
    """On both streams: Ray keeps them apart."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):  # a full disk: a log must not end a worker
            print(text, file=stream, flush=True)


# -- in the driver --------------------------------------------------------------------------------------------------


class WorkerLog:
    """Writes what Ray brings, within ``with``. No error of its own ends or hinders a run."""

    def __init__(self, run: Storage, start: int, now: Callable[[], datetime] = lambda: datetime.now(UTC)) -> None:
        """``start``: its number."""
        self._run, self._start, self._now = run, start, now
        self._lock = threading.Lock()
        self._waiting: list[str] = []
        self._dropped = 0
        self._heard_s = time.monotonic()
        self._who: dict[tuple[str, str], str] = {}  # of an address and a process
        self._open: Counter[tuple[str, str]] = Counter()  # streams of workers that have not said that they end
        self._last: dict[str, _Repeated] = {}  # of the raylet at an address
        self._part, self._text, self._published = 1, bytearray(), 0
        self._is_failing = False
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._live, name="worker-log", daemon=True)

    @property
    def url(self) -> str:
        """Of the folder."""
        return f"{self._run.url}/{FOLDER}"

    def __enter__(self) -> WorkerLog:
        self._thread.start()
        _listen_to_ray(self.take)
        return self

    def __exit__(self, *_: object) -> None:
        began_s = time.monotonic()  # a cluster that talks on must not hold up the driver
        while (now_s := time.monotonic()) - began_s < _MOST_LAST_WORDS_S:
            with self._lock:
                if not any(self._open.values()) or now_s - max(began_s, self._heard_s) > _LAST_WORDS_S:
                    break
            time.sleep(0.05)
        _listen_to_ray(None)
        with self._lock:
            for address in list(self._last):
                self._end_repetition(address)
        self._end.set()
        self._thread.join(_END_S)

    def take(self, data: Mapping[str, Any]) -> None:
        """Lines that a process has printed, as Ray brings them: ip, pid, lines, actor_name."""
        process = str(data.get("ip", "")), str(data.get("pid", ""))
        if process[1] in _NOISE or data.get("actor_name") in _NOISE:
            return
        with self._lock:
            for line in data["lines"]:
                if begun := _BEGUN.match(line):
                    self._open[process] += 1
                    if self._open[process] == 2:
                        continue  # said on both streams
                    self._who[process] = f"rank {begun[1]}  {begun[2]} {process[0]}"
                elif line == _ENDS:
                    self._open[process] -= 1
                    continue
                if process[1] == "raylet" and self._repeats(process[0], line):
                    continue
                self._add(self._name_of(data), line)
            self._heard_s = time.monotonic()

    def _name_of(self, data: Mapping[str, Any]) -> str:
        address, pid = str(data.get("ip", "")), str(data.get("pid", ""))
        return self._who.get((address, pid), f"{data.get('actor_name') or 'process ' + pid}  {address}")

    def _repeats(self, address: str, line: str) -> bool:
        """Whether a raylet says what it has just said: that a disk fills up it tells every ten seconds."""
        text, last = re.sub(r"[\d.:]+", "", line), self._last.get(address)
        if last is not None and last.text == text and time.monotonic() - last.since_s < _SAME_S:
            last.times += 1
            return True
        self._end_repetition(address)
        self._last[address] = _Repeated(text, time.monotonic())
        return False

    def _end_repetition(self, address: str) -> None:
        last = self._last.pop(address, None)
        if last is not None and last.times:
            self._add(self._name_of({"ip": address, "pid": "raylet"}), f"{last.times} more like the last one")

    def _add(self, who: str, line: str) -> None:
        if len(self._waiting) >= _MAX_WAITING:
            self._dropped += 1
            return
        time_utc = self._now().isoformat(timespec="milliseconds").replace("+00:00", "Z")
        self._waiting.append(f"{time_utc}  {who} | {masked(line)[:_MAX_LINE]}\n")

    # -- its thread ---------------------------------------------------------------------------------------------

    def _live(self) -> None:
        published_s = time.monotonic()
        while not self._end.wait(_WRITE_EVERY_S):
            is_time = self._run.is_local or time.monotonic() - published_s > _PUBLISH_EVERY_S
            published_s = time.monotonic() if is_time else published_s
            self._round(publishes=is_time)
        self._round(publishes=True)

    def _round(self, *, publishes: bool) -> None:
        with self._lock:
            lines, dropped = self._waiting, self._dropped
            self._waiting, self._dropped = [], 0
        for number, line in enumerate(lines):
            if len(self._text) > _PART_BYTES:
                if not self._publish():
                    dropped += len(lines) - number
                    break
                self._part, self._text, self._published = self._part + 1, bytearray(), 0
            self._text += line.encode()
        if dropped:
            self._text += f"{dropped} lines came faster than they could be written: they are lost\n".encode()
        if publishes:
            self._publish()

    def _publish(self) -> bool:
        """Whether all of this part is written."""
        name, text = f"{FOLDER}/{self._start:06d}-{self._part:04d}.log", self._text
        if len(text) == self._published:
            return True
        try:
            if not self._published:
                for old in self._run.files(FOLDER)[: -_MAX_PARTS + 1]:
                    self._run.delete(old)
            if (path := self._run.local_path(name)) is not None:
                path.parent.mkdir(parents=True, exist_ok=True)
                with path.open("ab") as stream:
                    stream.truncate(min(self._published, stream.tell()))  # a write that failed may have left its half
                    stream.write(text[self._published :])
            else:
                self._run.publish(name, bytes(text))
        except (OSError, ValueError) as error:
            if not self._is_failing:
                _log.warning("what the workers print is not written now (%s): %s", self.url, error)
            self._is_failing = True
            return False
        self._published, self._is_failing = len(text), False
        return True


@dataclass
class _Repeated:
    """A line without its numbers. ``since_s``: by the monotonic clock; ``times`` that it was left out."""

    text: str
    since_s: float
    times: int = 0


def _listen_to_ray(handler: Callable[[Mapping[str, Any]], None] | None) -> None:
    """Give lines to ``handler``; None: to nobody."""
    try:
        from ray._private.ray_logging import global_worker_stdstream_dispatcher as dispatcher

        dispatcher.remove_handler(_HANDLER)
        if handler is not None:
            dispatcher.add_handler(_HANDLER, handler)
    except (ImportError, AttributeError) as error:  # Ray's own parts: all else goes on without them
        if handler is not None:
            _log.warning("what the workers print is not kept: this version of Ray does not bring it (%s)", error)
