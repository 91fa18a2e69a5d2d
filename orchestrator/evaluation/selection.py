"""Greedy choice of members with replacement (Caruana et al. 2004), and what it is worth on images it has not seen.

It starts with the best single member and adds, again and again, the member with which the average is best; how often
one was added is its weight. The best ensemble on the way is taken. On the images of the choice it is never worse than
the best member, and looks better than it is: it is measured on images that had no part in it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from orchestrator.evaluation.contest import Contest

_ROUNDS_PER_MEMBER = 4

# Times each member was added → (wrong in the top 5, wrong in the top 1), or whatever is to be least.
Loss = Callable[[tuple[int, ...]], tuple[int, ...]]


@dataclass(frozen=True)
class GreedyChoice:
    """weights: how often each member was added, on all images. fold_weights: the same without the images of one fold.

    ranks: [N] int32, of each image in the average that was chosen without its fold (``ranking.ranks``).
    """

    weights: tuple[int, ...]
    fold_weights: tuple[tuple[int, ...], ...]
    ranks: np.ndarray


def greedy(loss: Loss, num_members: int) -> tuple[int, ...]:
    """Times that each member is added, without a common factor. Ties go to the member that comes first."""
    counts = (0,) * num_members
    best: tuple[tuple[int, ...], tuple[int, ...]] | None = None
    for _ in range(_ROUNDS_PER_MEMBER * num_members):
        added = [tuple(n + (m == i) for i, n in enumerate(counts)) for m in range(num_members)]
        counts = min(added, key=lambda each: loss(_reduced(each)))
        if best is None or loss(_reduced(counts)) < best[0]:
            best = loss(_reduced(counts)), _reduced(counts)
    assert best is not None
    return best[1]


def _reduced(counts: tuple[int, ...]) -> tuple[int, ...]:
    """2, 4, 0 and 1, 2, 0 are one average."""
    divisor = math.gcd(*counts)
    return tuple(n // divisor for n in counts)


def folds(num_images: int, num_folds: int, seed: int) -> np.ndarray:
    """Fold of each image: [N] int64, of equal sizes up to one, drawn by ``seed``."""
    of = np.empty(num_images, np.int64)
    of[np.random.default_rng(seed).permutation(num_images)] = np.arange(num_images) % num_folds
    return of


def choose(contest: Contest, *, num_folds: int, seed: int) -> GreedyChoice:
    """The greedy choice by top-5 error, then by top-1 error: on all images, and for each fold on the others.

    Raises ValueError where there are fewer images than folds.
    """
    if not 2 <= num_folds <= len(contest):
        raise ValueError(
            f"{len(contest)} labelled images cannot be dealt out to {num_folds} folds: give 2 to {len(contest)}"
        )
    of = folds(len(contest), num_folds, seed)
    known: dict[tuple[int, ...], np.ndarray] = {}

    def wrong(counts: tuple[int, ...]) -> np.ndarray:
        """[folds, 2] int64, in the top 5 and in the top 1. Most folds ask for the same averages."""
        if counts not in known:
            ranks = contest.ranks(counts)
            known[counts] = np.array([contest.wrong(ranks[of == fold])[::-1] for fold in range(num_folds)])
        return known[counts]

    def loss_without(fold: int | None) -> Loss:
        seen = [each for each in range(num_folds) if each != fold]
        return lambda counts: tuple(wrong(counts)[seen].sum(axis=0).tolist())

    fold_weights = tuple(greedy(loss_without(fold), contest.num_members) for fold in range(num_folds))
    ranks = np.empty(len(contest), np.int32)
    for fold, weights in enumerate(fold_weights):
        ranks[of == fold] = contest.ranks(weights)[of == fold]
    return GreedyChoice(greedy(loss_without(None), contest.num_members), fold_weights, ranks)
