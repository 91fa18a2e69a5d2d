"""Between the workers and the driver: an actor that keeps events, signs of life, failures and wishes.

Workers never call the driver, nor it them; both call the mailbox, which lives on the driver's machine and ends with it.
"""

from __future__ import annotations

import threading
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from types import TracebackType
from typing import Any

from orchestrator.config import GuardConfig
from orchestrator.control.guard import Beat, Failure, FailureClass, Guard, Refusal
from orchestrator.control.stuck import Place
from orchestrator.remote import is_waiting
from orchestrator.training.notices import Event, notice
from orchestrator.training.pulse import Phase, Pulse, Wish

_MANY_BEATS_PER_S = 512.0  # that one actor takes (benchmarks/thousand_nodes.py --actor)
_TOGETHER_S = 1.5  # between the last beats of workers that ended at once


@dataclass
class Post:
    """What the driver finds in the mailbox: the events since it last looked, and how the workers stand now."""

    events: list[Event]
    refusal: Refusal | None
    group: str  # "" before the first one begins
    failed_s: float | None  # when a worker of it last told that it fails: the group is about to end
    places: dict[int, Place]
    beats: list[Beat]
    begun_s: float  # when the group's last worker began
    now_s: float  # on the same clock as the beats


@dataclass
class _Group:
    name: str = ""
    size: int = 0
    places: dict[int, Place] = field(default_factory=dict)
    beats: dict[int, Beat] = field(default_factory=dict)
    failed: set[int] = field(default_factory=set)
    failed_s: float | None = None
    is_explained: bool = False  # why it ended: Ray ends those that are left, without a word
    standing_by: set[int] = field(default_factory=set)
    wish: Wish = Wish.NONE
    begun_s: float = field(default_factory=time.monotonic)
    over: bool = False

    def first_silent(self) -> list[str]:
        """Workers that have told no failure: of these, those that fell silent first. Ray ends the others after them."""
        left = [self.beats[r].heard_s if r in self.beats else 0.0 for r in self.places if r not in self.failed]
        return [
            str(place)
            for rank, place in sorted(self.places.items())
            if rank not in self.failed
            and (self.beats[rank].heard_s if rank in self.beats else 0.0) <= min(left) + _TOGETHER_S
        ]


class Mailbox:
    """The actor."""

    def __init__(self, run: str, limits: dict[str, Any]) -> None:
        self._guard = Guard(run, GuardConfig(**limits))
        self._events: list[Event] = []
        self._group = _Group()
        self._past: set[str] = set()
        self._num_taken = 0  # events that have left the mailbox

    # -- for workers --------------------------------------------------------------------------------------------

    def begin(self, group: str, size: int, place: Place) -> tuple[bool, int, float]:
        """A worker starts: whether it may, the number of its group (from 1), and seconds to wait first."""
        if group in self._past:
            return False, 0, 0.0  # a straggler of a group that is long gone
        if group != self._group.name:
            old = self._group
            self._past.add(old.name)
            silent = old.first_silent()
            self._guard.begin(size, silent)
            if old.places and not old.failed and size != old.size:
                self._events.append(notice(f"Ray changes the number of workers from {old.size} to {size}"))
            elif silent and not old.is_explained and self._guard.refusal is None:
                self._events.append(notice(f"{', '.join(silent[:8])} ended without a word; all workers start again"))
            self._group = _Group(group, size)
        self._group.places[place.rank] = place
        self._group.begun_s = time.monotonic()
        if len(self._group.places) == size:
            workers = [asdict(place) for _, place in sorted(self._group.places.items())]
            self._events.append({"kind": "workers", "workers": workers})
        return self._guard.refusal is None, self._guard.num_groups, self._guard.pause_s

    def put(self, events: list[Event]) -> None:
        for event in events:
            if event["kind"] == "checkpoint":
                self._guard.saved(event["step"])
            elif event["kind"] == "start":
                self._guard.goes_on_from(event["step"])
            elif event["kind"] == "scoring":
                self._guard.scored(f"{event['split']} {event['protocol']}", event["done"])
        self._events += events

    def failed(self, group: str, rank: int, failure: Failure) -> bool:
        """Worker ``rank`` of ``group`` stops, or was stopped; whether all are going to start again."""
        if group == self._group.name:
            self._group.failed.add(rank)
            self._group.failed_s = time.monotonic()
            self._group.is_explained |= not failure.is_collateral
            self._guard.failed(failure)
        return self._guard.refusal is None

    def beat(self, group: str, beat: dict[str, Any]) -> Wish:
        """A sign of life; what is wished of the worker. A checkpoint is asked of the first one, once."""
        g = self._group
        if group != g.name or beat["rank"] in g.standing_by:
            return Wish.NONE
        g.beats[beat["rank"]] = Beat(**beat, heard_s=time.monotonic())
        if g.wish is Wish.SAVE:
            if beat["rank"] != 0:
                return Wish.NONE
            g.wish = Wish.NONE
            return Wish.SAVE
        return g.wish

    def stand_by(self, group: str, rank: int) -> None:
        """This worker takes no part: nobody waits for it."""
        if group == self._group.name:
            self._group.standing_by.add(rank)
            self._group.beats.pop(rank, None)

    def end(self, group: str) -> None:
        """The workers of ``group`` have done all."""
        self._group.over = self._group.over or group == self._group.name

    def is_over(self, group: str) -> bool:
        return self._group.over or group != self._group.name

    # -- for the driver -----------------------------------------------------------------------------------------

    def take(self, num_received: int) -> Post:
        """Everything after the first ``num_received`` events: an answer that was lost is given again."""
        del self._events[: num_received - self._num_taken]
        self._num_taken = num_received
        events = list(self._events)
        g = self._group
        beats = [beat for _, beat in sorted(g.beats.items())]
        return Post(events, self._guard.refusal, g.name, g.failed_s, g.places, beats, g.begun_s, time.monotonic())

    def wish(self, group: str, wish: Wish) -> None:
        if group == self._group.name:
            self._group.wish = max(self._group.wish, wish)

    def give_up(self, why: str) -> None:
        self._guard.give_up(why)

    def leave(self) -> None:
        """The driver's place is about to go away: the workers make a checkpoint, and none start again."""
        g = self._group
        self.wish(g.name, Wish.LEAVE)
        self._guard.leave(is_at_work=bool(g.places) and not g.failed)


def beat_interval_s(workers: int) -> float:
    """How often each of so many workers gives a sign of life: the watchdog's silence must be far longer."""
    return max(1.0, workers / _MANY_BEATS_PER_S)


# -- in a worker ----------------------------------------------------------------------------------------------------


class Heart:
    """Sends a worker's pulse to the mailbox while the context lasts, and brings back what is wished of it."""

    def __init__(self, mailbox: Any, group: str, place: Place, size: int, pulse: Pulse) -> None:
        self._mailbox, self._group, self._place, self._pulse = mailbox, group, place, pulse
        self._interval_s = beat_interval_s(size)
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._live, name="heart", daemon=True)

    def __enter__(self) -> Heart:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._end.set()

    def _live(self) -> None:
        import ray

        while not self._end.is_set():
            pulse = self._pulse
            beat = {"rank": self._place.rank, "step": pulse.step, "phase": pulse.phase, "count": pulse.count}
            beat["waits_for_storage"] = pulse.waits_for_storage or is_waiting()
            with suppress(Exception):  # the driver is gone, or busy: not this worker's affair
                wish = ray.get(self._mailbox.beat.remote(self._group, beat), timeout=30)
                pulse.wish = max(pulse.wish, wish)
            self._end.wait(self._interval_s)


def failure_of(error: BaseException, kind: FailureClass, place: Place, pulse: Pulse, text: str) -> Failure:
    """What a worker tells of its end."""
    where = "at its start" if pulse.phase is Phase.START else f"in step {pulse.step}, {pulse.phase.name.lower()}"
    return Failure(kind, f"{place} {where}", text)
