"""Error curves: what a journal gives, and a figure that is whole, legible without colour and drawn from any thread."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from orchestrator.control import curves
from orchestrator.control.curves import Curve, draw_errors, read_journal


def journal(*, num_steps: int = 60, every: int = 1, offset: float = 0.0) -> list[dict[str, Any]]:
    events: list[dict[str, Any]] = []
    for step in range(every, num_steps + 1, every):
        error = offset + (60.0 if step < num_steps / 2 else 35.0)
        events.append({"kind": "train", "step": step, "metrics": {"train_top1_error": error + 3}})
        if step % (10 * every) == 0:
            events.append({"kind": "validation", "step": step, "metrics": {"validation_top1_error": error}})
        if step == num_steps // 2:
            events.append(decision(step, "drop", 0.1, 0.01))
    return events


def decision(step: int, action: str, before: float, after: float) -> dict[str, Any]:
    rates = {"learning_rate_before": before, "learning_rate": after}
    return {"kind": "decision", "step": step, "decision": {"action": action, **rates}}


def grey(path: Path) -> np.ndarray:
    """[H, W] uint8 of a drawn figure, as a black-and-white print shows it."""
    return np.asarray(Image.open(path).convert("L"))


def test_a_torn_last_line_is_left_out_and_any_other_is_named() -> None:
    lines = [json.dumps(event) for event in journal()]
    assert read_journal([*lines, "", '{"kind": "tra']) == journal()
    with pytest.raises(ValueError, match="line 2 is not JSON"):
        read_journal([lines[0], '{"kind": "tra', lines[1]])
    with pytest.raises(ValueError, match="line 1 is list"):
        read_journal(["[1]"])


def test_a_curve_takes_what_it_knows_and_passes_over_the_rest() -> None:
    curve = Curve.of(
        [
            {"kind": "train", "step": 1, "metrics": {"train_top1_error": 99}},
            {"kind": "train", "step": 2, "metrics": {"train_top1_error": float("nan")}},
            {"kind": "train", "step": 3, "metrics": {}},
            {"kind": "train", "metrics": {"train_top1_error": 1}},
            decision(2, "warm", 0.01, 0.1),
            decision(5, "drop", 0.1, 0.01),
            decision(6, "stop", 0.01, 0.01),
            {"kind": "decision", "step": 7, "decision": None},
            {"kind": "restart", "step": 5},
            {"kind": "train", "step": 1, "metrics": {"train_top1_error": 98.5}},  # trained again after a resume
        ]
    )
    assert curve == Curve(training={1: 98.5}, learning_rates={2: 0.1, 5: 0.01})


def test_several_runs_share_one_figure(tmp_path: Path) -> None:
    path = tmp_path / "figures" / "errors.png"
    # Names are the user's: neither mathematics nor hidden from the legend.
    draw_errors({"$broken_{math": journal(), "_hidden": journal(offset=5)}, path, title="$\\frac{")
    first = grey(path)
    assert first.shape[0] > 400
    assert first.min() < 40
    draw_errors({f"member-{i}": journal(offset=i) for i in range(6)}, path, title="six")
    assert grey(path).shape[1] > first.shape[1]  # the legend stands beside
    assert [p.name for p in path.parent.iterdir()] == ["errors.png"]


def test_training_and_validation_differ_without_colour(tmp_path: Path) -> None:
    events = [event for event in journal(num_steps=600_000, every=1000) if event["kind"] != "decision"]
    dark = {}
    for kind in ("train", "validation"):
        path = tmp_path / f"{kind}.png"
        draw_errors({"run": [event for event in events if event["kind"] == kind]}, path, title="one")
        image = grey(path)
        left, right = image.shape[1] // 4, image.shape[1] // 2
        dark[kind] = int((image[40:-75, left:right] < 100).sum())
    assert dark["validation"] > 1.8 * dark["train"] > 0


@pytest.mark.parametrize("kind", ["train", "validation"])
def test_runs_differ_in_their_markers(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [tmp_path / name for name in ("different.png", "same.png")]
    for path in paths:
        runs = {f"r{i}": [e for e in journal(offset=5 * i) if e["kind"] == kind] for i in range(2)}
        draw_errors(runs, path, title="two")
        monkeypatch.setattr(curves, "MARKERS", "o" * 10)
    assert int((grey(paths[0]) != grey(paths[1])).sum()) > 40


@pytest.mark.parametrize("error", [0, 37.5, 100])
def test_a_first_validation_alone_is_visible(tmp_path: Path, error: float) -> None:
    path = tmp_path / "errors.png"
    draw_errors({"a": [{"kind": "validation", "step": 0, "metrics": {"validation_top1_error": error}}]}, path, title="")
    assert grey(path).min() < 50


def test_nothing_to_draw_says_so(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nothing to draw"):
        draw_errors({"a": [], "b": [{"kind": "checkpoint", "step": 1}]}, tmp_path / "errors.png", title="none")
    assert not list(tmp_path.iterdir())


def test_a_failed_write_leaves_the_old_figure(tmp_path: Path) -> None:
    path = tmp_path / "errors.png"
    path.mkdir()  # a rename onto a folder fails
    with pytest.raises(OSError, match=r"errors\.png"):
        draw_errors({"a": journal()}, path, title="a")
    assert [p.name for p in tmp_path.iterdir()] == ["errors.png"]


def test_threads_draw_the_same_bytes(tmp_path: Path) -> None:
    paths = [tmp_path / f"{i}.png" for i in range(4)]
    threads = [
        threading.Thread(target=draw_errors, args=({"a": journal()}, path), kwargs={"title": "a"}) for path in paths
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({path.read_bytes() for path in paths}) == 1


def test_importing_costs_nothing() -> None:
    code = (
        "import sys, orchestrator.control.curves, orchestrator.control.tracking as tracking;"
        "sys.exit(bool({'mlflow', 'matplotlib', 'numpy', 'torch'} & set(sys.modules)))"
    )
    root = Path(__file__).parents[2]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, env=dict(os.environ), check=False).returncode == 0
