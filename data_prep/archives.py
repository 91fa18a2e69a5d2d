"""Members of tar archives by their headers, read where they lie: nothing is unpacked.

``tarfile`` ends silently at a damaged header or at a missing end, which would turn half a download into a smaller data
set: the walk here tells the end of an archive (a block of zeros) from the end of its bytes.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import IO

BLOCK = tarfile.BLOCKSIZE
_MAX_LONG_NAME_BYTES = 1 << 16


@dataclass(frozen=True)
class Member:
    """A file inside an archive: base name, and where its bytes lie, counted from the start of the outermost file."""

    name: str
    offset: int
    nbytes: int


def walk(stream: IO[bytes], archive: str, start: int, stop: int) -> Iterator[Member]:
    """The regular files of the tar in bytes ``start`` to ``stop`` of ``stream``, in their order.

    Directories and hidden files (``._x``, ``.DS_Store`` of repacked archives) are passed over. Raises ValueError,
    naming ``archive``, where the tar is damaged or ends early.
    """
    position = start
    long_name: str | None = None
    while True:
        block = _read(stream, archive, position, BLOCK, stop)
        if not any(block):
            return
        try:
            header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        except tarfile.HeaderError as error:
            raise ValueError(f"{archive} is damaged at byte {position} ({error}): download it again") from None
        data = position + BLOCK
        if header.size < 0 or data + header.size > stop:
            raise ValueError(
                f"{archive} is truncated: {header.name!r} should end at byte {data + header.size}, "
                f"the archive ends at {stop}: download it again"
            )
        position = data + -(-header.size // BLOCK) * BLOCK
        if header.type in (tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE):
            if header.size > _MAX_LONG_NAME_BYTES:
                raise ValueError(
                    f"{archive} is damaged at byte {data} (a name of {header.size} bytes): download it again"
                )
            long_name = _long_name(header.type, _read(stream, archive, data, header.size, stop)) or long_name
            continue
        if header.isreg():
            name = PurePosixPath(long_name or header.name).name
            if not name.startswith("."):
                yield Member(name, data, header.size)
        long_name = None


def check_end(stream: IO[bytes], archive: str, start: int, stop: int) -> None:
    """The tar in bytes ``start`` to ``stop`` begins with a header and ends with a block of zeros: two reads, no walk.

    Raises ValueError, naming ``archive``.
    """
    for _ in walk(stream, archive, start, stop):
        break
    if any(_read(stream, archive, max(start, stop - BLOCK), BLOCK, stop)):
        raise ValueError(f"{archive} is truncated: it does not end as a tar file does: download it again")


def _read(stream: IO[bytes], archive: str, position: int, nbytes: int, stop: int) -> bytes:
    data = b""
    if position + nbytes <= stop:
        stream.seek(position)
        data = stream.read(nbytes)
    if len(data) != nbytes:
        raise ValueError(f"{archive} is truncated: it ends within a tar at byte {stop}: download it again")
    return data


def _long_name(kind: bytes, data: bytes) -> str | None:
    if kind == tarfile.GNUTYPE_LONGNAME:
        return data.rstrip(b"\0").decode("utf-8", "surrogateescape")
    # POSIX extended header: "<length> <keyword>=<value>\n" records, the length counting itself
    while data:
        length, _, rest = data.partition(b" ")
        if not length.isdigit() or not int(length):
            return None
        record, data = rest[: int(length) - len(length) - 1], data[int(length) :]
        keyword, _, value = record.rstrip(b"\n").partition(b"=")
        if keyword == b"path":
            return value.decode("utf-8", "surrogateescape")
    return None
