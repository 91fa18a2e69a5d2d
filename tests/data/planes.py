"""A data set of small images that lie in memory, from arrays, for tests."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors.numpy import save

from orchestrator.data.shard_writer import write_index
from orchestrator.data.shards import ClassInfo, DataSet, Encoding, Manifest, ShardInfo, SplitInfo
from orchestrator.storage import Storage, sha256_hex

Images = tuple[np.ndarray, np.ndarray]  # [N, 3, H, W] uint8, labels [N]


def random_images(seed: int, count: int, num_classes: int = 10, side: int = 32) -> Images:
    """Noise whose brightness tells the class."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % num_classes
    noise = rng.integers(0, 60, (count, 3, side, side))
    return (noise + 15 * labels[:, None, None, None]).astype(np.uint8), labels


def build_planes(folder: Path, splits: Mapping[str, Images], shards: int = 2, name: str = "planes") -> DataSet:
    """``splits``: by name; ``name``: of the data set; train's mean image is the mean that is subtracted."""
    storage, infos = Storage(str(folder)), {}
    for split, (images, labels) in splits.items():
        columns: dict[str, list[object]] = {key: [] for key in ("shard", "offset", "nbytes", "width", "height")}
        parts, nbytes = [], int(images[0].size)
        for number, part in enumerate(np.array_split(images, shards)):
            content = save({"images": part})
            shard = ShardInfo(f"{split}/{number:03d}.safetensors", len(content), len(part), sha256_hex(content))
            storage.publish(shard.name, content)
            parts.append(shard)
            begin = len(content) - part.size
            columns["shard"] += [number] * len(part)
            columns["offset"] += [begin + i * nbytes for i in range(len(part))]
        columns |= {"nbytes": [nbytes] * len(images), "decodable": [1] * len(images), "label": labels.tolist()}
        columns |= {"width": [images.shape[3]] * len(images), "height": [images.shape[2]] * len(images)}
        columns["name"] = [f"{split}/{i:05d}" for i in range(len(images))]
        digest = write_index(storage, f"{split}.arrow", columns)
        infos[split] = SplitInfo(len(images), f"{split}.arrow", digest, tuple(parts))
    mean = splits["train"][0].mean(0).astype(np.float32)
    axes = {"eigenvalues": np.array([14000.0, 1200.0, 290.0]), "eigenvectors": np.eye(3)[::-1].copy()}
    axes |= {"covariance": np.eye(3), "channel_mean": mean.mean((1, 2)).astype(np.float64)}
    statistics = save({"mean_image": mean, **axes})
    storage.publish("statistics.safetensors", statistics)
    manifest = Manifest(
        name=name,
        classes=tuple(
            ClassInfo(i, f"class{i}") for i in range(max(int(labels.max()) for _, labels in splits.values()) + 1)
        ),
        splits=infos,
        statistics="statistics.safetensors",
        statistics_sha256=sha256_hex(statistics),
        statistics_crop=mean.shape[1],
        encoding=Encoding.PLANES,
    )
    storage.publish("manifest.json", manifest.to_bytes())
    return DataSet(storage)
