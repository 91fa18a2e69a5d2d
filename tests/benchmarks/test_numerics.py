"""The gate of fast modes lets what computes the same pass, and stops what does not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import modes, numerics
from benchmarks.modes import Mode, Way
from benchmarks.numerics import check, judge
from orchestrator.config import Precision, TrainConfig
from orchestrator.data.shards import DataSet
from orchestrator.models import group_images
from orchestrator.storage import Storage
from orchestrator.training.step import ClassificationStep
from orchestrator.world import World
from tests.training.group import small_config

EAGER = Mode(Way.EAGER, Precision.FP32)


@pytest.fixture
def config(prepared: Path, tmp_path: Path) -> TrainConfig:
    return replace(small_config(prepared, tmp_path, "r"), data=str(prepared))


def verdict(config: TrainConfig, mode: Mode = EAGER) -> numerics.Verdict:
    verdicts, noise, reference = check(config, [mode], DataSet(Storage(config.data)), World(), 3, 0.003, 1)
    assert len(reference) == 3
    assert 0 < noise < 0.01
    return verdicts[0]


def test_groups_at_once_pass(config: TrainConfig) -> None:
    assert verdict(config).passes


def test_statistics_over_the_whole_batch_do_not(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    def step_of(config: TrainConfig, mode: Mode, *rest: object) -> ClassificationStep:
        step = modes.step_of(config, mode, *rest)  # type: ignore[arg-type]
        if mode == EAGER:
            group_images(step.model, 0)
        return step

    monkeypatch.setattr(numerics, "step_of", step_of)
    assert not verdict(config).passes


@pytest.mark.parametrize(
    ("losses", "passes"),
    [([2.0, 1.0], True), ([2.004, 1.0], False), ([2.0, 1.03], False), ([2.0, torch.nan], False)],
)
def test_a_verdict_is_of_the_first_loss_and_of_the_curve(losses: list[float], passes: bool) -> None:
    assert judge("m", losses, [2.0, 1.0], 0.0, is_short=False).passes == passes
    assert judge("m", losses, [2.0, 1.0], 1.0, is_short=True).passes == (losses[1] == losses[1])
