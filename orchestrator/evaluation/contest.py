"""How often any average of several score files is right, without looking at all their scores again and again.

In an average of members, a class can come before an image's own only if it comes before, or close to, the own class in
at least one of them: a class that is clearly below in every member is below in every average. Of 1000 classes some tens
are left an image. Only these rivals are kept, in a temporary file, so that hundreds of averages cost little more than
one pass over the score files, and the memory is bounded.

An average is summed in float64 in the order of the members, divided by the sum of the weights, and rounded to float32:
here as in the ensemble's own score file, so that both say the same of every image. A member that could not decode an
image has no part in that image's average.
"""

from __future__ import annotations

import tempfile
import weakref
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from orchestrator.data.shards import UNLABELLED
from orchestrator.evaluation.scores import Scores, chunks

# Far above what rounding an average to float32 can change (2⁻²⁴), far below what differs between classes.
_CLOSE = 2.0**-20
_CHUNK_BYTES = 16 << 20  # of all members' scores at a time


def average(values: Iterable[np.ndarray], weights: Sequence[float], decoded: Sequence[np.ndarray]) -> np.ndarray:
    """Weighted average of M float32 arrays of one shape, [n] or [n, C], as float32.

    weights: [M], at least 0, and not all 0. decoded: M times [n] bool. Of an image that no member with a weight has
    decoded it is the average of what they have: the class prior, in score files.
    """
    used = [each for each in zip(values, weights, decoded, strict=True) if each[1]]
    by_none = ~np.logical_or.reduce([seen for _, _, seen in used])
    total = divisor = None
    for value, weight, seen in used:
        share = np.where(seen | by_none, float(weight), 0.0)
        part = np.multiply(value, share.reshape(-1, *[1] * (value.ndim - 1)), dtype=np.float64)
        total = part if total is None else np.add(total, part, out=total)
        divisor = share if divisor is None else divisor + share
    assert total is not None, weights
    assert divisor is not None
    total /= divisor.reshape(-1, *[1] * (total.ndim - 1))
    return total.astype(np.float32)


@dataclass(frozen=True)
class _Part:
    """Some images. n: images, K: rivals of all of them, M: members.

    rows: [K] int32, the image of each rival, rising. is_lower: [K] bool, its label is lower than the image's own, so
    that a tie is its. rivals: [M, K] float32. own: [M, n] float32. undecoded: [M, n] bool.
    """

    rows: np.ndarray
    is_lower: np.ndarray
    rivals: np.ndarray
    own: np.ndarray
    undecoded: np.ndarray


class Contest:
    """The labelled images of several score files that speak of the same images (``ensemble.check``)."""

    def __init__(self, members: Sequence[Scores]) -> None:
        labels = members[0].labels
        self.labelled = np.flatnonzero(labels != UNLABELLED)
        self.num_members, self.num_classes = len(members), members[0].num_classes
        self._undecoded = np.stack([~each.decoded[self.labelled] for each in members])
        self._file = tempfile.TemporaryFile(prefix="contest-")  # noqa: SIM115 - lives as long as this
        weakref.finalize(self, self._file.close)
        self._parts_of: list[tuple[int, int]] = []  # n and K of each
        for rows in chunks(len(self.labelled), self.num_classes, _CHUNK_BYTES // len(members)):
            images = self.labelled[rows]
            self._write([each.scores[images] for each in members], labels[images])

    def __len__(self) -> int:
        """Number of images."""
        return len(self.labelled)

    def _write(self, scores: list[np.ndarray], labels: np.ndarray) -> None:
        """Find the rivals. scores: M arrays [n, C] float32; labels: [n]."""
        n = len(labels)
        each, own = np.arange(n), np.stack([member[np.arange(n), labels] for member in scores])
        is_rival = np.zeros((n, self.num_classes), bool)
        for member, value in zip(scores, own, strict=True):
            is_rival |= member >= (value - _CLOSE * np.abs(value, dtype=np.float64))[:, None]
        is_rival[each, labels] = False
        rows, classes = np.nonzero(is_rival)
        rivals = np.stack([member[rows, classes] for member in scores])
        for array in (rows.astype(np.int32), own, rivals, classes < labels[rows]):
            self._file.write(array.tobytes())
        self._parts_of.append((n, len(rows)))

    def _parts(self) -> Iterator[tuple[slice, _Part]]:
        m, start = self.num_members, 0
        self._file.seek(0)
        for n, k in self._parts_of:
            rows = np.frombuffer(self._file.read(4 * k), np.int32)
            own = np.frombuffer(self._file.read(4 * m * n), np.float32).reshape(m, n)
            rivals = np.frombuffer(self._file.read(4 * m * k), np.float32).reshape(m, k)
            is_lower = np.frombuffer(self._file.read(k), np.bool_)
            yield slice(start, start + n), _Part(rows, is_lower, rivals, own, self._undecoded[:, start : start + n])
            start += n

    def _ranks(self, part: _Part, own: np.ndarray, rivals: np.ndarray, members: Sequence[int]) -> np.ndarray:
        """[n] int64, from the averages of the own classes [n] and the rivals [K]."""
        against = own[part.rows]
        comes_before = (rivals > against) | ((rivals == against) & part.is_lower)
        ranks = np.bincount(part.rows[comes_before], minlength=len(own))
        ranks[part.undecoded[list(members)].all(axis=0)] = self.num_classes
        return ranks

    def ranks(self, weights: Sequence[float]) -> np.ndarray:
        """How many classes come before each image's own in the average with these weights: [N] int32.

        As ``ranking.ranks`` of the averaged scores; C where no member with a weight has decoded the image.
        """
        ranks = np.empty(len(self), np.int32)
        members = [m for m, weight in enumerate(weights) if weight]
        for images, part in self._parts():
            decoded = ~part.undecoded
            own = average(part.own, weights, list(decoded))
            rivals = average(part.rivals, weights, list(decoded[:, part.rows]))
            ranks[images] = self._ranks(part, own, rivals, members)
        return ranks

    def wrong(self, ranks: np.ndarray) -> tuple[int, int]:
        """Images that are wrong in the top 1 and in the top 5. ranks: [any number] int."""
        return int((ranks >= 1).sum()), int((ranks >= min(5, self.num_classes)).sum())

    def subsets(self, largest: int) -> dict[tuple[int, ...], tuple[int, int]]:
        """``wrong`` of the plain average of every subset of up to ``largest`` members, by their numbers, rising.

        A subset's sums are those of its first members plus the last one's.
        """
        counts: dict[tuple[int, ...], tuple[int, int]] = {}

        def visit(part: _Part, members: tuple[int, ...], own: np.ndarray, rivals: np.ndarray, seen: np.ndarray) -> None:
            """seen: [n], how many of ``members`` have decoded each image."""
            for m in range(members[-1] + 1 if members else 0, self.num_members):
                subset, decoded = (*members, m), ~part.undecoded[m]
                own_sum, rival_sum = own + part.own[m] * decoded, rivals + part.rivals[m] * decoded[part.rows]
                count = seen + decoded
                divisor = np.maximum(count, 1)
                of = [(own_sum / divisor).astype(np.float32), (rival_sum / divisor[part.rows]).astype(np.float32)]
                top1, top5 = self.wrong(self._ranks(part, of[0], of[1], subset))
                before = counts.get(subset, (0, 0))
                counts[subset] = before[0] + top1, before[1] + top5
                if len(subset) < largest:
                    visit(part, subset, own_sum, rival_sum, count)

        for _, part in self._parts():
            n, k = part.own.shape[1], part.rivals.shape[1]
            visit(part, (), np.zeros(n), np.zeros(k), np.zeros(n, np.int64))
        return dict(sorted(counts.items(), key=lambda item: (len(item[0]), item[0])))
