"""Benchmarks in their smallest forms, through the command line: they run, and their last line can be read.

How long anything takes is not looked at: machines differ, and are busy.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from benchmarks import ratios
from tests.conftest import run_module


def figures_of(module: str, *arguments: str) -> dict[str, float]:
    """The last line of the benchmark's output."""
    done = run_module(f"benchmarks.{module}", *arguments)
    assert done.returncode == 0, done.stderr
    pairs = [word.partition("=") for word in done.stdout.splitlines()[-1].split()]
    return {name: float(value) for name, _, value in pairs}


def test_overhead(prepared: Path, tmp_path: Path) -> None:
    sizes = ("--global-batch-size", "4", "--steps", "4", "--block-steps", "2")
    table = tmp_path / "results.md"
    found = figures_of("overhead", "--data", str(prepared), *sizes, "--record", str(table))
    assert found["step_s"] > 0
    assert found["low"] <= found["overhead_percent"] <= found["high"]
    assert "| what | by the clock | of a processor |" in table.read_text()


def test_start(tmp_path: Path) -> None:
    found = figures_of("start", "--entries", "2000", "--repeats", "1", "--scratch", str(tmp_path))
    assert 0 < found["views_s_2e+03"] < found["batch_s_2e+03"]
    assert not list(tmp_path.iterdir())


def test_preparation(tmp_path: Path) -> None:
    found = figures_of("preparation", "--quick", "--scratch", str(tmp_path))
    for kind in ("ilsvrc", "folder"):
        assert found[f"{kind}_images_per_s_2"] > 0
        assert 50 < found[f"{kind}_peak_mib"] < 1000
    assert not list(tmp_path.iterdir())


def test_memory(prepared: Path) -> None:
    found = figures_of("memory", "--what", "loop", "--loop-steps", "80", "--data", str(prepared))
    assert found["growth_low_kb"] <= found["growth_kb"] <= found["growth_high_kb"]
    assert found["journal_kb"] > 0


def test_ratios() -> None:
    found = figures_of("ratios", "--only", "sampling")
    assert found.keys() == {"sampling_batch", "sampling_start"}


def test_committed_ratios_are_those_that_are_measured() -> None:
    assert ratios.committed_ratios().keys() == {ratio.name for ratio in ratios.RATIOS}
    assert all(math.isfinite(value) and value > 0 for value in ratios.committed_ratios().values())


@pytest.mark.parametrize("better", ratios.RATIOS, ids=lambda ratio: ratio.name)
def test_only_what_is_beyond_its_margin_is_told(better: ratios.Ratio) -> None:
    worse = 2.0 / better.margin if better.more_is_better else 2.0 * better.margin
    beyond = worse * (0.99 if better.more_is_better else 1.01)
    within = worse * (1.01 if better.more_is_better else 0.99)
    assert "WORSE" in ratios.judged(better, beyond, 2.0)
    assert ratios.judged(better, within, 2.0) == "as committed"
    assert ratios.judged(better, 2.0, None) == "not committed yet"


def test_what_was_not_measured_stays_as_committed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ratios, "COMMITTED", tmp_path / "ratios.json")
    ratios.write({"overhead": 1.01, "start_batch": 1.2})
    ratios.write({"overhead": 1.02})
    assert ratios.committed_ratios() == {"overhead": 1.02, "start_batch": 1.2}
    assert json.loads((tmp_path / "ratios.json").read_text())["machine"]
