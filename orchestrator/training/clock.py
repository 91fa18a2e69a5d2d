"""Where the time of a run goes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise

import torch

from orchestrator.training.time_parts import OTHER, PARTS, VALIDATION

_PROGRESS_EVERY_S = 1.0
_MOST_STEPS_TIMED = 256  # between two measurements: the others are taken to be like them
_OF_A_STEP = PARTS[:5]


class StepTimes:
    """Seconds of each part of the steps of one device; the host does not wait for it before they are asked for.

    In a step: ``copies`` where its batch is still to be copied to its place, ``begins`` with the batch at hand,
    ``ready`` whenever more of this worker's own gradients are (the last time counts), ``reduced``, ``ended``. The
    input's part is what lies before: the device waits for a batch.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._steps: list[list[_Mark]] = []  # copies, begins, ready, reduced, ended, of each step since ``take``
        self._last = [_Mark(self._on_gpu)] * 5
        self._before: list[_Mark] = []  # the end of what came before each step
        self._copy: _Mark | None = None  # of the step that is about to begin
        self._end = _Mark(self._on_gpu)
        self._end.set()

    def between(self) -> None:
        """What comes now is a part of its own: the next step's input begins after it."""
        self._end = _Mark(self._on_gpu)
        self._end.set()

    def copies(self) -> None:
        self._copy = _Mark(self._on_gpu)
        self._copy.set()

    def begins(self) -> None:
        begin = _Mark(self._on_gpu)
        begin.set()
        self._last, self._copy = [self._copy or begin, begin, begin, begin, begin], None

    def ready(self) -> None:
        if self._last[2] is self._last[1]:
            self._last[2] = _Mark(self._on_gpu)
        self._last[2].set()

    def reduced(self) -> None:
        self._last[3] = _Mark(self._on_gpu)
        self._last[3].set()
        if self._last[2] is self._last[1]:  # a single worker has nothing to reduce
            self._last[2] = self._last[3]

    def ended(self) -> None:
        self._last[4] = _Mark(self._on_gpu)
        self._last[4].set()
        if len(self._steps) < _MOST_STEPS_TIMED:
            self._steps.append(self._last)
            self._before.append(self._end)
        self._end = self._last[4]

    def own_seconds(self) -> float:
        """Of the newest step, until this worker's own gradients were ready."""
        return self._last[2].since(self._last[1])

    def take(self) -> dict[str, float]:
        """Mean seconds of the steps since the last call, by part; {} where there was none. Waits for the device."""
        parts = dict.fromkeys(_OF_A_STEP, 0.0)
        for before, marks in zip(self._before, self._steps, strict=True):
            for part, (start, end) in zip(_OF_A_STEP, pairwise([before, *marks]), strict=True):
                parts[part] += end.since(start)
        count = len(self._steps)
        self._steps, self._before = [], []
        return {part: seconds / count for part, seconds in parts.items()} if count else {}


class _Mark:
    """A moment of the host, or of the GPU's current stream."""

    def __init__(self, on_gpu: bool) -> None:
        self._event = torch.cuda.Event(enable_timing=True) if on_gpu else None
        self._time_s = 0.0

    def set(self) -> None:
        if self._event is not None:
            self._event.record()
        else:
            self._time_s = time.monotonic()

    def since(self, other: _Mark) -> float:
        """Seconds."""
        if self._event is not None and other._event is not None:
            self._event.synchronize()
            return float(other._event.elapsed_time(self._event)) / 1000
        return self._time_s - other._time_s


class Clock:
    """Images a second, and where the time has gone, since ``restart``; stalls are no time of training."""

    @dataclass
    class Stall:
        seconds: float = 0.0

    def __init__(self) -> None:
        self._last_progress = time.monotonic()
        self.restart()

    def restart(self) -> None:
        self._start, self._images, self._steps, self._waited = time.monotonic(), 0, 0, 0.0
        self._stalled: dict[str, float] = {}

    @contextmanager
    def waiting(self) -> Iterator[None]:
        start = time.monotonic()
        yield
        self._waited += time.monotonic() - start

    @contextmanager
    def stalled(self, part: str) -> Iterator[Stall]:
        """``part``: VALIDATION or CHECKPOINT."""
        stall, start = Clock.Stall(), time.monotonic()
        yield stall
        stall.seconds = time.monotonic() - start
        self._stalled[part] = self._stalled.get(part, 0.0) + stall.seconds

    def stepped(self, images: int) -> None:
        self._images += images
        self._steps += 1

    def progress_due(self) -> bool:
        now = time.monotonic()
        due = now - self._last_progress >= _PROGRESS_EVERY_S
        if due:
            self._last_progress = now
        return due

    def speed(self) -> dict[str, float]:
        """images_per_s over all workers, data_wait_share in [0, 1] of this one."""
        elapsed = max(1e-9, time.monotonic() - self._start - sum(self._stalled.values()))
        return {"images_per_s": self._images / elapsed, "data_wait_share": self._waited / elapsed}

    def seconds(self, step: dict[str, float]) -> dict[str, float]:
        """All seconds since ``restart``, by part, without validations; ``step``: the mean of its steps
        (``StepTimes.take``).
        """
        stalled = {part: seconds for part, seconds in self._stalled.items() if part != VALIDATION}
        elapsed = time.monotonic() - self._start - self._stalled.get(VALIDATION, 0.0)
        found = {part: seconds * self._steps for part, seconds in step.items()}
        # Steps that were not timed may have been faster.
        room, total = max(0.0, elapsed - sum(stalled.values())), sum(found.values())
        found = {part: seconds * min(1.0, room / total) for part, seconds in found.items()} if total else {}
        found |= stalled | {OTHER: max(0.0, room - sum(found.values()))}
        return {part: round(found.get(part, 0.0), 4) for part in PARTS}
