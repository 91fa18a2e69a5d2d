"""--profile: each worker leaves a trace of the steps that were asked for."""

from __future__ import annotations

import gzip
import json
from dataclasses import replace
from pathlib import Path

import pytest

from orchestrator.config import TrackingConfig
from orchestrator.storage import Storage
from orchestrator.training import profiling
from orchestrator.training.profiling import Profiler
from orchestrator.training.pulse import Pulse
from orchestrator.world import World
from tests.training.group import run_to_end, small_config


def test_each_worker_leaves_a_trace(prepared: Path, tmp_path: Path) -> None:
    config = replace(small_config(prepared, tmp_path, "r"), tracking=TrackingConfig(profile_steps=2))
    config = replace(config, schedule=replace(config.schedule, max_steps=13))
    run = run_to_end(config, 2)
    assert sorted(path.name for path in (run / "profile").iterdir()) == [
        "000001-0000.json.gz",
        "000001-0001.json.gz",
    ]
    for path in (run / "profile").iterdir():
        names = [event.get("name") for event in json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]]
        # ResNet-18 has 20 convolutions; of a step's three groups the first worker has two.
        num_groups = {"0000": 2, "0001": 1}[path.name[7:11]]
        assert names.count("aten::convolution_backward") == 2 * 20 * num_groups


def test_a_store_that_refuses_it_hinders_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profiling, "_STEPS_BEFORE", 0)
    (tmp_path / "profile").write_text("in the way")
    told: list[str] = []
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    profiler = Profiler(Storage(str(tmp_path)), 1, World.from_environment(), 5, 2, told.append, Pulse())
    for step in range(5, 9):
        profiler.at(step)
    profiler.close()
    assert len(told) == 1
    assert told[0].startswith("the profile of rank 0 is not kept: ")
