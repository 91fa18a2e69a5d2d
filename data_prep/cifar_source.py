"""CIFAR-10 as cs.toronto.edu gives it: the binary or the Python version, as an archive or a folder of its files."""

from __future__ import annotations

import gzip
import hashlib
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any, cast

import numpy as np

from data_prep.archives import walk
from data_prep.cifar_pickle import read_batch, read_class_names
from data_prep.preparation import answered, check_folder
from orchestrator.data.shards import Source
from orchestrator.storage import Storage

CLASSES: tuple[str, ...] = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
SIDE = 32  # pixels
IMAGE_BYTES = 3 * SIDE * SIDE
RECORD_BYTES = 1 + IMAGE_BYTES  # of the binary version: label, then the planes of red, green and blue
_BATCH_IMAGES = 10_000  # in each official file

# MD5 of the archives: https://www.cs.toronto.edu/~kriz/cifar.html
OFFICIAL = {
    "cifar-10-python.tar.gz": "c58f30108f718f92721af3b95e74349a",
    "cifar-10-binary.tar.gz": "c32a1d4ab5d03f1284b67883e8d87530",
}
_TRAIN = tuple(f"data_batch_{number}" for number in range(1, 6))
_TEST = "test_batch"
_BINARY = (*(f"{name}.bin" for name in (*_TRAIN, _TEST)), "batches.meta.txt")
_PYTHON = (*_TRAIN, _TEST, "batches.meta")

_GZIPPED = (".tar.gz", ".tgz")
_MAX_FILE_BYTES = 32 << 20  # the largest has 31.0 MB
_MAX_UNPACKED_BYTES = 512 << 20  # the larger archive holds 186 MB
_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True, eq=False)
class Images:
    """n images of CIFAR-10. images: [n, 3, 32, 32] uint8, R, G, B; labels: [n] int64; names: of length n."""

    images: np.ndarray
    labels: np.ndarray
    names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.names)

    def some(self, rows: np.ndarray) -> Images:
        """The images ``rows`` [m] int64, in that order."""
        return Images(self.images[rows], self.labels[rows], tuple(self.names[row] for row in rows.tolist()))


@dataclass(frozen=True)
class Content:
    """What a source holds: all training images, in the order of the files, the test set, and whatever is to be told."""

    train: Images
    test: Images | None
    sources: tuple[Source, ...]
    notes: tuple[str, ...]


class CifarSource:
    """The archive or folder at ``url``: names and sizes in bytes of its ``files``, in a fixed order; nothing is read.

    Raises ValueError where there is none, or where a folder holds no file of CIFAR-10, or those of both versions.
    """

    def __init__(self, url: str) -> None:
        name = PurePosixPath(url).name
        self.archive = name if name.endswith((*_GZIPPED, ".tar")) and not Path(url).is_dir() else None
        if self.archive:
            folder = url.rstrip("/").removesuffix(name)
            self.storage = Storage(folder or ".")
            self.files = {name: answered(self.storage, "read", lambda: self.storage.size_bytes(name))}
            return
        self.storage = Storage(url)
        check_folder(self.storage, "SOURCE")
        there = answered(self.storage, "listed", self.storage.sizes_bytes)
        self.files = {name: there[name] for name in _of_one_version(there, self.storage.url)}
        for name, nbytes in self.files.items():
            _check_size(self.storage.url, name, nbytes)

    def read(self) -> Content:
        """Read everything once, into memory: 0.5 GB at its peak, of the Python version 0.7 GB.

        Raises ValueError, naming the file, where it is damaged, truncated, or not of CIFAR-10; OSError.
        """
        where = self.archive or self.storage.url
        pieces: dict[str, Images] = {}
        classes, notes = CLASSES, list[str]()
        sources = list[Source]()
        for name, data in self._archived(sources) if self.archive else self._lying(sources):
            batch = name.removesuffix(".bin")
            if batch in (*_TRAIN, _TEST):
                pieces[batch] = _images(data, name, batch)
            else:
                classes = tuple(_class_names(data, name))
            if classes != CLASSES:
                raise ValueError(
                    f"{name} does not name the classes of CIFAR-10, in their order ({', '.join(CLASSES)}), but "
                    f"{', '.join(classes)[:200]!r}: download {where} again"
                )
        trained = [batch for batch in _TRAIN if batch in pieces]
        if not trained:
            raise ValueError(f"{where} holds no data_batch_1 to data_batch_5: there is nothing to train on: add them")
        images = sum(len(piece) for piece in pieces.values())
        if any(len(piece) != _BATCH_IMAGES for piece in pieces.values()) or len(pieces) < len(_TRAIN) + 1:
            held = ", ".join(f"{batch} {len(pieces[batch]):,}" for batch in (*_TRAIN, _TEST) if batch in pieces)
            notes.append(f"note: {where} is a part of CIFAR-10: {images:,} of its 60,000 images ({held})")
        return Content(_joined([pieces[b] for b in trained]), pieces.get(_TEST), tuple(sources), tuple(notes))

    def _lying(self, sources: list[Source]) -> Iterator[tuple[str, bytes]]:
        """The files of a folder; adds to ``sources``."""
        for name, nbytes in self.files.items():
            data = self.storage.read(name)
            if len(data) != nbytes:
                raise ValueError(f"{name} was changed while it was read: when nothing writes there any more, run again")
            sources.append(Source(name, nbytes, hashlib.md5(data, usedforsecurity=False).hexdigest()))
            yield name, data

    def _archived(self, sources: list[Source]) -> Iterator[tuple[str, bytes]]:
        """The files of the archive, read from front to back and never unpacked to a disk; adds to ``sources``."""
        archive = cast(str, self.archive)
        seen: list[str] = []
        with self.storage.reading(archive) as stream:
            passing = _Passing(stream)
            unpacked, stop = cast(IO[bytes], passing), self.files[archive]
            if archive.endswith(_GZIPPED):
                unpacked, stop = cast(IO[bytes], gzip.GzipFile(fileobj=passing)), _MAX_UNPACKED_BYTES
            try:
                for member in walk(unpacked, archive, 0, stop):
                    if member.name not in (*_BINARY, *_PYTHON):
                        continue
                    _check_size(archive, member.name, member.nbytes)
                    if member.name in seen:
                        raise ValueError(f"{archive} holds {member.name!r} twice: download it again")
                    seen.append(member.name)
                    unpacked.seek(member.offset)
                    data = unpacked.read(member.nbytes)
                    if len(data) != member.nbytes:
                        raise ValueError(f"{archive} is truncated within {member.name!r}: download it again")
                    yield member.name, data
                # To its very end: gzip's checksum stands there, and the MD5 is that of all of it.
                while unpacked.read(_CHUNK_BYTES):
                    if unpacked.tell() > _MAX_UNPACKED_BYTES:
                        raise ValueError(f"{archive} holds more than CIFAR-10 has: download it again")
            except (EOFError, gzip.BadGzipFile, zlib.error) as error:
                raise ValueError(f"{archive} is truncated or damaged ({error}): download it again") from None
            while passing.read(_CHUNK_BYTES):
                pass
        if passing.tell() != self.files[archive]:
            raise ValueError(f"{archive} was changed while it was read: when nothing writes there any more, run again")
        _of_one_version(seen, archive)
        md5 = passing.md5.hexdigest()
        sources.append(Source(archive, passing.tell(), md5, md5 in OFFICIAL.values()))


class _Passing:
    """A stream read once, front to back; digests what passes."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self._position = 0
        self.md5 = hashlib.md5(usedforsecurity=False)

    def read(self, nbytes: int) -> bytes:
        data = self._stream.read(nbytes)
        self.md5.update(data)
        self._position += len(data)
        return data

    def seek(self, position: int) -> None:
        """Read on to ``position``."""
        assert position >= self._position
        while self._position < position and self.read(min(position - self._position, _CHUNK_BYTES)):
            pass

    def tell(self) -> int:
        return self._position


# -- one file -----------------------------------------------------------------------------------------------------


def _of_one_version(there: Any, where: str) -> list[str]:
    """The files of CIFAR-10 among the names ``there``, in order. Raises ValueError."""
    binary, python = ([name for name in version if name in there] for version in (_BINARY, _PYTHON))
    if binary and python:
        raise ValueError(
            f"{where} holds files of the binary and of the Python version ({binary[0]}, {python[0]}): move those of "
            "one away"
        )
    if not binary and not python:
        raise ValueError(
            f"{where} holds no file of CIFAR-10: give the archive (cifar-10-binary.tar.gz or cifar-10-python.tar.gz), "
            "or the folder in which data_batch_1.bin, or data_batch_1, lies"
        )
    return binary or python


def _check_size(where: str, name: str, nbytes: int) -> None:
    if nbytes > _MAX_FILE_BYTES:
        raise ValueError(f"{where}: {name!r} of {nbytes} bytes is no file of CIFAR-10: download it again")


def _images(data: bytes, name: str, batch: str) -> Images:
    if name.endswith(".bin"):
        if len(data) % RECORD_BYTES:
            raise ValueError(
                f"{name} has {len(data)} bytes, which is no multiple of {RECORD_BYTES}, a label and an image: it is "
                "cut short, or not of CIFAR-10: download it again"
            )
        records = np.frombuffer(data, np.uint8).reshape(-1, RECORD_BYTES)
        pixels, labels = records[:, 1:], records[:, 0].astype(np.int64)
    else:
        pixels, labels = read_batch(data, name, IMAGE_BYTES)
    if not len(labels):
        raise ValueError(f"{name} is empty: download it again, or take it away")
    wrong = np.flatnonzero(labels >= len(CLASSES))
    if len(wrong):
        raise ValueError(
            f"{name}: image {wrong[0]} has the label {labels[wrong[0]]}, labels of CIFAR-10 are 0 to 9: the file is "
            "damaged, or of another set: download it again"
        )
    names = tuple(f"{batch}/{number:05d}" for number in range(len(labels)))
    return Images(pixels.reshape(-1, 3, SIDE, SIDE), labels, names)


def _class_names(data: bytes, name: str) -> list[str]:
    if name == "batches.meta":
        return read_class_names(data, name)
    return data.decode("latin-1").split()


def _joined(pieces: list[Images]) -> Images:
    return Images(
        np.concatenate([piece.images for piece in pieces]),
        np.concatenate([piece.labels for piece in pieces]),
        tuple(name for piece in pieces for name in piece.names),
    )
