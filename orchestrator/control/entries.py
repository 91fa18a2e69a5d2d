"""What MLflow is to show of a journal: metrics and tags event by event, and the result in one line."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import Enum, StrEnum
from typing import Any

from orchestrator.control.bottleneck import TimeAccount
from orchestrator.control.curves import EventKind
from orchestrator.masking import masked

_BEST_KEY, _EPOCH_KEY = "best_validation_top1_error", "epoch"
RESERVED_KEYS = (_BEST_KEY, _EPOCH_KEY)  # whatever else a job measures, these find room
_MAX_VALUE_LENGTH = 500
_FORBIDDEN_IN_KEY = re.compile(r"[^\w.\- /:]")
_KINDS = frozenset(kind.value for kind in EventKind)
_OPTIONS = {  # that fix what is tuned, by the name that it has where it is
    "hw_decoder_share": "numerics.hw_decoder_share",
    "num_threads": "placement.decode_threads",
    "prefetch_batches": "placement.prefetch_batches",
}


class RunStatus(StrEnum):
    """How a training run ended, in MLflow's words."""

    RUNNING = "RUNNING"  # another driver goes on with it
    FINISHED = "FINISHED"
    FAILED = "FAILED"
    KILLED = "KILLED"


UNTIL = {
    RunStatus.RUNNING: " so far",
    RunStatus.FINISHED: "",
    RunStatus.FAILED: " until it failed",
    RunStatus.KILLED: " until it was interrupted",
}


@dataclass(frozen=True, slots=True)
class Entry:
    """What MLflow is to show of an event. ``time_ms`` is None where the journal does not have the event."""

    kind: EventKind
    step: int
    time_ms: int | None
    metrics: dict[str, float]
    tags: dict[str, str]


class Account:
    """Makes entries of a run's events, in their order, and knows the result so far."""

    def __init__(self) -> None:
        self._best_error = math.inf
        self._best = self._last = ""
        self._tests: dict[str, str] = {}
        self._times = TimeAccount()
        self.step = -1  # of the last validation

    def entry(self, event: Mapping[str, Any]) -> Entry | None:
        """What to show of ``event``, such that MLflow cannot find it invalid; None for a kind that is not shown.

        Numbers have six digits, since MLflow shows all that it has. Raises some exception for a malformed event.
        """
        if event["kind"] not in _KINDS:
            return None
        kind, step = EventKind(event["kind"]), event["step"]
        time_ms = None if kind is EventKind.START else event["time_ms"]
        if not (_is_count(step) and (time_ms is None or _is_count(time_ms))):
            raise ValueError(f"step {step!r}, time_ms {time_ms!r}")
        metrics: dict[str, float] = {}
        tags: dict[str, str] = {}
        match kind:
            case EventKind.START:
                tags["workers"] = str(event["workers"])
            case EventKind.TRAIN | EventKind.VALIDATION:
                # Batches of two sizes have epochs in common, not steps.
                numbers = event["metrics"] | ({_EPOCH_KEY: event[_EPOCH_KEY]} if _EPOCH_KEY in event else {})
                for key, value in numbers.items():
                    if isinstance(value, int | float):
                        metrics[cleaned_key(key)] = float(f"{value:.6g}") if math.isfinite(value) else math.nan
                if kind is EventKind.VALIDATION:
                    self._take_validation(step, metrics)
                if "seconds" in event:
                    self._times.add(event)
                    tags["time"] = cleaned_value(self._times.line())
            case EventKind.DECISION:
                tags["last_decision"] = cleaned_value(_sentence(step, event["decision"]))
            case EventKind.CHECKPOINT:
                if event["best"]:
                    tags["best_checkpoint"] = cleaned_value(event["url"])
            case EventKind.TUNED:
                tags["input"] = cleaned_value(tuning_line(event))
            case EventKind.SCORES:
                metrics = errors_of_test(event)
                if "top1_error" in event:
                    errors = f"{event['top1_error']:.2f} %, top-5 {event['top5_error']:.2f} %"
                    self._tests[f"{event['split']} by {event['protocol']}"] = errors
        return Entry(kind, step, time_ms, metrics, tags)

    def _take_validation(self, step: int, metrics: dict[str, float]) -> None:
        self.step = step
        error = metrics.get("validation_top1_error", math.nan)
        when = f"epoch {metrics[_EPOCH_KEY]:.4g}, step {step}" if _EPOCH_KEY in metrics else f"step {step}"
        if error < self._best_error:
            self._best_error = metrics[_BEST_KEY] = error
            self._best = f"{error:.2f} % ({when})"
        top5 = f", top-5 {metrics['validation_top5_error']:.2f} %" if "validation_top5_error" in metrics else ""
        self._last = f"{error:.2f} %{top5} ({when})"

    def result(self, status: RunStatus) -> str:
        """The line of results in a run's description; it begins as ``comparison.with_result`` looks for it."""
        text = f"best validation top-1 error {self._best}; the last {self._last}" if self._best else "no validation"
        text += "".join(f"; {test} {errors}" for test, errors in self._tests.items())
        return f"**Result{UNTIL[status]}:** {text}"


def tuning_line(event: Mapping[str, Any]) -> str:
    """What the input side was set to when a start tried it, and how fast each value was."""
    parts = []
    for field, tried in event["images_per_s"].items():
        speeds = ", ".join(f"{value:g}: {images_per_s:g}" for value, images_per_s in tried)
        parts.append(f"{_OPTIONS[field]} {event['settings'][field]:g} ({speeds} images/s)")
    return "; ".join(parts) or "nothing was tried in the time that there is for it"


def errors_of_test(event: Mapping[str, Any]) -> dict[str, float]:
    """Errors of a test, in percent by metric (``val_ten_crop_top1_error``); {} where the images have no labels."""
    where = f"{event['other_data']}_{event['split']}" if "other_data" in event else event["split"]
    kinds = [kind for kind in ("top1_error", "top5_error") if kind in event]
    return {cleaned_key(f"{where}_{event['protocol']}_{kind}"): float(f"{event[kind]:.6g}") for kind in kinds}


def flattened(params: Mapping[str, object], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Dotted keys and values; what is not set (None, an empty list) is left out."""
    for name, value in params.items():
        if isinstance(value, Mapping):
            yield from flattened(value, f"{prefix}{name}.")
        elif value not in (None, [], ()):
            yield cleaned_key(f"{prefix}{name}"), cleaned_value(value)


@functools.cache  # one string for all the events that wait: a run has few keys
def cleaned_key(text: str) -> str:
    """``text`` as MLflow accepts it for a key."""
    return _FORBIDDEN_IN_KEY.sub("_", text)[:250]


def cleaned_value(value: object) -> str:
    """``value`` as MLflow accepts it, without credentials."""
    text = masked(str(value.value if isinstance(value, Enum) else value))
    if isinstance(value, float):
        text = text.removesuffix(".0")  # 30 and 30.0 are no difference
    return text if len(text) <= _MAX_VALUE_LENGTH else f"{text[: _MAX_VALUE_LENGTH - 1]}…"


def _sentence(step: int, decision: Mapping[str, Any]) -> str:
    """A policy's decision as a person reads it; the journal has all its inputs."""
    before, after = decision["learning_rate_before"], decision["learning_rate"]
    rates = f", learning rate {before:g} → {after:g}" if after != before else ""
    return f"{decision['action']} at step {step}{rates}, error {decision['error_percent']:.2f} %"


def _is_count(value: object) -> bool:
    return isinstance(value, int) and 0 <= value < 2**63
