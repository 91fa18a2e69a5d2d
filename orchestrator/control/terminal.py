"""What a run shows in the terminal: a live line, or plain lines where there is no terminal."""

from __future__ import annotations

import threading
import time
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.text import Text

from orchestrator.control.entries import tuning_line

Event = dict[str, Any]
_PLAIN_PROGRESS_EVERY_S = 10.0


class Terminal:
    """Takes the events of a run in any thread, and shows them::

    with Terminal(console, name="r50", batch_size=256) as terminal:
        run_job(config, terminal.put)
    """

    def __init__(self, console: Console, *, name: str, batch_size: int) -> None:
        self._console, self._name, self._batch_size = console, name, batch_size
        self._lock = threading.Lock()
        self._now: dict[str, Any] = {}
        self._test: Event = {}  # the newest of the test that goes on
        self._steps, self._images = 0, 1
        self._last_plain_s = 0.0
        self._live = Live(Text(""), console=console, refresh_per_second=4) if console.is_terminal else None

    def __enter__(self) -> Terminal:
        if self._live is not None:
            self._live.__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        if self._live is not None:
            self._live.update(Text(""))
            self._live.__exit__(*exception)

    def put(self, event: Event) -> None:
        """Show one event."""
        with self._lock:
            self._put(event)

    def _put(self, event: Event) -> None:
        match event["kind"]:
            case "placed":
                where = "GPU" if event["gpu"] else "CPU"
                self._say(f"{event['workers']} {where} worker(s), start number {event['attempt']} of this run")
            case "start":
                self._steps, self._images = event["steps"], event["images"]
                self._now |= {"step": event["step"]}
                epochs = event["steps"] * self._batch_size / event["images"]
                length = f"step {event['step']} to {event['steps']} ({epochs:.4g} epochs)"
                self._say(f"training from {length}, {event['workers']} worker(s)")
            case "notice":
                self._say(event["text"])
            case "progress":
                self._now |= {k: v for k, v in event.items() if k != "kind"}
                if self._live is None and time.monotonic() - self._last_plain_s > _PLAIN_PROGRESS_EVERY_S:
                    self._plain()
            case "train":
                self._now |= {"step": event["step"], **event["metrics"]}
                if self._live is None:
                    self._plain()
            case "validation":
                m = event["metrics"]
                self._now |= m
                self._say(
                    f"step {event['step']}, epoch {event['epoch']:.1f}: validation error "
                    f"{m['validation_top1_error']:.2f} % top-1, {m['validation_top5_error']:.2f} % top-5"
                )
            case "decision":
                d = event["decision"]
                self._say(
                    f"step {event['step']}: {_DECISIONS[d['action']]} at {d['error_percent']:.2f} % "
                    f"(learning rate {d['learning_rate_before']:.4g} → {d['learning_rate']:.4g})"
                )
            case "tuned":
                self._say(f"step {event['step']}: input side, without the network: {tuning_line(event)}")
            case "test":
                self._test = {}
                self._say(f"testing step {event['step']}: {name_of_test(event)}")
            case "scoring":
                self._test = event
                if self._live is None and time.monotonic() - self._last_plain_s > _PLAIN_PROGRESS_EVERY_S:
                    self._plain()
            case "scores":
                self._test = {}
                self._say(f"{name_of_test(event)}: {result_of_test(event)}")
        if self._live is not None:
            self._live.update(Text(self._line(), style="cyan", no_wrap=True, overflow="ellipsis"))

    def _say(self, text: str) -> None:
        self._console.print(Text(text), soft_wrap=self._live is None)  # a log is searched line by line

    def _plain(self) -> None:
        self._last_plain_s = time.monotonic()
        self._console.print(Text(self._line()), soft_wrap=True)

    def _line(self) -> str:
        if self._test:
            return self._test_line()
        n = self._now
        step = n.get("step", 0)
        parts = [f"{self._name}  step {step}/{self._steps}  epoch {step * self._batch_size / self._images:.2f}"]
        if "images_per_s" in n:
            parts.append(f"{n['images_per_s']:.0f} images/s")
        if "train_top1_error" in n:
            parts.append(f"train {n['train_top1_error']:.1f} %")
        if "validation_top1_error" in n:
            parts.append(f"val {n['validation_top1_error']:.1f} %")
        if "learning_rate" in n:
            parts.append(f"lr {n['learning_rate']:.4g}")
        if "images_per_s" in n:
            parts.append(f"data wait {100 * n['data_wait_share']:.0f} %")
            if n["images_per_s"] > 0:
                parts.append(f"{duration((self._steps - step) * self._batch_size / n['images_per_s'])} left")
        return " · ".join(parts)

    def _test_line(self) -> str:
        t = self._test
        parts = [f"{self._name}  {name_of_test(t)}  {t['done']}/{t['total']} images"]
        if t["images_per_s"] > 0:
            parts.append(f"{t['images_per_s']:.1f} images/s a worker")
        return " · ".join(parts)


def name_of_test(event: Event) -> str:
    """Which test an event tells of."""
    return f"{event['split']} by {event['protocol']}"


def result_of_test(event: Event) -> str:
    """What came of it."""
    bad = f", {event['undecodable']} undecodable" if event["undecodable"] else ""
    images = f"{event['images']} images{bad}"
    if "top1_error" not in event:
        return f"{images} without labels, in {event['file']}"
    return f"{event['top1_error']:.2f} % top-1, {event['top5_error']:.2f} % top-5 error ({images})"


_DECISIONS = {
    "drop": "the error has stalled",
    "stop": "the error has stalled after the last drop: training ends",
    "warm": "the warm-up ends",
}


def duration(seconds: float) -> str:
    """In words: h:mm:ss, from two days on days and hours."""
    minutes, s = divmod(int(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours // 24} d {hours % 24} h" if hours >= 48 else f"{hours}:{m:02d}:{s:02d}"
