"""Promise 1: the stream is a function of (seed, position)."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.config import Order
from orchestrator.data.sampling import Purpose, SampleStream, permute, philox


def words(*values: int) -> np.ndarray:
    return np.array([values], np.uint32)


def test_philox_gives_the_authors_known_answers() -> None:
    # kat_vectors of Random123 (Salmon et al. 2011), philox 4x32, 10 rounds
    assert philox(words(0, 0), words(0, 0, 0, 0)).tolist() == [[0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]]
    ones = 0xFFFFFFFF
    answer = [[0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]]
    assert philox(words(ones, ones), words(ones, ones, ones, ones)).tolist() == answer
    counter = words(0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)
    answer = [[0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]]
    assert philox(words(0xA4093822, 0x299F31D0), counter).tolist() == answer


@settings(max_examples=60, deadline=None)
@given(size=st.integers(1, 3000), seed=st.integers(0, 2**63 - 1), epoch=st.integers(0, 1000))
def test_an_epoch_holds_every_image_once(size: int, seed: int, epoch: int) -> None:
    images = SampleStream(size, seed).images(epoch * size + np.arange(size))
    assert np.array_equal(np.sort(images), np.arange(size))


def test_the_stream_does_not_depend_on_how_it_is_cut() -> None:
    stream = SampleStream(1000, 7)
    whole = np.arange(900, 3100)
    pieces = [whole[:1], whole[1:77], whole[77:1500], whole[1500:]]
    assert np.array_equal(stream.images(whole), np.concatenate([stream.images(p) for p in pieces]))
    for purpose in Purpose:
        together = stream.uniforms(whole, purpose, 5)
        assert np.array_equal(together, np.concatenate([stream.uniforms(p, purpose, 5) for p in pieces]))
        # A longer request begins with the shorter one: new numbers move no old ones.
        assert np.array_equal(together, stream.uniforms(whole, purpose, 40)[:, :5])


def test_epochs_seeds_and_purposes_differ() -> None:
    first, second = SampleStream(5000, 0), SampleStream(5000, 1)
    epoch = np.arange(5000)
    for a, b in (
        (first.images(epoch), first.images(epoch + 5000)),
        (first.images(epoch), second.images(epoch)),
        (first.images(epoch), epoch),
    ):
        assert (a == b).mean() < 0.005  # a random permutation has one fixed point on average
    a, b = (first.uniforms(epoch, p, 1)[:, 0] for p in (Purpose.FLIP, Purpose.COLOUR))
    assert abs(np.corrcoef(a, b)[0, 1]) < 0.06


@pytest.mark.parametrize("size", [2, 5, 7, 100])
def test_every_image_is_equally_likely_at_every_place(size: int) -> None:
    epochs = 20_000
    for place in {0, 1, size - 1}:
        images = SampleStream(size, 3).images(np.arange(epochs) * size + place)
        expected = epochs / size
        chi2 = ((np.bincount(images, minlength=size) - expected) ** 2 / expected).sum()
        # mean size − 1, standard deviation √(2(size − 1)); 6 deviations
        assert chi2 < size - 1 + 6 * np.sqrt(2 * (size - 1)) + 6


def test_a_billion_images_need_no_memory() -> None:
    size = 10**9
    positions = np.arange(size - 1000, size + 1000)
    images = SampleStream(size, 5).images(positions)
    assert images.min() >= 0
    assert images.max() < size
    assert len(np.unique(images[:1000])) == len(np.unique(images[1000:])) == 1000
    # the inverse check: the permutation stays inside at any size up to 2**62
    big = permute(np.zeros(10, np.uint64), np.arange(10), 2**62)
    assert len(np.unique(big)) == 10


def test_draws_have_the_right_distribution() -> None:
    stream = SampleStream(10, 11)
    u = stream.uniforms(np.arange(100_000), Purpose.FLIP, 1)[:, 0]
    assert 0 < u.min() < u.max() < 1
    counts, _ = np.histogram(u, 50, (0, 1))
    assert (((counts - 2000) ** 2) / 2000).sum() < 49 + 6 * np.sqrt(98)
    z = stream.normals(np.arange(100_000), Purpose.COLOUR, 3)
    assert np.allclose(z.mean(0), 0, atol=0.02)
    assert np.allclose(np.cov(z.T), np.eye(3), atol=0.02)
    assert abs((z**4).mean() - 3) < 0.1


def test_sequential_order_is_the_shards() -> None:
    assert SampleStream(4, 0, Order.SEQUENTIAL).images(np.arange(6)).tolist() == [0, 1, 2, 3, 0, 1]


def test_bad_streams_are_refused() -> None:
    with pytest.raises(ValueError, match="empty"):
        SampleStream(0, 0)
    with pytest.raises(ValueError, match="seed"):
        SampleStream(1, -1)


@settings(max_examples=60, deadline=None)
@given(
    counts=st.lists(st.integers(0, 9), min_size=1, max_size=12).filter(any),
    window=st.integers(1, 14),
    seed=st.integers(0, 2**63 - 1),
)
def test_a_windowed_epoch_holds_every_image_once_window_by_window(counts: list[int], window: int, seed: int) -> None:
    size, shard_of = sum(counts), np.repeat(np.arange(len(counts)), counts)
    stream = SampleStream(size, seed, Order.WINDOWED, np.array(counts), window)
    for epoch in (0, 1, 5):
        images = stream.images(epoch * size + np.arange(size))
        assert sorted(images.tolist()) == list(range(size))
        if all(counts):
            # A window is read to its end before the next is begun: the shards come in groups of at most `window`.
            place = seen = 0
            while place < size:
                these = stream.upcoming_shards(epoch * size + place)[: min(window, len(counts) - seen)]
                in_window = int(np.isin(shard_of, these).sum())
                assert set(shard_of[images[place : place + in_window]].tolist()) == set(these.tolist())
                place, seen = place + in_window, seen + len(these)


def test_a_windowed_stream_depends_on_the_position_alone() -> None:
    counts = np.array([5, 9, 3, 8, 8, 2, 7])
    stream = SampleStream(42, 1, Order.WINDOWED, counts, 3)
    positions = np.arange(200)
    whole = stream.images(positions)
    backwards = np.random.default_rng(0).permutation(positions)
    assert np.array_equal(SampleStream(42, 1, Order.WINDOWED, counts, 3).images(backwards), whole[backwards])
    epochs = [whole[i * 42 : (i + 1) * 42].tolist() for i in range(4)]
    assert len({tuple(e) for e in epochs}) == 4
    assert not np.array_equal(SampleStream(42, 2, Order.WINDOWED, counts, 3).images(positions), whole)


def test_the_shards_to_come_are_named_before_they_are_needed() -> None:
    counts = np.full(10, 6)
    stream, shard_of = SampleStream(60, 4, Order.WINDOWED, counts, 3), np.repeat(np.arange(10), 6)
    for position in range(0, 180, 5):
        soon = stream.upcoming_shards(position)
        assert len(set(soon.tolist())) == len(soon)
        assert len(soon) <= 6
        assert shard_of[stream.images(np.array([position]))[0]] in soon[:3]
        # What follows within a window's length is at hand.
        needed = set(shard_of[stream.images(np.arange(position, position + 6))].tolist())
        assert needed <= set(soon.tolist())
    assert stream.upcoming_shards(59)[-3:].tolist() == stream.upcoming_shards(60)[:3].tolist()
    assert SampleStream(60, 4, Order.FULL, counts).upcoming_shards(17).tolist() == list(range(10))


def test_one_window_over_all_shards_mixes_as_well_as_the_full_order() -> None:
    """Neighbours in the stream come from the same shard as often as chance has it."""
    counts = np.full(20, 50)
    shard_of = np.repeat(np.arange(20), 50)
    for order in (Order.FULL, Order.WINDOWED):
        shards = shard_of[SampleStream(1000, 0, order, counts, 20).images(np.arange(100_000))]
        assert np.mean(shards[1:] == shards[:-1]) == pytest.approx(49 / 999, abs=0.004)


def test_a_billion_images_take_no_memory_in_either_order() -> None:
    counts = np.full(1_000_000, 1000)
    for order in (Order.FULL, Order.WINDOWED):
        images = SampleStream(10**9, 0, order, counts, 64).images(np.arange(10**9 - 128, 10**9 + 128))
        assert len(np.unique(images[:128])) == 128
        assert images.max() < 10**9
