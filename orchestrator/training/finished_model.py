"""The finished model of a run: the weights of one checkpoint as they are tested, with the mean that goes with them.

::

    model/000600000-last-bn50000.safetensors   model/<name>: weights and buffers; input/mean: what is subtracted
    model/000600000-last-bn50000.json          its record, published last: a file without one does not exist

A model is tested with the mean that it was trained with, whatever data set it is tested on.
"""

from __future__ import annotations

import json
import typing
from dataclasses import dataclass
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

from orchestrator.plain import digest, from_plain, to_plain
from orchestrator.remote import StoreRefusedError
from orchestrator.storage import DigestError, Storage


@dataclass(frozen=True)
class ModelRecord:
    """What a finished model is, and where it came from.

    file: its name in the run's folder; weights_sha256: over model/* (``checkpoint.weights_sha256``); step: optimizer
    steps done; checkpoint: URL of the folder whose weights these are, and the SHA-256 of its tensors; errors in
    percent; precise_bn_images: training images over which batch norm's statistics are averaged (0: as trained); run:
    URL of the run's folder; config: its identity, data set apart, whose digest is data_sha256.
    """

    file: str
    nbytes: int
    sha256: str
    weights_sha256: str
    step: int
    checkpoint: str
    checkpoint_sha256: str
    validation_top1_error: float | None
    precise_bn_images: int
    run: str
    name: str
    recipe: str
    config: dict[str, Any]
    data_sha256: str
    num_classes: int
    code_version: str

    @property
    def record_name(self) -> str:
        """The record's own name in the run's folder."""
        return self.file.removesuffix(".safetensors") + ".json"

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return typing.cast(dict[str, Any], to_plain(self))

    @staticmethod
    def from_json(data: dict[str, Any]) -> ModelRecord:
        """Inverse of ``to_json``. Raises ValueError for an unknown, missing or ill-typed field."""
        return typing.cast(ModelRecord, from_plain(ModelRecord, data, "model"))

    def to_bytes(self) -> bytes:
        plain = self.to_json()
        return json.dumps({"sha256": digest(plain), "model": plain}, indent=1, sort_keys=True).encode()

    @staticmethod
    def from_bytes(data: bytes) -> ModelRecord:
        """Raises ValueError, KeyError or TypeError for what is not whole."""
        content = json.loads(data)
        if content["sha256"] != digest(content["model"]):
            raise ValueError("its SHA-256 is not right")
        return ModelRecord.from_json(content["model"])


def read_model(run: Storage, record: ModelRecord) -> dict[str, Tensor]:
    """model/<name> as trained, and input/mean [3, S, S] or [3] float32 on the 0–255 scale, in host memory.

    Raises DigestError where they are not what was published, FileNotFoundError where they are gone.
    """
    data = run.read(record.file, record.sha256)
    try:
        return safetensors.torch.load(data)
    except safetensors.SafetensorError as error:
        raise DigestError(f"{run.url}/{record.file} is no file of tensors: {error}") from None


def find_models(run: Storage) -> list[ModelRecord]:
    """The finished models of a run, oldest step first; what cannot be read is passed over."""
    found = []
    for name in run.files("model"):
        if name.endswith(".json") and (record := _read_record(run, name)) is not None:
            found.append(record)
    return sorted(found, key=lambda record: (record.step, record.file))


def _read_record(run: Storage, name: str) -> ModelRecord | None:
    """The record ``name``; None where there is none, or it is torn."""
    try:
        return ModelRecord.from_bytes(run.read(name))
    except StoreRefusedError:  # nothing is wrong with the record
        raise
    except (FileNotFoundError, json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, ValueError):
        return None
