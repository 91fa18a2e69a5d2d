"""One shard read from end to end and held against the manifest and the index."""

from __future__ import annotations

import errno
import hashlib
import json
import struct
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import IO

import numpy as np

from data_prep.images import MAX_IMAGE_BYTES, is_ready
from data_prep.progress import printable
from orchestrator.data.shard_writer import key_of, path_key
from orchestrator.data.shards import UNLABELLED, Encoding, ShardInfo
from orchestrator.storage import Storage

_MAX_HEADER_BYTES = 1 << 16  # of a shard of planes: one tensor is described in a hundred
_READ_BYTES = 4 << 20  # at a time; a multiple of tarfile.RECORDSIZE
_MAX_PROBLEMS = 20  # named of one shard: a shard of another set has thousands
DIGEST_BYTES = 16


@dataclass(frozen=True, eq=False)
class Rows:
    """The n rows of the index that tell of one shard, in its order: arrays [n], names of length n."""

    offset: np.ndarray
    nbytes: np.ndarray
    width: np.ndarray
    height: np.ndarray
    label: np.ndarray
    names: Sequence[str]


@dataclass(frozen=True, eq=False)
class Expected:
    """A shard as the manifest has it; ``rows`` None where the index cannot be read."""

    info: ShardInfo
    split: str
    first_row: int  # of the split's index
    rows: Rows | None


@dataclass(frozen=True)
class Found:
    """``problems``: what is wrong, one line each, of ``num_problems``. ``digests``: of each image, 16 bytes a row."""

    problems: tuple[str, ...]
    num_problems: int
    digests: bytes


class ShardCheck:
    """What runs on the machines of the cluster. Holds one image at a time and writes nothing."""

    def __init__(self, storage: Storage, encoding: Encoding = Encoding.JPEG) -> None:
        self.storage = storage
        self._check = {Encoding.JPEG: _check_members, Encoding.PLANES: _check_planes}[encoding]

    def __call__(self, expected: Expected) -> Found:
        """Raises OSError where storage fails for now."""
        info, problems = expected.info, _Problems(expected.info.name)
        digests = np.zeros(len(expected.rows.names) if expected.rows else 0, f"S{DIGEST_BYTES}")
        try:
            with self.storage.reading(info.name) as stream:
                passing = _Passing(stream)
                if expected.rows is not None:
                    self._check(passing, expected.rows, problems, digests)
                while passing.read(_READ_BYTES):
                    pass
        except FileNotFoundError:
            problems.first("is missing")
            return problems.found(digests)
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            problems.first(f"cannot be read to its end ({error})")
            return problems.found(digests)
        if passing.nbytes != info.nbytes:
            problems.first(f"has {passing.nbytes} bytes where the manifest says {info.nbytes}")
        elif passing.sha256.hexdigest() != info.sha256:
            problems.first("is damaged: its SHA-256 is not the one in the manifest")
        return problems.found(digests)


class _Problems:
    def __init__(self, shard: str) -> None:
        self._shard, self._lines, self._number = shard, list[str](), 0

    def add(self, line: str) -> None:
        self._number += 1
        if len(self._lines) < _MAX_PROBLEMS:
            self._lines.append(f"{self._shard}: {line}")

    def first(self, line: str) -> None:
        """What is wrong with the whole shard: the cause of the rest."""
        self._number += 1
        self._lines.insert(0, f"{self._shard} {line}")

    def found(self, digests: np.ndarray) -> Found:
        return Found(tuple(self._lines), self._number, digests.tobytes())


class _Passing:
    """A stream read once, front to back; counts and digests what passes."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self.sha256 = hashlib.sha256()
        self.nbytes = 0

    def read(self, nbytes: int) -> bytes:
        data = self._stream.read(nbytes)
        self.sha256.update(data)
        self.nbytes += len(data)
        return data


def _check_members(stream: _Passing, rows: Rows, problems: _Problems, digests: np.ndarray) -> None:
    """The tar against the index; fills ``digests``."""
    row_at = {offset: row for row, offset in enumerate(rows.offset.tolist())}
    seen, labelled = np.zeros(len(row_at), bool), np.zeros(len(row_at), bool)
    row, key = None, ""
    try:
        with tarfile.open(fileobj=stream, mode="r|", bufsize=_READ_BYTES, encoding="utf-8") as tar:  # type: ignore[call-overload]
            for member in tar:
                kind = member.name.rpartition(".")[2]
                if not member.isreg() or kind not in ("jpg", "cls") or member.size > MAX_IMAGE_BYTES:
                    problems.add(f"{printable(member.name)} at byte {member.offset} belongs to no data set")
                    if member.size > MAX_IMAGE_BYTES:
                        break
                    continue
                data = tar.extractfile(member).read()
                if kind == "jpg":
                    row, key = row_at.get(member.offset_data), member.name.removesuffix(".jpg")
                    if row is None:
                        problems.add(f"{printable(member.name)} at byte {member.offset_data} is not in the index")
                        continue
                    seen[row] = True
                    digests[row] = hashlib.blake2b(data, digest_size=DIGEST_BYTES).digest()
                    _check_image(data, key, rows, row, problems)
                elif row is not None and member.name == f"{key}.cls":
                    labelled[row] = True
                    if data != str(rows.label[row]).encode():
                        label = printable(data[:20].decode("latin1"))
                        problems.add(f"{printable(rows.names[row])} has label {label}, in the index {rows.label[row]}")
                else:
                    problems.add(f"{printable(member.name)} at byte {member.offset} is the label of no image before it")
    except (tarfile.TarError, EOFError, OverflowError, UnicodeError) as error:
        problems.add(f"is no whole tar file ({error})")
    _missing(rows, ~seen, "images that are not where the index says", problems)
    _missing(
        rows, seen & ((rows.label != UNLABELLED) != labelled), "images without a label, or with one too many", problems
    )


def _check_image(data: bytes, key: str, rows: Rows, row: int, problems: _Problems) -> None:
    name, width, height = rows.names[row], int(rows.width[row]), int(rows.height[row])
    keys = key_of(name).replace(".", "_"), path_key(name), path_key(name, distinct=True)
    if key not in keys:
        problems.add(f"{printable(key)}.jpg is {printable(name)} in the index")
    if len(data) != rows.nbytes[row]:
        problems.add(f"{printable(name)} has {len(data)} bytes, in the index {rows.nbytes[row]}")
    elif not is_ready(data, width, height):
        problems.add(f"{printable(name)} is no JPEG of {width} × {height} pixels that can be decoded")


def _check_planes(stream: _Passing, rows: Rows, problems: _Problems, digests: np.ndarray) -> None:
    """The tensor against the index; fills ``digests``."""
    start = stream.read(8)
    header_bytes = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
    try:
        tensors = json.loads(stream.read(header_bytes) if header_bytes <= _MAX_HEADER_BYTES else b"")
        (name, tensor), *others = tensors.items()
        kind, (count, planes, height, width), place = (tensor[key] for key in ("dtype", "shape", "data_offsets"))
        are_numbers = all(type(side) is int and 0 < side < 2**20 for side in (count, planes, height, width))
        image_bytes = 3 * height * width if are_numbers else 0
        is_whole = are_numbers and place == [0, count * image_bytes]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        problems.add(f"is no safetensors file with images in it ({error})")
        return
    if others or (name, kind, planes) != ("images", "U8", 3) or not is_whole:
        problems.add("holds something else than one tensor images [n, 3, height, width] uint8")
        return
    if count != len(rows.names):
        problems.add(f"holds {count} images, in the index {len(rows.names)}")
    first = stream.nbytes
    at = first + image_bytes * np.arange(len(rows.names))
    _missing(
        rows, (rows.offset != at) | (rows.nbytes != image_bytes), "images that are not where the index says", problems
    )
    _missing(
        rows, (rows.width != width) | (rows.height != height), "images of another size than the index says", problems
    )
    for row in range(min(count, len(rows.names))):
        data = stream.read(image_bytes)
        if len(data) != image_bytes:
            problems.add(f"ends within {printable(rows.names[row])}")
            return
        digests[row] = hashlib.blake2b(data, digest_size=DIGEST_BYTES).digest()
    if count == len(rows.names) and stream.read(1):
        problems.add("goes on behind its images")


def _missing(rows: Rows, where: np.ndarray, what: str, problems: _Problems) -> None:
    missing = np.flatnonzero(where)
    if len(missing):
        names = ", ".join(printable(rows.names[row]) for row in missing[:3])
        problems.add(f"{what}: {len(missing)} of {len(where)} ({names}{', …' if len(missing) > 3 else ''})")
