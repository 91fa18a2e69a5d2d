"""Which worker the others wait for, seen on one step of every measurement."""

from __future__ import annotations

import statistics

_SLOW_RATIO = 1.5  # of the median
_TOLD_AFTER = 3  # measurements in a row


class Stragglers:
    """Compares the seconds that each worker takes from its batch to its own gradients, for each of its images."""

    def __init__(self) -> None:
        self._seconds: list[float] = []
        self._slow: dict[int, int] = {}  # rank → measurements in a row
        self._told: set[int] = set()

    def look(self, seconds: list[float]) -> None:
        """Seconds for an image of each rank, in one and the same step."""
        self._seconds = seconds
        median = statistics.median(seconds)
        slow = [rank for rank, s in enumerate(seconds) if len(seconds) > 1 and s > _SLOW_RATIO * median > 0]
        self._slow = {rank: self._slow.get(rank, 0) + 1 for rank in slow}

    def metrics(self) -> dict[str, float]:
        """``slowest_worker_ratio``: the slowest worker's seconds over the median's; nothing for a single worker."""
        if len(self._seconds) < 2:
            return {}
        return {"slowest_worker_ratio": max(self._seconds) / max(1e-9, statistics.median(self._seconds))}

    def slow_warning(self) -> str | None:
        """Once for each worker that has been slow in several measurements in a row."""
        for rank, times in self._slow.items():
            if times >= _TOLD_AFTER and rank not in self._told:
                self._told.add(rank)
                ratio = self._seconds[rank] / statistics.median(self._seconds)
                return (
                    f"worker {rank} is slow: {ratio:.1f} times the median's time for an image; all others wait for it"
                )
        return None
