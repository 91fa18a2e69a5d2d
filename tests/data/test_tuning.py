"""The search for the fastest input side, on tables of seconds, and its clock on a real one."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.data.decoder import DecodeSettings
from orchestrator.data.pipeline import Batch, TrainInput
from orchestrator.data.shards import DataSet
from orchestrator.data.tuning import LEAST_GAIN, Trials, Tuned, tune
from orchestrator.world import World
from tests.data.test_pipeline import NO_COLOUR, train_input

START = DecodeSettings(num_threads=8)
CANDIDATES = {"hw_decoder_share": (0.0, 0.5, 0.65, 1.0), "num_threads": (2, 4, 8), "prefetch_batches": (2, 3, 4)}
FACTORS = st.fixed_dictionaries(
    {name: st.tuples(*[st.floats(0.1, 10) for _ in values]) for name, values in CANDIDATES.items()}
)


class Table:
    """Seconds as a product of a factor for each field's value; knows what was asked."""

    def __init__(self, factors: dict[str, tuple[float, ...]]) -> None:
        self.factors, self.asked = factors, list[DecodeSettings]()

    def __call__(self, settings: DecodeSettings) -> float:
        self.asked.append(settings)
        return float(np.prod([self._factor(name, getattr(settings, name)) for name in CANDIDATES]))

    def _factor(self, name: str, value: float) -> float:
        return self.factors[name][CANDIDATES[name].index(value)]


def chosen(tuned: Tuned) -> tuple[float, int, int]:
    s = tuned.settings
    return s.hw_decoder_share, s.num_threads, s.prefetch_batches


def test_it_finds_the_best_of_a_table() -> None:
    table = Table({"hw_decoder_share": (4, 2, 3, 5), "num_threads": (3, 1, 2), "prefetch_batches": (9, 7, 6)})
    tuned = tune(START, CANDIDATES, table)
    assert chosen(tuned) == (0.5, 4, 4)
    assert tuned.settings == replace(START, hw_decoder_share=0.5, num_threads=4, prefetch_batches=4)  # and no more
    assert tuned.seconds["hw_decoder_share"] == [(0.65, 54), (0.0, 72), (0.5, 36), (1.0, 90)]
    assert tuned.seconds["num_threads"] == [(8, 36), (2, 54), (4, 18)]
    told = tuned.to_json(global_batch_size=360)
    assert told["settings"] == {"hw_decoder_share": 0.5, "num_threads": 4, "prefetch_batches": 4}
    assert told["images_per_s"]["prefetch_batches"] == [[2, 20], [3, 25.71], [4, 30]]


@given(FACTORS)
def test_no_other_value_of_a_field_is_faster_by_more_than_the_margin(factors: dict[str, tuple[float, ...]]) -> None:
    table = Table(factors)
    tuned = tune(START, CANDIDATES, table)
    for name, values in CANDIDATES.items():
        took = dict(zip(values, factors[name], strict=True))
        assert took[getattr(tuned.settings, name)] * (1 - LEAST_GAIN) <= min(took.values()) * (1 + 1e-9)
        assert took[getattr(tuned.settings, name)] <= took[getattr(START, name)]
    assert len(set(table.asked)) == 1 + 3 + 2 + 2
    assert len(table.asked) <= 1 + 3 + 2 + 2 + 2 * 3  # of each field the winner and what it replaces once more


@given(st.lists(st.floats(0.96, 1.04), min_size=7, max_size=7))
def test_noise_within_the_margin_chooses_nothing(noise: list[float]) -> None:
    seconds = iter([1.0, *noise])
    assert tune(START, CANDIDATES, lambda settings: next(seconds)).settings == START


def test_what_is_faster_by_less_than_the_margin_is_not_taken() -> None:
    for gain, taken in ((0.04, 2), (0.06, 3)):
        seconds = {2: 1.0, 3: 1.0 - gain}
        tuned = tune(START, {"prefetch_batches": (2, 3)}, lambda s, of=seconds: of[s.prefetch_batches])  # type: ignore[misc]
        assert tuned.settings.prefetch_batches == taken


def test_what_is_not_open_is_left_alone() -> None:
    table = Table({"hw_decoder_share": (1, 2, 9, 1), "num_threads": (1, 2, 9), "prefetch_batches": (9, 2, 1)})
    tuned = tune(START, {"prefetch_batches": CANDIDATES["prefetch_batches"]}, table)
    assert chosen(tuned) == (0.65, 8, 4)
    assert {(s.hw_decoder_share, s.num_threads) for s in table.asked} == {(0.65, 8)}
    assert list(tuned.to_json(1)["settings"]) == ["prefetch_batches"]


@pytest.mark.parametrize(
    ("trials", "expected"),
    [(0, START), (1, START), (3, START), (5, START), (6, replace(START, hw_decoder_share=0.0))],
)
def test_when_time_is_up_what_is_settled_is_taken(trials: int, expected: DecodeSettings) -> None:
    seconds = iter([5.0, 4.0, 4.5, 4.9, 4.0, 5.0][:trials])  # the last two settle the share
    tuned = tune(START, CANDIDATES, lambda settings: next(seconds, None))
    assert tuned.settings == expected


def test_a_winner_that_does_not_win_again_is_not_taken() -> None:
    for again, taken in ((4.0, 0.0), (4.9, 0.65)):
        seconds = iter([5.0, 4.0, 4.5, 4.9, again, 5.0])
        tuned = tune(START, {"hw_decoder_share": CANDIDATES["hw_decoder_share"]}, lambda settings, of=seconds: next(of))  # type: ignore[misc]
        assert tuned.settings.hw_decoder_share == taken


def test_noise_beyond_the_margin_seldom_chooses() -> None:
    """Of numbers that scatter by 5 % around the same the least is often below the margin, and seldom twice."""
    rng, share = np.random.default_rng(0), {"hw_decoder_share": (0.0, 0.35, 0.5, 0.65, 0.8, 1.0)}
    moved = [tune(START, share, lambda s: float(rng.normal(1, 0.05))).settings != START for _ in range(500)]
    assert np.mean(moved) < 0.2


class Slow(TrainInput):
    """Waits before each batch, as long as the number of threads says: in place of what decoding costs."""

    def __next__(self) -> Batch:
        time.sleep(0.08 / self.settings.num_threads)
        return super().__next__()


def opened(data: DataSet, inputs: list[TrainInput]) -> Callable[[DecodeSettings], TrainInput]:
    def open_input(settings: DecodeSettings) -> TrainInput:
        source = train_input(data.split("train"), NO_COLOUR, 2, settings=settings)
        source.__class__ = Slow
        inputs.append(source)
        return source

    return open_input


def test_the_clock_sees_what_is_slow_and_leaves_nothing_open(data: DataSet) -> None:
    inputs, alive = list[TrainInput](), list[int]()
    trials = Trials(opened(data, inputs), World(), lambda: alive.append(1))
    slow, fast = trials(DecodeSettings(num_threads=1)), trials(DecodeSettings(num_threads=8))
    trials.close()
    assert slow is not None
    assert fast is not None
    assert slow >= 0.08
    assert 0.01 <= fast < slow / 2
    assert len(inputs) == 3  # the first once more, to warm up
    assert all(not hasattr(source, "_decoder") for source in inputs)  # closed
    assert len(alive) > 3 * 4


def test_after_its_time_nothing_is_tried(data: DataSet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orchestrator.data.tuning._NO_TRIAL_AFTER_S", 0.0)
    inputs = list[TrainInput]()
    assert Trials(opened(data, inputs), World())(DecodeSettings()) is None
    assert len(inputs) == 1
