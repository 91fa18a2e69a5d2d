"""Where a worker is: written by the training loop for free, read by a thread beside it.

A watchdog outside the process compares the workers (``control.guard``): who has not arrived holds the others up.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum


class Phase(IntEnum):
    """What a worker does in a step, and after the last one, in the order in which it does it."""

    START = 0  # building the network, reading the checkpoint
    INPUT = 1  # waiting for the next batch
    COMPUTE = 2  # its own share of the step
    REDUCE = 3  # its gradients are ready: waiting for those of the others
    MEASURE = 4
    VALIDATE = 5
    SAVE = 6
    END = 7
    FINISH = 8  # averaging batch norm's statistics
    SCORE = 9  # testing the finished model
    GATHER = 10  # waiting for the scores of the others
    DONE = 11


class Wish(IntEnum):
    """What the world outside wants of a run; the highest wish of any worker is that of all."""

    NONE = 0
    SAVE = 1  # a checkpoint after this step
    LEAVE = 2  # a checkpoint, then end: this place is about to go away


class Pulse:
    """One worker's place in the run. One thread writes, others may read at any time."""

    def __init__(self) -> None:
        self.step, self.phase, self.count = 0, Phase.START, 0
        self.wish = Wish.NONE  # written from outside, any thread
        self.waits_for_storage = False

    def at(self, phase: Phase, step: int) -> None:
        """The worker is now in ``phase`` of ``step`` (0-based number of the step that is being done)."""
        self.step, self.phase = step, phase
        self.count += 1

    def take_wish(self) -> Wish:
        """What is wished now. A checkpoint is wished once; a wish to leave stays."""
        wish = self.wish
        if wish is Wish.SAVE:
            self.wish = Wish.NONE
        return wish

    @contextmanager
    def storing(self) -> Iterator[None]:
        """While something large goes to storage or comes from there: a slow line is no hang."""
        self.waits_for_storage = True
        try:
            yield
        finally:
            self.waits_for_storage = False

    def alive(self) -> None:
        """Still in the same phase, and not stuck."""
        self.count += 1
