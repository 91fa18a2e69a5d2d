"""Mean image, channel means and colour covariance of a training set, from exact integer sums.

Everything is on the 0–255 scale, channels in the order R, G, B, over *centre test views*: shorter side resized to
``round(crop * 256 / 224)`` pixels (bilinear, antialiased), central ``crop`` × ``crop`` pixels, EXIF orientation
ignored. The sums are integers, so that neither the order of the images nor the way they were split among processes
shows in the result.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
from PIL import Image
from safetensors.numpy import load, save


def centre_view(image: Image.Image, crop: int) -> np.ndarray:
    """The centre test view of an RGB image: [crop, crop, 3] uint8."""
    shorter = round(crop * 256 / 224)
    scale = shorter / min(image.size)
    width, height = (max(shorter, round(side * scale)) for side in image.size)
    left, top = (width - crop) // 2, (height - crop) // 2
    # Only the view is computed: the whole of a 3 × 60,000 sliver would fill the memory.
    x, y = image.width / width, image.height / height
    box = (left * x, top * y, min(image.width, (left + crop) * x), min(image.height, (top + crop) * y))
    return np.asarray(image.resize((crop, crop), Image.Resampling.BILINEAR, box=box))


class PixelSums:
    """Sums over images: ``count`` images, ``image`` [crop, crop, 3] int64, ``products`` [3, 3] int64 of channel pairs.

    10^13 images of 224 × 224 would fit.
    """

    def __init__(self, crop: int) -> None:
        self.crop = crop
        self.count = 0
        self.image = np.zeros((crop, crop, 3), np.int64)
        self.products = np.zeros((3, 3), np.int64)

    def add(self, view: np.ndarray) -> None:
        """Count in one view [crop, crop, 3] uint8."""
        assert view.shape == self.image.shape
        assert view.dtype == np.uint8
        self.count += 1
        self.image += view
        flat = view.reshape(-1, 3).astype(np.float64)
        # Exact: the sums of one view stay far below 2^53, and float64 products run in BLAS.
        self.products += (flat.T @ flat).astype(np.int64)

    def merge(self, other: PixelSums) -> None:
        assert self.crop == other.crop
        self.count += other.count
        self.image += other.image
        self.products += other.products

    def to_bytes(self) -> bytes:
        return save({"count": np.array([self.count], np.int64), "image": self.image, "products": self.products})

    @staticmethod
    def from_bytes(data: bytes) -> PixelSums:
        arrays = load(data)
        sums = PixelSums(len(arrays["image"]))
        sums.count = int(arrays["count"][0])
        sums.image[:], sums.products[:] = arrays["image"], arrays["products"]
        return sums


def statistics_of(sums: PixelSums) -> dict[str, np.ndarray]:
    """The arrays of ``statistics.safetensors``, on the 0–255 scale, rows and channels R, G, B.

    mean_image: [3, crop, crop] float32. channel_mean: [3] float64. covariance: [3, 3] float64, of the pixels of all
    views. eigenvalues: [3] float64, descending. eigenvectors: [3, 3] float64, the eigenvectors are its *columns*, each
    with its largest component positive. Raises ValueError where no image was counted.
    """
    if not sums.count:
        raise ValueError(
            "the training set has no decodable image, so there is nothing to take a mean of: are its files damaged?"
        )
    pixels = sums.count * sums.crop**2
    totals = [int(t) for t in sums.image.sum(axis=(0, 1))]
    covariance = [
        [Fraction(int(sums.products[i, j]), pixels) - Fraction(totals[i] * totals[j], pixels**2) for j in range(3)]
        for i in range(3)
    ]
    matrix = [[float(c) for c in row] for row in covariance]
    eigenvalues, eigenvectors = _eigen(matrix)
    return {
        "mean_image": np.ascontiguousarray((sums.image / sums.count).transpose(2, 0, 1).astype(np.float32)),
        "channel_mean": np.array([total / pixels for total in totals]),
        "covariance": np.array(matrix),
        "eigenvalues": np.array(eigenvalues),
        "eigenvectors": np.array(eigenvectors),
    }


def statistics_bytes(sums: PixelSums) -> bytes:
    """``statistics.safetensors``: equal sums give equal bytes, on any machine."""
    return save(statistics_of(sums))


def _eigen(matrix: Sequence[Sequence[float]]) -> tuple[list[float], list[list[float]]]:
    """Eigenvalues, descending, and eigenvectors (columns) of a symmetric 3 × 3 matrix, by Jacobi rotations.

    LAPACK's last bits depend on the CPU; this is IEEE arithmetic in a fixed order, so that the digest of a data set
    does not depend on the machine that prepared it.
    """
    a = [list(row) for row in matrix]
    v = [[float(i == j) for j in range(3)] for i in range(3)]
    for _ in range(50):
        p, q = max(((0, 1), (0, 2), (1, 2)), key=lambda pair: abs(a[pair[0]][pair[1]]))
        if abs(a[p][q]) <= 1e-18 * (abs(a[0][0]) + abs(a[1][1]) + abs(a[2][2])):
            break
        theta = (a[q][q] - a[p][p]) / (2 * a[p][q])
        t = math.copysign(1.0, theta) / (abs(theta) + math.sqrt(theta * theta + 1))
        c = 1 / math.sqrt(t * t + 1)
        s = t * c
        for m in (a, v):
            for row in m:
                row[p], row[q] = c * row[p] - s * row[q], s * row[p] + c * row[q]
        a[p], a[q] = (
            [c * x - s * y for x, y in zip(a[p], a[q], strict=True)],
            [s * x + c * y for x, y in zip(a[p], a[q], strict=True)],
        )
    order = sorted(range(3), key=lambda i: -a[i][i])
    columns = [[v[i][k] for i in range(3)] for k in order]
    columns = [[x * math.copysign(1.0, max(column, key=abs)) for x in column] for column in columns]
    return [a[k][k] for k in order], [list(row) for row in zip(*columns, strict=True)]
