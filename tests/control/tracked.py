"""A made-up journal, and what a real MLflow shows of it: shared by the tests of tracking."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from orchestrator.control.tracking import Delivery, Tracker

Event = dict[str, Any]


def train(step: int, *, time_ms: int = 0) -> Event:
    metrics = {
        "train_loss": 7.0 / step,
        "train_top1_error": 100.0 / step,
        "train_top5_error": 50.0 / step,
        "learning_rate": 0.1,
        "images_per_s": 1000.0,
        "data_wait_share": 0.01,
    }
    return {"kind": "train", "step": step, "epoch": step / 10, "time_ms": time_ms or step * 1000, "metrics": metrics}


def validation(step: int, *, time_ms: int = 0) -> Event:
    metrics = {"validation_loss": 7.0 / step, "validation_top1_error": 90 / step, "validation_top5_error": 40 / step}
    return {
        "kind": "validation",
        "step": step,
        "epoch": step / 10,
        "time_ms": time_ms or step * 1000,
        "metrics": metrics,
    }


def decision(step: int, action: str = "drop", *, drops: int = 1, time_ms: int = 0) -> Event:
    before = {"drops": drops - 1, "best_error_percent": 60.0, "stale_validations": 2, "stop": False}
    inputs = {
        "action": action,
        "step": step,
        "error_percent": 61.5,
        "before": before,
        "after": before | ({"drops": drops, "stale_validations": 0} if action == "drop" else {"stop": True}),
        "learning_rate_before": 0.1 * 0.5 ** (drops - 1),
        "learning_rate": 0.1 * 0.5 ** (drops if action == "drop" else drops - 1),
    }
    return {
        "kind": "decision",
        "step": step,
        "epoch": step / 10,
        "time_ms": time_ms or step * 1000,
        "decision": inputs,
    }


def checkpoint(step: int, *, best: bool = True, time_ms: int = 0) -> Event:
    return {
        "kind": "checkpoint",
        "step": step,
        "epoch": step / 10,
        "time_ms": time_ms or step * 1000,
        "url": f"s3://key:hidden@bucket/step-{step}",
        "validation_top1_error": 90 / step,
        "best": best,
    }


def journal(first: int, last: int, *, delay_ms: int = 0) -> list[Event]:
    """Steps ``first``..``last``; every tenth validates, every twentieth drops the rate and is the best so far."""
    events: list[Event] = []
    for step in range(first, last + 1):
        time_ms = step * 1000 + delay_ms
        events.append(train(step, time_ms=time_ms))
        if step % 10 == 0:
            events.append(validation(step, time_ms=time_ms))
            events.append(decision(step, "drop" if step % 20 == 0 else "stop", drops=step // 20, time_ms=time_ms))
            events.append(checkpoint(step, best=step % 20 == 0, time_ms=time_ms))
            events.append({"kind": "restart", "step": step, "epoch": 0.0, "time_ms": time_ms})
    return events


def runs(uri: str, experiment: str = "imagenet") -> list[Any]:
    from mlflow import MlflowClient

    client = MlflowClient(uri)
    return list(client.search_runs([client.get_experiment_by_name(experiment).experiment_id]))


def rows(database: Path, run_id: str) -> dict[str, list[tuple[int, int, float]]]:
    """By metric key the (step, time in ms, value) in the order of arrival."""
    with sqlite3.connect(database) as connection:
        found = connection.execute(
            "SELECT key, step, timestamp, value FROM metrics WHERE run_uuid = ? ORDER BY rowid", (run_id,)
        ).fetchall()
    connection.close()
    by_key: dict[str, list[tuple[int, int, float]]] = {}
    for key, step, time_ms, value in found:
        by_key.setdefault(key, []).append((step, time_ms, value))
    return by_key


def expected(events: list[Event]) -> dict[str, list[tuple[int, int, float]]]:
    by_key: dict[str, list[tuple[int, int, float]]] = {}
    epochs: set[int] = set()
    for event in events:
        metrics = dict(event.get("metrics", {}))
        if metrics and event["step"] not in epochs:
            epochs.add(event["step"])
            metrics["epoch"] = event["epoch"]
        if event["kind"] == "validation":  # these only fall
            metrics["best_validation_top1_error"] = metrics["validation_top1_error"]
        for key, value in metrics.items():
            shown = float(f"{value:.6g}")  # six digits
            by_key.setdefault(key, []).append((event["step"], event["time_ms"], shown))
    return by_key


def put_all(tracker: Tracker, events: list[Event]) -> None:
    for event in events:
        tracker.put(event)


def wait_until(condition: Callable[[], bool], timeout_s: float = 90.0) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, "waited in vain"
        time.sleep(0.05)


def assert_complete(delivery: Delivery, num_events: int) -> None:
    assert (delivery.error, delivery.pending, delivery.dropped) == (None, 0, 0)
    assert delivery.delivered == num_events


def tracked(events: list[Event]) -> int:
    return sum(event["kind"] != "restart" for event in events)
