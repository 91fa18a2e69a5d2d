"""Which region of an image a network sees: the geometry and colour of training and test views, as pure functions.

A view never touches pixels: it gives the region of the *stored* image (EXIF orientation ignored, as in the paper's
Caffe) that is decoded and then resized to crop × crop. Legend: n images, coordinates in pixels of the stored image.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from orchestrator.config import CropStyle
from orchestrator.data.sampling import Purpose, SampleStream

Region = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]  # x0, y0, x1, y1, each [n] float64


@dataclass(frozen=True)
class Views:
    """n views. Regions are [x0, x1) × [y0, y1) with fractional borders; shifts are added on the 0–255 scale."""

    x0: np.ndarray  # [n] float64
    y0: np.ndarray
    x1: np.ndarray
    y1: np.ndarray
    flip: np.ndarray  # [n] bool: mirrored left to right after resizing
    colour_shift: np.ndarray  # [n, 3] float32, RGB


@dataclass(frozen=True)
class ColourAxes:
    """Principal axes of RGB over the training set: eigenvalues [3], eigenvectors [3, 3] as columns, rows R, G, B.

    On the 0–255 scale (a covariance in units of 255²).
    """

    eigenvalues: np.ndarray
    eigenvectors: np.ndarray

    def shifts(self, alphas: np.ndarray) -> np.ndarray:
        """AlexNet's colour shift V·(α∘λ) for alphas [n, 3]: [n, 3] float32 on the 0–255 scale.

        AlexNet's eigenvalues are of RGB in [0, 1] (fb.resnet.torch lists 0.2175, 0.0188, 0.0045): λ/255², and the
        shift times 255.
        """
        return ((alphas * (self.eigenvalues / 255.0)) @ self.eigenvectors.T).astype(np.float32)


def resized(width: np.ndarray, height: np.ndarray, shorter: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Width and height [n] int64 after resizing the shorter side to ``shorter``, aspect kept, rounded half up."""
    scale = shorter / np.minimum(width, height)
    return np.floor(width * scale + 0.5).astype(np.int64), np.floor(height * scale + 0.5).astype(np.int64)


def _crop_of_resized(
    width: np.ndarray, height: np.ndarray, shorter: np.ndarray, crop: int, where_x: np.ndarray, where_y: np.ndarray
) -> Region:
    """Region of the stored image under a crop × crop window of the resized one; where_* place it in whole pixels."""
    new_width, new_height = resized(width, height, shorter)
    left, top = where_x * (new_width - crop + 1), where_y * (new_height - crop + 1)
    left, top = np.floor(left).astype(np.int64), np.floor(top).astype(np.int64)
    step_x, step_y = width / new_width, height / new_height
    return left * step_x, top * step_y, (left + crop) * step_x, (top + crop) * step_y


@dataclass(frozen=True)
class TrainView:
    """The training view of ``crop`` × ``crop`` pixels. Raises ValueError for sizes that do not fit together."""

    crop: int = 224
    style: CropStyle = CropStyle.SCALE_JITTER
    scale_min: int = 256
    scale_max: int = 480
    area_min: float = 0.08
    flip: bool = True
    colour_std: float = 0.1  # of α; 0: no colour augmentation

    def __post_init__(self) -> None:
        if self.crop < 1:
            raise ValueError(f"input.crop_px {self.crop} must be at least 1")
        if self.style is CropStyle.SCALE_JITTER and not self.crop <= self.scale_min <= self.scale_max:
            raise ValueError(
                f"input.crop_px {self.crop} ≤ scale_min_px {self.scale_min} ≤ scale_max_px {self.scale_max} does not "
                "hold: change them together (the paper: 224, 256, 480)"
            )
        if not 0 < self.area_min <= 1:
            raise ValueError(f"input.area_min {self.area_min} must be in (0, 1]")

    def views(
        self, stream: SampleStream, positions: np.ndarray, width: np.ndarray, height: np.ndarray, axes: ColourAxes
    ) -> Views:
        """Views of the images (sizes [n] in pixels) at the stream positions [n] int64."""
        n = len(positions)
        match self.style:
            case CropStyle.SCALE_JITTER:
                u = stream.uniforms(positions, Purpose.SCALE_AND_CROP, 3)
                shorter = self.scale_min + np.floor(u[:, 0] * (self.scale_max - self.scale_min + 1))
                region = _crop_of_resized(width, height, shorter, self.crop, u[:, 1], u[:, 2])
            case CropStyle.RANDOM_AREA:
                region = self._random_area(stream, positions, width, height)
        flip = np.zeros(n, bool)
        if self.flip:
            flip = stream.uniforms(positions, Purpose.FLIP, 1)[:, 0] < 0.5
        shift = np.zeros((n, 3), np.float32)
        if self.colour_std > 0:
            shift = axes.shifts(self.colour_std * stream.normals(positions, Purpose.COLOUR, 3))
        return Views(*region, flip=flip, colour_shift=shift)

    def _random_area(
        self, stream: SampleStream, positions: np.ndarray, width: np.ndarray, height: np.ndarray
    ) -> Region:
        """Ten tries of area in [area_min, 1] and aspect in [3/4, 4/3], else the largest centre crop of such aspect.

        The rule of torchvision's RandomResizedCrop.
        """
        n, tries = len(positions), 10
        u = stream.uniforms(positions, Purpose.SCALE_AND_CROP, 4 * tries).reshape(n, tries, 4)
        width, height = width.astype(np.float64), height.astype(np.float64)
        area = (self.area_min + u[:, :, 0] * (1 - self.area_min)) * (width * height)[:, None]
        aspect = np.exp(np.log(3 / 4) + u[:, :, 1] * (np.log(4 / 3) - np.log(3 / 4)))
        w, h = np.round(np.sqrt(area * aspect)), np.round(np.sqrt(area / aspect))
        fits = (w >= 1) & (h >= 1) & (w <= width[:, None]) & (h <= height[:, None])
        first = fits.argmax(axis=1)
        rows = np.arange(n)
        w, h, found = w[rows, first], h[rows, first], fits.any(axis=1)
        x = np.floor(u[rows, first, 2] * (width - w + 1))
        y = np.floor(u[rows, first, 3] * (height - h + 1))
        fallback_w = np.minimum(width, np.round(height * 4 / 3))
        fallback_h = np.minimum(height, np.round(width * 4 / 3))
        w, h = np.where(found, w, fallback_w), np.where(found, h, fallback_h)
        x = np.where(found, x, np.floor((width - w) / 2))
        y = np.where(found, y, np.floor((height - h) / 2))
        return x, y, x + w, y + h


@dataclass(frozen=True)
class TestView:
    """The 1-crop test view: shorter side resized to ``shorter_side`` pixels, centre ``crop`` × ``crop``."""

    __test__ = False  # no test class for pytest

    crop: int = 224
    shorter_side: int = 256

    def __post_init__(self) -> None:
        if not 1 <= self.crop <= self.shorter_side:
            raise ValueError(
                f"input.crop_px {self.crop} is larger than input.test_shorter_side_px {self.shorter_side}: raise that"
            )

    def views(self, width: np.ndarray, height: np.ndarray) -> Views:
        """Views of n images of the sizes given [n] in pixels."""
        n = len(width)
        shorter = np.full(n, self.shorter_side)
        new_width, new_height = resized(width, height, shorter)
        # The middle, half a pixel left or up where it does not divide; + 0.5 keeps the floor off the borders.
        where_x = ((new_width - self.crop) // 2 + 0.5) / (new_width - self.crop + 1)
        where_y = ((new_height - self.crop) // 2 + 0.5) / (new_height - self.crop + 1)
        region = _crop_of_resized(width, height, shorter, self.crop, where_x, where_y)
        return Views(*region, flip=np.zeros(n, bool), colour_shift=np.zeros((n, 3), np.float32))
