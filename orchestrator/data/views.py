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

    def of(self, i: int) -> Views:
        """The view of image ``i`` alone."""
        return Views(*(getattr(self, f)[i : i + 1] for f in Views.__dataclass_fields__))


@dataclass(frozen=True)
class ManyViews:
    """K views of each of n images, view k of them all resized to ``sizes[k]``: height and width in pixels."""

    regions: np.ndarray  # [K, n, 4] float64: x0, y0, x1, y1 as of ``Views``
    sizes: tuple[tuple[int, int], ...]

    def of(self, i: int) -> ManyViews:
        """The views of image ``i`` alone."""
        return ManyViews(self.regions[:, i : i + 1], self.sizes)


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
    """Region of the stored image under a crop × crop window of the resized one; where_* place it.

    It begins at whole pixels of the stored image, not of the resized one: there decoding can begin, and resizing.
    """
    new_width, new_height = resized(width, height, shorter)
    starts, ends = [], []
    for side, new_side, where in ((width, new_width, where_x), (height, new_height, where_y)):
        seen = crop * side / new_side
        starts.append(np.floor(where * (np.floor(side - seen + 1e-6) + 1)))  # side − seen is rounded: 0 may be −1e-14
        ends.append(np.minimum(side, starts[-1] + seen))
    return starts[0], starts[1], ends[0], ends[1]


def _window(step_x: np.ndarray, step_y: np.ndarray, left: np.ndarray, top: np.ndarray, crop: int) -> Region:
    """Region of the stored image under a crop × crop window of the resized one, whose pixels are step_* wide in it."""
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
    padding: int = 4  # pixels around the image, of a padded crop

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
        if self.padding < 0:
            raise ValueError(f"input.padding_px {self.padding} must not be negative")

    def windows(self, stream: SampleStream, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of a padded crop: left and top [n] int64 in the padded image, and whether it is mirrored [n] bool."""
        assert self.style is CropStyle.PADDED
        u = stream.uniforms(positions, Purpose.SCALE_AND_CROP, 2)
        left, top = np.floor(u * (2 * self.padding + 1)).astype(np.int64).T
        return left, top, self._flips(stream, positions)

    def colour_shifts(self, stream: SampleStream, positions: np.ndarray, axes: ColourAxes) -> np.ndarray:
        """What is added to each image: [n, 3] float32 on the 0–255 scale."""
        return axes.shifts(self.colour_std * stream.normals(positions, Purpose.COLOUR, 3))

    def _flips(self, stream: SampleStream, positions: np.ndarray) -> np.ndarray:
        if not self.flip:
            return np.zeros(len(positions), bool)
        return stream.uniforms(positions, Purpose.FLIP, 1)[:, 0] < 0.5

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
            case CropStyle.PADDED:
                raise AssertionError("a padded crop is no region of the stored image: see windows()")
        shift = np.zeros((n, 3), np.float32)
        if self.colour_std > 0:
            shift = self.colour_shifts(stream, positions, axes)
        return Views(*region, flip=self._flips(stream, positions), colour_shift=shift)

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
        new_width, new_height = resized(width, height, np.full(n, self.shorter_side))
        # The middle, half a pixel left or up where it does not divide.
        left, top = (new_width - self.crop) // 2, (new_height - self.crop) // 2
        region = _window(width / new_width, height / new_height, left, top, self.crop)
        return Views(*region, flip=np.zeros(n, bool), colour_shift=np.zeros((n, 3), np.float32))


@dataclass(frozen=True)
class CropViews:
    """Test views that are crops: shorter side resized to ``shorter_side`` pixels, the centre ``crop`` × ``crop``.

    corners: the four corners too, before the centre: upper left, upper right, lower left, lower right.
    """

    crop: int = 224
    shorter_side: int = 256
    corners: bool = False

    def __post_init__(self) -> None:
        TestView(self.crop, self.shorter_side)  # the same sizes fit together

    def sizes(self, width: np.ndarray, height: np.ndarray) -> np.ndarray:
        """Height and width of every view of n images: [n, K, 2] int64."""
        return np.full((len(width), 5 if self.corners else 1, 2), self.crop)

    def regions(self, width: np.ndarray, height: np.ndarray) -> np.ndarray:
        """Regions of every view of n images: [K, n, 4] float64."""
        new_width, new_height = resized(width, height, np.full(len(width), self.shorter_side))
        right, bottom = new_width - self.crop, new_height - self.crop
        places = [(right // 2, bottom // 2)]
        if self.corners:
            places = [(0 * right, 0 * bottom), (right, 0 * bottom), (0 * right, bottom), (right, bottom), *places]
        steps = width / new_width, height / new_height
        return np.stack([np.stack(_window(*steps, left, top, self.crop), 1) for left, top in places])


@dataclass(frozen=True)
class ScaleViews:
    """Test views that are whole images: one for each of ``shorter_sides``, pixels, aspect kept.

    The longer side is cut to ``longest`` times the shorter one, around the middle: else a sliver of an image would
    have no bound.
    """

    shorter_sides: tuple[int, ...] = (224, 256, 384, 480, 640)
    longest: int = 4

    def sizes(self, width: np.ndarray, height: np.ndarray) -> np.ndarray:
        """Height and width of every view of n images: [n, K, 2] int64."""
        cut = self.cut(width, height)
        each = [resized(*cut, np.full(len(width), shorter)) for shorter in self.shorter_sides]
        return np.stack([np.stack((new_height, new_width), 1) for new_width, new_height in each], 1)

    def regions(self, width: np.ndarray, height: np.ndarray) -> np.ndarray:
        """Regions of every view of n images: [K, n, 4] float64."""
        cut_width, cut_height = self.cut(width, height)
        left, top = (width - cut_width) // 2, (height - cut_height) // 2
        region = np.stack((left, top, left + cut_width, top + cut_height), 1).astype(np.float64)
        return np.broadcast_to(region, (len(self.shorter_sides), *region.shape))

    def cut(self, width: np.ndarray, height: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Width and height [n] int64 that are seen of images of the sizes given."""
        width, height = width.astype(np.int64), height.astype(np.int64)
        return np.minimum(width, self.longest * height), np.minimum(height, self.longest * width)
