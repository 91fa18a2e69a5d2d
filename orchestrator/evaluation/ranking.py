"""Which classes come first for an image, and so what is right: decided here alone.

An image is right in the top k where fewer than k classes come before its own. Of classes with equal scores the lower
label comes first. An image that cannot be decoded is wrong, whatever its scores.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from orchestrator.data.shards import UNLABELLED
from orchestrator.evaluation.scores import Scores, chunks


class Errors(NamedTuple):
    """Of ``num_images`` labelled images: how many are wrong in the top 1 and in the top 5."""

    num_images: int
    wrong_top1: int
    wrong_top5: int

    @property
    def top1_error(self) -> float:
        """Percent."""
        return 100.0 * self.wrong_top1 / self.num_images

    @property
    def top5_error(self) -> float:
        """Percent."""
        return 100.0 * self.wrong_top5 / self.num_images


def ranks(scores: np.ndarray, labels: np.ndarray, decoded: np.ndarray) -> np.ndarray:
    """How many classes come before an image's own: [n] int32, 0: it is right. For a chunk of images: memory is O(n·C).

    scores: [n, C]; labels: [n], of an unlabelled image the rank is 0 and means nothing; decoded: [n] bool, where False
    the rank is C.
    """
    own = np.maximum(labels, 0)[:, None]
    value = np.take_along_axis(scores, own, axis=1)
    before = (scores > value).sum(axis=1, dtype=np.int32)
    ties = scores == value
    ties &= np.arange(scores.shape[1])[None] < own
    before += ties.sum(axis=1, dtype=np.int32)
    before[~decoded] = scores.shape[1]
    before[labels == UNLABELLED] = 0
    return before


def top(scores: np.ndarray, k: int) -> np.ndarray:
    """Labels of the ``k`` highest scores of each row, highest first, of equal ones the lower label: [n, min(k, C)]."""
    c = scores.shape[1]
    if k >= c:
        return np.argsort(-scores, axis=1, kind="stable")
    # Candidates by value: all of those that are at least the k-th, which ties may make more than k.
    bound = np.partition(scores, c - k, axis=1)[:, c - k]
    labels = np.empty((len(scores), k), np.int64)
    for row, (line, least) in enumerate(zip(scores, bound, strict=True)):
        candidates = np.flatnonzero(line >= least)
        labels[row] = candidates[np.argsort(-line[candidates], kind="stable")[:k]]
    return labels


def errors(scores: Scores) -> Errors:
    """Errors over the labelled images. Raises ValueError where none is labelled."""
    labelled = scores.labels != UNLABELLED
    count = int(labelled.sum())
    if not count:
        raise ValueError(f"the score file {scores.url} has no labels: its error cannot be computed")
    wrong1 = wrong5 = 0
    for rows in chunks(len(scores), scores.num_classes):
        rank = ranks(scores.scores[rows], scores.labels[rows], scores.decoded[rows])[labelled[rows]]
        wrong1 += int((rank >= 1).sum())
        wrong5 += int((rank >= min(5, scores.num_classes)).sum())
    return Errors(count, wrong1, wrong5)
