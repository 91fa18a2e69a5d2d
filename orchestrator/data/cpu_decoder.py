"""Training views made on the CPU: DALI decodes the region of each view, torch resizes it.

torch's resize of uint8 images takes a fifth of the time of DALI's and is Pillow's to within rounding. It cannot begin
inside a pixel: training views begin at whole ones (views.py). Legend: N images in a batch, S = crop in pixels.
"""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from threadpoolctl import threadpool_limits
from torch import Tensor

from orchestrator.data.decoder import AnyDecoder, DecodeSettings
from orchestrator.data.views import Views

_IN_PIPELINE = 2  # batches: one is decoded while the one before it is resized


@dataclass
class _Work:
    """A batch on its way. regions: [N, 4] float64; width, height: [N] of the stored images."""

    encoded: list[np.ndarray]
    views: Views
    regions: np.ndarray
    width: np.ndarray
    height: np.ndarray
    result: Future[Tensor]


class CpuDecoder(AnyDecoder[Views, Tensor]):
    """One view of each image: pixels [N, S, S, 3] float32 or float16, in order, less ``mean``.

    mean: [3] or [3, S, S] float32. Views must begin at whole pixels.
    """

    def __init__(self, settings: DecodeSettings, batch_size: int, crop: int, mean: np.ndarray) -> None:
        self.crop = crop
        mean_CHW = torch.from_numpy(mean).reshape(3, *([1, 1] if mean.ndim == 1 else mean.shape[1:]))
        # Whole rows: operations on three numbers at a time would take three times as long.
        self._mean_rows = mean_CHW.expand(3, crop, crop).permute(1, 2, 0).reshape(crop, crop * 3).contiguous()
        self._dtype = np.dtype(np.float16 if settings.half else np.float32)
        self._waiting: deque[_Work] = deque()  # submitted
        self._decoding: deque[_Work] = deque()  # in the pipeline
        self._results: deque[Future[Tensor]] = deque()  # not collected yet
        # One thread holds the pipeline. Its helpers resize one batch while the pipeline decodes the next, which takes
        # four times as long: more of them would only wait for each other.
        self._thread = ThreadPoolExecutor(1, "decode")
        self._num_helpers = -(-settings.num_threads // 4)
        self._helpers = ThreadPoolExecutor(self._num_helpers, "resize", initializer=_compute_alone)
        super().__init__(settings, batch_size, queue_depth=_IN_PIPELINE)

    @property
    def depth(self) -> int:
        return self.settings.prefetch_batches + 1  # one more is being resized

    def _graph(self) -> Any:
        return self._decoded()

    def _gray(self) -> dict[str, np.ndarray]:
        return {}

    def submit(self, encoded: list[np.ndarray], views: Views, width: np.ndarray, height: np.ndarray) -> None:
        regions = np.stack([views.x0, views.y0, views.x1, views.y1], 1)
        assert (regions[:, :2] == np.floor(regions[:, :2])).all(), "a training view begins inside a pixel"
        work = _Work(encoded, views, regions, width, height, Future())
        self._waiting.append(work)
        self._results.append(work.result)
        self._thread.submit(self._advance)

    def collect(self) -> Tensor:
        return self._results.popleft().result()

    def close(self) -> None:
        self._thread.shutdown(wait=True, cancel_futures=True)
        self._helpers.shutdown(wait=True)

    def _advance(self) -> None:
        """One batch more is done: of those in the pipeline the oldest, which is kept filled."""
        while self._waiting and len(self._decoding) < _IN_PIPELINE:
            work = self._waiting.popleft()
            self._decoding.append(work)
            try:
                self._feed(work.encoded, work.regions[None], None, work.width, work.height)
                self._pipeline.schedule_run()
            except Exception as error:  # a broken image before it has ended the pipeline
                work.result.set_exception(error)
        work = self._decoding.popleft()
        if work.result.done():
            return
        try:
            work.result.set_result(self._resized_batch(work))
        except Exception as error:
            work.result.set_exception(error)

    def _resized_batch(self, work: _Work) -> Tensor:
        (parts,) = self._pipeline.share_outputs()
        count = len(work.encoded)
        pixels = torch.from_numpy(self._buffers.take((count, self.crop, self.crop, 3), self._dtype))
        try:
            tasks = [
                self._helpers.submit(self._fill_all, pixels, parts, work, range(first, count, self._num_helpers))
                for first in range(self._num_helpers)
            ]
            for task in tasks:
                task.result()
        finally:
            self._pipeline.release_outputs()
        return pixels

    def _fill_all(self, out: Tensor, parts: Any, work: _Work, numbers: range) -> None:
        """Into ``out`` [N, S, S, 3] those of the decoded ``parts`` (a list of DALI's) that are numbered."""
        sides = work.regions[:, 2:] - work.regions[:, :2]
        for i in numbers:
            self._fill(out[i], np.asarray(parts[i]), sides[i], work.views.flip[i], work.views.colour_shift[i])

    def _fill(self, out: Tensor, part: np.ndarray, side: np.ndarray, flip: bool, shift: np.ndarray) -> None:
        """Into ``out`` [S, S, 3] the first ``side`` (width, height) pixels of ``part`` [h, w, 3] uint8."""
        crop = self.crop
        # The size that comes out is cut to whole pixels: no rounding may cost the last one.
        scale = [crop / float(each) * (1 + 1e-9) for each in (side[1], side[0])]
        image_NCHW = torch.from_numpy(part).view(1, *part.shape).permute(0, 3, 1, 2)  # torch knows it as channels last
        resized = F.interpolate(
            image_NCHW, scale_factor=scale, mode="bilinear", antialias=True, recompute_scale_factor=False
        )
        seen = resized[0, :, :crop, :crop].permute(1, 2, 0)
        if flip:
            seen = seen.flip(1)
        rows = (out if out.dtype == torch.float32 else torch.empty(out.shape)).view(crop, crop * 3)
        torch.add(seen.reshape(crop, crop * 3), torch.from_numpy(np.tile(shift, crop)), out=rows)
        rows.sub_(self._mean_rows)
        if out.dtype != torch.float32:
            out.copy_(rows.view(out.shape))


def _compute_alone() -> None:
    """Operations of this thread take no other one's time: there is a thread for each processor already."""
    torch.get_num_threads()  # torch sets a thread's number when the thread first asks
    threadpool_limits(1, user_api="openmp")
