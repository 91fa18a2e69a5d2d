"""Score files of random numbers, for tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from orchestrator.data.shards import ClassInfo
from orchestrator.evaluation import scores
from orchestrator.evaluation.scores import ScoreRecord, ScoresInfo
from orchestrator.storage import Storage


def info_of(num_classes: int, **changed: Any) -> ScoresInfo:
    """What a score file of that many classes speaks of. Ids are not in the order of labels, as ILSVRC's are not."""
    classes = tuple(ClassInfo(i, f"n{i:08d}", num_classes - i, f"thing {i}") for i in range(num_classes))
    known: dict[str, Any] = {
        "split": "val",
        "protocol": {"kind": "ten_crop", "crop_px": 64, "average": "softmax"},
        "classes": classes,
        "model": {"name": "member", "recipe": "resnet18", "weights_sha256": "0" * 64},
        "data": {"url": "/data/set", "sha256": "d" * 64, "name": "set", "sources": []},
        "code_version": "abc",
    }
    return ScoresInfo(**(known | changed))


def columns(values: np.ndarray, labels: np.ndarray | None = None, **changed: Any) -> dict[str, Any]:
    """Columns of a score file; without labels it is a test set's."""
    n = len(values)
    known: dict[str, Any] = {
        "names": [f"image_{i:04d}.JPEG" for i in range(n)],
        "labels": np.full(n, -1, np.int32) if labels is None else labels.astype(np.int32),
        "decoded": np.ones(n, bool),
        "width": np.full(n, 60, np.int32),
        "height": np.full(n, 40, np.int32),
        "scores": values.astype(np.float32),
    }
    return known | changed


def softmax(logits: np.ndarray) -> np.ndarray:
    """float64 [N, C] to float32 [N, C]."""
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    return (powers / powers.sum(axis=1, keepdims=True)).astype(np.float32)


def member(
    folder: Path,
    name: str,
    values: np.ndarray,
    labels: np.ndarray | None = None,
    *,
    info: dict[str, Any] | None = None,
    **changed: Any,
) -> ScoreRecord:
    """One published score file ``folder/name/scores/x.arrow``."""
    speaks = info_of(values.shape[1], **({"model": {"name": name, "recipe": "resnet18"}} | (info or {})))
    return scores.publish(Storage(str(folder)), f"{name}/scores/x.arrow", speaks, **columns(values, labels, **changed))
