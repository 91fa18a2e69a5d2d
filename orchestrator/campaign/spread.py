"""Runs that differ in their seed alone: mean and standard deviation of their errors. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, stdev

from orchestrator.config import TrainConfig
from orchestrator.control.description import network
from orchestrator.plain import digest


@dataclass(frozen=True)
class Spread:
    """Errors of ``test`` over runs, percent. deviation: of the sample (n − 1). what: their recipe or network."""

    what: str
    members: tuple[str, ...]
    test: str
    mean: float
    deviation: float

    def __str__(self) -> str:
        return f"{self.mean:.2f} ± {self.deviation:.2f} %"


def seeds_of(configs: Mapping[str, TrainConfig]) -> list[tuple[str, ...]]:
    """Names of runs by what they are apart from the seed, in the order given."""
    groups: dict[str, list[str]] = {}
    for name, config in configs.items():
        identity = config.identity()
        del identity["seed"]
        groups.setdefault(digest(identity), []).append(name)
    return [tuple(names) for names in groups.values()]


def spreads(
    configs: Mapping[str, TrainConfig], errors: Mapping[str, Mapping[str, float]], tests: Sequence[str]
) -> list[Spread]:
    """Of each group of at least two runs that have an error in a test, and of each of ``tests``."""
    found, groups = [], seeds_of(configs)
    labels = [configs[names[0]].recipe or network(configs[names[0]].model) for names in groups]
    for names, label in zip(groups, labels, strict=True):
        if labels.count(label) > 1:  # a recipe that was changed for some
            label = f"{label} as {names[0]}"
        for test in tests:
            values = {name: errors[name][test] for name in names if math.isfinite(errors[name].get(test, math.nan))}
            if len(values) > 1:
                found.append(Spread(label, tuple(values), test, mean(values.values()), stdev(values.values())))
    return found
