"""Encoded images and regions in, pixels out, on CPU and GPU. The only door to DALI.

Only the region that encloses an image's views is decoded, once, then resized to each of them. Legend: N images in a
batch, S = crop in pixels, K views of an image.
"""

from __future__ import annotations

import io
import sys
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from PIL import Image

from orchestrator.data.views import ManyViews, Views

Seen = TypeVar("Seen", Views, ManyViews)
Pixels = TypeVar("Pixels")


@cache
def gray_jpeg() -> np.ndarray:
    """One gray pixel, [bytes] uint8: stands in for an image of an evaluation that cannot be decoded."""
    stream = io.BytesIO()
    Image.new("RGB", (1, 1), (128, 128, 128)).save(stream, "JPEG")
    return np.frombuffer(stream.getvalue(), np.uint8)


@dataclass(frozen=True)
class DecodeSettings:
    """How pixels are made, on ``device`` "cpu" or "cuda". Defaults stand where nothing is tuned.

    ``hw_decoder_share``: part of a batch that the GPU's JPEG engine decodes (0: CUDA cores and CPU only). It alters
    pixels on a GPU, as ``half`` does; how many threads decode, and how far ahead, does not.
    """

    device: str = "cpu"
    device_id: int = 0
    num_threads: int = 1
    prefetch_batches: int = 2
    hw_decoder_share: float = 0.65
    half: bool = False  # float16 output instead of float32


def is_jpeg(encoded: np.ndarray, width: int, height: int) -> bool:
    """Whether [bytes] uint8 begin as a JPEG of this size, in pixels (50 µs).

    DALI 2.4 crashes the process (SIGSEGV, on batches of 32 and more) on bytes that are no JPEG, or one of another size.
    """
    try:
        with Image.open(io.BytesIO(encoded.data)) as image:
            # MPO: a JPEG with further pictures behind it, as cameras write them.
            return image.format in ("JPEG", "MPO") and image.size == (width, height)
    except Exception:  # whatever PIL raises on broken headers
        return False


def _references(arrays: list[np.ndarray]) -> list[int]:
    """How often each is referred to, what asks included. A tensor that was made of it, or a view of that, counts."""
    return [sys.getrefcount(array) for array in arrays]


_UNSEEN = _references([np.empty(0)])[0]  # of an array that only its list holds


class Buffers:
    """Arrays whose memory is used again once nobody sees them any more: fresh pages cost more than a copy."""

    def __init__(self) -> None:
        self._arrays: list[np.ndarray] = []

    def take(self, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        """One that nobody else sees, its content undefined."""
        seen = _references(self._arrays)
        free = [array for array, times in zip(self._arrays, seen, strict=True) if times <= _UNSEEN]
        fits = [array for array in free if array.shape == shape and array.dtype == dtype]
        if not fits:
            unfit = {id(array) for array in free}
            fits = [np.empty(shape, dtype)]
            self._arrays = [array for array in self._arrays if id(array) not in unfit] + fits
        return fits[0]

    def copy_of(self, source: np.ndarray) -> torch.Tensor:
        copy = torch.from_numpy(self.take(source.shape, source.dtype))
        copy.copy_(torch.from_numpy(source))
        return copy


def release_unused_memory() -> None:
    """Give back what DALI keeps of decoders that are no more: nothing else could use that part of a GPU's memory."""
    from nvidia.dali.backend import ReleaseUnusedMemory  # type: ignore[attr-defined]  # missing in DALI's stubs

    ReleaseUnusedMemory()


class AnyDecoder(ABC, Generic[Seen, Pixels]):
    """A DALI pipeline that is fed explicitly: encoded images and what is seen of them in, pixels out, in order."""

    def __init__(self, settings: DecodeSettings, batch_size: int, queue_depth: int) -> None:
        """``queue_depth``: batches that the pipeline may have in work."""
        # Imported here: half a second and 200 MB that only a process with an input side pays.
        from nvidia.dali import pipeline_def

        self.settings, self.batch_size, self._buffers = settings, batch_size, Buffers()
        self.copying: Callable[[], None] = lambda: None  # told before a batch is copied on the GPU

        @pipeline_def(
            batch_size=batch_size,
            num_threads=settings.num_threads,
            device_id=settings.device_id if settings.device == "cuda" else None,
            prefetch_queue_depth=queue_depth,
        )
        def graph() -> Any:
            return self._graph()

        self._pipeline = graph()
        self._pipeline.build()
        self._prime(queue_depth)

    @property
    def depth(self) -> int:
        """Batches that may be submitted and not collected."""
        return self.settings.prefetch_batches

    def close(self) -> None:
        """End what still works on batches that nobody will collect."""

    @abstractmethod
    def submit(self, encoded: list[np.ndarray], views: Seen, width: np.ndarray, height: np.ndarray) -> None:
        """Feed one batch: N encoded images [bytes] uint8, their views, and their width and height [N] in pixels.

        Bytes that are no JPEG of that size may crash the process: see ``is_jpeg``.
        """

    @abstractmethod
    def collect(self) -> Pixels:
        """The oldest batch, on the pipeline's device. Raises RuntimeError if an image is undecodable."""

    @abstractmethod
    def _graph(self) -> Any:
        """The graph's outputs, made of ``_decoded()``."""

    @abstractmethod
    def _gray(self) -> dict[str, np.ndarray]:
        """What the graph is fed, besides the image, with one gray pixel."""

    @staticmethod
    def _source(name: str, kind: str, ndim: int) -> Any:
        """An input of the graph. ``kind``: UINT8, INT32 or FLOAT."""
        import nvidia.dali.fn as fn
        import nvidia.dali.types as types

        return fn.external_source(name=name, dtype=getattr(types, kind), ndim=ndim, batch=True)

    def _decoded(self) -> Any:
        """The decoded part of each image."""
        import nvidia.dali.fn as fn
        import nvidia.dali.types as types

        gpu = self.settings.device == "cuda"
        hardware: dict[str, Any] = {"hw_decoder_load": self.settings.hw_decoder_share} if gpu else {}
        return fn.decoders.image_slice(
            self._source("encoded", "UINT8", 1),
            self._source("anchor", "INT32", 1),
            self._source("shape", "INT32", 1),
            device="mixed" if gpu else "cpu",
            axes=[0, 1],
            output_type=types.RGB,
            adjust_orientation=False,  # the EXIF orientation is ignored: sizes in the index are as stored
            **hardware,
        )

    def _resized(self, images: Any, suffix: str, size: Any) -> Any:
        """A region of each image, resized; ``size``: height and width."""
        import nvidia.dali.fn as fn
        import nvidia.dali.types as types

        return fn.resize(
            images,
            size=size,
            roi_start=self._source(f"roi_start{suffix}", "FLOAT", 1),
            roi_end=self._source(f"roi_end{suffix}", "FLOAT", 1),
            interp_type=types.INTERP_LINEAR,
            antialias=True,
        )

    def _feed(
        self,
        encoded: list[np.ndarray],
        regions: np.ndarray,
        sizes: Sequence[tuple[int, int]] | None,
        image_width: np.ndarray,
        image_height: np.ndarray,
    ) -> np.ndarray:
        """Feed encoded images and the part of each that is decoded: what encloses its ``regions`` [K, n, 4]. Where they
        are cut out of a whole image that is resized (to ``sizes``: height, width), with what the filter reads around
        them. Returns the regions within those parts.
        """
        x0, y0, x1, y1 = np.moveaxis(regions, 2, 0)
        margin_x = margin_y = np.zeros(x0.shape)
        if sizes is not None:
            height, width = np.array(sizes, np.float64).T[:, :, None]
            # The antialiasing filter reads outside the region by its own support: one output pixel, in input pixels.
            margin_x = np.maximum(4, np.ceil((x1 - x0) / width) + 1)
            margin_y = np.maximum(4, np.ceil((y1 - y0) / height) + 1)
        left, top = (np.maximum(0, np.floor(a).min(0)) for a in (x0 - margin_x, y0 - margin_y))
        right = np.minimum(image_width, np.ceil(x1 + margin_x).max(0))
        bottom = np.minimum(image_height, np.ceil(y1 + margin_y).max(0))
        self._pipeline.feed_input("encoded", encoded)
        self._pipeline.feed_input("anchor", np.stack([top, left], 1).astype(np.int32))
        self._pipeline.feed_input("shape", np.stack([bottom - top, right - left], 1).astype(np.int32))
        return regions - np.stack([left, top, left, top], 1)

    def _feed_region(self, region: np.ndarray, suffix: str) -> None:
        """``region`` [n, 4] of the decoded parts, for ``_resized``."""
        self._pipeline.feed_input(f"roi_start{suffix}", np.ascontiguousarray(region[:, [1, 0]], np.float32))
        self._pipeline.feed_input(f"roi_end{suffix}", np.ascontiguousarray(region[:, [3, 2]], np.float32))

    def _prime(self, depth: int) -> None:
        """Run the pipeline on gray pixels: its first schedule_run takes as many batches as it may prefetch."""
        gray = {"anchor": np.zeros((1, 2), np.int32), "shape": np.ones((1, 2), np.int32), **self._gray()}
        for _ in range(depth):
            self._pipeline.feed_input("encoded", [gray_jpeg()])
            for name, value in gray.items():
                self._pipeline.feed_input(name, value)
        self._pipeline.schedule_run()
        for _ in range(depth):
            self._pipeline.share_outputs()
            self._pipeline.release_outputs()

    def _collect(self, shapes: Sequence[tuple[int, ...]], dtype: torch.dtype) -> list[torch.Tensor]:
        """Copies of the oldest batch's outputs. Raises RuntimeError if an image is undecodable."""
        outputs = self._pipeline.share_outputs()
        if self.settings.device == "cuda":
            from nvidia.dali.plugin.pytorch import feed_ndarray

            self.copying()
            device = torch.device("cuda", self.settings.device_id)
            pixels = [torch.empty(shape, dtype=dtype, device=device) for shape in shapes]
            for output, copy in zip(outputs, pixels, strict=True):
                feed_ndarray(output.as_tensor(), copy, cuda_stream=torch.cuda.current_stream(device))
        else:
            views = [np.asarray(output.as_tensor()) for output in outputs]  # DALI reuses what they show
            assert [view.shape for view in views] == list(shapes)
            pixels = [self._buffers.copy_of(view) for view in views]
        self._pipeline.release_outputs()
        return pixels


class Decoder(AnyDecoder[Views, torch.Tensor]):
    """One view of each image: pixels [N, S, S, 3] float32 or float16, in order, less ``mean``.

    mean: [3] or [3, S, S] float32. of_whole: the view is cut out of the resized whole image (tests), else the region is
    cut out and resized (training): the filter does not see what is around it.
    """

    def __init__(
        self, settings: DecodeSettings, batch_size: int, crop: int, mean: np.ndarray, *, of_whole: bool
    ) -> None:
        self.crop, self._sizes = crop, [(crop, crop)] if of_whole else None
        self._channel_mean = mean if mean.ndim == 1 else np.zeros(3, np.float32)
        self._mean_image = torch.from_numpy(mean.transpose(1, 2, 0).copy()) if mean.ndim == 3 else None
        self._counts: deque[int] = deque()
        super().__init__(settings, batch_size, settings.prefetch_batches)

    def _graph(self) -> Any:
        import nvidia.dali.fn as fn
        import nvidia.dali.types as types

        return fn.crop_mirror_normalize(
            self._resized(self._decoded(), "", [self.crop, self.crop]),
            mirror=self._source("flip", "INT32", 0),
            mean=self._source("shift", "FLOAT", 1),
            dtype=types.FLOAT16 if self.settings.half else types.FLOAT,
            output_layout="HWC",  # channels last, as the convolutions want it
        )

    def _gray(self) -> dict[str, np.ndarray]:
        roi = {"roi_start": np.zeros((1, 2), np.float32), "roi_end": np.ones((1, 2), np.float32)}
        return {**roi, "flip": np.zeros(1, np.int32), "shift": np.zeros((1, 3), np.float32)}

    def submit(self, encoded: list[np.ndarray], views: Views, width: np.ndarray, height: np.ndarray) -> None:
        regions = np.stack([views.x0, views.y0, views.x1, views.y1], 1)[None]
        (region,) = self._feed(encoded, regions, self._sizes, width, height)
        self._feed_region(region, "")
        self._pipeline.feed_input("flip", views.flip.astype(np.int32))
        self._pipeline.feed_input("shift", (self._channel_mean - views.colour_shift).astype(np.float32))
        self._pipeline.schedule_run()
        self._counts.append(len(encoded))

    def collect(self) -> torch.Tensor:
        shape = (self._counts.popleft(), self.crop, self.crop, 3)
        pixels = self._collect([shape], torch.float16 if self.settings.half else torch.float32)[0]
        if self._mean_image is not None:
            self._mean_image = self._mean_image.to(pixels.device, pixels.dtype)
            pixels -= self._mean_image
        return pixels


class ManyDecoder(AnyDecoder[ManyViews, tuple[torch.Tensor, ...]]):
    """Several views of each image, which is decoded once: K tensors [N, height, width, 3] uint8, in order."""

    def __init__(self, settings: DecodeSettings, batch_size: int, num_views: int) -> None:
        self._num_views = num_views
        self._shapes: deque[list[tuple[int, ...]]] = deque()
        super().__init__(settings, batch_size, settings.prefetch_batches)

    def _graph(self) -> Any:
        images = self._decoded()
        return tuple(
            self._resized(images, f"{k}", self._source(f"size{k}", "FLOAT", 1)) for k in range(self._num_views)
        )

    def _gray(self) -> dict[str, np.ndarray]:
        corner, pixel = np.zeros((1, 2), np.float32), np.ones((1, 2), np.float32)
        gray: dict[str, np.ndarray] = {}
        for k in range(self._num_views):
            gray |= {f"roi_start{k}": corner, f"roi_end{k}": pixel, f"size{k}": pixel}
        return gray

    def submit(self, encoded: list[np.ndarray], views: ManyViews, width: np.ndarray, height: np.ndarray) -> None:
        # Batches may differ in their number of images and in the sizes of their views.
        regions = self._feed(encoded, views.regions, views.sizes, width, height)
        for k, (region, size) in enumerate(zip(regions, views.sizes, strict=True)):
            self._feed_region(region, f"{k}")
            self._pipeline.feed_input(f"size{k}", np.tile(np.array(size, np.float32), (len(encoded), 1)))
        self._pipeline.schedule_run()
        self._shapes.append([(len(encoded), *size, 3) for size in views.sizes])

    def collect(self) -> tuple[torch.Tensor, ...]:
        return tuple(self._collect(self._shapes.popleft(), torch.uint8))
