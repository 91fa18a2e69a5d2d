"""DALI: stream → Batch, for training and test views, on CPU and GPU. The only door to DALI.

Region and scale are drawn first (``views``); only the enclosing region is decoded, then resized to the crop. Legend:
N images in a batch, C = 3 channels R, G, B, S = crop in pixels.
"""

from __future__ import annotations

import io
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from PIL import Image

from orchestrator.data.sampling import Purpose, SampleStream
from orchestrator.data.shards import Split
from orchestrator.data.views import ColourAxes, TestView, TrainView, Views


@cache
def _gray_jpeg() -> np.ndarray:
    """One gray pixel, [bytes] uint8: stands in for an image of an evaluation that cannot be decoded."""
    stream = io.BytesIO()
    Image.new("RGB", (1, 1), (128, 128, 128)).save(stream, "JPEG")
    return np.frombuffer(stream.getvalue(), np.uint8)


@dataclass(frozen=True)
class DecodeSettings:
    """How pixels are made. ``device`` "cpu" or "cuda"; on a GPU all of these are pinned, since they alter pixels.

    ``hw_decoder_share``: part of a batch that the GPU's JPEG engine decodes (0: CUDA cores and CPU only).
    """

    device: str = "cpu"
    device_id: int = 0
    num_threads: int = 1
    prefetch_batches: int = 2
    hw_decoder_share: float = 0.65
    half: bool = False  # float16 output instead of float32


@dataclass(frozen=True)
class Batch:
    """N images with their labels, on the device of the pipeline.

    images: [N, 3, S, S] float32 or float16, channels last in memory, mean subtracted, 0–255 scale
    labels: [N] int64 (−1: unlabelled)
    indices: [N] int64, on the host: which images of the split
    valid: [N] bool, on the host: False for padding and, in an evaluation, for what cannot be decoded
    num_unreadable: images of an evaluation that cannot be decoded: they count as wrong
    replaced: names of images that could not be decoded, each with the name of what stands in for it
    """

    images: torch.Tensor
    labels: torch.Tensor
    indices: np.ndarray
    valid: np.ndarray
    num_unreadable: int = 0
    replaced: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Mean:
    """What is subtracted: per channel [3], or per pixel [3, S, S], float32 on the 0–255 scale."""

    value: np.ndarray

    def __post_init__(self) -> None:
        assert self.value.dtype == np.float32
        assert self.value.shape == (3,) or (self.value.ndim == 3 and self.value.shape[0] == 3)


@dataclass
class _Job:
    """One batch on its way: which images, seen how; ``encoded`` is filled by the reading thread."""

    positions: np.ndarray  # [N] int64: stream positions in training, −1 in an evaluation
    indices: np.ndarray  # [N] int64
    padding: np.ndarray  # [N] bool
    encoded: list[np.ndarray] = field(default_factory=list)
    views: Views | None = None
    unreadable: np.ndarray | None = None  # [N] bool
    replaced: tuple[tuple[str, str], ...] = ()


class _Decoder:
    """A DALI pipeline that is fed explicitly: encoded images and regions in, pixels [N, S, S, 3] out, in order."""

    def __init__(self, settings: DecodeSettings, crop: int, batch_size: int) -> None:
        # Imported here: half a second and 200 MB that only a process with an input side pays.
        import nvidia.dali.fn as fn
        import nvidia.dali.types as types
        from nvidia.dali import pipeline_def

        self.settings, self.crop, self.batch_size = settings, crop, batch_size
        gpu = settings.device == "cuda"

        @pipeline_def(
            batch_size=batch_size,
            num_threads=settings.num_threads,
            device_id=settings.device_id if gpu else None,
            prefetch_queue_depth=settings.prefetch_batches,
        )
        def graph() -> Any:
            source = partial(fn.external_source, batch=True)
            encoded = source(name="encoded", dtype=types.UINT8, ndim=1)
            anchor = source(name="anchor", dtype=types.INT32, ndim=1)
            shape = source(name="shape", dtype=types.INT32, ndim=1)
            roi_start = source(name="roi_start", dtype=types.FLOAT, ndim=1)
            roi_end = source(name="roi_end", dtype=types.FLOAT, ndim=1)
            flip = source(name="flip", dtype=types.INT32, ndim=0)
            shift = source(name="shift", dtype=types.FLOAT, ndim=1)
            hardware: dict[str, Any] = {"hw_decoder_load": settings.hw_decoder_share} if gpu else {}
            images = fn.decoders.image_slice(
                encoded,
                anchor,
                shape,
                device="mixed" if gpu else "cpu",
                axes=[0, 1],
                output_type=types.RGB,
                adjust_orientation=False,  # the EXIF orientation is ignored: sizes in the index are as stored
                **hardware,
            )
            images = fn.resize(
                images,
                size=[crop, crop],
                roi_start=roi_start,
                roi_end=roi_end,
                interp_type=types.INTERP_LINEAR,
                antialias=True,
            )
            return fn.crop_mirror_normalize(
                images,
                mirror=flip,
                mean=shift,
                dtype=types.FLOAT16 if settings.half else types.FLOAT,
                output_layout="HWC",  # channels last, as the convolutions want it
            )

        self._pipeline = graph()
        self._pipeline.build()
        self._prime()

    def submit(self, job: _Job, mean: np.ndarray, width: np.ndarray, height: np.ndarray) -> None:
        """Feed one batch. ``mean`` [3] float32 is subtracted; width and height [N] in pixels."""
        v = job.views
        assert v is not None
        feed = self._pipeline.feed_input
        # The antialiasing filter reads outside the region by its own support: one output pixel, in input pixels.
        margin_x = np.maximum(4, np.ceil((v.x1 - v.x0) / self.crop) + 1)
        margin_y = np.maximum(4, np.ceil((v.y1 - v.y0) / self.crop) + 1)
        left, top = np.maximum(0, np.floor(v.x0 - margin_x)), np.maximum(0, np.floor(v.y0 - margin_y))
        right, bottom = np.minimum(width, np.ceil(v.x1 + margin_x)), np.minimum(height, np.ceil(v.y1 + margin_y))
        feed("encoded", job.encoded)
        feed("anchor", np.stack([top, left], 1).astype(np.int32))
        feed("shape", np.stack([bottom - top, right - left], 1).astype(np.int32))
        feed("roi_start", np.stack([v.y0 - top, v.x0 - left], 1).astype(np.float32))
        feed("roi_end", np.stack([v.y1 - top, v.x1 - left], 1).astype(np.float32))
        feed("flip", v.flip.astype(np.int32))
        feed("shift", (mean - v.colour_shift).astype(np.float32))
        self._pipeline.schedule_run()

    def _prime(self) -> None:
        """Run the pipeline on gray pixels: its first schedule_run takes as many batches as it may prefetch."""
        depth = self.settings.prefetch_batches
        gray = {"encoded": [_gray_jpeg()], "flip": np.zeros(1, np.int32)}
        corner, pixel = np.zeros((1, 2)), np.ones((1, 2))
        gray |= {"anchor": corner.astype(np.int32), "shape": pixel.astype(np.int32)}
        gray |= {"roi_start": corner.astype(np.float32), "roi_end": pixel.astype(np.float32)}
        gray |= {"shift": np.zeros((1, 3), np.float32)}
        for _ in range(depth):
            for name, value in gray.items():
                self._pipeline.feed_input(name, value)
        self._pipeline.schedule_run()
        for _ in range(depth):
            self.collect(1)

    def collect(self, count: int) -> torch.Tensor:
        """The oldest batch: [N, S, S, 3] on the pipeline's device. Raises RuntimeError if an image is undecodable."""
        shape = (count, self.crop, self.crop, 3)
        dtype = torch.float16 if self.settings.half else torch.float32
        if self.settings.device == "cuda":
            from nvidia.dali.plugin.pytorch import feed_ndarray

            (out,) = self._pipeline.share_outputs()
            pixels = torch.empty(shape, dtype=dtype, device=torch.device("cuda", self.settings.device_id))
            feed_ndarray(out.as_tensor(), pixels, cuda_stream=torch.cuda.current_stream(pixels.device))
        else:
            (out,) = self._pipeline.share_outputs()
            pixels = torch.from_numpy(np.array(out.as_tensor()))  # a copy: DALI reuses its buffer
        self._pipeline.release_outputs()
        return pixels


class _Feed:
    """Jobs in, batches out in order: bytes are read one thread ahead of the decoder, the decoder ahead of the step.

    An image that DALI cannot decode costs the whole batch and the pipeline (DALI names no sample): the images on
    their way are decoded singly to find it, the pipeline is built anew, and ``_stand_in`` says what takes its place.
    """

    def __init__(self, split: Split, mean: Mean, settings: DecodeSettings, crop: int, batch_size: int) -> None:
        self.split, self.settings, self.crop, self.batch_size = split, settings, crop, batch_size
        self.undecodable: set[int] = set(np.flatnonzero(split.decodable == 0).tolist())
        self._channel_mean = mean.value if mean.value.ndim == 1 else np.zeros(3, np.float32)
        self._mean_image: torch.Tensor | None = None
        if mean.value.ndim == 3:
            if mean.value.shape != (3, crop, crop):
                raise ValueError(f"mean image of {mean.value.shape} does not fit crops of {crop} pixels")
            self._mean_image = torch.from_numpy(mean.value.transpose(1, 2, 0).copy())
        self._decoder = _Decoder(settings, crop, batch_size)
        self._threads = ThreadPoolExecutor(1, "read-images")
        self._reading: deque[Future[_Job]] = deque()
        self._decoding: deque[_Job] = deque()

    def _views(self, job: _Job) -> Views:
        raise NotImplementedError

    def _stand_in(self, job: _Job) -> None:
        """Change ``job`` so that no undecodable image is in it, or mark those as unreadable."""
        raise NotImplementedError

    def _prepare(self, job: _Job) -> _Job:
        """Regions and bytes of one batch. Runs in the reading thread."""
        job = replace(job, indices=job.indices.copy(), replaced=(), unreadable=np.zeros(len(job.indices), bool))
        self._stand_in(job)
        job.views = self._views(job)
        job.encoded = self.split.read(job.indices)
        assert job.unreadable is not None
        for i in np.flatnonzero(job.unreadable):
            job.encoded[i] = _gray_jpeg()
        return job

    def _sizes(self, job: _Job) -> tuple[np.ndarray, np.ndarray]:
        width, height = self.split.width[job.indices].copy(), self.split.height[job.indices].copy()
        if job.unreadable is not None:
            width[job.unreadable] = height[job.unreadable] = 1
        return width, height

    def _run(self, jobs: Iterator[_Job]) -> Iterator[tuple[_Job, torch.Tensor]]:
        originals: deque[_Job] = deque()
        depth = self.settings.prefetch_batches
        exhausted = False
        while True:
            while not exhausted and len(self._reading) < depth:
                job = next(jobs, None)
                exhausted = job is None
                if job is not None:
                    originals.append(job)
                    self._reading.append(self._threads.submit(self._prepare, job))
            while self._reading and len(self._decoding) < depth:
                self._submit(self._reading.popleft().result())
            if not self._decoding:
                return
            try:
                pixels = self._decoder.collect(len(self._decoding[0].indices))
            except RuntimeError as error:
                self._recover(list(originals)[: len(self._decoding)], error)
                continue
            originals.popleft()
            if self._mean_image is not None:
                self._mean_image = self._mean_image.to(pixels.device, pixels.dtype)
                pixels -= self._mean_image
            yield self._decoding.popleft(), pixels.permute(0, 3, 1, 2)

    def _submit(self, job: _Job) -> None:
        self._decoder.submit(job, np.broadcast_to(self._channel_mean, (len(job.indices), 3)), *self._sizes(job))
        self._decoding.append(job)

    def _recover(self, originals: Sequence[_Job], error: RuntimeError) -> None:
        """Find what cannot be decoded among the batches on their way, and submit them again without it."""
        found = False
        single: _Decoder | None = None
        for job in self._decoding:
            assert job.views is not None
            for i, index in enumerate(job.indices.tolist()):
                if index in self.undecodable:
                    continue
                one = _Job(job.positions[i : i + 1], job.indices[i : i + 1], job.padding[i : i + 1])
                one.encoded = [job.encoded[i]]
                one.views = Views(*(getattr(job.views, f)[i : i + 1] for f in Views.__dataclass_fields__))
                single = single or _Decoder(replace(self.settings, prefetch_batches=1), self.crop, 1)
                try:
                    single.submit(one, np.zeros((1, 3), np.float32), *self._sizes(one))
                    single.collect(1)
                except RuntimeError:
                    self.undecodable.add(index)
                    found, single = True, None
        if not found:
            raise error
        self._decoder = _Decoder(self.settings, self.crop, self.batch_size)
        self._decoding.clear()
        for job in originals:
            self._submit(self._threads.submit(self._prepare, job).result())

    def _batch(self, job: _Job, pixels: torch.Tensor) -> Batch:
        assert job.unreadable is not None
        labels = torch.from_numpy(self.split.label[job.indices].astype(np.int64))
        return Batch(
            images=pixels,
            labels=labels.to(pixels.device, non_blocking=True),
            indices=job.indices,
            valid=~(job.padding | job.unreadable),
            num_unreadable=int((job.unreadable & ~job.padding).sum()),
            replaced=job.replaced,
        )

    def close(self) -> None:
        """Stop reading ahead and free the pipeline."""
        self._threads.shutdown(wait=True, cancel_futures=True)
        self.split.close()
        self._reading.clear()
        self._decoding.clear()
        del self._decoder


class TrainInput(_Feed):
    """An endless iterator over the training batches of one worker.

    ``positions_of(step)`` gives the stream positions [N] int64 that this worker sees in ``step``.
    """

    def __init__(
        self,
        split: Split,
        stream: SampleStream,
        view: TrainView,
        axes: ColourAxes,
        mean: Mean,
        settings: DecodeSettings,
        positions_of: partial[np.ndarray] | Any,
        start_step: int,
    ) -> None:
        super().__init__(split, mean, settings, view.crop, len(positions_of(start_step)))
        if len(self.undecodable) == len(split):
            raise ValueError("no image of the training set can be decoded: prepare the data set again")
        self.stream, self.view, self.axes = stream, view, axes
        self._positions_of, self._start_step = positions_of, start_step
        self._batches = self._iterate()

    def _jobs(self) -> Iterator[_Job]:
        step = self._start_step
        while True:
            positions = self._positions_of(step)
            yield _Job(positions, self.stream.images(positions), np.zeros(len(positions), bool))
            step += 1

    def _iterate(self) -> Iterator[Batch]:
        for job, pixels in self._run(self._jobs()):
            yield self._batch(job, pixels)

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        return next(self._batches)

    def _views(self, job: _Job) -> Views:
        return self.view.views(self.stream, job.positions, *self._sizes(job), self.axes)

    def _stand_in(self, job: _Job) -> None:
        """Another image, drawn by (seed, position) alone: the same one whenever and wherever this step is done."""
        replaced = []
        for i in np.flatnonzero([index in self.undecodable for index in job.indices.tolist()]):
            bad, attempt = int(job.indices[i]), 0
            while int(job.indices[i]) in self.undecodable:
                attempt += 1
                draws = self.stream.uniforms(job.positions[i : i + 1], Purpose.REPLACEMENT, attempt)
                job.indices[i] = int(draws[0, -1] * len(self.split))
            names = self.split.names
            replaced.append((names[bad].as_py(), names[int(job.indices[i])].as_py()))
        job.replaced = tuple(replaced)


class EvalInput(_Feed):
    """The evaluation batches of a split: fixed by the data set and ``batch_size`` alone, each padded to full size."""

    def __init__(self, split: Split, view: TestView, mean: Mean, settings: DecodeSettings, batch_size: int) -> None:
        super().__init__(split, mean, settings, view.crop, batch_size)
        self.view = view
        self.num_batches = -(-len(split) // batch_size)

    def batches(self, rank: int, size: int) -> Iterator[Batch]:
        """The batches of worker ``rank`` of ``size``: numbers rank, rank + size, …, each whole."""
        return (self._batch(job, pixels) for job, pixels in self._run(self._jobs(rank, size)))

    def _jobs(self, rank: int, size: int) -> Iterator[_Job]:
        for number in range(rank, self.num_batches, size):
            indices = np.arange(number * self.batch_size, (number + 1) * self.batch_size)
            padding = indices >= len(self.split)
            yield _Job(np.full(len(indices), -1), np.where(padding, 0, indices), padding)

    def _views(self, job: _Job) -> Views:
        return self.view.views(*self._sizes(job))

    def _stand_in(self, job: _Job) -> None:
        assert job.unreadable is not None
        job.unreadable[:] = [index in self.undecodable for index in job.indices.tolist()]
