"""The greedy choice, and that it does not fool itself."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.evaluation.contest import Contest
from orchestrator.evaluation.selection import choose, folds, greedy
from tests.evaluation.score_files import softmax
from tests.evaluation.test_contest import in_memory


def test_greedy_by_hand() -> None:
    """Two members that are worth something together only at 2 : 1; the third is the best alone."""
    losses = {(1, 0, 0): 10, (0, 1, 0): 9, (0, 0, 1): 8, (0, 1, 1): 7, (0, 1, 2): 5, (1, 1, 2): 5, (0, 2, 1): 6}
    asked = []

    def loss(counts: tuple[int, ...]) -> tuple[int, ...]:
        asked.append(counts)
        return (losses.get(counts, 20),)

    assert greedy(loss, 3) == (0, 1, 2)
    assert all(np.gcd.reduce(counts) == 1 for counts in asked)
    assert greedy(lambda counts: (1,), 3) == (1, 0, 0)  # ties: the first, alone


def random_contest(seed: int, num_members: int = 3, n: int = 60, c: int = 8) -> Contest:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, c, n)
    hints = rng.uniform(0, 2.5, num_members)
    logits = [rng.normal(size=(n, c)) + hint * (np.arange(c) == labels[:, None]) for hint in hints]
    return Contest([in_memory(softmax(each), labels) for each in logits])


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10_000))
def test_never_worse_than_the_best_member_where_it_was_chosen(seed: int) -> None:
    contest = random_contest(seed)
    chosen = choose(contest, num_folds=4, seed=seed)
    of = folds(len(contest), 4, seed)
    alone = [contest.ranks([float(m == i) for i in range(3)]) for m in range(3)]
    for fold, weights in [*enumerate(chosen.fold_weights), (-1, chosen.weights)]:
        seen = of != fold
        top1, top5 = contest.wrong(contest.ranks(weights)[seen])
        assert (top5, top1) <= min(contest.wrong(ranks[seen])[::-1] for ranks in alone)


def test_what_is_held_out_has_no_part_in_the_choice() -> None:
    """A fold whose truth is changed changes its own figure, not the weights that it is measured with."""
    rng = np.random.default_rng(1)
    values = [softmax(rng.normal(size=(40, 8))) for _ in range(3)]
    labels = rng.integers(0, 8, 40)
    of = folds(40, 4, seed=5)
    other = np.where(of == 2, (labels + 3) % 8, labels)
    one, two = (
        choose(Contest([in_memory(v, truth) for v in values]), num_folds=4, seed=5) for truth in (labels, other)
    )
    assert one.fold_weights[2] == two.fold_weights[2]
    assert not np.array_equal(one.ranks[of == 2], two.ranks[of == 2])


def test_random_members_do_not_look_better_than_chance() -> None:
    """Where no member knows anything the choice looks better than chance on all images, not on those held out."""
    seen, held_out, n, c = 0, 0, 100, 10
    for seed in range(8):
        rng = np.random.default_rng(seed)
        labels = rng.integers(0, c, n)
        contest = Contest([in_memory(softmax(rng.normal(size=(n, c))), labels) for _ in range(4)])
        chosen = choose(contest, num_folds=5, seed=seed)
        seen += contest.wrong(contest.ranks(chosen.weights))[1]
        held_out += contest.wrong(chosen.ranks)[1]
    spread = 3 * np.sqrt(8 * n * 0.25)  # of the number of images that chance gets wrong
    assert seen < 8 * n * 0.5 - spread
    assert abs(held_out - 8 * n * 0.5) < spread


def test_folds_are_equal_and_drawn() -> None:
    of = folds(103, 5, seed=3)
    assert sorted(np.bincount(of).tolist()) == [20, 20, 21, 21, 21]
    assert not np.array_equal(of, folds(103, 5, seed=4))
    assert np.array_equal(of, folds(103, 5, seed=3))


@pytest.mark.parametrize("num_folds", [1, 61])
def test_folds_that_cannot_be(num_folds: int) -> None:
    with pytest.raises(ValueError, match=f"60 labelled images cannot be dealt out to {num_folds} folds"):
        choose(random_contest(0), num_folds=num_folds, seed=0)


def test_it_finds_the_best_of_few() -> None:
    """Against all weights up to 3, on images whose truth three members share out among them."""
    contest = random_contest(11, n=200)
    chosen = choose(contest, num_folds=2, seed=0).weights
    all_weights = [w for w in itertools.product(range(4), repeat=3) if any(w)]
    losses = sorted(contest.wrong(contest.ranks(w))[::-1] for w in all_weights)
    assert contest.wrong(contest.ranks(chosen))[::-1] <= losses[len(losses) // 10]
