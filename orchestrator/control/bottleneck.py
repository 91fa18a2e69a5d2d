"""Where the time of a run went, by its journal, and what could be done about it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from orchestrator.training.time_parts import (
    CHECKPOINT,
    COMPUTE,
    COPY,
    INPUT,
    OPTIMIZER,
    OTHER,
    PARTS,
    REDUCE,
    VALIDATION,
)

_WORDS = {
    INPUT: "input",
    COPY: "copy",
    COMPUTE: "forward and backward",
    REDUCE: "all-reduce",
    OPTIMIZER: "optimizer",
    VALIDATION: "validation",
    CHECKPOINT: "checkpoints",
    OTHER: "other",
}
# A part that takes more of the time than this is worth a word, and what to do about it.
_ADVICE = {
    INPUT: (
        0.05,
        "training waits for images: give each worker more processors (--placement.cpus-per-worker), or keep the data "
        "set on a local disk (--placement.cache-dir)",
    ),
    REDUCE: (
        0.10,
        "workers wait for each other's gradients: check the network (python -m cluster.doctor) and slow workers "
        "(slowest_worker_ratio), or take fewer workers",
    ),
    OPTIMIZER: (0.15, "the optimizer's share is that of a small batch: take fewer workers"),
    VALIDATION: (0.15, "validate less often (--rhythm.validate-every-epochs)"),
    CHECKPOINT: (0.03, "make checkpoints less often (--rhythm.checkpoint-every-steps), or on a faster store"),
    OTHER: (0.10, "measurements and the host take their time: measure less often (--rhythm.log-every-steps)"),
}


class TimeAccount:
    """Adds up the seconds of each part over a run's measurements: its events of kind "train" and "validation"."""

    def __init__(self) -> None:
        self._seconds = dict.fromkeys(PARTS, 0.0)

    def add(self, event: Mapping[str, Any]) -> None:
        for part, seconds in event.get("seconds", {}).items():
            self._seconds[part] = self._seconds.get(part, 0.0) + seconds

    def shares(self) -> dict[str, float]:
        """Of each part in all the time, in [0, 1]; {} where nothing is known."""
        total = sum(self._seconds.values())
        return {part: seconds / total for part, seconds in self._seconds.items()} if total else {}

    @property
    def seconds(self) -> float:
        """All that is accounted for."""
        return sum(self._seconds.values())

    def line(self) -> str:
        """``forward and backward 93.1 %, input 4.0 %, …``; "" where nothing is known."""
        parts = sorted(self.shares().items(), key=lambda item: -item[1])
        return ", ".join(f"{_WORDS.get(part, part)} {100 * share:.1f} %" for part, share in parts if share >= 0.0005)

    def advice(self) -> str:
        """The bottleneck, and what could be done about it; "" where nothing is known."""
        if not self.shares():
            return ""
        worst = self._worst()
        if not worst:
            return "the network itself takes the time, as it should"
        return f"bottleneck: {_WORDS[worst]}: {_ADVICE[worst][1]}"

    def bottleneck(self) -> str:
        """The same in few words: ``input, 12 % of the time``."""
        shares, worst = self.shares(), self._worst()
        if not shares:
            return ""
        return f"{_WORDS[worst]}, {100 * shares[worst]:.0f} % of the time" if worst else "none: the network itself"

    def _worst(self) -> str:
        """The part that is most above its limit; "" where none is."""
        shares = self.shares()
        over = {part: shares[part] - limit for part, (limit, _) in _ADVICE.items() if shares.get(part, 0.0) > limit}
        return max(over, key=lambda part: over[part], default="")


def account_of(journal: Iterable[Mapping[str, Any]]) -> TimeAccount:
    account = TimeAccount()
    for event in journal:
        account.add(event)
    return account
