"""Stream → Batch, for training and test views: reads ahead, decodes ahead, and copes with broken images.

Legend: N images in a batch, 3 channels R, G, B, S = crop in pixels.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Generic

import numpy as np
import torch

from orchestrator.data.cpu_decoder import CpuDecoder
from orchestrator.data.decoder import AnyDecoder, Decoder, DecodeSettings, Pixels, Seen, gray_jpeg, is_jpeg
from orchestrator.data.sampling import Purpose, SampleStream
from orchestrator.data.shards import Split
from orchestrator.data.views import ColourAxes, TestView, TrainView, Views


def check_undecodable(split: Split, images: set[int], limit: int) -> None:
    """Raises ValueError for more than ``limit`` images that cannot be decoded and were not known as such."""
    if len(images) > limit:
        names = ", ".join(split.names[i].as_py() for i in sorted(images)[:20])
        raise ValueError(
            f"{len(images)} images of the {split.name} set cannot be decoded, more than "
            f"input.max_undecodable {limit}: {names}: prepare the data set again or raise it"
        )


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
class Job(Generic[Seen]):
    """One batch on its way: which images, seen how; ``encoded`` is filled by the reading thread."""

    positions: np.ndarray  # [N] int64: stream positions in training, −1 in an evaluation
    indices: np.ndarray  # [N] int64
    padding: np.ndarray  # [N] bool
    encoded: list[np.ndarray] = field(default_factory=list)
    views: Seen | None = None
    unreadable: np.ndarray | None = None  # [N] bool
    replaced: tuple[tuple[str, str], ...] = ()


class Feed(ABC, Generic[Seen, Pixels]):
    """Jobs in, batches out in order: bytes are read one thread ahead of the decoder, the decoder ahead of the step.

    An image that DALI cannot decode costs the whole batch and the pipeline (DALI names no sample): the images on
    their way are decoded singly to find it, the pipeline is built anew, and ``_stand_in`` says what takes its place.
    """

    def __init__(self, split: Split, settings: DecodeSettings, batch_size: int, max_undecodable: int) -> None:
        self.split, self.settings, self.batch_size = split, settings, batch_size
        self._max_undecodable = max_undecodable
        # Images that are no JPEG of their recorded size. Those that preparation has found (``split.decodable``) are
        # not among them: only what is found later counts towards the limit.
        self._broken: frozenset[int] = frozenset()
        # (position, image): a file cut off in its pixels decodes in some regions and not in others, so a failure tells
        # of one view alone. Else what is shown would depend on what this process has seen before.
        self._failed: frozenset[tuple[int, int]] = frozenset()
        self._decoder: AnyDecoder[Seen, Pixels] = self._new_decoder(settings, batch_size)
        self._threads = ThreadPoolExecutor(1, "read-images")
        self._reading: deque[Future[Job[Seen]]] = deque()
        self._decoding: deque[Job[Seen]] = deque()

    @abstractmethod
    def _new_decoder(self, settings: DecodeSettings, batch_size: int) -> AnyDecoder[Seen, Pixels]:
        """A decoder for batches of up to ``batch_size``."""

    @abstractmethod
    def _views(self, job: Job[Seen]) -> Seen:
        """Which region of each image is shown."""

    @abstractmethod
    def _stand_in(self, job: Job[Seen]) -> None:
        """Change ``job`` so that no undecodable image is in it, or mark those as unreadable."""

    def _prepare(self, original: Job[Seen]) -> Job[Seen]:
        """Regions and bytes of one batch. Runs in the reading thread."""
        while True:
            unreadable = np.zeros(len(original.indices), bool)
            job = replace(original, indices=original.indices.copy(), replaced=(), unreadable=unreadable)
            self._stand_in(job)
            job.encoded = self.split.read(job.indices)
            for i in np.flatnonzero(unreadable):
                job.encoded[i] = gray_jpeg()
            width, height = self._sizes(job)
            sound = [is_jpeg(*image) for image in zip(job.encoded, width.tolist(), height.tolist(), strict=True)]
            if all(sound):
                job.views = self._views(job)
                return job
            self._remember(broken=job.indices[~np.array(sound)].tolist())

    @property
    def undecodable(self) -> set[int]:
        """Images of which a view could not be decoded so far, those known from the preparation included."""
        return self._known | self._found()

    @cached_property
    def _known(self) -> set[int]:
        return set(np.flatnonzero(self.split.decodable == 0).tolist())

    def _found(self) -> set[int]:
        return {*self._broken, *(index for _, index in self._failed)}

    def _is_bad(self, position: int, index: int) -> bool:
        return not self.split.decodable[index] or index in self._broken or (position, index) in self._failed

    def _bad_places(self, job: Job[Seen]) -> list[bool]:
        return [self._is_bad(*pair) for pair in zip(job.positions.tolist(), job.indices.tolist(), strict=True)]

    def _remember(self, broken: Iterable[int] = (), failed: Iterable[tuple[int, int]] = ()) -> None:
        """Remember what cannot be decoded. Raises ValueError past the limit."""
        # New sets: another thread may be reading the old ones.
        self._broken, self._failed = self._broken | set(broken), self._failed | set(failed)
        check_undecodable(self.split, self._found(), self._max_undecodable)

    def _sizes(self, job: Job[Seen]) -> tuple[np.ndarray, np.ndarray]:
        width, height = self.split.width[job.indices].copy(), self.split.height[job.indices].copy()
        if job.unreadable is not None:
            width[job.unreadable] = height[job.unreadable] = 1
        return width, height

    def _run(self, jobs: Iterator[Job[Seen]]) -> Iterator[tuple[Job[Seen], Pixels]]:
        if self._reading or self._decoding:  # an iteration before this one was given up in the middle
            self._reading.clear()
            self._decoding.clear()
            self._renew_decoder()
        originals: deque[Job[Seen]] = deque()
        depth = self.settings.prefetch_batches
        exhausted = False
        while True:
            while not exhausted and len(self._reading) < depth:
                job = next(jobs, None)
                exhausted = job is None
                if job is not None:
                    originals.append(job)
                    self._reading.append(self._threads.submit(self._prepare, job))
            while self._reading and len(self._decoding) < self._decoder.depth:
                self._submit(self._reading.popleft().result())
            if not self._decoding:
                return
            try:
                pixels = self._decoder.collect()
            except RuntimeError as error:
                self._recover(list(originals)[: len(self._decoding)], error)
                continue
            originals.popleft()
            yield self._decoding.popleft(), pixels

    def _renew_decoder(self) -> None:
        self._decoder.close()
        self._decoder = self._new_decoder(self.settings, self.batch_size)

    def _submit(self, job: Job[Seen]) -> None:
        assert job.views is not None
        self._decoder.submit(job.encoded, job.views, *self._sizes(job))
        self._decoding.append(job)

    def _recover(self, originals: Sequence[Job[Seen]], error: RuntimeError) -> None:
        """Find what cannot be decoded among the batches on their way, and submit them again without it."""
        found: set[tuple[int, int]] = set()
        single: AnyDecoder[Seen, Pixels] | None = None
        for job in self._decoding:
            assert job.views is not None
            for i, pair in enumerate(zip(job.positions.tolist(), job.indices.tolist(), strict=True)):
                if self._is_bad(*pair) or pair in found:
                    continue
                single = single or self._new_decoder(replace(self.settings, prefetch_batches=1), 1)
                width, height = self.split.width[pair[1] : pair[1] + 1], self.split.height[pair[1] : pair[1] + 1]
                try:
                    single.submit([job.encoded[i]], job.views.of(i), width, height)
                    single.collect()
                except RuntimeError:
                    found.add(pair)
                    single = None
        if not found:
            raise error
        self._remember(failed=found)
        self._renew_decoder()
        self._decoding.clear()
        for job in originals:
            self._submit(self._threads.submit(self._prepare, job).result())

    def close(self) -> None:
        """Stop reading ahead and free the pipeline."""
        self._threads.shutdown(wait=True, cancel_futures=True)
        self.split.close()
        self._reading.clear()
        self._decoding.clear()
        self._decoder.close()
        del self._decoder


class _OneView(Feed[Views, torch.Tensor]):
    """Batches of one crop × crop view of each image, less the mean."""

    def __init__(
        self, split: Split, mean: Mean, settings: DecodeSettings, crop: int, batch_size: int, max_undecodable: int
    ) -> None:
        self.crop, self.mean = crop, mean.value
        if mean.value.ndim == 3 and mean.value.shape != (3, crop, crop):
            raise ValueError(f"mean image of {mean.value.shape} does not fit crops of {crop} pixels")
        super().__init__(split, settings, batch_size, max_undecodable)

    def _batch(self, job: Job[Views], pixels: torch.Tensor) -> Batch:
        assert job.unreadable is not None
        labels = torch.from_numpy(self.split.label[job.indices].astype(np.int64))
        return Batch(
            images=pixels.permute(0, 3, 1, 2),
            labels=labels.to(pixels.device, non_blocking=True),
            indices=job.indices,
            valid=~(job.padding | job.unreadable),
            num_unreadable=int((job.unreadable & ~job.padding).sum()),
            replaced=job.replaced,
        )


class TrainInput(_OneView):
    """An endless iterator over the training batches of one worker.

    ``positions_of(step)`` gives the stream positions [N] int64 that this worker sees in ``step``; ``ahead`` is told the
    first of them, before they are read; ``copying`` is told when a batch is about to be copied on the GPU.
    """

    def __init__(
        self,
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
    ) -> None:
        first = positions_of(start_step)
        self._copying = copying
        super().__init__(split, mean, settings, view.crop, len(first), max_undecodable)
        self.stream, self.view, self.axes = stream, view, axes
        self._positions_of, self._start_step, self._ahead = positions_of, start_step, ahead
        ahead(int(first[0]))
        self._batches = self._iterate()

    def _new_decoder(self, settings: DecodeSettings, batch_size: int) -> AnyDecoder[Views, torch.Tensor]:
        if settings.device == "cpu":
            return CpuDecoder(settings, batch_size, self.crop, self.mean)
        decoder = Decoder(settings, batch_size, self.crop, self.mean, of_whole=False)
        decoder.copying = self._copying
        return decoder

    def _jobs(self) -> Iterator[Job[Views]]:
        step = self._start_step
        while True:
            positions = self._positions_of(step)
            self._ahead(int(positions[0]))
            yield Job[Views](positions, self.stream.images(positions), np.zeros(len(positions), bool))
            step += 1

    def _iterate(self) -> Iterator[Batch]:
        for job, pixels in self._run(self._jobs()):
            yield self._batch(job, pixels)

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        return next(self._batches)

    def _views(self, job: Job[Views]) -> Views:
        return self.view.views(self.stream, job.positions, *self._sizes(job), self.axes)

    def _stand_in(self, job: Job[Views]) -> None:
        """Another image, drawn by (seed, position) alone: the same one whenever and wherever this step is done."""
        replaced = []
        for i in np.flatnonzero(self._bad_places(job)):
            bad, attempt = int(job.indices[i]), 0
            while self._is_bad(int(job.positions[i]), int(job.indices[i])):
                attempt += 1
                if attempt > 1000:
                    raise ValueError("hardly an image of the training set can be decoded: prepare the data set again")
                draws = self.stream.uniforms(job.positions[i : i + 1], Purpose.REPLACEMENT, attempt)
                job.indices[i] = int(draws[0, -1] * len(self.split))
            names = self.split.names
            replaced.append((names[bad].as_py(), names[int(job.indices[i])].as_py()))
        job.replaced = tuple(replaced)


class EvalInput(_OneView):
    """The evaluation batches of a split: fixed by the data set and ``batch_size`` alone, each padded to full size."""

    def __init__(
        self,
        split: Split,
        view: TestView,
        mean: Mean,
        settings: DecodeSettings,
        batch_size: int,
        max_undecodable: int,
    ) -> None:
        super().__init__(split, mean, settings, view.crop, batch_size, max_undecodable)
        self.view = view
        self.num_batches = -(-len(split) // batch_size)

    def _new_decoder(self, settings: DecodeSettings, batch_size: int) -> Decoder:
        return Decoder(settings, batch_size, self.crop, self.mean, of_whole=True)

    def batches(self, rank: int, size: int) -> Iterator[Batch]:
        """The batches of worker ``rank`` of ``size``: numbers rank, rank + size, …, each whole."""
        return (self._batch(job, pixels) for job, pixels in self._run(self._jobs(rank, size)))

    def _jobs(self, rank: int, size: int) -> Iterator[Job[Views]]:
        for number in range(rank, self.num_batches, size):
            indices = np.arange(number * self.batch_size, (number + 1) * self.batch_size)
            padding = indices >= len(self.split)
            yield Job[Views](np.full(len(indices), -1), np.where(padding, 0, indices), padding)

    def _views(self, job: Job[Views]) -> Views:
        return self.view.views(*self._sizes(job))

    def _stand_in(self, job: Job[Views]) -> None:
        assert job.unreadable is not None
        job.unreadable[:] = self._bad_places(job)
