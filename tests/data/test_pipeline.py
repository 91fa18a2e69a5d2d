"""DALI's pixels against a slow plain reference, and promise 1 for pixels."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from orchestrator.config import CropStyle
from orchestrator.data.decoder import DecodeSettings
from orchestrator.data.pipeline import Batch, EvalInput, Mean, TrainInput
from orchestrator.data.sampling import Purpose, SampleStream
from orchestrator.data.shards import DataSet, Split
from orchestrator.data.views import ColourAxes, TestView, TrainView
from tests.data.build import DECODED, build, jpeg, noise_image

CROP = 48
ZERO = Mean(np.zeros(3, np.float32))
CPU = DecodeSettings(num_threads=2)
AXES = ColourAxes(np.array([14000.0, 1200.0, 290.0]), np.linalg.qr(np.random.default_rng(1).normal(size=(3, 3)))[0])
NO_COLOUR = TrainView(crop=CROP, scale_min=55, scale_max=103, colour_std=0)
# DALI and PIL decode JPEG and filter with other roundings; a wrong pixel border costs 15 dB and more.
LEAST_PSNR_DB = 45.0


@pytest.fixture(scope="module")
def synthetic(tmp_path_factory: pytest.TempPathFactory) -> DataSet:
    rng = np.random.default_rng(0)
    sizes = [(160, 120), (120, 160), (100, 100), (300, 90), (90, 300), (60, 61), (500, 375), (33, 40)]
    images = [(f"i{k}.JPEG", jpeg(noise_image(rng, *size), subsampling=0), k % 3) for k, size in enumerate(sizes)]
    return build(tmp_path_factory.mktemp("synthetic"), images)


@pytest.fixture(scope="module")
def photographs(real_data: Path, tmp_path_factory: pytest.TempPathFactory) -> DataSet:
    files = sorted((real_data / "photos_folder" / "val").glob("*/*.jpg"))[::4]
    images = [(f.name, f.read_bytes(), k % 2) for k, f in enumerate(files)]
    return build(tmp_path_factory.mktemp("photographs"), images)


def train_input(
    split: Split, view: TrainView, batch: int, start: int = 0, seed: int = 5, **options: object
) -> TrainInput:
    mean = options.pop("mean", ZERO)
    settings = options.pop("settings", CPU)
    limit = options.pop("limit", 50)
    stream = SampleStream(len(split), seed)
    positions = lambda step: np.arange(step * batch, (step + 1) * batch)  # noqa: E731
    return TrainInput(split, stream, view, AXES, mean, settings, positions, start, limit)  # type: ignore[arg-type]


def take(source: TrainInput, steps: int) -> list[Batch]:
    batches = [next(source) for _ in range(steps)]
    source.close()
    return batches


def original(split: Split, index: int) -> Image.Image:
    data = split.read(np.array([index]))[0].tobytes()
    return Image.open(io.BytesIO(data)).convert("RGB")


def psnr_db(a: np.ndarray, b: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / max(1e-9, np.mean((a - b) ** 2))))


def reference_scale_jitter(image: Image.Image, u: np.ndarray, view: TrainView) -> np.ndarray:
    """The image is resized so that its shorter side is S, a square cut out: here first cut out, then resized."""
    shorter = view.scale_min + int(u[0] * (view.scale_max - view.scale_min + 1))
    scale = shorter / min(image.size)
    start, end = [], []
    for side, where in zip(image.size, u[1:3], strict=True):
        seen = view.crop * side / int(side * scale + 0.5)
        start.append(int(where * (int(side - seen + 1e-6) + 1)))
        end.append(min(side, start[-1] + seen))
    part = image.crop((*start, *(int(np.ceil(e)) for e in end)))
    box = (0, 0, end[0] - start[0], end[1] - start[1])
    return np.asarray(part.resize((view.crop, view.crop), Image.Resampling.BILINEAR, box=box), np.float32)


def reference_random_area(image: Image.Image, u: np.ndarray, view: TrainView) -> np.ndarray:
    width, height = image.size
    for area, aspect, x, y in u.reshape(10, 4):
        pixels = (view.area_min + area * (1 - view.area_min)) * width * height
        ratio = np.exp(np.log(3 / 4) + aspect * np.log((4 / 3) / (3 / 4)))
        w, h = round(np.sqrt(pixels * ratio)), round(np.sqrt(pixels / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(x * (width - w + 1)), int(y * (height - h + 1))
            break
    else:
        w, h = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))
        left, top = (width - w) // 2, (height - h) // 2
    part = image.crop((left, top, left + w, top + h))
    return np.asarray(part.resize((view.crop, view.crop), Image.Resampling.BILINEAR), np.float32)


def reference_test_view(image: Image.Image, view: TestView) -> np.ndarray:
    scale = view.shorter_side / min(image.size)
    width, height = (int(side * scale + 0.5) for side in image.size)
    whole = image.resize((width, height), Image.Resampling.BILINEAR)
    x, y = (width - view.crop) // 2, (height - view.crop) // 2
    return np.asarray(whole.crop((x, y, x + view.crop, y + view.crop)), np.float32)


def check_training_views(split: Split, view: TrainView, batch_size: int, least_db: float) -> None:
    source = train_input(split, view, batch_size)
    stream = source.stream
    for step, batch in enumerate(take(source, 3)):
        positions = np.arange(step * batch_size, (step + 1) * batch_size)
        count = 40 if view.style is CropStyle.RANDOM_AREA else 3
        u = stream.uniforms(positions, Purpose.SCALE_AND_CROP, count)
        flip = stream.uniforms(positions, Purpose.FLIP, 1)[:, 0] < 0.5
        assert batch.indices.tolist() == stream.images(positions).tolist()
        assert batch.labels.tolist() == split.label[batch.indices].tolist()
        for i, index in enumerate(batch.indices.tolist()):
            reference = reference_random_area if view.style is CropStyle.RANDOM_AREA else reference_scale_jitter
            expected = reference(original(split, index), u[i], view)
            expected = expected[:, ::-1] if flip[i] and view.flip else expected
            pixels = batch.images[i].permute(1, 2, 0).numpy()
            assert psnr_db(pixels, expected) > least_db, (split.names[index], step, i)


@pytest.mark.parametrize("style", DECODED)
def test_training_views_are_the_references(synthetic: DataSet, style: CropStyle) -> None:
    check_training_views(synthetic.split("train"), replace(NO_COLOUR, style=style), 8, LEAST_PSNR_DB)


@pytest.mark.parametrize("style", DECODED)
def test_training_views_of_photographs_are_the_references(photographs: DataSet, style: CropStyle) -> None:
    view = TrainView(colour_std=0, style=style)
    check_training_views(photographs.split("train"), view, len(photographs.split("train")), 50.0)


def test_the_test_view_is_the_reference(synthetic: DataSet) -> None:
    check_test_views(synthetic.split("val"), TestView(CROP, 55), LEAST_PSNR_DB)


def test_the_test_view_of_photographs_is_the_reference(photographs: DataSet) -> None:
    check_test_views(photographs.split("val"), TestView(), 50.0)


def check_test_views(split: Split, view: TestView, least_db: float) -> None:
    source = EvalInput(split, view, ZERO, CPU, batch_size=3, max_undecodable=50)
    seen = []
    for batch in source.batches(0, 1):
        assert len(batch.images) == 3  # always full
        for i in np.flatnonzero(batch.valid):
            index = int(batch.indices[i])
            seen.append(index)
            expected = reference_test_view(original(split, index), view)
            assert psnr_db(batch.images[i].permute(1, 2, 0).numpy(), expected) > least_db, split.names[index]
    source.close()
    assert seen == list(range(len(split)))


def test_pixels_do_not_depend_on_batches_threads_or_the_start(synthetic: DataSet) -> None:
    split, view = synthetic.split("train"), replace(NO_COLOUR, colour_std=0.1)
    whole = torch.cat([b.images for b in take(train_input(split, view, 8), 3)])
    for batch, settings in (
        (1, CPU),
        (3, replace(CPU, num_threads=1)),
        (24, CPU),
        (8, replace(CPU, prefetch_batches=5)),
    ):
        pieces = take(train_input(split, view, batch, settings=settings), 24 // batch)
        assert torch.equal(torch.cat([b.images for b in pieces]), whole)
    assert torch.equal(take(train_input(split, view, 8, start=2), 1)[0].images, whole[16:])


def test_evaluation_batches_are_dealt_out_whole(synthetic: DataSet) -> None:
    split, view = synthetic.split("val"), TestView(CROP, 55)
    source = EvalInput(split, view, ZERO, CPU, batch_size=3, max_undecodable=50)
    alone = list(source.batches(0, 1))
    dealt = [list(source.batches(rank, 2)) for rank in range(2)]
    source.close()
    assert [len(d) for d in dealt] == [2, 1]
    for number, batch in enumerate(alone):
        other = dealt[number % 2][number // 2]
        assert torch.equal(batch.images, other.images)
        assert np.array_equal(batch.valid, other.valid)


def test_colour_moves_whole_images_along_the_axes(synthetic: DataSet) -> None:
    split = synthetic.split("train")
    plain = torch.cat([b.images for b in take(train_input(split, NO_COLOUR, 8), 3)])
    moved = torch.cat([b.images for b in take(train_input(split, replace(NO_COLOUR, colour_std=0.1), 8), 3)])
    alphas = 0.1 * SampleStream(len(split), 5).normals(np.arange(24), Purpose.COLOUR, 3)
    # AlexNet: on RGB in [0, 1] the eigenvalues are λ / 255²
    shift = 255 * (AXES.eigenvectors @ (alphas * AXES.eigenvalues / 255**2).T).T
    expected = torch.from_numpy(shift).float()[:, :, None, None].expand_as(plain)
    assert torch.allclose(moved - plain, expected, atol=1e-3)
    assert expected.abs().max() > 1


def test_colour_axes_agree_with_the_published_ones() -> None:
    # fb.resnet.torch, datasets/imagenet.lua: rows R, G, B, eigenvectors in columns; the first is near grey
    vectors = np.array([[-0.5675, 0.7192, 0.4009], [-0.5808, -0.0045, -0.8140], [-0.5836, -0.6948, 0.4203]])
    axes = ColourAxes(np.array([0.2175, 0.0188, 0.0045]) * 255**2, vectors)
    grey = axes.shifts(np.array([[1.0, 0.0, 0.0]]))[0]
    assert np.ptp(grey) < 0.03 * abs(grey.mean())
    assert abs(grey.mean()) == pytest.approx(255 * 0.2175 * 0.577, rel=0.01)


@pytest.mark.parametrize("flip", [False, True])
def test_the_mean_image_is_subtracted_in_place_of_the_channel_mean(synthetic: DataSet, flip: bool) -> None:
    split, view = synthetic.split("train"), replace(NO_COLOUR, flip=flip)
    image = np.random.default_rng(3).uniform(80, 140, (3, CROP, CROP)).astype(np.float32)
    plain, per_pixel, per_channel = (
        take(train_input(split, view, 8, mean=mean), 1)[0].images
        for mean in (ZERO, Mean(image), Mean(np.array([120, 110, 100], np.float32)))
    )
    assert torch.allclose(plain - per_pixel, torch.from_numpy(image).expand_as(plain), atol=1e-3)
    shift = (plain - per_channel).mean((0, 2, 3))
    assert torch.allclose(shift, torch.tensor([120.0, 110.0, 100.0]), atol=1e-3)
    with pytest.raises(ValueError, match="mean image"):
        train_input(split, view, 8, mean=Mean(image[:, 1:]))


def test_batches_are_channels_last(synthetic: DataSet) -> None:
    images = take(train_input(synthetic.split("train"), NO_COLOUR, 4), 1)[0].images
    assert images.shape == (4, 3, CROP, CROP)
    assert images.is_contiguous(memory_format=torch.channels_last)
    half = replace(CPU, half=True)
    assert take(train_input(synthetic.split("train"), NO_COLOUR, 4, settings=half), 1)[0].images.dtype == torch.float16


def test_the_exif_orientation_is_ignored(tmp_path: Path) -> None:
    pixels = noise_image(np.random.default_rng(4), 120, 60)
    exif = Image.Exif()
    exif[0x0112] = 6  # "rotate by 90 degrees to show"
    turned = jpeg(pixels, subsampling=0, exif=exif.tobytes())
    split = build(tmp_path, [("turned.jpg", turned, 0), ("plain.jpg", jpeg(pixels, subsampling=0), 0)]).split("val")
    assert (split.width[0], split.height[0]) == (120, 60)
    source = EvalInput(split, TestView(CROP, 55), ZERO, CPU, batch_size=2, max_undecodable=50)
    (batch,) = source.batches(0, 1)
    source.close()
    assert torch.equal(batch.images[0], batch.images[1])


def test_extreme_shapes_are_views_like_others(tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    shapes = [(1, 1), (3, 500), (500, 3), (2, 2), (2000, 1500)]
    images = [(f"{w}x{h}.jpg", jpeg(noise_image(rng, w, h), subsampling=0), 0) for w, h in shapes]
    split = build(tmp_path, images).split("train")
    for style in DECODED:
        for batch in take(train_input(split, replace(NO_COLOUR, style=style), 5), 4):
            assert batch.images.isfinite().all()
            assert batch.images.min() >= 0
            assert batch.images.max() <= 255
    check_test_views(split, TestView(CROP, 55), 35.0)


@pytest.fixture
def with_bad_images(tmp_path: Path) -> DataSet:
    rng = np.random.default_rng(6)
    good = [jpeg(noise_image(rng, 80, 64), subsampling=0) for _ in range(10)]
    images = [(f"good{k}.jpg", data, k % 3) for k, data in enumerate(good)]
    images[3] = ("text.jpg", b"this is no image at all", 0)
    images[7] = ("empty.jpg", b"\xff\xd8\xff\xd9", 1)
    return build(tmp_path, images)


def test_a_bad_training_image_is_replaced_the_same_way_everywhere(with_bad_images: DataSet) -> None:
    split = with_bad_images.split("train")
    runs = [take(train_input(split, NO_COLOUR, batch), 30 // batch) for batch in (10, 5, 30)]
    indices = [np.concatenate([b.indices for b in run]) for run in runs]
    images = [torch.cat([b.images for b in run]) for run in runs]
    drawn = SampleStream(10, 5).images(np.arange(30))
    assert set(np.flatnonzero(indices[0] != drawn)) == set(np.flatnonzero(np.isin(drawn, [3, 7])))
    assert not np.isin(indices[0], [3, 7]).any()
    for other in (1, 2):
        assert np.array_equal(indices[0], indices[other])
        assert torch.equal(images[0], images[other])
    named = {bad for run in runs for b in run for bad, _ in b.replaced}
    assert named == {"text.jpg", "empty.jpg"}
    labels = torch.cat([b.labels for b in runs[0]])
    assert labels.tolist() == split.label[indices[0]].tolist()  # the label of what is shown
    late = take(train_input(split, NO_COLOUR, 10, start=2), 1)[0]
    assert torch.equal(late.images, images[0][20:])


def test_a_bad_evaluation_image_is_never_replaced(with_bad_images: DataSet) -> None:
    source = EvalInput(with_bad_images.split("val"), TestView(CROP, 55), ZERO, CPU, batch_size=4, max_undecodable=50)
    for _ in range(2):  # a second validation must not depend on what the first has learned
        batches = list(source.batches(0, 1))
        assert [b.num_unreadable for b in batches] == [1, 1, 0]
        valid = np.concatenate([b.indices[b.valid] for b in batches])
        assert valid.tolist() == [0, 1, 2, 4, 5, 6, 8, 9]
    source.close()


BROKEN = {
    "text": b"this is no image at all",
    "zeros": bytes(3000),
    "headless": b"\xff\xd8\xff\xe0\x00\x10JFIF" + bytes(200),
    "cut": jpeg(noise_image(np.random.default_rng(7), 80, 64))[:400],
    "cut late": (lambda data: data[: len(data) * 2 // 3])(jpeg(noise_image(np.random.default_rng(7), 80, 64))),
    "no end": jpeg(noise_image(np.random.default_rng(7), 80, 64))[:-2],
    "other size": jpeg(noise_image(np.random.default_rng(8), 300, 200)),
}


def set_with(folder: Path, broken: dict[int, bytes], count: int) -> DataSet:
    """``count`` images of 80 × 64 pixels; those in ``broken`` were sound when their sizes were recorded."""
    good = [jpeg(noise_image(np.random.default_rng(k), 80, 64)) for k in range(8)]
    images = [(f"i{k}.jpg", good[k % 8], k % 3) for k in range(count)]
    data = build(folder, images, broken=broken)
    return data


REACH_DALI = ("cut late", "no end")  # their headers are right: found only by decoding


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_image_in_a_large_batch_is_replaced(tmp_path: Path, kind: str) -> None:
    """Bytes that are no JPEG of the recorded size crash DALI in batches of 32 and more: they must not get there."""
    split = set_with(tmp_path, {5: BROKEN[kind], 40: BROKEN[kind]}, 64).split("train")
    named = set()
    for batch in take(train_input(split, NO_COLOUR, 64), 3):
        assert batch.images.isfinite().all()
        named |= {bad for bad, _ in batch.replaced}
        if kind not in REACH_DALI:  # else a view may lie in the part that is there
            assert not np.isin(batch.indices, [5, 40]).any()
    assert named == {"i5.jpg", "i40.jpg"}


@pytest.mark.parametrize("kind", ["cut", *REACH_DALI])
def test_what_is_shown_does_not_depend_on_what_was_seen_before(tmp_path: Path, kind: str) -> None:
    """Broken images among those read ahead, any batch, any start: a file cut late decodes in some views only."""
    bad = dict.fromkeys((1, 4, 9), BROKEN[kind])
    split = set_with(tmp_path, bad, 20).split("train")
    settings = replace(CPU, prefetch_batches=4)
    runs = {
        batch: take(train_input(split, NO_COLOUR, batch, settings=settings), 60 // batch) for batch in (4, 6, 20, 60)
    }
    whole = runs[60][0]
    assert {name for name, _ in whole.replaced} <= {"i1.jpg", "i4.jpg", "i9.jpg"}
    assert whole.replaced
    for run in runs.values():
        assert np.array_equal(np.concatenate([b.indices for b in run]), whole.indices)
        assert torch.equal(torch.cat([b.images for b in run]), whole.images)
    for start in (1, 2):
        late = take(train_input(split, NO_COLOUR, 20, start=start), 1)[0]
        assert np.array_equal(late.indices, whole.indices[start * 20 : start * 20 + 20])


def test_a_failure_tells_of_one_view_alone(tmp_path: Path) -> None:
    """A tall image cut off at 80 % is shown where its upper part is, whatever failed before, and replaced elsewhere."""
    tall = jpeg(noise_image(np.random.default_rng(9), 64, 800), subsampling=0)
    images = [("tall.jpg", tall, 0), ("plain.jpg", jpeg(noise_image(np.random.default_rng(10), 64, 64)), 1)]
    split = build(tmp_path, images, shards=1, broken={0: tall[: len(tall) * 8 // 10]}).split("train")
    whole = np.concatenate([b.indices for b in take(train_input(split, NO_COLOUR, 2), 20)])
    drawn = SampleStream(2, 5).images(np.arange(40))
    shown = (whole == 0) & (drawn == 0)
    replaced = (whole != 0) & (drawn == 0)
    assert shown.any()
    assert replaced.any()
    first = int(np.flatnonzero(replaced)[0])
    assert shown[first:].any()  # else the rest of this test would show nothing
    late = np.concatenate([b.indices for b in take(train_input(split, NO_COLOUR, 2, start=first // 2 + 1), 5)])
    assert np.array_equal(late, whole[(first // 2 + 1) * 2 :][:10])


@pytest.mark.parametrize("count", [5, 9])
def test_padding_with_an_image_that_cannot_be_decoded(tmp_path: Path, count: int) -> None:
    """The last batch is padded with the first image, and may be on its way when that is found not to decode."""
    split = set_with(tmp_path, {0: BROKEN["no end"]}, count).split("val")
    source = EvalInput(split, TestView(CROP, 55), ZERO, CPU, batch_size=4, max_undecodable=50)
    batches = list(source.batches(0, 1))
    source.close()
    assert [b.num_unreadable for b in batches] == [1, *[0] * (len(batches) - 1)]
    assert np.concatenate([b.indices[b.valid] for b in batches]).tolist() == list(range(1, count))


def test_more_broken_images_than_allowed_stop_with_their_names(tmp_path: Path) -> None:
    some = set_with(tmp_path / "some", dict.fromkeys((2, 3, 7), BROKEN["text"]), 20).split("train")
    with pytest.raises(ValueError, match=r"3 images of the train set cannot be decoded.*i2.jpg, i3.jpg, i7.jpg"):
        take(train_input(some, NO_COLOUR, 20, limit=2), 1)
    everything = set_with(tmp_path / "all", dict.fromkeys(range(20), BROKEN["cut"]), 20).split("train")
    for limit in (5, 50):
        with pytest.raises(ValueError, match=r"cannot be decoded|hardly an image"):
            take(train_input(everything, NO_COLOUR, 5, limit=limit), 1)


def test_an_evaluation_given_up_in_the_middle_can_be_done_again(synthetic: DataSet) -> None:
    source = EvalInput(synthetic.split("val"), TestView(CROP, 55), ZERO, CPU, batch_size=2, max_undecodable=0)
    whole = [b.images for b in source.batches(0, 1)]
    next(iter(source.batches(0, 1)))
    again = [b.images for b in source.batches(0, 1)]
    source.close()
    assert all(torch.equal(a, b) for a, b in zip(whole, again, strict=True))


def test_a_truncated_shard_is_an_error_not_a_crash(synthetic: DataSet) -> None:
    split = synthetic.split("train")
    shard = Path(synthetic.storage.path(split.info.shards[0].name))
    data = shard.read_bytes()
    try:
        shard.write_bytes(data[:5000])
        with pytest.raises(OSError, match="truncated"):
            take(train_input(split, NO_COLOUR, 8), 1)
    finally:
        shard.write_bytes(data)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu_pixels_are_close_to_cpu_pixels(photographs: DataSet) -> None:
    split, view = photographs.split("train"), TrainView(colour_std=0)
    cpu = take(train_input(split, view, 8), 2)
    gpu = take(train_input(split, view, 8, settings=replace(CPU, device="cuda")), 2)
    for a, b in zip(cpu, gpu, strict=True):
        for i in range(8):
            assert psnr_db(a.images[i].numpy(), b.images[i].cpu().numpy()) > 38
