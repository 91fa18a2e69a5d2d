"""Where a file came from: file → scores → checkpoints → recipes and configs → data → archives, and which code.

::

    file      name, size, SHA-256, format of what was written
    scores    URL and SHA-256 of the score file it was written from; split, protocol, code that made it
    models    one entry for each network in it: its share of the average, its own score file (URL, SHA-256), and its
              finished model's record: weights, checkpoint, run, recipe, config, data that it was trained on, code
    data      URL, name and SHA-256 of the data set that was scored: the digest is that of its manifest, which names
              every image
    sources   the archives that the data set was made of: name, size, MD5, whether it is the official one
    code_version   of what wrote the file
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from orchestrator.evaluation.scores import Scores

FORMAT = "resnet-orchestrator-lineage/1"


def lineage_of(scores: Scores, name: str, nbytes: int, sha256: str, form: str, code_version: str) -> dict[str, Any]:
    """Plain data, as above, of the file ``name`` that was written from ``scores``."""
    info, data = scores.info, dict(scores.info.data)
    return {
        "format": FORMAT,
        "file": {"name": name, "nbytes": nbytes, "sha256": sha256, "format": form, "images": len(scores)},
        "scores": {
            "url": scores.url,
            "sha256": scores.sha256,
            "split": info.split,
            "protocol": dict(info.protocol),
            "code_version": info.code_version,
        },
        "models": _models({"url": scores.url, "sha256": scores.sha256}, info.model, 1.0),
        "sources": data.pop("sources", []),
        "data": data,
        "code_version": code_version,
    }


def _models(file: Mapping[str, str], model: Mapping[str, Any], share: float) -> list[dict[str, Any]]:
    """The networks behind a score file; of an ensemble those of its members."""
    if "ensemble" not in model:
        return [{"share": share, "scores": dict(file), "model": dict(model)}]
    members, found = model["ensemble"], list[dict[str, Any]]()
    total = sum(member["weight"] for member in members)
    for member in members:
        of = {"url": member["url"], "sha256": member["sha256"]}
        found += _models(of, member["model"], share * member["weight"] / total)
    return found
