"""Benchmarks in their smallest forms, through the command line: they run, and their last line can be read.

How long anything takes is not looked at: machines differ, and are busy.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from benchmarks import memory, preparation, ratios
from tests.conftest import run_module


def last_line(output: str) -> dict[str, float]:
    pairs = [word.partition("=") for word in output.splitlines()[-1].split()]
    return {name: float(value) for name, _, value in pairs}


def figures_of(module: str, *arguments: str) -> dict[str, float]:
    done = run_module(f"benchmarks.{module}", *arguments)
    assert done.returncode == 0, done.stderr
    return last_line(done.stdout)


@pytest.fixture
def figures_here(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Callable[..., dict[str, float]]:
    """The same in this process, which has imported torch already."""

    def call(main: Callable[[], int], *arguments: str) -> dict[str, float]:
        monkeypatch.setattr(sys, "argv", ["benchmark", *arguments])
        assert main() == 0
        return last_line(capsys.readouterr().out)

    return call


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


def test_preparation(tmp_path: Path, figures_here: Callable[..., dict[str, float]]) -> None:
    found = figures_here(preparation.main, "--quick", "--scratch", str(tmp_path))
    for kind in ("ilsvrc", "folder"):
        assert found[f"{kind}_images_per_s_2"] > 0
        assert 50 < found[f"{kind}_peak_mib"] < 1000
    assert not list(tmp_path.iterdir())


def test_memory(prepared: Path) -> None:
    found = figures_of("memory", "--what", "loop", "--loop-steps", "40", "--data", str(prepared))
    assert found["growth_low_kb"] <= found["growth_kb"] <= found["growth_high_kb"]
    assert found["journal_kb"] > 0


def test_growth_is_found_with_its_interval() -> None:
    steps = np.arange(0, 3000, 10)
    noise = np.random.default_rng(0).normal(0, 1, len(steps))
    for kb in (0.0, 2000.0):
        found = memory.growth_of(np.stack([steps, 300 + kb / 1e6 * steps + noise], 1), 0.0)
        assert found.low_kb < kb < found.high_kb
        assert found.high_kb - found.low_kb < 1500


def test_ratios(figures_here: Callable[..., dict[str, float]]) -> None:
    found = figures_here(ratios.main, "--only", "sampling")
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
