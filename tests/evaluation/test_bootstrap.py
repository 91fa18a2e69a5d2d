"""Intervals over images."""

from __future__ import annotations

import numpy as np
import pytest

from orchestrator.evaluation.bootstrap import difference, error


def by_drawing_images(values: np.ndarray, draws: int = 4000) -> tuple[float, float]:
    """The bootstrap as it is defined: whole images, with replacement."""
    rng = np.random.default_rng(99)
    means = [100 * values[rng.integers(0, len(values), len(values))].mean() for _ in range(draws)]
    low, high = np.percentile(means, [2.5, 97.5])
    return low, high


def test_the_interval_of_an_error() -> None:
    wrong = np.arange(400) < 100
    found = error(wrong, seed=0)
    low, high = by_drawing_images(wrong)
    assert found.value == 25.0
    assert found.low == pytest.approx(low, abs=0.5)
    assert found.high == pytest.approx(high, abs=0.5)
    assert found == error(wrong, seed=0) != error(wrong, seed=1)
    assert error(np.zeros(5, bool), seed=0) == error(np.zeros(5, bool), seed=1)


def test_the_interval_of_a_difference_is_paired() -> None:
    rng = np.random.default_rng(0)
    wrong = rng.random(500) < 0.4
    other = wrong ^ (rng.random(500) < 0.05)
    found = difference(wrong, other, seed=0)
    values = wrong.astype(float) - other
    low, high = by_drawing_images(values)
    assert found.value == pytest.approx(100 * values.mean())
    assert found.low == pytest.approx(low, abs=0.4)
    assert found.high == pytest.approx(high, abs=0.4)
    unpaired = error(wrong, seed=0)
    assert found.high - found.low < 0.6 * (unpaired.high - unpaired.low)
    assert difference(other, wrong, seed=0).value == -found.value
