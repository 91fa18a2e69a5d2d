"""Shared by the tests of control."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from orchestrator.control.tracking import RunStatus, Tracker


@pytest.fixture
def tracker(tmp_path: Path) -> Iterator[Callable[..., Tracker]]:
    """Makes trackers with everything but what the test is about filled in."""
    made: list[Tracker] = []

    def make(uri: str, **changes: Any) -> Tracker:
        fields: dict[str, Any] = {
            "experiment": "imagenet",
            "name": "resnet-34",
            "run_key": "resnet-34/0",
            "params": {"depth": 34},
            "tags": {},
            "figure_dir": tmp_path / "figures",
            "system_metrics": False,
        }
        made.append(Tracker(uri=uri, **(fields | changes)))
        return made[-1]

    yield make
    for one in made:
        one.close(0, RunStatus.KILLED)
