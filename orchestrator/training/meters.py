"""Mergeable sums and counts of a classification task, kept on the device.

All sums are integers (the loss in units of 2**-24), so that they are the same in any order, at any number of workers
and however often a run was interrupted.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import astuple, dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from orchestrator.data.sampling import mix64

_LOSS_UNIT = 2.0**24
_MAX_LOSS = 2.0**16


@dataclass(frozen=True)
class Totals:
    """Sums over images.

    Their number, loss in units of 2**-24, wrong at top-1 and top-5, losses that are not finite, images of an evaluation
    that cannot be read (wrong, without a loss), training images that another one stands in for, optimizer steps left
    out because a loss or gradient was not finite, checksum of the samples (``sample_checksum``, modulo 2**64).
    """

    images: int = 0
    loss_units: int = 0
    wrong_top1: int = 0
    wrong_top5: int = 0
    not_finite: int = 0
    unreadable: int = 0
    replaced: int = 0
    skipped_steps: int = 0
    samples: int = 0

    def __add__(self, other: Totals) -> Totals:
        sums = [a + b for a, b in zip(self.as_list(), other.as_list(), strict=True)]
        return Totals(*[*sums[:-1], sums[-1] % 2**64])

    def as_list(self) -> list[int]:
        return list(astuple(self))

    @property
    def loss(self) -> float:
        """Mean cross-entropy, nats; NaN where no image has a finite one."""
        finite = self.images - self.not_finite - self.unreadable
        return self.loss_units / _LOSS_UNIT / finite if finite else math.nan

    @property
    def top1_error(self) -> float:
        """Percent."""
        return 100.0 * self.wrong_top1 / max(1, self.images)

    @property
    def top5_error(self) -> float:
        """Percent."""
        return 100.0 * self.wrong_top5 / max(1, self.images)


class Meter:
    """Adds up on ``device`` without waiting for it."""

    def __init__(self, device: torch.device) -> None:
        self.sums = torch.zeros(9, dtype=torch.int64, device=device)

    @torch.no_grad()
    def add(self, logits: Tensor, labels: Tensor, losses: Tensor, weight: Tensor | None = None) -> None:
        """logits [N, K] float, labels [N] int64, losses [N] float; weight [N] int64 of 0 and 1 leaves images out."""
        own = logits.gather(1, labels.clamp_min(0).unsqueeze(1))
        # The place of the label among the scores; a tie counts for the smaller label, a NaN as wrong.
        classes = torch.arange(logits.shape[1], device=logits.device)
        before = (logits > own) | ((logits == own) & (classes < labels.unsqueeze(1)))
        place = before.sum(1)
        finite = own.squeeze(1).isfinite() & losses.isfinite()
        units = (losses.double().nan_to_num(0, 0, 0).clamp(0, _MAX_LOSS) * _LOSS_UNIT).round().to(torch.int64)
        rows = torch.stack(
            [torch.ones_like(place), units, ((place >= 1) | ~finite), ((place >= 5) | ~finite), ~finite]
        ).to(torch.int64)
        self.sums[:5] += (rows if weight is None else rows * weight).sum(1)

    def add_unreadable(self, count: int) -> None:
        """Images of an evaluation that cannot be read: wrong, and left out of the loss."""
        self.sums += count * torch.tensor([1, 0, 1, 1, 0, 1, 0, 0, 0], device=self.sums.device)

    def add_replaced(self, count: int) -> None:
        """Training images that another one stands in for."""
        self.sums[6] += count

    def add_skipped(self, skipped: Tensor) -> None:
        """[] bool: whether an optimizer step was left out. To be told by one rank."""
        self.sums[7] += skipped

    def add_samples(self, positions: np.ndarray, images: np.ndarray) -> None:
        """Stream positions [N] int64 and the images [N] int64 that were trained on there."""
        self.sums[8] += sample_checksum(positions, images)

    def take(self, reduce: Callable[[Tensor], object]) -> Totals:
        """Totals over all ranks, then from zero again. ``reduce`` sums over ranks in place. Waits for the device."""
        reduce(self.sums)
        *sums, samples = self.sums.tolist()
        totals = Totals(*[*sums, samples % 2**64])
        self.sums.zero_()
        return totals


def sample_checksum(positions: np.ndarray, images: np.ndarray) -> int:
    """Checksum of (position, image) pairs, [N] int64 each, in [-2**63, 2**63): sums of it (modulo 2**64) are the same
    however the pairs were dealt out, and another where a pair is missing, repeated or exchanged.
    """
    pairs = mix64(mix64(positions.astype(np.uint64)) ^ images.astype(np.uint64))
    return int(pairs.sum(dtype=np.uint64).astype(np.int64))


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of each image in fp32: logits [N, K], labels [N] int64 → [N] float32, nats."""
    return F.cross_entropy(logits.float(), labels, reduction="none")


def smoothed(logits: Tensor, labels: Tensor, label_smoothing: float) -> Tensor:
    """As ``cross_entropy``, ``label_smoothing`` of each label dealt out over all classes evenly."""
    return F.cross_entropy(logits.float(), labels, reduction="none", label_smoothing=label_smoothing)
