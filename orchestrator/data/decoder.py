"""Encoded images and regions in, pixels out, on CPU and GPU. The only door to DALI.

Only the region that encloses a view is decoded, then resized to the crop. Legend: N images in a batch, S = crop in
pixels.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from PIL import Image

from orchestrator.data.views import Views


@cache
def gray_jpeg() -> np.ndarray:
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


class Decoder:
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

    def submit(
        self, encoded: list[np.ndarray], views: Views, mean: np.ndarray, width: np.ndarray, height: np.ndarray
    ) -> None:
        """Feed one batch: N encoded images [bytes] uint8, their views, and their width and height [N] in pixels.

        ``mean`` [3] float32 is subtracted. Bytes that are no JPEG of that size may crash the process: see ``is_jpeg``.
        """
        v = views
        feed = self._pipeline.feed_input
        # The antialiasing filter reads outside the region by its own support: one output pixel, in input pixels.
        margin_x = np.maximum(4, np.ceil((v.x1 - v.x0) / self.crop) + 1)
        margin_y = np.maximum(4, np.ceil((v.y1 - v.y0) / self.crop) + 1)
        left, top = np.maximum(0, np.floor(v.x0 - margin_x)), np.maximum(0, np.floor(v.y0 - margin_y))
        right, bottom = np.minimum(width, np.ceil(v.x1 + margin_x)), np.minimum(height, np.ceil(v.y1 + margin_y))
        feed("encoded", encoded)
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
        gray = {"encoded": [gray_jpeg()], "flip": np.zeros(1, np.int32)}
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
