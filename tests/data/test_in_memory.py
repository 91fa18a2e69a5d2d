"""Batches of a set that lies in memory, against the same made image by image with NumPy and Pillow."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from orchestrator.config import CropStyle, InputConfig, MeanKind, TrainConfig
from orchestrator.data.decoder import DecodeSettings
from orchestrator.data.in_memory import MemoryTrainInput
from orchestrator.data.inputs import eval_input, scoring_input, train_input
from orchestrator.data.sampling import Purpose, SampleStream
from orchestrator.data.shards import DataSet
from orchestrator.data.views import CropViews, ScaleViews, TestView
from orchestrator.training.assembly import shard_cache, views_of
from tests.data.planes import build_planes, random_images

COUNT, STEP, SEED = 40, 12, 7
CONFIG = TrainConfig(
    input=InputConfig(crop_px=32, crop_style=CropStyle.PADDED, colour_std=0.0, test_shorter_side_px=32)
)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> DataSet:
    images = {"train": random_images(0, COUNT), "val": random_images(1, 23)}
    return build_planes(tmp_path_factory.mktemp("planes"), images)


def batches(data: DataSet, config: TrainConfig, positions: np.ndarray, **settings: object) -> torch.Tensor:
    """The images at these stream positions [N]."""
    view, _, mean, axes = views_of(config, data)
    split = data.split("train")
    stream = SampleStream(len(split), SEED)
    settings = DecodeSettings(**settings)  # type: ignore[arg-type]
    source = train_input(data, split, stream, view, axes, mean, settings, lambda step: positions, 0, 0)
    with closing(source):
        return next(source).images


def test_a_training_view_is_the_papers(small: DataSet) -> None:
    pixels, _ = random_images(0, COUNT)
    mean, stream = pixels.mean(0).astype(np.float32), SampleStream(COUNT, SEED)
    positions = np.arange(3 * STEP, 4 * STEP)
    places, mirrored = set(), 0
    found = batches(small, CONFIG, positions)
    for number, position in enumerate(positions.tolist()):
        at = np.array([position])
        image = pixels[stream.images(at)[0]].astype(np.float32) - mean
        padded = np.zeros((3, 40, 40), np.float32)
        padded[:, 4:36, 4:36] = image
        u, v = stream.uniforms(at, Purpose.SCALE_AND_CROP, 2)[0]
        left, top = int(u * 9), int(v * 9)
        window = padded[:, top : top + 32, left : left + 32]
        if stream.uniforms(at, Purpose.FLIP, 1)[0, 0] < 0.5:
            window, mirrored = window[:, :, ::-1], mirrored + 1
        np.testing.assert_array_equal(found[number].numpy(), window)
        places.add((left, top))
    assert len(places) > 5
    assert 0 < mirrored < STEP
    assert found.is_contiguous(memory_format=torch.channels_last)


def test_every_place_of_the_padding_is_drawn_and_none_else(small: DataSet) -> None:
    view = views_of(CONFIG, small)[0]
    left, top, flip = view.windows(SampleStream(COUNT, SEED), np.arange(4000))
    for drawn in (left, top):
        counts = np.bincount(drawn, minlength=9)
        assert len(counts) == 9
        assert counts.min() > 4000 / 9 * 0.75
    assert 1800 < flip.sum() < 2200


def test_pixels_do_not_depend_on_how_a_batch_is_dealt_out(small: DataSet) -> None:
    positions = np.arange(100, 100 + STEP)
    config = replace(CONFIG, input=replace(CONFIG.input, colour_std=0.1))
    whole = batches(small, config, positions)
    parts = [batches(small, config, part, num_threads=2) for part in (positions[:1], positions[1:5], positions[5:])]
    assert torch.equal(torch.cat(parts), whole)
    assert not torch.equal(whole, batches(small, CONFIG, positions))  # colours are shifted
    half = batches(small, config, positions, half=True)
    assert half.dtype == torch.float16
    assert torch.equal(half, whole.half())


def test_steps_follow_each_other_from_wherever_it_starts(small: DataSet) -> None:
    view, _, mean, axes = views_of(CONFIG, small)
    split, stream = small.split("train"), SampleStream(COUNT, SEED)

    def positions_of(step: int) -> np.ndarray:
        return np.arange(step * STEP, (step + 1) * STEP)

    def source(start: int) -> MemoryTrainInput:
        return MemoryTrainInput(small, split, stream, view, axes, mean, DecodeSettings(), positions_of, start)

    with closing(source(0)) as first, closing(source(3)) as later:
        seen = [next(first) for _ in range(5)]
        for expected in seen[3:]:
            batch = next(later)
            assert torch.equal(batch.images, expected.images)
            np.testing.assert_array_equal(batch.indices, expected.indices)
            np.testing.assert_array_equal(batch.labels, split.label[batch.indices])
            assert batch.valid.all()
    np.testing.assert_array_equal(np.concatenate([b.indices for b in seen]), stream.images(np.arange(5 * STEP)))


@pytest.mark.parametrize("workers", [1, 3])
def test_every_validation_image_is_seen_once(small: DataSet, workers: int) -> None:
    _, view, mean, _ = views_of(CONFIG, small)
    split, (pixels, labels) = small.split("val"), random_images(1, 23)
    with closing(eval_input(small, split, view, mean, DecodeSettings(), 5, 0)) as source:
        found = [batch for rank in range(workers) for batch in source.batches(rank, workers)]
        assert source.undecodable == set()
    counts = np.zeros(23, int)
    for batch in found:
        assert len(batch.images) == 5
        for image, label, index, valid in zip(batch.images, batch.labels, batch.indices, batch.valid, strict=True):
            counts[index] += valid
            np.testing.assert_array_equal(image.numpy(), pixels[index] - mean.value)
            assert label == labels[index]
    assert (counts == 1).all()


def test_views_of_a_test_are_the_image_itself_its_corners_or_resized(small: DataSet) -> None:
    split, (pixels, _) = small.split("val"), random_images(1, 23)
    plan, settings = [np.array([3, 9, 22])], DecodeSettings()

    def views(view: CropViews | ScaleViews) -> tuple[torch.Tensor, ...]:
        with closing(scoring_input(small, split, view, settings, 3, 0)) as source:
            (batch,) = source.batches(plan)
        np.testing.assert_array_equal(batch.indices, plan[0])
        assert batch.decoded.all()
        return batch.views

    (whole,) = views(CropViews(32, 32))
    np.testing.assert_array_equal(whole.numpy(), pixels[plan[0]].transpose(0, 2, 3, 1))
    corners = views(CropViews(24, 32, corners=True))
    for found, (top, left) in zip(corners, [(0, 0), (0, 8), (8, 0), (8, 8), (4, 4)], strict=True):
        np.testing.assert_array_equal(found.numpy(), whole.numpy()[:, top : top + 24, left : left + 24])
    smaller, same, larger = views(ScaleViews((24, 32, 48)))
    assert torch.equal(same, whole)
    for found, side in ((smaller, 24), (larger, 48)):
        for image, stored in zip(found.numpy(), whole.numpy(), strict=True):
            by_pillow = np.asarray(Image.fromarray(stored).resize((side, side), Image.Resampling.BILINEAR))
            assert np.abs(image.astype(int) - by_pillow).max() <= 1


def test_a_validation_image_may_be_cut_and_resized(small: DataSet) -> None:
    _, _, mean, _ = views_of(replace(CONFIG, input=replace(CONFIG.input, mean=MeanKind.CHANNEL)), small)
    split = small.split("val")
    with closing(eval_input(small, split, TestView(32, 40), mean, DecodeSettings(), 4, 0)) as source:
        batch = next(source.batches(0, 1))
    for image, index in zip(batch.images, batch.indices, strict=True):
        stored = Image.fromarray(random_images(1, 23)[0][index].transpose(1, 2, 0))
        resized = np.asarray(stored.resize((40, 40), Image.Resampling.BILINEAR), np.float32)[4:36, 4:36]
        assert np.abs(image.numpy().transpose(1, 2, 0) + mean.value - resized).max() <= 1.01  # Pillow rounds twice


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"crop_style": CropStyle.SCALE_JITTER}, "does not fit the data set .* take a recipe of jobs/cifar10.py"),
        ({"padding_px": -1}, r"input\.padding_px -1 must not be negative"),
    ],
)
def test_views_that_do_not_fit_are_refused(small: DataSet, fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        views_of(replace(CONFIG, input=replace(CONFIG.input, **fields)), small)  # type: ignore[arg-type]


def test_padding_is_refused_for_images_of_any_size(data: DataSet) -> None:
    with pytest.raises(ValueError, match="take scale_jitter or random_area"):
        views_of(CONFIG, data)


def test_images_are_trained_on_at_their_own_size(small: DataSet) -> None:
    config = replace(CONFIG, input=replace(CONFIG.input, crop_px=28))
    with pytest.raises(ValueError, match=r"input\.crop_px 28: the images have 32 × 32 pixels"):
        batches(small, config, np.arange(3))


@pytest.mark.parametrize("what", ["cut", "changed", "gone", "other shape"])
def test_a_damaged_shard_is_refused(tmp_path: Path, what: str) -> None:
    data = build_planes(tmp_path, {"train": random_images(0, COUNT)})
    shard = tmp_path / "train" / "001.safetensors"
    content = shard.read_bytes()
    if what == "gone":
        shard.unlink()
    elif what == "other shape":
        build_planes(tmp_path / "other", {"train": random_images(0, COUNT, side=16)})
        manifest, other = (DataSet(type(data.storage)(str(p))).manifest for p in (tmp_path, tmp_path / "other"))
        shard.write_bytes((tmp_path / "other" / "train" / "001.safetensors").read_bytes())
        info = manifest.splits["train"]
        shards = (info.shards[0], other.splits["train"].shards[1])
        data.manifest.splits["train"] = replace(info, shards=shards)  # type: ignore[index]
    else:
        shard.write_bytes(content[:-1] if what == "cut" else content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(ValueError, match="prepare the data set again"):
        batches(data, CONFIG, np.arange(3))


def test_no_shard_is_staged_of_what_is_read_whole(small: DataSet) -> None:
    assert shard_cache(CONFIG, small) is None
