"""The input side of a set of small images of one size: all of them lie in memory, on a GPU in its own.

Legend: N images in a batch, height H and width W of all images, S = crop in pixels.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import safetensors.numpy
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor

from orchestrator.data.decoder import DecodeSettings
from orchestrator.data.pipeline import Batch, Mean
from orchestrator.data.sampling import SampleStream
from orchestrator.data.scoring_input import ViewedBatch
from orchestrator.data.shards import DataSet, Split
from orchestrator.data.views import ColourAxes, CropViews, ScaleViews, TestView, TrainView
from orchestrator.storage import DigestError

_TENSOR = "images"


def planes_of(data: DataSet, split: Split) -> np.ndarray:
    """All images of a split: [len(split), 3, H, W] uint8. Raises ValueError where a shard is damaged, OSError."""
    parts = []
    for shard in split.info.shards:
        try:
            images = safetensors.numpy.load(data.storage.read(shard.name, shard.sha256))[_TENSOR]
        except (DigestError, SafetensorError, KeyError, FileNotFoundError) as error:
            where = f"{data.storage.url}/{shard.name}"
            raise ValueError(f"the shard {where} cannot be read ({error}): prepare the data set again") from None
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[:2] != (shard.count, 3):
            raise ValueError(
                f"the shard {data.storage.url}/{shard.name} holds {images.dtype} {images.shape}, not the uint8 images "
                "of its manifest: prepare the data set again"
            )
        parts.append(images)
    if len({part.shape[2:] for part in parts}) != 1:
        raise ValueError(f"the images of the {split.name} split are not of one size: prepare the data set again")
    return np.concatenate(parts)


@dataclass(frozen=True)
class _Drawn:
    """What a training batch is made of: images [N] int64, and left, top, mirrored or not of each [N, 3] int64."""

    indices: np.ndarray
    windows: np.ndarray
    colour_shift: np.ndarray | None  # [N, 3] float32


class _InMemory:
    """Images [·, 3, H, W] uint8 and labels [·] int64 of a split, on the device."""

    def __init__(self, data: DataSet, split: Split, settings: DecodeSettings) -> None:
        on_gpu = settings.device == "cuda"
        self.device = torch.device("cuda", settings.device_id) if on_gpu else torch.device("cpu")
        self.split, self.dtype = split, torch.float16 if settings.half else torch.float32
        self._pixels = torch.from_numpy(planes_of(data, split)).to(self.device)
        self._labels = torch.from_numpy(split.label.astype(np.int64)).to(self.device)

    @property
    def undecodable(self) -> set[int]:
        """None: what is in memory has been read."""
        return set()

    def close(self) -> None:
        """Free what the images take."""
        self._pixels = self._labels = torch.empty(0)

    def _to_device(self, array: np.ndarray) -> Tensor:
        tensor = torch.from_numpy(array)
        if self.device.type == "cuda":
            return tensor.pin_memory().to(self.device, non_blocking=True)
        return tensor

    def _mean_of(self, mean: Mean, crop: int) -> Tensor:
        """[3, 1, 1] or [3, S, S] float32. Raises ValueError where it does not fit."""
        if mean.value.ndim == 3 and mean.value.shape != (3, crop, crop):
            raise ValueError(f"mean image of {mean.value.shape} does not fit crops of {crop} pixels")
        value = mean.value if mean.value.ndim == 3 else mean.value[:, None, None]
        return torch.from_numpy(value.copy()).to(self.device)


class MemoryTrainInput(_InMemory):
    """An endless iterator over the training batches of one worker: padded by zeros, cropped, mirrored.

    ``positions_of(step)`` gives the stream positions [N] int64 that this worker sees in ``step``; ``copying`` is told
    when a batch's draws are about to be copied to the GPU. Draws are made ahead by a thread; pixels when they are asked
    for, by a handful of operations on the whole batch.
    """

    def __init__(
        self,
        data: DataSet,
        split: Split,
        stream: SampleStream,
        view: TrainView,
        axes: ColourAxes,
        mean: Mean,
        settings: DecodeSettings,
        positions_of: Callable[[int], np.ndarray],
        start_step: int,
        copying: Callable[[], None] = lambda: None,
    ) -> None:
        super().__init__(data, split, settings)
        self.stream, self.view, self.axes, self._copying = stream, view, axes, copying
        assert self._pixels.shape[2:] == (view.crop, view.crop)  # assembly.views_of has looked
        self._mean, self._side = self._mean_of(mean, view.crop), torch.arange(view.crop, device=self.device)
        self._positions_of, self._next_step = positions_of, start_step
        self._thread, self._drawn = ThreadPoolExecutor(1, "draw"), deque[Future[_Drawn]]()
        self._depth = settings.prefetch_batches

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        while len(self._drawn) < self._depth:
            self._drawn.append(self._thread.submit(self._draw, self._next_step))
            self._next_step += 1
        drawn = self._drawn.popleft().result()
        if self.device.type == "cuda":
            self._copying()
        indices = self._to_device(drawn.indices)
        shift = None if drawn.colour_shift is None else self._to_device(drawn.colour_shift)
        images = self._seen(indices, self._to_device(drawn.windows), shift)
        return Batch(images, self._labels[indices], drawn.indices, np.ones(len(drawn.indices), bool))

    def close(self) -> None:
        self._thread.shutdown(wait=True, cancel_futures=True)
        super().close()

    def _draw(self, step: int) -> _Drawn:
        positions = self._positions_of(step)
        left, top, flip = self.view.windows(self.stream, positions)
        shift = self.view.colour_shifts(self.stream, positions, self.axes) if self.view.colour_std > 0 else None
        return _Drawn(self.stream.images(positions), np.stack([left, top, flip.astype(np.int64)], 1), shift)

    def _seen(self, indices: Tensor, windows: Tensor, colour_shift: Tensor | None) -> Tensor:
        """Images [N, 3, S, S], channels last in memory."""
        pixels = self._pixels[indices].float()
        if colour_shift is not None:
            pixels += colour_shift[:, :, None, None]
        padded = F.pad(pixels.sub_(self._mean), (self.view.padding,) * 4)  # by zeros, the mean: what is added is gray
        left, top, flip = windows[:, :, None].unbind(1)
        columns = left + torch.where(flip.bool(), self.view.crop - 1 - self._side, self._side)  # [N, S]
        rows = top + self._side
        number = torch.arange(len(indices), device=self.device)[:, None, None]
        seen = padded[number, :, rows[:, :, None], columns[:, None, :]]  # [N, S, S, 3]
        return seen.to(self.dtype).permute(0, 3, 1, 2)


class MemoryEvalInput(_InMemory):
    """The evaluation batches of a split: fixed by the data set and ``batch_size`` alone, each padded to full size."""

    def __init__(
        self, data: DataSet, split: Split, view: TestView, mean: Mean, settings: DecodeSettings, batch_size: int
    ) -> None:
        super().__init__(data, split, settings)
        self.view, self.batch_size = view, batch_size
        self.num_batches = -(-len(split) // batch_size)
        self._mean = self._mean_of(mean, view.crop)

    def batches(self, rank: int, size: int) -> Iterator[Batch]:
        """The batches of worker ``rank`` of ``size``: numbers rank, rank + size, …, each whole."""
        height, width = self._pixels.shape[2:]
        v = self.view.views(np.array([width]), np.array([height]))
        region = np.concatenate([v.x0, v.y0, v.x1, v.y1])
        for number in range(rank, self.num_batches, size):
            indices = np.arange(number * self.batch_size, (number + 1) * self.batch_size)
            padding = indices >= len(self.split)
            indices = np.where(padding, 0, indices)
            chosen = self._to_device(indices)
            pixels = resized_region(self._pixels[chosen].float(), region, (self.view.crop, self.view.crop))
            images = (pixels - self._mean).to(self.dtype).contiguous(memory_format=torch.channels_last)
            yield Batch(images, self._labels[chosen], indices, ~padding)


class MemoryScoringInput(_InMemory):
    """Batches of ``view`` of a split's images, as ``scoring_input.ScoringInput`` makes them of encoded ones."""

    def __init__(self, data: DataSet, split: Split, view: CropViews | ScaleViews, settings: DecodeSettings) -> None:
        super().__init__(data, split, settings)
        self.view = view

    def batches(self, plan: Iterable[np.ndarray]) -> Iterator[ViewedBatch]:
        """One batch for each of the plan's: indices [N] int64."""
        height, width = (np.array([side]) for side in self._pixels.shape[2:])
        regions, sizes = self.view.regions(width, height)[:, 0], self.view.sizes(width, height)[0].tolist()
        for indices in plan:
            pixels = self._pixels[self._to_device(indices)].float()
            views = [resized_region(pixels, region, (h, w)) for region, (h, w) in zip(regions, sizes, strict=True)]
            shown = tuple(v.round_().clamp_(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous() for v in views)
            yield ViewedBatch(shown, indices, np.ones(len(indices), bool))


def resized_region(images: Tensor, region: np.ndarray, size: tuple[int, int]) -> Tensor:
    """A new tensor [N, 3, *size] of what ``region`` (x0, y0, x1, y1) of images [N, 3, H, W] float32 shows.

    The whole image is resized, unless it has that size, and the region cut out of it.
    """
    height, width = images.shape[2:]
    x0, y0, x1, y1 = region.tolist()
    scale_y, scale_x = size[0] / (y1 - y0), size[1] / (x1 - x0)
    whole = round(height * scale_y), round(width * scale_x)
    if whole != (height, width):
        images = F.interpolate(images, size=whole, mode="bilinear", antialias=True, align_corners=False)
    top, left = round(y0 * scale_y), round(x0 * scale_x)
    return images[:, :, top : top + size[0], left : left + size[1]].clone()
