"""Averages of score files, counted by rivals, are those of a naive computation."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from orchestrator.evaluation import ranking, scores
from orchestrator.evaluation.contest import Contest, average
from orchestrator.evaluation.scores import Scores
from tests.evaluation.score_files import columns, info_of, member, softmax


def in_memory(values: np.ndarray, labels: np.ndarray, decoded: np.ndarray | None = None) -> Scores:
    known = columns(values, labels)
    known["names"] = pa.array(known["names"])
    if decoded is not None:
        known["decoded"] = decoded
    return Scores(url="memory", sha256="0" * 64, info=info_of(values.shape[1]), **known)


def naive(members: list[Scores], weights: list[float]) -> np.ndarray:
    """Ranks of all images, from all the scores."""
    mean, decoded = np.zeros(members[0].scores.shape, np.float32), np.zeros(len(members[0]), bool)
    for i in range(len(mean)):
        sees = [(m, w) for m, w in zip(members, weights, strict=True) if w and m.decoded[i]]
        if sees:
            decoded[i] = True
            mean[i] = sum(w * m.scores[i].astype(np.float64) for m, w in sees) / sum(w for _, w in sees)
    return ranking.ranks(mean, members[0].labels, decoded)


@settings(max_examples=60, deadline=None)
@given(
    arrays(np.float32, (3, 7, 6), elements=st.sampled_from([0.0, 1e-30, 1e-7, 0.1, 0.25, 0.2500001, 0.5, 1.0, -0.5])),
    arrays(np.int32, 7, elements=st.integers(0, 5)),
    arrays(np.bool_, (3, 7)),
    st.lists(st.sampled_from([0.0, 0.3, 1.0, 2.0]), min_size=3, max_size=3).filter(any),
)
def test_averages_equal_a_naive_computation(
    values: np.ndarray, labels: np.ndarray, decoded: np.ndarray, weights: list[float]
) -> None:
    """With ties, near ties, numbers of very different size and images that a member has not decoded."""
    members = [in_memory(values[m], labels, decoded[m]) for m in range(3)]
    contest = Contest(members)
    assert contest.ranks(weights).tolist() == naive(members, weights).tolist()
    for subset, wrong in contest.subsets(3).items():
        ranks = naive(members, [float(m in subset) for m in range(3)])
        assert wrong == ((ranks >= 1).sum(), (ranks >= 5).sum()), subset


def test_over_several_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some images without a label; few of the classes are looked at."""
    rng = np.random.default_rng(0)
    n, c = 500, 200
    labels = rng.integers(-1, c, n)
    for m in range(4):
        logits = rng.normal(size=(n, c)) * 2 + 6 * (np.arange(c) == labels[:, None])
        member(tmp_path, f"m{m}", softmax(logits), labels)
    members = [scores.load(f"{tmp_path}/m{m}/scores/x.arrow") for m in range(4)]
    whole = Contest(members)
    monkeypatch.setattr("orchestrator.evaluation.contest._CHUNK_BYTES", 64 << 10)
    parts = Contest(members)
    assert len(parts._parts_of) > 10 > len(whole._parts_of)
    assert sum(k for _, k in parts._parts_of) < 0.2 * n * c
    labelled = labels >= 0
    assert len(parts) == labelled.sum()
    for weights in ([1.0, 1.0, 1.0, 1.0], [1.0, 0.0, 2.0, 0.5]):
        assert parts.ranks(weights).tolist() == whole.ranks(weights).tolist()
        assert parts.ranks(weights).tolist() == naive(members, weights)[labelled].tolist()
    subsets = parts.subsets(3)
    assert list(subsets) == [s for size in (1, 2, 3) for s in itertools.combinations(range(4), size)]
    for subset, wrong in subsets.items():
        ranks = naive(members, [float(m in subset) for m in range(4)])[labelled]
        assert wrong == ((ranks >= 1).sum(), (ranks >= 5).sum())


@given(arrays(np.float32, (4, 5), elements=st.floats(0, 1, width=32)), st.integers(1, 6))
def test_the_average_of_equals_is_one_of_them(values: np.ndarray, times: int) -> None:
    seen = [np.ones(4, bool)] * times
    assert np.array_equal(average([values] * times, [1.0] * times, seen), values)
