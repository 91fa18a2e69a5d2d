"""95 % bootstrap intervals of errors and of their differences, over images.

An image is wrong or not: to draw N of them with replacement and count the wrong ones is one draw of a binomial, and for
two models on the same images one draw of a multinomial over (only the one is wrong, only the other, neither or both).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

_DRAWS = 10_000
_BOUNDS = (2.5, 97.5)  # percentiles


@dataclass(frozen=True)
class Estimate:
    """A figure in percent, or a difference in points of percent, and the interval that holds it 95 times in 100."""

    value: float
    low: float
    high: float


def error(wrong: np.ndarray, seed: int) -> Estimate:
    """The share of images that are wrong, percent. wrong: [N] bool."""
    n, count = len(wrong), int(wrong.sum())
    drawn = np.random.default_rng(seed).binomial(n, count / n, _DRAWS)
    return _estimate(count, drawn, n)


def difference(wrong: np.ndarray, other: np.ndarray, seed: int) -> Estimate:
    """Error of the one minus error of the other on the same images, points; below 0: the one is better.

    wrong, other: [N] bool. Drawn in pairs: what is hard for both does not widen the interval.
    """
    n, worse, better = len(wrong), int((wrong & ~other).sum()), int((other & ~wrong).sum())
    drawn = np.random.default_rng(seed).multinomial(n, [worse / n, better / n, (n - worse - better) / n], _DRAWS)
    return _estimate(worse - better, drawn[:, 0] - drawn[:, 1], n)


def _estimate(count: int, drawn: np.ndarray, n: int) -> Estimate:
    low, high = np.percentile(drawn, _BOUNDS, method="inverted_cdf")
    return Estimate(100.0 * count / n, 100.0 * float(low) / n, 100.0 * float(high) / n)
