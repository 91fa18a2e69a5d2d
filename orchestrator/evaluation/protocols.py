"""How a trained network is tested: what a protocol asks for, and in which batches and parts a split is tested. Pure.

Legend: N images, K views of each, h × w pixels of a view, C classes.
"""

from __future__ import annotations

import typing
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from orchestrator.config import Average, Protocol, TrainConfig
from orchestrator.data.shards import DataSet, Split
from orchestrator.data.views import CropViews, ScaleViews
from orchestrator.plain import to_plain

PAPER_SCALES_PX, PAPER_CROP_PX = (224, 256, 384, 480, 640), 224

_LONGEST_SIDE = 4  # times the shorter one
# Parts are what an interruption loses and what workers share: many, and not too small for deep batches.
_PARTS, _LEAST_PART, _LARGEST_PART = 96, 8, 512
# Of stored images that are decoded in one batch: 100 MB. A larger image is a batch of its own.
_DECODED_MEGAPIXELS = 32.0
# All views of a batch, as bytes, against what goes through the network at a time, as activations.
_VIEWS_PER_PASS = 8.0


@dataclass(frozen=True)
class Procedure:
    """One protocol for one kind of input; its JSON form is part of the name of what is scored so.

    shorter_sides_px: to which images are resized; mirrored: every view mirrored too; longest_side: whole images are
    cut to so many times their shorter side, 0: crops are taken of them.
    """

    kind: Protocol
    crop_px: int
    shorter_sides_px: tuple[int, ...]
    average: Average
    mirrored: bool
    longest_side: int

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return typing.cast(dict[str, Any], to_plain(self))

    @property
    def slides(self) -> bool:
        """Whether the network is applied to whole images, at every position."""
        return self.kind is Protocol.MULTI_SCALE

    @property
    def view(self) -> CropViews | ScaleViews:
        """Which regions of an image are seen."""
        if self.slides:
            return ScaleViews(self.shorter_sides_px, self.longest_side)
        return CropViews(self.crop_px, self.shorter_sides_px[0], corners=self.kind is Protocol.TEN_CROP)


def procedure_of(protocol: Protocol, config: TrainConfig) -> Procedure:
    """What ``protocol`` comes to for the input of ``config``. Raises ValueError for sizes that do not fit together."""
    crop_px, scales_px = config.input.crop_px, config.evaluation.scales_px
    average = config.evaluation.average
    match protocol:
        case Protocol.ONE_CROP:  # there is nothing to average
            found = Procedure(protocol, crop_px, (config.input.test_shorter_side_px,), Average.SOFTMAX, False, 0)
        case Protocol.TEN_CROP:
            found = Procedure(protocol, crop_px, (config.input.test_shorter_side_px,), average, True, 0)
        case Protocol.MULTI_SCALE:
            scales_px = scales_px or tuple(round(px * crop_px / PAPER_CROP_PX) for px in PAPER_SCALES_PX)
            found = Procedure(protocol, crop_px, tuple(sorted(scales_px)), average, True, _LONGEST_SIDE)
    assert found.view  # its sizes are checked
    return found


def check_protocols(config: TrainConfig, data: DataSet, model: nn.Module) -> None:
    """Refuse what an evaluation after training would refuse. ``model`` may be on the meta device. Raises ValueError."""
    for protocol in config.evaluation.protocols:
        procedure_of(protocol, config)
        check_model(protocol, model)
    if config.evaluation.protocols:
        have = data.manifest.splits
        for name in config.evaluation.splits:
            if name not in have:
                raise ValueError(
                    f"the data set {data.storage.url!r} has no split {name!r} (it has {', '.join(have)}): name those "
                    "that are to be scored with --evaluation.splits"
                )
            check_split(data, data.split(name))


def check_model(protocol: Protocol, model: nn.Module) -> None:
    """Refuse a network that cannot be tested so. Raises ValueError."""
    needed = ("forward_features", "classify_windows")
    if protocol is Protocol.MULTI_SCALE and not all(callable(getattr(model, name, None)) for name in needed):
        raise ValueError(
            f"evaluation.protocols: multi_scale slides a network over whole images, and {type(model).__name__} has no "
            "forward_features(images) and classify_windows(features, window): give it both, as "
            "orchestrator.models.ResNet has them, or leave multi_scale out"
        )


def check_split(data: DataSet, split: Split) -> None:
    """Refuse a split that has nothing to score, or labels outside the classes. Raises ValueError."""
    if not len(split):
        raise ValueError(f"the {split.name} split of {data.storage.url!r} is empty: prepare the data set again")
    if split.label.max() >= data.num_classes:
        raise ValueError(
            f"the {split.name} split of {data.storage.url!r} has the label {split.label.max()} where there are "
            f"{data.num_classes} classes: prepare the data set again"
        )


# -- batches and parts ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """All images of a split but those known to be undecodable, in parts, each of which has a result of its own.

    A part is a list of batches: indices [n] int64 of images whose views have the same sizes, so that a view of all of
    them is one tensor.
    """

    parts: tuple[tuple[np.ndarray, ...], ...]

    @property
    def largest_batch(self) -> int:
        """Images in the largest batch."""
        return max((len(batch) for part in self.parts for batch in part), default=0)

    def images(self, number: int) -> np.ndarray:
        """The images of part ``number``, in the order of its result: indices [n] int64."""
        return np.concatenate(self.parts[number])


def plan(procedure: Procedure, split: Split, batch_megapixels: float) -> Plan:
    """Batches and parts: fixed by the data set, the procedure and ``batch_megapixels`` alone."""
    images = np.flatnonzero(split.decodable)
    width, height = split.width[images], split.height[images]
    sizes = procedure.view.sizes(width, height)
    # The same sizes side by side; the largest first, so that what does not fit into memory shows at once.
    by_size = [sizes[:, k, side] for k in range(sizes.shape[1]) for side in range(2)]
    order = np.lexsort((images, *by_size, -sizes.prod(2).sum(1)))
    stored = width.astype(np.int64) * height
    count = min(_LARGEST_PART, max(_LEAST_PART, -(-len(images) // _PARTS)))
    parts = []
    for start in range(0, len(images), count):
        rows = order[start : start + count]
        batches, begin, decoded = [], 0, 0.0
        for i, row in enumerate(rows.tolist()):
            full = i - begin >= _batch_size(procedure, sizes[row], batch_megapixels)
            too_large = decoded + stored[row] > _DECODED_MEGAPIXELS * 1e6
            if i > begin and (full or too_large or (sizes[row] != sizes[rows[begin]]).any()):
                batches.append(images[rows[begin:i]])
                begin, decoded = i, 0.0
            decoded += stored[row]
        parts.append((*batches, images[rows[begin:]]))
    return Plan(tuple(parts))


def images_per_pass(procedure: Procedure, height: int, width: int, batch_megapixels: float) -> int:
    """Images whose view of these sizes, and its mirror image, go through the network at a time."""
    pixels = height * width * (2 if procedure.mirrored else 1)
    return max(1, int(batch_megapixels * 1e6 // pixels))


def passes(procedure: Procedure, view: Tensor, batch_megapixels: float) -> Iterator[Tensor]:
    """``view`` [N, h, w, 3] in pieces of N that go through the network at a time."""
    yield from view.split(images_per_pass(procedure, view.shape[1], view.shape[2], batch_megapixels))


def _batch_size(procedure: Procedure, sizes: np.ndarray, batch_megapixels: float) -> int:
    """Images that are decoded together: as many as the smallest view takes in a pass, as far as all views have room."""
    height, width = sizes[sizes.prod(1).argmin()].tolist()
    room = int(_VIEWS_PER_PASS * batch_megapixels * 1e6 // int(sizes.prod(1).sum()))
    return max(1, min(room, images_per_pass(procedure, height, width, batch_megapixels)))


# -- averages -------------------------------------------------------------------------------------------------------


def said_of_view(procedure: Procedure, logits: Tensor) -> Tensor:
    """What a view says, to be averaged over views: [n, C] float32 from logits [n or 2n, C] or [n or 2n, C, h, w].

    The second n are of the mirrored images. The average is over positions, then over the two.
    """
    said = logits.float()
    if procedure.average is Average.SOFTMAX:
        said = said.softmax(1)
    if said.ndim == 4:
        said = said.mean((2, 3))
    if procedure.mirrored:
        said = torch.stack(said.chunk(2)).mean(0)
    return said


def probabilities(procedure: Procedure, said: list[Tensor]) -> Tensor:
    """Scores [n, C] float32 from what each view says: probabilities, whatever was averaged."""
    mean = torch.stack(said).mean(0)
    return mean if procedure.average is Average.SOFTMAX else mean.softmax(1)
