"""Where the images of a unit come from: a tar inside an archive, chosen members of one, or files of a folder."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from data_prep.archives import Member, walk
from data_prep.images import MAX_IMAGE_BYTES
from orchestrator.data.shard_writer import key_of
from orchestrator.storage import Storage


class SourceImage(NamedTuple):
    """``name`` as the index has it, ``key`` as the shard has it, the bytes as they were found, the label."""

    name: str
    key: str
    data: bytes
    label: int


class ImageSource(Protocol):
    """A frozen dataclass of plain fields: all that the images depend on, beside the storage they lie in."""

    @property
    def nbytes(self) -> int:
        """Size of what is read, in bytes."""

    def images(self, storage: Storage) -> Iterator[SourceImage]:
        """In a fixed order. Raises ValueError, naming the file, where it is damaged or changed; OSError."""


@dataclass(frozen=True)
class InnerTar:
    """All files of the tar in bytes ``start`` to ``stop`` of an archive, in their order, with one label."""

    archive: str
    archive_nbytes: int
    name: str  # of the tar, for people
    start: int
    stop: int
    label: int

    @property
    def nbytes(self) -> int:
        return self.stop - self.start

    def images(self, storage: Storage) -> Iterator[SourceImage]:
        where = f"{self.archive} ({self.name})"
        seen: set[str] = set()
        with storage.reading(self.archive) as stream:
            for member in walk(stream, where, self.start, self.stop):
                key = key_of(member.name)
                if key in seen:
                    raise ValueError(f"{where}: two files have the name {member.name!r}: download it again")
                seen.add(key)
                stream.seek(member.offset)
                data = stream.read(_checked_size(self.archive, member))
                yield SourceImage(member.name, key, _whole(self.archive, member, data), self.label)


@dataclass(frozen=True)
class Members:
    """The ``members`` of an archive, each with its own label."""

    archive: str
    archive_nbytes: int
    members: tuple[Member, ...]
    labels: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return sum(m.nbytes for m in self.members)

    def images(self, storage: Storage) -> Iterator[SourceImage]:
        with storage.reading(self.archive) as stream:
            for member, label in zip(self.members, self.labels, strict=True):
                stream.seek(member.offset)
                data = stream.read(_checked_size(self.archive, member))
                yield SourceImage(member.name, key_of(member.name), _whole(self.archive, member, data), label)


class File(NamedTuple):
    """A file of a folder: its path relative to it, size in bytes, key in a shard, label."""

    name: str
    nbytes: int
    key: str
    label: int


@dataclass(frozen=True)
class Files:
    """Files of a folder."""

    files: tuple[File, ...]

    @property
    def nbytes(self) -> int:
        return sum(file.nbytes for file in self.files)

    def images(self, storage: Storage) -> Iterator[SourceImage]:
        # Object stores and network disks answer in tens of milliseconds, however small the file: several at a time.
        with ThreadPoolExecutor(_READERS, "read-files") as threads:
            for files in _handfuls(self.files):
                read = threads.map(lambda file: _read(storage, file), files)
                for file, data in zip(files, read, strict=True):
                    yield SourceImage(file.name, file.key, data, file.label)


_READERS = 8
_HANDFUL_BYTES = 32 << 20  # a handful of files is held at once


def _handfuls(files: Sequence[File]) -> Iterator[list[File]]:
    handful: list[File] = []
    for file in files:
        if handful and (len(handful) == _READERS or sum(f.nbytes for f in handful) + file.nbytes > _HANDFUL_BYTES):
            yield handful
            handful = []
        handful.append(file)
    if handful:
        yield handful


def _read(folder: Storage, file: File) -> bytes:
    try:
        data = folder.read(file.name)
    except FileNotFoundError:
        data = None
    except PermissionError:
        raise ValueError(f"{folder.url}/{file.name} may not be read: change its permissions and run again") from None
    if data is None or len(data) != file.nbytes:
        raise ValueError(
            f"{folder.url}/{file.name} has changed since the folder was listed: when nothing writes there any more, "
            "prepare it into a new --out"
        )
    return data


def _checked_size(archive: str, member: Member) -> int:
    if member.nbytes > MAX_IMAGE_BYTES:
        raise ValueError(f"{archive}: {member.name!r} of {member.nbytes} bytes is no image of this set")
    return member.nbytes


def _whole(archive: str, member: Member, data: bytes) -> bytes:
    if len(data) != member.nbytes:
        raise ValueError(f"{archive} is truncated within {member.name!r}: download it again")
    return data
