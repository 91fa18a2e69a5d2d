"""A network as a protocol applies it: from the views of a batch of images to their scores."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from orchestrator.data.scoring_input import ViewedBatch
from orchestrator.evaluation.protocols import Procedure, passes, probabilities, said_of_view


class TestedNetwork:
    """``model`` under a procedure; a context, within which the model is in evaluation mode.

    mean: [3, S, S] or [3] float32 on the 0–255 scale. batch_megapixels: 10^6 pixels of views, mirror images included,
    that go through the network at a time. autocast: what convolutions and products compute in; softmax and averages are
    float32. N images in a batch, C classes.
    """

    __test__ = False  # no test class for pytest

    def __init__(
        self,
        model: nn.Module,
        mean: Tensor,
        procedure: Procedure,
        batch_megapixels: float,
        autocast: torch.dtype | None,
    ) -> None:
        self._device = next(model.parameters()).device
        self._model: Any = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stubs
        self._procedure, self._megapixels, self._autocast = procedure, batch_megapixels, autocast
        mean = mean.to(self._device)
        self._channel_mean = (mean if mean.ndim == 1 else mean.mean((1, 2)))[:, None, None]
        self._mean_image = mean if mean.ndim == 3 else self._channel_mean
        self._window = 0

    def __enter__(self) -> TestedNetwork:
        self._was = self._model.training, torch.backends.cudnn.benchmark
        self._model.eval()
        if self._procedure.slides:
            # cuDNN would try all its ways for each of a hundred sizes.
            torch.backends.cudnn.benchmark = False
            crop_px = self._procedure.crop_px
            with torch.inference_mode(), self._casting():  # as wide as the features of one crop
                features = self._model.forward_features(torch.zeros(1, 3, crop_px, crop_px, device=self._device))
            self._window = features.shape[2]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        was_training, torch.backends.cudnn.benchmark = self._was
        self._model.train(was_training)

    @torch.inference_mode()
    def __call__(self, batch: ViewedBatch, alive: Callable[[], None] = lambda: None) -> Tensor:
        """Scores [N, C] float32, on the device, which is not waited for. ``alive`` is told of every pass."""
        said = []
        for view in batch.views:
            pieces = []
            for images in passes(self._procedure, view, self._megapixels):
                alive()
                pieces.append(said_of_view(self._procedure, self._logits(images.permute(0, 3, 1, 2).float())))
            said.append(torch.cat(pieces))
        return probabilities(self._procedure, said)

    def _logits(self, images: Tensor) -> Tensor:
        """images [n, 3, h, w] on the 0–255 scale → [n or 2n, C], or [n or 2n, C, positions…] where it slides."""
        if self._procedure.mirrored:
            images = torch.cat([images, images.flip(3)])
        crop_px = self._procedure.crop_px
        images = images - (self._mean_image if images.shape[2:] == (crop_px, crop_px) else self._channel_mean)
        images = images.contiguous(memory_format=torch.channels_last)
        with self._casting():
            if self._procedure.slides:
                return self._model.classify_windows(self._model.forward_features(images), self._window)
            return self._model(images)

    def _casting(self) -> torch.autocast:
        return torch.autocast(self._device.type, self._autocast or torch.bfloat16, enabled=self._autocast is not None)
