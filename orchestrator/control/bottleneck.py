"""Where the time of a run went, by its journal, and what could be done about it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from orchestrator.training.clock import (
    CHECKPOINT,
    COMPUTE,
    INPUT,
    OPTIMIZER,
    OTHER,
    PARTS,
    REDUCE,
    SHARE,
    VALIDATION,
)

_WORDS = {
    INPUT: "input",
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


def shares_of(journal: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """Share of each part in the time that the journal's measurements cover; {} where they tell nothing of it."""
    seconds = dict.fromkeys(PARTS, 0.0)
    for event in journal:
        if event["kind"] == "train" and "interval_s" in event:
            for part in PARTS:
                seconds[part] += event["interval_s"] * event["metrics"].get(f"{SHARE}{part}", 0.0)
    total = sum(seconds.values())
    return {part: value / total for part, value in seconds.items()} if total else {}


def told(journal: Iterable[Mapping[str, Any]]) -> list[str]:
    """Lines for a person: the shares, and the bottleneck with advice; [] where nothing is known."""
    shares = shares_of(journal)
    if not shares:
        return []
    parts = sorted(shares.items(), key=lambda item: -item[1])
    lines = [", ".join(f"{_WORDS[part]} {100 * share:.1f} %" for part, share in parts if share >= 0.0005)]
    over = {part: shares[part] - limit for part, (limit, _) in _ADVICE.items() if shares[part] > limit}
    if not over:
        return [*lines, "the network itself takes the time, as it should"]
    worst = max(over, key=lambda part: over[part])
    return [*lines, f"bottleneck: {_WORDS[worst]}: {_ADVICE[worst][1]}"]
