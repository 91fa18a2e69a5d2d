"""What a person sees of an event that is neither measured nor validated: the tuned input side."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console

from orchestrator.control.curves import Curve
from orchestrator.control.entries import tuning_line
from orchestrator.control.terminal import Terminal
from orchestrator.control.tracking import RunStatus, Tracker, default_uri
from tests.control.tracked import runs

TUNED: dict[str, Any] = {
    "kind": "tuned",
    "step": 0,
    "epoch": 0.0,
    "time_ms": 1000,
    "settings": {"hw_decoder_share": 0.8, "num_threads": 16, "prefetch_batches": 2},
    "images_per_s": {
        "hw_decoder_share": [[0.65, 3950], [0.0, 2105], [0.35, 3001], [0.5, 3612], [0.8, 4212], [1.0, 3344]],
        "num_threads": [[16, 4212], [4, 3871], [8, 4102], [12, 4155]],
        "prefetch_batches": [[2, 4212], [3, 4303], [4, 4288]],
    },
}
LINE = (
    "numerics.hw_decoder_share 0.8 (0.65: 3950, 0: 2105, 0.35: 3001, 0.5: 3612, 0.8: 4212, 1: 3344 images/s); "
    "placement.decode_threads 16 (16: 4212, 4: 3871, 8: 4102, 12: 4155 images/s); "
    "placement.prefetch_batches 2 (2: 4212, 3: 4303, 4: 4288 images/s)"
)


def test_mlflow_has_it_as_a_tag_and_no_metric(tmp_path: Path, tracker: Callable[..., Tracker]) -> None:
    uri = default_uri(None, tmp_path)
    one = tracker(uri)
    one.put(TUNED)
    delivery = one.close(60, RunStatus.FINISHED)
    assert (delivery.delivered, delivery.pending, delivery.error) == (1, 0, None)
    [run] = runs(uri)
    assert run.data.tags["input"] == LINE
    assert not run.data.metrics
    assert Curve.of([TUNED]).is_empty()


def test_the_terminal_says_it() -> None:
    shown = io.StringIO()
    with Terminal(Console(file=shown, width=80), name="r", batch_size=256) as terminal:
        terminal.put(TUNED)
    assert shown.getvalue() == f"step 0: input side, without the network: {LINE}\n"


def test_without_time_it_says_that() -> None:
    assert "nothing was tried" in tuning_line(TUNED | {"settings": {}, "images_per_s": {}})
