"""Statistics against a naive computation in floating point, and against their own promises."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.numpy import load

from data_prep.statistics import PixelSums, centre_view, statistics_bytes, statistics_of
from orchestrator.data.shards import DataSet
from orchestrator.storage import Storage


def naive_view(image: Image.Image, crop: int) -> np.ndarray:
    """Resize the whole, then cut the centre out: [crop, crop, 3] float64."""
    shorter = round(crop * 256 / 224)
    width, height = image.size
    scale = shorter / min(width, height)
    size = (round(width * scale), round(height * scale))
    resized = np.asarray(image.resize(size, Image.Resampling.BILINEAR), np.float64)
    top, left = (size[1] - crop) // 2, (size[0] - crop) // 2
    return resized[top : top + crop, left : left + crop]


def sums_of(views: np.ndarray) -> PixelSums:
    sums = PixelSums(views.shape[1])
    for view in views:
        sums.add(view)
    return sums


def test_equal_a_naive_computation(prepared: Any) -> None:
    views = []
    with tarfile.open(prepared.archives / "ILSVRC2012_img_train.tar") as train:
        for member in train:
            with tarfile.open(fileobj=train.extractfile(member)) as tar:
                for name in tar:
                    stream = tar.extractfile(name)
                    assert stream is not None
                    views.append(naive_view(Image.open(io.BytesIO(stream.read())).convert("RGB"), 32))
    assert len(views) == 40
    pixels = np.concatenate(views).reshape(-1, 3)
    statistics = DataSet(Storage(str(prepared.out))).statistics()
    # Views differ by roundings, and the PNG and the CMYK image were seen after re-encoding.
    mean_image = np.mean(views, axis=0).transpose(2, 0, 1)
    np.testing.assert_allclose(statistics["mean_image"], mean_image, atol=1.0)
    assert np.abs(statistics["mean_image"] - mean_image).mean() < 0.1
    np.testing.assert_allclose(statistics["channel_mean"], pixels.mean(axis=0), atol=0.05)
    covariance = np.cov(pixels.T, bias=True)
    np.testing.assert_allclose(statistics["covariance"], covariance, rtol=0.005)
    values, vectors = np.linalg.eigh(covariance)
    np.testing.assert_allclose(statistics["eigenvalues"], values[::-1], rtol=0.01)
    for k in range(3):
        assert abs(statistics["eigenvectors"][:, k] @ vectors[:, 2 - k]) > 0.999


def test_types_and_shapes(prepared: Any) -> None:
    statistics = load((prepared.out / "statistics.safetensors").read_bytes())
    assert {name: (a.shape, a.dtype.name) for name, a in statistics.items()} == {
        "mean_image": ((3, 32, 32), "float32"),
        "channel_mean": ((3,), "float64"),
        "covariance": ((3, 3), "float64"),
        "eigenvalues": ((3,), "float64"),
        "eigenvectors": ((3, 3), "float64"),
    }
    assert statistics["mean_image"].min() > 10  # 0–255, not 0–1
    np.testing.assert_allclose(statistics["mean_image"].mean(axis=(1, 2)), statistics["channel_mean"], rtol=1e-6)


def test_exact_on_known_pixels() -> None:
    rng = np.random.default_rng(1)
    views = rng.integers(0, 256, (7, 9, 9, 3), dtype=np.uint8)
    statistics = statistics_of(sums_of(views))
    pixels = views.reshape(-1, 3).astype(np.float64)
    np.testing.assert_allclose(statistics["channel_mean"], pixels.mean(axis=0), rtol=1e-14)
    np.testing.assert_allclose(statistics["covariance"], np.cov(pixels.T, bias=True), rtol=1e-11, atol=1e-9)
    np.testing.assert_array_equal(
        statistics["mean_image"], views.astype(np.float64).mean(axis=0).transpose(2, 0, 1).astype(np.float32)
    )


@settings(deadline=None, max_examples=30)
@given(cuts=st.lists(st.integers(0, 12), max_size=4), seed=st.integers(0, 1000))
def test_order_and_split_do_not_show(cuts: list[int], seed: int) -> None:
    rng = np.random.default_rng(seed)
    views = rng.integers(0, 256, (12, 6, 6, 3), dtype=np.uint8)
    whole = statistics_bytes(sums_of(views))
    shuffled = views[rng.permutation(12)]
    merged = PixelSums(6)
    for first, last in zip([0, *sorted(cuts)], [*sorted(cuts), 12], strict=True):
        piece = sums_of(shuffled[first:last]) if last > first else PixelSums(6)
        merged.merge(PixelSums.from_bytes(piece.to_bytes()))
    assert merged.count == 12
    assert statistics_bytes(merged) == whole


@settings(deadline=None, max_examples=100)
@given(st.lists(st.lists(st.integers(0, 255), min_size=3, max_size=3), min_size=1, max_size=8))
def test_eigenvectors(pixels: list[list[int]]) -> None:
    view = np.array([pixels[i % len(pixels)] for i in range(9)], np.uint8).reshape(1, 3, 3, 3)
    statistics = statistics_of(sums_of(view))
    values, vectors, covariance = (statistics[k] for k in ("eigenvalues", "eigenvectors", "covariance"))
    assert values[0] >= values[1] >= values[2]
    np.testing.assert_allclose(vectors.T @ vectors, np.eye(3), atol=1e-12)
    np.testing.assert_allclose(vectors @ np.diag(values) @ vectors.T, covariance, atol=1e-9)
    assert (vectors[np.abs(vectors).argmax(axis=0), range(3)] > 0).all()


def test_eigenvectors_are_columns_and_rows_are_channels() -> None:
    # pixels along (1, 2, 0): red and green vary, blue does not
    levels = np.arange(81).reshape(9, 9)
    view = np.stack([levels, 2 * levels, np.full_like(levels, 77)], axis=-1).astype(np.uint8)
    statistics = statistics_of(sums_of(view[None]))
    np.testing.assert_allclose(statistics["eigenvectors"][:, 0], np.array([1, 2, 0]) / 5**0.5, atol=1e-12)
    np.testing.assert_allclose(statistics["eigenvalues"], [5 * levels.var(), 0, 0], atol=1e-9)
    assert statistics["mean_image"][2].tolist() == [[77.0] * 9] * 9


@pytest.mark.parametrize("size", [(500, 375), (375, 500), (224, 224), (3, 500), (1, 1), (60_000, 2)])
def test_views_of_any_image_have_the_size_of_the_crop(size: tuple[int, int]) -> None:
    image = Image.new("RGB", size, (10, 20, 30))
    view = centre_view(image, 64)
    assert view.shape == (64, 64, 3)
    assert view.dtype == np.uint8
    assert (view == (10, 20, 30)).all()


@pytest.mark.parametrize("size", [(113, 77), (77, 113), (300, 200)])
@pytest.mark.parametrize("crop", [32, 224])
def test_views_are_the_centre_of_the_resized_image(size: tuple[int, int], crop: int) -> None:
    rng = np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(0, 256, (*size[::-1], 3), dtype=np.uint8))
    assert np.abs(centre_view(noise, crop) - naive_view(noise, crop)).max() <= 1


def test_nothing_to_take_a_mean_of() -> None:
    with pytest.raises(ValueError, match="no decodable image"):
        statistics_of(PixelSums(8))


def test_orientation_is_ignored(tmp_path: Path) -> None:
    from data_prep.images import prepare_image

    image = Image.fromarray(np.arange(30 * 20 * 3, dtype=np.uint8).reshape(20, 30, 3))
    exif = Image.Exif()
    exif[0x0112] = 6
    stream = io.BytesIO()
    image.save(stream, "JPEG", exif=exif)
    found = prepare_image(stream.getvalue(), with_pixels=True)
    assert (found.width, found.height) == (30, 20)
    assert found.pixels is not None
    assert found.pixels.size == (30, 20)
    assert found.data == stream.getvalue()
