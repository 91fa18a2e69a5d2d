"""Images a second of the input side alone, from JPEG bytes to batches of floats, against what others use.

    python -m benchmarks.input --photos FOLDER [--view paper|area] [--size 500x375] [--cpus 2] [--store URL] [--cold]
                               [--quick]

All kinds see the same pictures, made of the photographs in FOLDER (any size) as JPEGs of one size and weight, and use
the same processors, one after another in one run, several times:

    ours       what a worker trains on: region decoded by DALI from shards, resized, mirrored, colour, mean; from this
               machine's memory, from its disk (--cold), or from an object store (--store s3://…, no node's cache)
    pil        torch's DataLoader of --cpus processes, the same view by Pillow: image resized, cropped
    pil_region the same, only the region resized
    dali       DALI's usual pipeline: files, a random area decoded, resized to the crop, mirrored, normalized
    dali_whole the same with whole images decoded

The last line is machine-readable: ratio_to_pil=… ratio_to_dali=…, medians of the ratios within a repetition.
"""

from __future__ import annotations

import functools
import io
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from benchmarks.machine import about, line_of, record
from data_prep import image_folder
from jobs import command_line
from jobs.imagenet import RECIPES
from orchestrator.config import CropStyle
from orchestrator.data.pipeline import TrainInput
from orchestrator.data.sampling import SampleStream
from orchestrator.data.shards import DataSet
from orchestrator.data.views import ColourAxes, TrainView, Views
from orchestrator.storage import Storage
from orchestrator.training.assembly import decode_settings, views_of

_SUFFIXES = (".jpg", ".jpeg", ".png")
_WARM_UP = 6  # batches


class View(Enum):
    """What a training image is shown as."""

    PAPER = "paper"  # shorter side 256 to 480 pixels, a crop of 224
    AREA = "area"  # 8 to 100 % of the area


@dataclass(frozen=True)
class Arguments:
    """What is measured."""

    photos: Path
    """folder of photographs, searched with all folders below"""
    view: View = View.PAPER
    size: str = "500x375"
    """pixels of the JPEGs, width x height"""
    kilobytes: int = 110
    """about so large is each"""
    cpus: int = 0
    """threads of DALI, processes of the DataLoader; 0: all processors"""
    images: int = 2048
    """seen in one measurement"""
    batch_size: int = 128
    repeats: int = 5
    kinds: tuple[str, ...] = ("ours", "pil", "pil_region", "dali", "dali_whole")
    store: str = ""
    """URL of a folder for our set, left there, as s3://bucket/folder; empty: a temporary folder, as of the peers"""
    cold: bool = False
    """the kernel forgets all pictures before each measurement: they come from the disk"""
    quick: bool = False
    """a minute: fewer images, one repetition"""
    record: str = ""
    """file of Markdown that a table is appended to"""


# -- the pictures ---------------------------------------------------------------------------------------------------


def make_pictures(photos: Path, out: Path, size: tuple[int, int], kilobytes: int) -> tuple[int, float]:
    """JPEGs of one size and about one weight, in folders of classes; how many, and their mean weight in kB."""
    found = sorted(path for path in photos.rglob("*") if path.suffix.lower() in _SUFFIXES)
    if not found:
        raise ValueError(f"there are no photographs in {photos}: give a folder of JPEGs as --photos")
    pictures = [_fitted(path, size) for path in found]
    qualities = range(40, 100)
    weights = [sum(len(_jpeg(p, q)) for p in pictures[:16]) / len(pictures[:16]) for q in qualities]
    quality = min(zip(qualities, weights, strict=True), key=lambda pair: abs(pair[1] - 1000 * kilobytes))[0]
    total = 0
    for number, picture in enumerate(pictures):
        folder = out / "train" / f"class{number % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        data = _jpeg(picture, quality)
        total += len(data)
        (folder / f"{number:06d}.jpg").write_bytes(data)
    (out / "val" / "class0").mkdir(parents=True)
    (out / "val" / "class1").mkdir()
    for number in (0, 1):
        (out / "val" / f"class{number}" / "0.jpg").write_bytes(_jpeg(pictures[number], quality))
    return len(pictures), total / len(pictures) / 1000


def _fitted(path: Path, size: tuple[int, int]) -> Image.Image:
    with Image.open(path) as image:
        picture = image.convert("RGB")
    scale = max(size[0] / picture.width, size[1] / picture.height)
    width, height = size[0] / scale, size[1] / scale
    left, top = max(0.0, (picture.width - width) / 2), max(0.0, (picture.height - height) / 2)
    return picture.resize(
        size,
        Image.Resampling.LANCZOS,
        box=(left, top, min(left + width, picture.width), min(top + height, picture.height)),
    )


def _jpeg(picture: Image.Image, quality: int) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, "JPEG", quality=quality)
    return stream.getvalue()


# -- kinds ----------------------------------------------------------------------------------------------------------


class PilSet(Dataset[tuple[torch.Tensor, int]]):
    """The same view by Pillow, image by image: [3, crop, crop] float32 less the mean, and a label."""

    def __init__(
        self, files: list[Path], view: TrainView, axes: ColourAxes, mean: np.ndarray, length: int, *, region: bool
    ) -> None:
        self._files, self._view, self._axes, self._mean = files, view, axes, mean
        self._length, self._region = length, region
        self._stream = SampleStream(len(files), 0)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, position: int) -> tuple[torch.Tensor, int]:
        positions = np.array([position])
        number = int(self._stream.images(positions)[0])
        with Image.open(self._files[number]) as opened:
            image = opened.convert("RGB")
        size = np.array([image.width]), np.array([image.height])
        view = self._view.views(self._stream, positions, *size, self._axes)
        pixels = np.asarray(self._shown(image, view), np.float32)
        if view.flip[0]:
            pixels = pixels[:, ::-1]
        shown = torch.from_numpy(np.ascontiguousarray((pixels + view.colour_shift[0]).transpose(2, 0, 1)))
        return shown - torch.from_numpy(self._mean), number

    def _shown(self, image: Image.Image, view: Views) -> Image.Image:
        crop, box = self._view.crop, (view.x0[0], view.y0[0], view.x1[0], view.y1[0])
        if self._region or self._view.style is CropStyle.RANDOM_AREA:
            return image.resize((crop, crop), Image.Resampling.BILINEAR, box=box)
        # As it is usually written: resize, then crop.
        scale_x, scale_y = crop / (box[2] - box[0]), crop / (box[3] - box[1])
        image = image.resize((round(image.width * scale_x), round(image.height * scale_y)), Image.Resampling.BILINEAR)
        left, top = round(box[0] * scale_x), round(box[1] * scale_y)
        return image.crop((left, top, left + crop, top + crop))


def _dali(files: list[Path], crop: int, a: Arguments, cpus: int, *, whole: bool) -> Callable[[], Any]:
    """DALI's usual training pipeline; a call gives a batch [N, 3, crop, crop] float32."""
    import nvidia.dali.fn as fn
    import nvidia.dali.types as types
    from nvidia.dali import pipeline_def

    @pipeline_def(batch_size=a.batch_size, num_threads=cpus, device_id=None, prefetch_queue_depth=2, seed=0)
    def graph() -> Any:
        encoded, labels = fn.readers.file(
            files=[str(path) for path in files], labels=list(range(len(files))), random_shuffle=True, initial_fill=1024
        )
        area = {"random_aspect_ratio": [3 / 4, 4 / 3], "random_area": [0.08, 1.0], "num_attempts": 10}
        if whole:
            images = fn.decoders.image(encoded, device="cpu", output_type=types.RGB)
            images = fn.random_resized_crop(images, size=[crop, crop], **area)
        else:
            images = fn.decoders.image_random_crop(encoded, device="cpu", output_type=types.RGB, **area)
            images = fn.resize(images, size=[crop, crop], interp_type=types.INTERP_TRIANGULAR)
        mean, std = [0.485 * 255, 0.456 * 255, 0.406 * 255], [0.229 * 255, 0.224 * 255, 0.225 * 255]
        mirror = fn.random.coin_flip(probability=0.5)
        images = fn.crop_mirror_normalize(images, dtype=types.FLOAT, mean=mean, std=std, mirror=mirror)
        return images, labels

    pipeline = graph()
    pipeline.build()

    def take() -> Any:
        images, _ = pipeline.run()
        return torch.from_numpy(np.array(images.as_tensor()))

    return take


def _ours(data: DataSet, a: Arguments, cpus: int) -> tuple[TrainInput, TrainView, ColourAxes, np.ndarray]:
    config = RECIPES["resnet50"]()
    style = CropStyle.SCALE_JITTER if a.view is View.PAPER else CropStyle.RANDOM_AREA
    config = replace(config, input=replace(config.input, crop_style=style))
    view, _, mean, axes = views_of(config, data)
    split = data.split("train")

    def positions_of(step: int) -> np.ndarray:
        return np.arange(step * a.batch_size, (step + 1) * a.batch_size)

    settings = decode_settings(config, torch.device("cpu"), cpus)
    stream = SampleStream(len(split), 0)
    return TrainInput(split, stream, view, axes, mean, settings, positions_of, 0, 0), view, axes, mean.value


def measure(a: Arguments, data: DataSet, pictures: Path, cpus: int) -> dict[str, list[float]]:
    """Images a second of each kind, one value a repetition."""
    files = sorted(pictures.rglob("*.jpg"))
    source, view, axes, mean = _ours(data, a, cpus)
    takes: dict[str, Callable[[], Any]] = {"ours": lambda: next(source)}
    for kind, region in (("pil", False), ("pil_region", True)):
        if kind in a.kinds:
            dataset = PilSet(files, view, axes, mean, 1 << 30, region=region)
            loader = DataLoader(dataset, a.batch_size, num_workers=cpus, multiprocessing_context="spawn")
            takes[kind] = functools.partial(next, iter(loader))
    for kind, whole in (("dali", False), ("dali_whole", True)):
        if kind in a.kinds:
            takes[kind] = _dali(files, view.crop, a, cpus, whole=whole)
    speeds: dict[str, list[float]] = {kind: [] for kind in takes}
    batches = max(1, a.images // a.batch_size)
    for _ in range(a.repeats):
        for kind, take in takes.items():
            if a.cold:
                _forget(pictures.parent.parent)
            for _ in range(_WARM_UP):  # what was made ready while others were measured
                take()
            start = time.perf_counter()
            for _ in range(batches):
                take()
            speeds[kind].append(batches * a.batch_size / (time.perf_counter() - start))
    source.close()
    return speeds


def _forget(folder: Path) -> None:
    """Drop all files below ``folder`` from the kernel's memory."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as stream:
                os.fsync(stream.fileno())
                os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def main() -> int:
    a = tyro.cli(Arguments, description=__doc__, config=(tyro.conf.EnumChoicesFromValues,))
    if a.quick:
        a = replace(a, images=min(a.images, 512), repeats=1)
    width, _, height = a.size.partition("x")
    cpus = a.cpus or len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory(prefix="benchmark-input-") as scratch:
        folder = Path(scratch)
        count, weight = make_pictures(a.photos, folder / "pictures", (int(width), int(height)), a.kilobytes)
        url = a.store or str(folder / "set")
        code = image_folder.main([str(folder / "pictures"), "--out", url, "--num-tasks", "0"])
        if code:
            return code
        speeds = measure(a, DataSet(Storage(url)), folder / "pictures" / "train", cpus)
    what = f"{count} pictures of {a.size} pixels, {weight:.0f} kB, view {a.view.value}, {cpus} CPUs"
    what += f", from {a.store.partition(':')[0] if a.store else 'disk' if a.cold else 'memory'}"
    ratios = {
        kind: statistics.median(ours / other for ours, other in zip(speeds["ours"], values, strict=True))
        for kind, values in speeds.items()
    }
    rows = [
        (kind, f"{statistics.median(values):.0f} ({min(values):.0f}–{max(values):.0f})", f"{ratios[kind]:.2f}")
        for kind, values in speeds.items()
    ]
    print(f"{what}; {about()}")
    for row in rows:
        print(f"{row[0]:>12}: {row[1]} images/s, ours is {row[2]} times as fast")
    if a.record:
        header = ("kind", "images/s, median (all)", "ours is so many times as fast")
        record(
            Path(a.record), f"Input side alone: {what}", header, rows, f"{a.repeats} repetitions of {a.images} images."
        )
    print(line_of({f"ratio_to_{kind}": ratio for kind, ratio in ratios.items() if kind != "ours"}))
    return 0


if __name__ == "__main__":
    from benchmarks.input import main as importable_main  # processes of the DataLoader import it

    sys.exit(command_line.exit_code(importable_main))
