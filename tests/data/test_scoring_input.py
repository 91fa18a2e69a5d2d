"""The views of test protocols against PIL: every image decoded once, any batch, any odd image."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from orchestrator.data.decoder import DecodeSettings
from orchestrator.data.scoring_input import ScoringInput
from orchestrator.data.shards import DataSet, Split
from orchestrator.data.views import CropViews, ScaleViews
from tests.data.build import build, jpeg, noise_image
from tests.data.test_pipeline import BROKEN, psnr_db
from tests.evaluation import naive

CPU = DecodeSettings(num_threads=2)
TEN = CropViews(48, 55, corners=True)
SCALES = ScaleViews((48, 55, 82, 137))
SIZES = [(160, 120), (120, 160), (100, 100), (300, 90), (90, 300), (60, 61), (500, 375), (33, 40)]


@pytest.fixture(scope="module")
def synthetic(tmp_path_factory: pytest.TempPathFactory) -> DataSet:
    rng = np.random.default_rng(0)
    images = [(f"i{k}.jpg", jpeg(noise_image(rng, *size), subsampling=0), 0) for k, size in enumerate(SIZES)]
    return build(tmp_path_factory.mktemp("synthetic"), images)


def plan(split: Split, view: CropViews | ScaleViews, most: int = 4) -> list[np.ndarray]:
    """Images of the same sizes together."""
    groups: dict[bytes, list[int]] = {}
    for i, sizes in enumerate(view.sizes(split.width, split.height)):
        groups.setdefault(sizes.tobytes(), []).append(i)
    return [np.array(group[k : k + most]) for group in groups.values() for k in range(0, len(group), most)]


def views_of(
    split: Split, view: CropViews | ScaleViews, batches: list[np.ndarray], limit: int = 0
) -> dict[int, list[torch.Tensor] | None]:
    """The views of each image, [height, width, 3] each; None where it cannot be decoded."""
    source = ScoringInput(split, view, CPU, max(map(len, batches)), limit)
    found: dict[int, list[torch.Tensor] | None] = {}
    for batch in source.batches(batches):
        for row, i in enumerate(batch.indices.tolist()):
            assert i not in found
            found[i] = [each[row] for each in batch.views] if batch.decoded[row] else None
    source.close()
    return found


def expected(split: Split, i: int, view: CropViews | ScaleViews) -> list[np.ndarray]:
    image = Image.open(io.BytesIO(split.read(np.array([i]))[0].tobytes())).convert("RGB")
    if isinstance(view, CropViews):
        crops = list(naive.crops(image, view.crop, view.shorter_side, ten=view.corners))
        return crops[:: 2 if view.corners else 1]  # not the mirrored ones
    return [np.asarray(naive.resize(naive.middle(image), px), np.float32) for px in view.shorter_sides]


def check(split: Split, view: CropViews | ScaleViews, least_db: float) -> None:
    found = views_of(split, view, plan(split, view))
    assert sorted(found) == list(range(len(split)))
    for i, views in found.items():
        assert views is not None
        for k, (pixels, reference) in enumerate(zip(views, expected(split, i, view), strict=True)):
            assert pixels.dtype == torch.uint8
            assert pixels.shape == reference.shape, (split.names[i], k)
            assert psnr_db(pixels.float().numpy(), reference) > least_db, (split.names[i], k)


@pytest.mark.parametrize("view", [CropViews(48, 55), TEN, SCALES])
def test_views_are_the_references(synthetic: DataSet, view: CropViews | ScaleViews) -> None:
    check(synthetic.split("val"), view, 45.0)


@pytest.mark.parametrize("view", [CropViews(), CropViews(corners=True), ScaleViews()])
def test_views_of_photographs_are_the_references(real_data: Path, tmp_path: Path, view: CropViews | ScaleViews) -> None:
    files = sorted((real_data / "photos_folder" / "val").glob("*/*.jpg"))[::11]
    check(build(tmp_path, [(f.name, f.read_bytes(), 0) for f in files]).split("val"), view, 50.0)


@pytest.mark.parametrize("view", [TEN, SCALES])
def test_views_do_not_depend_on_batches(tmp_path: Path, view: CropViews | ScaleViews) -> None:
    rng = np.random.default_rng(1)
    images = [(f"i{k}.jpg", jpeg(noise_image(rng, 80 - k % 2, 64)), 0) for k in range(12)]
    split = build(tmp_path, images).split("val")
    whole = views_of(split, view, plan(split, view, most=12))
    for most in (1, 5):
        other = views_of(split, view, plan(split, view, most))
        for i, views in whole.items():
            assert all(torch.equal(a, b) for a, b in zip(views, other[i], strict=True))  # type: ignore[arg-type]


def test_extreme_shapes(tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    shapes = [(1, 1), (3, 500), (500, 3), (2, 2), (2000, 1500), (60, 240), (60, 241)]
    images = [(f"{w}x{h}.jpg", jpeg(noise_image(rng, w, h), subsampling=0), 0) for w, h in shapes]
    split = build(tmp_path, images).split("val")
    for view in (CropViews(48, 55), TEN, SCALES):
        check(split, view, 35.0)
    sizes = SCALES.sizes(split.width, split.height)
    assert sizes[1].tolist() == [[4 * px, px] for px in SCALES.shorter_sides]
    assert sizes[2].tolist() == [[px, 4 * px] for px in SCALES.shorter_sides]


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_image_is_marked_and_costs_no_other(tmp_path: Path, kind: str) -> None:
    """Alone in its batch, and in a batch of 40: bytes that are no JPEG of the recorded size would crash DALI."""
    good = [jpeg(noise_image(np.random.default_rng(k), 80, 64)) for k in range(8)]
    images = [(f"i{k}.jpg", good[k % 8], 0) for k in range(50)]
    split = build(tmp_path, images, broken={5: BROKEN[kind], 41: BROKEN[kind]}).split("val")
    whole = build(tmp_path / "whole", images).split("val")
    batches = [np.arange(40), np.array([41]), np.arange(42, 50)]
    found = views_of(split, SCALES, batches, limit=2)
    assert [i for i, views in found.items() if views is None] == [5, 41]
    sound = views_of(whole, SCALES, batches)
    for i, views in found.items():
        if views is not None:
            assert all(torch.equal(a, b) for a, b in zip(views, sound[i], strict=True))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="2 images of the val set cannot be decoded, more than"):
        views_of(split, SCALES, batches, limit=1)


def test_odd_photographs(real_data: Path, tmp_path: Path) -> None:
    """Grey, CMYK, turned by EXIF (ignored), progressive and the like are seen as PIL sees them."""
    names = ("hopper_gray", "hopper_orientation_6", "progressive", "one_pixel", "sliver_3x500", "pil_sample_cmyk")
    files = [real_data / "odd_images" / f"{name}.jpg" for name in names]
    split = build(tmp_path, [(f.name, f.read_bytes(), 0) for f in files]).split("val")
    for view in (TEN, SCALES):
        check(split, view, 25.0)  # what is enlarged tenfold shows every rounding; another picture has 10 dB
