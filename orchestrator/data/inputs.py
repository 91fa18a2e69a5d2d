"""From a split to its batches, for training, validation and tests, whatever the images of a set are stored as."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Protocol

import numpy as np

from orchestrator.data.decoder import DecodeSettings
from orchestrator.data.in_memory import MemoryEvalInput, MemoryScoringInput, MemoryTrainInput
from orchestrator.data.pipeline import Batch, EvalInput, Mean, TrainInput
from orchestrator.data.sampling import SampleStream
from orchestrator.data.scoring_input import ScoringInput, ViewedBatch
from orchestrator.data.shards import DataSet, Encoding, Split
from orchestrator.data.views import ColourAxes, CropViews, ScaleViews, TestView, TrainView


class TrainBatches(Protocol):
    """An endless iterator over the training batches of one worker."""

    def __iter__(self) -> Iterator[Batch]: ...
    def __next__(self) -> Batch: ...
    def close(self) -> None:
        """Stop working ahead."""


class EvalBatches(Protocol):
    """The evaluation batches of a split."""

    @property
    def undecodable(self) -> set[int]:
        """Images that could not be decoded so far, those known from the preparation included."""

    def batches(self, rank: int, size: int) -> Iterator[Batch]:
        """The batches of worker ``rank`` of ``size``, each whole."""

    def close(self) -> None:
        """Stop working ahead."""


class ScoringBatches(Protocol):
    """The views of a split's images, in batches that a plan has fixed."""

    @property
    def undecodable(self) -> set[int]:
        """Images that could not be decoded so far, those known from the preparation included."""

    def batches(self, plan: Iterable[np.ndarray]) -> Iterator[ViewedBatch]:
        """One batch for each of the plan's: indices [N] int64 of images whose views have the same sizes."""

    def close(self) -> None:
        """Stop working ahead."""


def train_input(
    data: DataSet,
    split: Split,
    stream: SampleStream,
    view: TrainView,
    axes: ColourAxes,
    mean: Mean,
    settings: DecodeSettings,
    positions_of: Callable[[int], np.ndarray],
    start_step: int,
    max_undecodable: int,
    ahead: Callable[[int], None] = lambda position: None,
    copying: Callable[[], None] = lambda: None,
) -> TrainBatches:
    """The training batches of a worker, see ``pipeline.TrainInput``. Raises ValueError, OSError."""
    match data.manifest.encoding:
        case Encoding.JPEG:
            return TrainInput(
                split, stream, view, axes, mean, settings, positions_of, start_step, max_undecodable, ahead, copying
            )
        case Encoding.PLANES:
            return MemoryTrainInput(data, split, stream, view, axes, mean, settings, positions_of, start_step, copying)


def eval_input(
    data: DataSet,
    split: Split,
    view: TestView,
    mean: Mean,
    settings: DecodeSettings,
    batch_size: int,
    max_undecodable: int,
) -> EvalBatches:
    """The evaluation batches of a split, see ``pipeline.EvalInput``. Raises ValueError, OSError."""
    match data.manifest.encoding:
        case Encoding.JPEG:
            return EvalInput(split, view, mean, settings, batch_size, max_undecodable)
        case Encoding.PLANES:
            return MemoryEvalInput(data, split, view, mean, settings, batch_size)


def scoring_input(
    data: DataSet,
    split: Split,
    view: CropViews | ScaleViews,
    settings: DecodeSettings,
    batch_size: int,
    max_undecodable: int,
) -> ScoringBatches:
    """What a test protocol sees of a split, see ``scoring_input.ScoringInput``. Raises ValueError, OSError."""
    match data.manifest.encoding:
        case Encoding.JPEG:
            return ScoringInput(split, view, settings, batch_size, max_undecodable)
        case Encoding.PLANES:
            return MemoryScoringInput(data, split, view, settings)
