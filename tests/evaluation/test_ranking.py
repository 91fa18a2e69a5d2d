"""What comes first, and what is right."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from orchestrator.evaluation import ranking, scores
from tests.evaluation.score_files import member


def test_errors_by_hand(tmp_path: Path) -> None:
    values = np.array(
        [
            [6, 5, 4, 3, 2, 1, 0],  # label 0: right
            [6, 5, 4, 3, 2, 1, 0],  # label 1: right in the top 5
            [6, 5, 4, 3, 2, 1, 0],  # label 4: the fifth
            [6, 5, 4, 3, 2, 1, 0],  # label 5: wrong
            [1, 1, 0, 0, 0, 0, 0],  # label 0 and 1 are equal: the lower one comes first
            [1, 1, 0, 0, 0, 0, 0],  # label 1: wrong in the top 1
            [0, 0, 0, 0, 0, 0, 0],  # label 5: the sixth of equals
            [9, 0, 0, 0, 0, 0, 0],  # label 0, not decoded: wrong
            [0, 0, 0, 0, 0, 0, 9],  # not labelled: not counted
        ]
    )
    labels = np.array([0, 1, 4, 5, 0, 1, 5, 0, -1])
    member(tmp_path, "a", values, labels, decoded=np.arange(9) != 7)
    found = ranking.errors(scores.load(f"{tmp_path}/a/scores/x.arrow"))
    assert found == (8, 6, 3)
    assert found.top1_error == 75.0
    assert found.top5_error == 37.5


@given(
    arrays(np.int8, (5, 7), elements=st.integers(0, 3)),
    st.integers(1, 9),
    st.lists(st.integers(0, 6), min_size=5, max_size=5),
)
def test_top_and_ranks_agree_with_a_sort(values: np.ndarray, k: int, labels: list[int]) -> None:
    """With many ties."""
    naive = [sorted(range(7), key=lambda c, row=row: (-row[c], c)) for row in values.astype(int).tolist()]
    assert ranking.top(values.astype(np.float32), k).tolist() == [order[:k] for order in naive]
    found = ranking.ranks(values.astype(np.float32), np.array(labels), np.ones(5, bool))
    assert found.tolist() == [order.index(label) for order, label in zip(naive, labels, strict=True)]


def test_few_classes() -> None:
    """With fewer than five all are in the top five, unless the image has no pixels."""
    rank = ranking.ranks(np.array([[1, 2, 3]] * 2, np.float32), np.array([0, 0]), np.array([True, False]))
    assert rank.tolist() == [2, 3]


def test_without_labels_there_is_no_error(tmp_path: Path) -> None:
    member(tmp_path, "a", np.zeros((2, 4)))
    with pytest.raises(ValueError, match="has no labels"):
        ranking.errors(scores.load(f"{tmp_path}/a/scores/x.arrow"))
