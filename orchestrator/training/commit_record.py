"""What makes a checkpoint exist: one record of its files and of how the run came to it; and which records count."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from orchestrator.storage import sha256_hex


@dataclass(frozen=True)
class FileRecord:
    """One file of a checkpoint: size in bytes and SHA-256."""

    nbytes: int
    sha256: str


@dataclass(frozen=True)
class CommitRecord:
    """What makes a checkpoint exist. ``validation_top1_error`` in percent, where it followed a validation.

    starts: (number, step it went on from) of every start that led here, oldest first; the last one is the writer's.
    """

    step: int
    attempt: int
    files: dict[str, FileRecord]
    starts: tuple[tuple[int, int], ...]
    validation_top1_error: float | None = None

    @property
    def folder(self) -> str:
        return f"checkpoints/{self.step:09d}-a{self.attempt:06d}"

    @property
    def name(self) -> str:
        return f"{self.folder}.json"

    def to_bytes(self) -> bytes:
        record = asdict(self)
        return json.dumps({"sha256": _digest(record), "record": record}, indent=1, sort_keys=True).encode()

    @staticmethod
    def from_bytes(data: bytes, name: str) -> CommitRecord:
        """Raises ValueError, KeyError, TypeError or AttributeError for what was not published as ``name``."""
        content = json.loads(data)
        raw = content["record"]
        if content["sha256"] != _digest(raw):
            raise ValueError("its SHA-256 is not right")
        raw["files"] = {name: FileRecord(**f) for name, f in raw["files"].items()}
        raw["starts"] = tuple((int(number), int(step)) for number, step in raw["starts"])
        record = CommitRecord(**raw)
        if record.name != name:
            raise ValueError(f"it belongs to {record.name}")
        return record


def _digest(plain: dict[str, Any]) -> str:
    return sha256_hex(json.dumps(plain, sort_keys=True).encode())


def counting(records: Iterable[CommitRecord]) -> list[CommitRecord]:
    """Those of ``records`` that led to the newest one, oldest first.

    The newest is of the highest start. Another counts only if no later start on the way to the newest has gone on
    from before it; of two records of one step the later start's counts.
    """
    known = sorted(records, key=lambda r: (r.attempt, r.step))
    if not known:
        return []
    on_the_way = [r for r in known if all(origin >= r.step for n, origin in known[-1].starts if n > r.attempt)]
    return [record for _, record in sorted({r.step: r for r in on_the_way}.items())]


def best(records: list[CommitRecord]) -> CommitRecord | None:
    measured = [(r.validation_top1_error, r.step, r) for r in records if r.validation_top1_error is not None]
    return min(measured, key=lambda each: each[:2])[2] if measured else None
