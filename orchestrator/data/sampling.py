"""The sample stream: (seed, epoch, position) → image and its random numbers, as pure vectorized functions.

The stream is endless: sample number n is the (n mod N)-th of epoch n // N. Everything here is a function of (seed, n):
no state, no shuffle buffer, the same at any number of workers. The whole state of the input side is one integer.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

import numpy as np

from orchestrator.config import Order

_U64 = np.uint64


def mix64(x: np.ndarray) -> np.ndarray:
    """A bijective 64-bit hash of [n] uint64: the finalizer of SplitMix64 (Steele, Lea and Flood 2014)."""
    with np.errstate(over="ignore"):
        x = x + _U64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> _U64(30))) * _U64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> _U64(27))) * _U64(0x94D049BB133111EB)
    return x ^ (x >> _U64(31))


def permute(key: np.ndarray, position: np.ndarray, size: int) -> np.ndarray:
    """Image at ``position`` [n] int64 of the permutation of range(size) named by ``key`` [n] uint64: [n] int64.

    A Feistel network over the next even power of two, walked until it falls inside (Black and Rogaway 2002): constant
    memory and under four passes on average at any ``size`` up to 2**62.
    """
    half_bits = _U64(max(1, ((size - 1).bit_length() + 1) // 2))
    mask = (_U64(1) << half_bits) - _U64(1)
    out = np.empty(len(position), np.int64)
    todo = np.arange(len(position))
    values = position.astype(np.uint64)
    while len(todo):
        left, right = values >> half_bits, values & mask
        for round_number in range(8):
            with np.errstate(over="ignore"):
                round_key = mix64(key + _U64(round_number))
            left, right = right, left ^ (mix64(round_key ^ right) & mask)
        values = (left << half_bits) | right
        done = values < _U64(size)
        out[todo[done]] = values[done].astype(np.int64)
        todo, values, key = todo[~done], values[~done], key[~done]
    return out


def philox(key: np.ndarray, counter: np.ndarray) -> np.ndarray:
    """Philox-4x32-10 (Salmon et al. 2011): key [n, 2] uint32, counter [n, 4] uint32 → [n, 4] uint32."""
    low = _U64(0xFFFFFFFF)
    c0, c1, c2, c3 = (counter[:, i].astype(np.uint64) for i in range(4))
    k0, k1 = key[:, 0].astype(np.uint64), key[:, 1].astype(np.uint64)
    for _ in range(10):
        p0, p1 = c0 * _U64(0xD2511F53), c2 * _U64(0xCD9E8D57)
        c0, c1, c2, c3 = (p1 >> _U64(32)) ^ c1 ^ k0, p1 & low, (p0 >> _U64(32)) ^ c3 ^ k1, p0 & low
        k0, k1 = (k0 + _U64(0x9E3779B9)) & low, (k1 + _U64(0xBB67AE85)) & low
    return np.stack([c0, c1, c2, c3], axis=1).astype(np.uint32)


class Purpose(Enum):
    """What a random number is for. Each has counters of its own, so that a new one moves no other."""

    SCALE_AND_CROP = 0
    FLIP = 1
    COLOUR = 2
    REPLACEMENT = 3
    DROPOUT = 4


@dataclass(frozen=True)
class _Epoch:
    """How the windowed order visits S shards in K windows in one epoch; places count from its start."""

    shards: np.ndarray  # [S] int64: shard number of each slot
    first_place: np.ndarray  # [S] int64: place of the slot's first image
    first_image: np.ndarray  # [S] int64: index of the slot's first image
    window_first: np.ndarray  # [K + 1] int64: place where each window begins; the last is the number of images


@dataclass(frozen=True)
class SampleStream:
    """The samples of ``num_images`` images under ``seed`` (0 ≤ seed < 2**63).

    The windowed order needs ``shard_counts`` ([S] int64: images of each shard) and ``window_shards``: an epoch visits
    the shards in a keyed permutation, and the images of ``window_shards`` neighbours in it are permuted together.
    """

    num_images: int
    seed: int
    order: Order = Order.FULL
    shard_counts: np.ndarray | None = None
    window_shards: int = 0
    _epochs: dict[int, _Epoch] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.num_images < 1:
            raise ValueError("the training set is empty: prepare a data set with at least one training image")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed {self.seed} is outside [0, 2**63): choose another")
        if self.order is Order.WINDOWED:
            assert self.shard_counts is not None
            assert self.window_shards > 0
            assert self.shard_counts.sum() == self.num_images

    def images(self, positions: np.ndarray) -> np.ndarray:
        """Image index [n] int64 in [0, num_images) of each stream position [n] int64."""
        epoch, place = np.divmod(positions, self.num_images)
        match self.order:
            case Order.FULL:
                return permute(self._key(epoch.astype(np.uint64)), place, self.num_images)
            case Order.WINDOWED:
                return self._windowed(epoch, place)
            case Order.SEQUENTIAL:
                return place

    def upcoming_shards(self, position: int) -> np.ndarray:
        """Shards [n] int64 to have at hand from stream ``position`` on, soonest first: those of its window and of the
        next one; in another order than the windowed, all.
        """
        if self.shard_counts is None:
            return np.zeros(0, np.int64)
        if self.order is not Order.WINDOWED:
            return np.arange(len(self.shard_counts))
        epoch, place = divmod(position, self.num_images)
        plan = self._epoch(epoch)
        first = int(np.searchsorted(plan.window_first, place, "right") - 1) * self.window_shards
        soon = plan.shards[first : first + 2 * self.window_shards]
        if first + self.window_shards >= len(plan.shards):  # the next window is the first one of the next epoch
            soon = np.concatenate([soon, self._epoch(epoch + 1).shards[: self.window_shards]])
        return soon[np.sort(np.unique(soon, return_index=True)[1])]

    def _key(self, *parts: np.ndarray) -> np.ndarray:
        """A key [n] uint64 for the seed and the numbers [n] uint64 in ``parts``."""
        key = mix64(np.full(len(parts[0]), self.seed, np.uint64))
        for part in parts:
            key = mix64(key ^ part)
        return key

    def _epoch(self, epoch: int) -> _Epoch:
        plan = self._epochs.get(epoch)
        if plan is None:
            assert self.shard_counts is not None
            number = np.arange(len(self.shard_counts))
            # Keyed apart from the windows: those count from 0.
            key = self._key(*(np.full(len(number), part, np.uint64) for part in (epoch, 2**64 - 1)))
            shards = permute(key, number, len(number))
            places = np.concatenate([[0], np.cumsum(self.shard_counts[shards])])
            plan = _Epoch(
                shards=shards,
                first_place=places[:-1],
                first_image=(np.cumsum(self.shard_counts) - self.shard_counts)[shards],
                window_first=np.append(places[: -1 : self.window_shards], self.num_images),
            )
            while len(self._epochs) >= 4:
                self._epochs.pop(next(iter(self._epochs)), None)
            self._epochs[epoch] = plan
        return plan

    def _windowed(self, epochs: np.ndarray, places: np.ndarray) -> np.ndarray:
        images = np.empty(len(places), np.int64)
        for epoch in np.unique(epochs).tolist():
            plan, of_epoch = self._epoch(epoch), np.flatnonzero(epochs == epoch)
            windows = np.searchsorted(plan.window_first, places[of_epoch], "right") - 1
            for window in np.unique(windows).tolist():
                these = of_epoch[windows == window]
                first, end = int(plan.window_first[window]), int(plan.window_first[window + 1])
                key = self._key(*(np.full(len(these), part, np.uint64) for part in (epoch, window)))
                mixed = first + permute(key, places[these] - first, end - first)
                slot = np.searchsorted(plan.first_place, mixed, "right") - 1
                images[these] = plan.first_image[slot] + mixed - plan.first_place[slot]
        return images

    def uniforms(self, positions: np.ndarray, purpose: Purpose, count: int) -> np.ndarray:
        """``count`` numbers in the open interval (0, 1) for each position: [n, count] float64, of 32 random bits."""
        blocks = -(-count // 4)
        n = len(positions)
        where = np.repeat(positions.astype(np.uint64), blocks)
        counter = np.empty((n * blocks, 4), np.uint32)
        counter[:, 0], counter[:, 1] = where & _U64(0xFFFFFFFF), where >> _U64(32)
        counter[:, 2], counter[:, 3] = np.tile(np.arange(blocks, dtype=np.uint32), n), purpose.value
        key = np.broadcast_to(np.array([self.seed & 0xFFFFFFFF, self.seed >> 32], np.uint32), (n * blocks, 2))
        words = philox(key, counter).reshape(n, blocks * 4)[:, :count]
        return (words + 0.5) / 2**32

    def normals(self, positions: np.ndarray, purpose: Purpose, count: int) -> np.ndarray:
        """``count`` standard normal numbers for each position: [n, count] float64 (Box and Muller 1958)."""
        u = self.uniforms(positions, purpose, 2 * count)
        return np.sqrt(-2 * np.log(u[:, :count])) * np.cos(2 * np.pi * u[:, count:])
