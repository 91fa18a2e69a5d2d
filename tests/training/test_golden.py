"""Recorded losses, where this processor and these versions have been recorded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests import golden
from tests.training.group import run_to_end


def test_losses_are_the_recorded_ones(undisturbed: dict[int, Path], prepared: Path, tmp_path: Path) -> None:
    recorded = json.loads(golden.RECORDED.read_text()).get(golden.machine())
    if recorded is None:
        pytest.skip(f"no golden losses for {golden.machine()}: record them with python -m tests.golden --write")
    assert golden.outcome_of(undisturbed[1]) == recorded["residual, 1 worker"]
    jobs = golden.kinds(prepared, tmp_path)
    assert jobs.keys() == recorded.keys()
    for kind, (config, size) in jobs.items():
        if kind != "residual, 1 worker":
            assert golden.outcome_of(run_to_end(config, size)) == recorded[kind], kind
