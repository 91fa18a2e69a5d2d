"""Which settings of the input side are fastest on this machine: tried for some seconds when training starts.

The search is pure: it asks for seconds and knows no clock. ``Trials`` measures them with real batches of the run.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any

import torch

from orchestrator.data.decoder import DecodeSettings, release_unused_memory
from orchestrator.data.inputs import TrainBatches
from orchestrator.world import World

LEAST_GAIN = 0.05  # a setting that is faster by less may owe it to noise
WINDOW_STEPS = 8  # whose images all trials decode: those come from memory after the first, and every trial has the same
_TIMED_S = 0.6
_LEAST_TIMED = 2  # batches, where one takes longer than that
_NO_TRIAL_AFTER_S = 12.0  # the one that is under way then is finished, however slow the store


@dataclass(frozen=True)
class Tuned:
    """What was chosen, and why: ``seconds`` a batch took with each value of each field, in the order of the trials."""

    settings: DecodeSettings
    seconds: dict[str, list[tuple[float, float]]]

    def to_json(self, global_batch_size: int) -> dict[str, Any]:
        """The chosen values by field; images a second of all workers together, by field and value."""
        return {
            "settings": {name: getattr(self.settings, name) for name in self.seconds},
            "images_per_s": {
                name: [[value, float(f"{global_batch_size / seconds:.4g}")] for value, seconds in tried]
                for name, tried in self.seconds.items()
            },
        }


def tune(
    start: DecodeSettings,
    candidates: Mapping[str, Sequence[float]],
    measure: Callable[[DecodeSettings], float | None],
) -> Tuned:
    """Try one field of ``start`` after another, the others as they are best so far.

    candidates: values by field, in the order in which the fields are tried; measure: seconds a batch takes, or None
    where there is no time left, which ends the search at what is settled by then. A value replaces the best one only
    where it takes less than 1 − LEAST_GAIN of its time, and does so again, beside the one that it is to replace.
    """
    best, seconds = start, dict[str, list[tuple[float, float]]]()
    best_s = measure(start)
    for name, values in candidates.items():
        if best_s is None:
            break
        before = best
        seconds[name] = [(getattr(before, name), best_s)]
        for value in values:
            if value == getattr(before, name):
                continue
            change: dict[str, Any] = {name: value}
            candidate = replace(before, **change)
            candidate_s = measure(candidate)
            if candidate_s is None:
                return Tuned(before, seconds)
            seconds[name].append((value, candidate_s))
            if candidate_s < (1 - LEAST_GAIN) * best_s:
                best, best_s = candidate, candidate_s
        if best != before:  # the best of several noisy numbers is too good: both once more, side by side
            again_s, before_s = measure(best), measure(before)
            if again_s is None or before_s is None or again_s >= (1 - LEAST_GAIN) * before_s:
                best, best_s = before, before_s
            else:
                best_s = again_s
    return Tuned(best, seconds)


class Trials:
    """Seconds that a batch takes the slowest worker, while all of them decode with the same settings.

    ``open_input`` makes an input side of the run, from its next step on; what it gives is thrown away. It has the
    machine to itself: no network computes beside it. ``alive`` is told of every batch. Calls are collective: all
    workers get the same answer, None for all once ``_NO_TRIAL_AFTER_S`` are over.
    """

    def __init__(
        self,
        open_input: Callable[[DecodeSettings], TrainBatches],
        world: World,
        alive: Callable[[], None] = lambda: None,
    ) -> None:
        self._open, self._world, self._alive = open_input, world, alive
        self._until_s = time.monotonic() + _NO_TRIAL_AFTER_S
        self._is_warm = False

    def __call__(self, settings: DecodeSettings) -> float | None:
        if not self._is_warm:
            self._try(settings)  # pays for what is done once: libraries, files that are not in memory
            self._is_warm = True
        if not self._world.from_first(int(time.monotonic() < self._until_s)):
            return None
        return self._try(settings)

    def close(self) -> None:
        """Free what the decoders have left behind."""
        if self._world.device.type == "cuda":
            release_unused_memory()

    def _try(self, settings: DecodeSettings) -> float:
        with closing(self._open(settings)) as batches:
            self._world.gather(0.0)  # together: they share the processors of a node
            # What the pipeline has done before anyone waits for it is no measure of its speed.
            for _ in range(settings.prefetch_batches + 2):
                self._take(batches)
            self._wait()
            began_s, count, took_s = time.perf_counter(), 0, 0.0
            while count < _LEAST_TIMED or took_s < _TIMED_S:
                self._take(batches)
                count, took_s = count + 1, time.perf_counter() - began_s
            self._wait()
            took_s = time.perf_counter() - began_s
        return max(self._world.gather(took_s / count))  # a step waits for the slowest

    def _take(self, batches: TrainBatches) -> None:
        next(batches)
        self._alive()

    def _wait(self) -> None:
        if self._world.device.type == "cuda":
            torch.cuda.synchronize(self._world.device)
