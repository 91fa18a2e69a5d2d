"""Where the time of a run goes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

_PROGRESS_EVERY_S = 1.0


class Clock:
    """Images a second and the share of time spent waiting for data, since ``restart``; stalls are left out."""

    @dataclass
    class Stall:
        seconds: float = 0.0

    def __init__(self) -> None:
        self._last_progress = time.monotonic()
        self.restart()

    def restart(self) -> None:
        self._start, self._images, self._waited, self._stalled = time.monotonic(), 0, 0.0, 0.0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        start = time.monotonic()
        yield
        self._waited += time.monotonic() - start

    @contextmanager
    def stalled(self) -> Iterator[Stall]:
        stall, start = Clock.Stall(), time.monotonic()
        yield stall
        stall.seconds = time.monotonic() - start
        self._stalled += stall.seconds

    def stepped(self, images: int) -> None:
        self._images += images

    def progress_due(self) -> bool:
        now = time.monotonic()
        due = now - self._last_progress >= _PROGRESS_EVERY_S
        if due:
            self._last_progress = now
        return due

    def speed(self) -> dict[str, float]:
        """images_per_s over all workers, data_wait_share in [0, 1] of this one."""
        elapsed = max(1e-9, time.monotonic() - self._start - self._stalled)
        return {"images_per_s": self._images / elapsed, "data_wait_share": self._waited / elapsed}
