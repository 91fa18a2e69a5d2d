"""Folders of runs that have scored both splits of a data set, without a network."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import numpy as np

from orchestrator.data.shards import DataSet
from orchestrator.evaluation import scores
from orchestrator.evaluation.scores import ScoresInfo
from orchestrator.storage import Storage, sha256_hex
from tests.evaluation.score_files import softmax

PROTOCOL = {"kind": "ten_crop", "crop_px": 64, "average": "softmax"}
HINTS = {"a": 2.0, "b": 1.6, "c": 1.0}  # what the members know of the truth


def scored_runs(folder: Path, data: DataSet) -> dict[str, dict[str, str]]:
    """Runs a, b and c in ``folder``; URLs of their score files, by split and run."""
    manifest, rng = data.manifest, np.random.default_rng(0)
    urls: dict[str, dict[str, str]] = {}
    for split_name in ("val", "test"):
        split = data.split(split_name)
        for name, hint in HINTS.items():
            truth = split.label[:, None] == np.arange(data.num_classes)
            weights = sha256_hex(name.encode())
            info = ScoresInfo(
                split=split_name,
                protocol=PROTOCOL,
                classes=manifest.classes,
                model={"name": name, "recipe": "resnet18", "run": f"{folder}/{name}", "weights_sha256": weights},
                data={
                    "url": data.storage.url,
                    "sha256": data.digest,
                    "name": manifest.name,
                    "sources": [asdict(source) for source in manifest.sources],
                },
                code_version="abc",
            )
            file = scores.file_name(split_name, "ten_crop", scores.key(weights, data.digest, split_name, PROTOCOL))
            record = scores.publish(
                Storage(str(folder / name)),
                file,
                info,
                names=split.names,
                labels=split.label,
                decoded=split.decodable.astype(bool),
                width=split.width,
                height=split.height,
                scores=softmax(rng.normal(size=truth.shape) + hint * truth),
            )
            urls.setdefault(split_name, {})[name] = f"{folder}/{name}/{record.name}"
    return urls
