"""A data set from images in memory, for tests."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from safetensors.numpy import save

from orchestrator.config import CropStyle
from orchestrator.data.shard_writer import ShardWriter, write_index
from orchestrator.data.shards import INDEX_SCHEMA, ClassInfo, DataSet, Manifest, SplitInfo
from orchestrator.storage import Storage, sha256_hex

DECODED = [style for style in CropStyle if style is not CropStyle.PADDED]  # padded ones are of images in memory


def jpeg(pixels: np.ndarray, **options: object) -> bytes:
    """pixels [H, W, 3] or [H, W] uint8 as JPEG."""
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "JPEG", quality=95, **options)
    return stream.getvalue()


def noise_image(rng: np.random.Generator, width: int, height: int) -> np.ndarray:
    """Smooth coloured noise [height, width, 3] uint8: structure at every scale, as photographs have."""
    total = np.zeros((height, width, 3))
    for cells in (3, 8, 20, 50):
        small = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), np.uint8))
        total += np.asarray(small.resize((width, height), Image.Resampling.BICUBIC), np.float64)
    return (total / 4).astype(np.uint8)


def build(
    folder: Path,
    images: Sequence[tuple[str, bytes, int]],
    shards: int = 2,
    crop: int = 32,
    broken: Mapping[int, bytes] | None = None,
) -> DataSet:
    """One data set whose train and val splits both hold ``images``: (name, encoded, label).

    ``broken``: bytes that replace those of an image after its size was recorded.
    """
    storage = Storage(str(folder))
    splits = {}
    for split in ("train", "val"):
        columns: dict[str, list[object]] = {f.name: [] for f in INDEX_SCHEMA}
        infos = []
        for number, part in enumerate(np.array_split(np.arange(len(images)), shards)):
            with ShardWriter(storage, f"{split}/{number:03d}.tar") as shard:
                for i in part.tolist():
                    name, data, label = images[i]
                    try:
                        width, height = Image.open(io.BytesIO(data)).size
                    except OSError:
                        width, height = 64, 64  # what a header that has since been damaged said
                    data = (broken or {}).get(i, data)
                    row = (number, shard.add(name, data, label), len(data), width, height, label, 1, name)
                    for key, value in zip(columns, row, strict=True):
                        columns[key].append(value)
            infos.append(shard.info)
        digest = write_index(storage, f"{split}.arrow", columns)
        splits[split] = SplitInfo(len(images), f"{split}.arrow", digest, tuple(infos))
    rng = np.random.default_rng(0)
    statistics = save(
        {
            "mean_image": rng.uniform(90, 130, (3, crop, crop)).astype(np.float32),
            "channel_mean": np.array([120.0, 115.0, 100.0]),
            "covariance": np.eye(3) * 3000,
            "eigenvalues": np.array([14000.0, 1200.0, 290.0]),
            "eigenvectors": np.linalg.qr(rng.normal(size=(3, 3)))[0],
        }
    )
    storage.publish("statistics.safetensors", statistics)
    labels = range(max(label for *_, label in images) + 1)
    manifest = Manifest(
        name="test",
        classes=tuple(ClassInfo(i, f"n{i:08d}", i + 1) for i in labels),
        splits=splits,
        statistics="statistics.safetensors",
        statistics_sha256=sha256_hex(statistics),
        statistics_crop=crop,
    )
    storage.publish("manifest.json", manifest.to_bytes())
    return DataSet(storage)
