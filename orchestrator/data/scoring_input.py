"""The input side of a test protocol: every image decoded once for all its views, in batches that a plan has fixed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch

from orchestrator.data.decoder import DecodeSettings, ManyDecoder
from orchestrator.data.pipeline import Feed, Job
from orchestrator.data.shards import Split
from orchestrator.data.views import CropViews, ManyViews, ScaleViews


@dataclass(frozen=True)
class ViewedBatch:
    """N images, K views of each, on the device of the pipeline.

    views: K times [N, height, width, 3] uint8, RGB
    indices: [N] int64, on the host: which images of the split
    decoded: [N] bool, on the host: False for what cannot be decoded; its views are one gray
    """

    views: tuple[torch.Tensor, ...]
    indices: np.ndarray
    decoded: np.ndarray


class ScoringInput(Feed[ManyViews, tuple[torch.Tensor, ...]]):
    """Batches of ``view`` of a split's images. An image that cannot be decoded is never replaced: it is marked.

    batch_size: images in the largest batch. Raises ValueError past ``max_undecodable`` images that cannot be decoded
    and were not known from the preparation, counting what this object has read.
    """

    def __init__(
        self,
        split: Split,
        view: CropViews | ScaleViews,
        settings: DecodeSettings,
        batch_size: int,
        max_undecodable: int,
    ) -> None:
        self.view = view
        self._num_views = view.sizes(np.ones(1), np.ones(1)).shape[1]
        super().__init__(split, settings, batch_size, max_undecodable)

    def batches(self, plan: Iterable[np.ndarray]) -> Iterator[ViewedBatch]:
        """One batch for each of the plan's: indices [N] int64 of images whose views have the same sizes."""
        jobs = (Job[ManyViews](np.full(len(i), -1), i, np.zeros(len(i), bool)) for i in plan)
        for job, views in self._run(jobs):
            assert job.unreadable is not None
            yield ViewedBatch(views, job.indices, ~job.unreadable)

    def _new_decoder(self, settings: DecodeSettings, batch_size: int) -> ManyDecoder:
        return ManyDecoder(settings, batch_size, self._num_views)

    def _views(self, job: Job[ManyViews]) -> ManyViews:
        # What stands in for an undecodable image is one pixel, seen at the sizes of the others.
        recorded = self.split.width[job.indices], self.split.height[job.indices]
        sizes = self.view.sizes(*recorded)
        assert (sizes == sizes[0]).all(), "a batch of a plan has images of several sizes"
        return ManyViews(self.view.regions(*self._sizes(job)), tuple((h, w) for h, w in sizes[0].tolist()))

    def _stand_in(self, job: Job[ManyViews]) -> None:
        assert job.unreadable is not None
        job.unreadable[:] = self._bad_places(job)
