"""A run's numbers for Prometheus: ``http://HOST:PORT/metrics`` of its driver, as long as it works.

Errors and shares are ratios in [0, 1], times seconds, as Prometheus has them. cluster/monitoring holds what scrapes and
shows them.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, ProcessCollector, start_http_server

from orchestrator.training.notices import Event

# Of the events "progress", "train" and "validation": name, what it is, what the event's number is divided by.
_GAUGES = {
    "train_loss": ("train_loss", "mean loss of the last training steps", 1),
    "train_top1_error": ("train_top1_error_ratio", "top-1 error of the last training steps", 100),
    "train_top5_error": ("train_top5_error_ratio", "top-5 error of the last training steps", 100),
    "validation_top1_error": ("validation_top1_error_ratio", "top-1 error of the last validation", 100),
    "validation_top5_error": ("validation_top5_error_ratio", "top-5 error of the last validation", 100),
    "learning_rate": ("learning_rate", "", 1),
    "images_per_s": ("images_per_second", "of all workers, stalls left out", 1),
    "data_wait_share": ("data_wait_ratio", "share of the time in which the first worker waits for images", 1),
}
# Events of a run that trains. Others tell of a step that is past, as of a checkpoint when it is published.
_AT_STEP = "start", "progress", "train", "validation", "saving"


class Exporter:
    """Serves what it is told of a run. Raises ValueError where nothing can listen at ``host``:``port``."""

    def __init__(self, run: str, host: str, port: int) -> None:
        registry = CollectorRegistry()
        self._run, self._lock = run, threading.Lock()

        def gauge(name: str, what: str) -> Gauge:
            return Gauge(f"resnet_{name}", what, ["run"], registry=registry)

        def counter(name: str, what: str) -> Counter:
            return Counter(f"resnet_{name}", what, ["run"], registry=registry)

        self._gauges = {key: (gauge(name, what), by) for key, (name, what, by) in _GAUGES.items()}
        self._step, self._steps = gauge("step", "optimizer steps done"), gauge("steps", "steps of the whole run")
        self._epoch = gauge("epoch", "passes over the training set")
        self._workers, self._start = gauge("workers", ""), gauge("start_number", "how often the run was started")
        what = "when the last checkpoint was published; before this driver's first: when it began"
        self._saved_s, self._has_begun = gauge("last_checkpoint_timestamp_seconds", what), False
        self._groups = counter("worker_group_starts", "by this driver; each but the first after something failed")
        self._checkpoints = counter("checkpoints", "published under this driver")
        self._stall_s = counter("checkpoint_stall_seconds", "for which training stood still to save")
        self._skipped = counter("skipped_steps", "not finite: nothing was changed")
        self._replaced = counter("replaced_images", "which could not be decoded")
        for each in (self._groups, self._checkpoints, self._stall_s, self._skipped, self._replaced):
            each.labels(run)  # 0 from the beginning
        ProcessCollector(registry=registry)
        try:
            self._server, self._thread = start_http_server(port, host, registry)
        except OSError as error:
            raise ValueError(
                f"metrics cannot be served at {host}:{port} ({error.strerror}): give another --tracking.metrics-port"
            ) from None

    def put(self, event: Event) -> None:
        """Show one event. Called by several threads."""
        with self._lock:
            self._put(event)

    def _put(self, event: Event) -> None:
        run = self._run
        if event["kind"] in _AT_STEP and "step" in event:
            self._step.labels(run).set(event["step"])
        if "epoch" in event:
            self._epoch.labels(run).set(event["epoch"])
        if event["kind"] in ("placed", "start") and not self._has_begun:  # once: workers may start again and again
            self._has_begun = True
            self._saved_s.labels(run).set_to_current_time()
        match event["kind"]:
            case "placed":
                self._start.labels(run).set(event["attempt"])
            case "start":
                self._steps.labels(run).set(event["steps"])
                self._workers.labels(run).set(event["workers"])
                self._groups.labels(run).inc()
            case "progress":
                self._take(event)
            case "train" | "validation":
                self._take(event["metrics"])
                self._skipped.labels(run).inc(event["metrics"].get("skipped_steps", 0))
                self._replaced.labels(run).inc(event["metrics"].get("replaced_images", 0))
            case "saving":
                self._stall_s.labels(run).inc(event["stall_s"])
            case "checkpoint":
                self._checkpoints.labels(run).inc()
                self._saved_s.labels(run).set_to_current_time()
            case "finished":  # maybe before the last step, by its learning rate policy
                self._step.labels(run).set(event["steps"])
                self._steps.labels(run).set(event["steps"])

    def _take(self, numbers: Mapping[str, Any]) -> None:
        for key, (gauge, by) in self._gauges.items():
            if isinstance(numbers.get(key), int | float):
                gauge.labels(self._run).set(numbers[key] / by)

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
