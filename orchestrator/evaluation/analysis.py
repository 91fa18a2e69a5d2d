"""What an ensemble is worth on one split: errors of members, subsets and a greedy choice; classes; agreement."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from orchestrator.data.shards import UNLABELLED
from orchestrator.evaluation import bootstrap
from orchestrator.evaluation.bootstrap import Estimate
from orchestrator.evaluation.contest import Contest
from orchestrator.evaluation.ranking import Errors
from orchestrator.evaluation.scores import Scores
from orchestrator.evaluation.selection import GreedyChoice

LARGEST_SUBSET = 6  # members
_MAX_SUBSETS = 1000  # all of up to ten members
_MAX_CONFUSED = 20


@dataclass(frozen=True)
class Tested:
    """Two errors, percent; or their differences, points of percent."""

    top1: Estimate
    top5: Estimate


@dataclass(frozen=True)
class MemberAnalysis:
    """gain: error of the plain average of all members minus the member's own: below 0, the average is better.

    without: error of the ensemble without this member minus the ensemble's: above 0, the member helps; None for a
    member that is no part of it, or is alone.
    """

    name: str
    weight: float
    alone: Tested
    gain: Tested
    without: Tested | None


@dataclass(frozen=True)
class Subset:
    """The plain average of some members. Percent."""

    members: tuple[str, ...]
    top1_error: float
    top5_error: float


@dataclass(frozen=True)
class GreedyAnalysis:
    """seen: errors on the images that the choice was made on, percent: too good to be true. held_out: on each fold with
    the weights chosen on the others. against_plain: held_out minus the plain average of all members.
    """

    weights: Mapping[str, int]
    fold_weights: tuple[tuple[int, ...], ...]
    seen: Subset
    held_out: Tested
    against_plain: Tested


@dataclass(frozen=True)
class ClassAnalysis:
    """Of the ensemble on the images of one class. Percent; None without images."""

    label: int
    wnid: str
    words: str
    num_images: int
    top1_error: float | None
    top5_error: float | None


@dataclass(frozen=True)
class Confused:
    """How many images of one class the ensemble puts first into another. Labels and words."""

    label: int
    words: str
    taken_for: int
    taken_for_words: str
    num_images: int


@dataclass(frozen=True)
class Agreement:
    """Two members. same_top1: both put the same class first; both_wrong: in the top 1, where labelled. Percent;
    None without such images.
    """

    first: str
    second: str
    same_top1: float | None
    both_wrong: float | None


@dataclass(frozen=True)
class LabelledAnalysis:
    """Where the truth is known. subsets: of up to ``largest_subset`` members, all of them."""

    errors: Errors
    ensemble: Tested
    plain: Tested
    members: tuple[MemberAnalysis, ...]
    largest_subset: int
    subsets: tuple[Subset, ...]
    greedy: GreedyAnalysis | None
    classes: tuple[ClassAnalysis, ...]
    confused: tuple[Confused, ...]


@dataclass(frozen=True)
class SplitAnalysis:
    """num_undecodable: images that count as wrong because no member with a weight could decode them."""

    num_images: int
    num_labelled: int
    num_undecodable: int
    agreement: tuple[Agreement, ...]
    labelled: LabelledAnalysis | None


def analyse(
    files: Sequence[Scores],
    names: Sequence[str],
    weights: Sequence[float],
    tops: np.ndarray,
    *,
    contest: Contest | None,
    greedy: GreedyChoice | None,
    seed: int,
) -> SplitAnalysis:
    """Of M members on one split. weights: of the ensemble, [M]. tops: [M + 1, N], the class that each member, and the
    ensemble, puts first. ``contest``: over the same files, None where nothing is labelled. ``seed`` draws intervals.
    """
    labels = files[0].labels
    wrong = (tops[:-1] != labels) | np.stack([~file.decoded for file in files])
    truth = labels != UNLABELLED
    return SplitAnalysis(
        num_images=len(labels),
        num_labelled=int(truth.sum()),
        num_undecodable=int((~decoded_by_any(files, weights)).sum()),
        agreement=_agreement(names, tops[:-1], wrong[:, truth]),
        labelled=None if contest is None else _labelled(files[0], names, weights, tops[-1], contest, greedy, seed),
    )


def decoded_by_any(files: Sequence[Scores], weights: Sequence[float]) -> np.ndarray:
    """[N] bool: what at least one of the files with a weight has decoded."""
    found: np.ndarray = np.logical_or.reduce([f.decoded for f, w in zip(files, weights, strict=True) if w])
    return found


def _agreement(names: Sequence[str], tops: np.ndarray, wrong: np.ndarray) -> tuple[Agreement, ...]:
    pairs = [(a, b) for a in range(len(names)) for b in range(a + 1, len(names))]
    return tuple(
        Agreement(
            names[a],
            names[b],
            100.0 * float((tops[a] == tops[b]).mean()) if tops.shape[1] else None,
            100.0 * float((wrong[a] & wrong[b]).mean()) if wrong.shape[1] else None,
        )
        for a, b in pairs
    )


@dataclass(frozen=True)
class _Wrong:
    """[N] bool each."""

    top1: np.ndarray
    top5: np.ndarray

    def tested(self, seed: int) -> Tested:
        return Tested(bootstrap.error(self.top1, seed), bootstrap.error(self.top5, seed))

    def minus(self, other: _Wrong, seed: int) -> Tested:
        pairs = (self.top1, other.top1), (self.top5, other.top5)
        return Tested(*(bootstrap.difference(one, another, seed) for one, another in pairs))


def _labelled(
    file: Scores,
    names: Sequence[str],
    weights: Sequence[float],
    tops: np.ndarray,
    contest: Contest,
    greedy: GreedyChoice | None,
    seed: int,
) -> LabelledAnalysis:
    m, n = len(names), len(contest)

    def of(ranks: np.ndarray) -> _Wrong:
        return _Wrong(ranks >= 1, ranks >= min(5, contest.num_classes))

    ranks = contest.ranks(weights)
    ensemble, plain = of(ranks), of(contest.ranks([1.0] * m))
    members = []
    for i, name in enumerate(names):
        alone = of(contest.ranks([float(j == i) for j in range(m)]))
        others = [0.0 if j == i else weight for j, weight in enumerate(weights)]
        without = of(contest.ranks(others)).minus(ensemble, seed) if weights[i] and any(others) else None
        members.append(MemberAnalysis(name, weights[i], alone.tested(seed), plain.minus(alone, seed), without))

    def subset(chosen: Sequence[str], wrong: tuple[int, int]) -> Subset:
        return Subset(tuple(chosen), 100.0 * wrong[0] / n, 100.0 * wrong[1] / n)

    largest = max(k for k in range(1, min(m, LARGEST_SUBSET) + 1) if _num_subsets(m, k) <= _MAX_SUBSETS or k == 1)
    subsets = tuple(subset([names[i] for i in each], wrong) for each, wrong in contest.subsets(largest).items())
    chosen = None
    if greedy is not None:
        held_out = of(greedy.ranks)
        of_greedy = dict(zip(names, greedy.weights, strict=True))
        seen = subset([name for name in names if of_greedy[name]], contest.wrong(contest.ranks(greedy.weights)))
        against = held_out.minus(plain, seed)
        chosen = GreedyAnalysis(of_greedy, greedy.fold_weights, seen, held_out.tested(seed), against)
    labels, taken_for = file.labels[contest.labelled], tops[contest.labelled]
    return LabelledAnalysis(
        errors=Errors(n, *contest.wrong(ranks)),
        ensemble=ensemble.tested(seed),
        plain=plain.tested(seed),
        members=tuple(members),
        largest_subset=largest,
        subsets=subsets,
        greedy=chosen,
        classes=_by_class(file, labels, ensemble),
        confused=_confused(file, labels, taken_for, ranks, contest.num_classes),
    )


def _num_subsets(members: int, largest: int) -> int:
    return sum(math.comb(members, k) for k in range(1, largest + 1))


def _by_class(file: Scores, labels: np.ndarray, wrong: _Wrong) -> tuple[ClassAnalysis, ...]:
    c = file.num_classes
    images, top1, top5 = (np.bincount(labels[which], minlength=c) for which in (slice(None), wrong.top1, wrong.top5))
    return tuple(
        ClassAnalysis(
            each.label,
            each.wnid,
            each.words,
            int(k),
            100.0 * float(top1[i]) / int(k) if k else None,
            100.0 * float(top5[i]) / int(k) if k else None,
        )
        for i, (each, k) in enumerate(zip(file.info.classes, images, strict=True))
    )


def _confused(
    file: Scores, labels: np.ndarray, taken_for: np.ndarray, ranks: np.ndarray, num_classes: int
) -> tuple[Confused, ...]:
    """The pairs of most images; of equal ones the lower labels first. Images without pixels are no confusion."""
    mistaken = (ranks >= 1) & (ranks < num_classes)
    pairs, counts = np.unique(labels[mistaken].astype(np.int64) * num_classes + taken_for[mistaken], return_counts=True)
    order = np.argsort(-counts, kind="stable")[:_MAX_CONFUSED]
    words = [each.words or each.wnid for each in file.info.classes]
    found = [(*divmod(int(pairs[i]), num_classes), int(counts[i])) for i in order]
    return tuple(Confused(label, words[label], other, words[other], count) for label, other, count in found)
