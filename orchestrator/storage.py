"""One folder of durable state at any fsspec URL: atomic publish, verified read, list. The only door to fsspec.

A name inside a storage is a relative POSIX path ("checkpoints/step-000000100.json"). What is published is whole or
absent: a local file is written beside its final name, synced and renamed; an object store makes an object visible when
its upload completes.
"""

from __future__ import annotations

import errno
import hashlib
import os
import secrets
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import IO, Any, cast

import fsspec
from fsspec.implementations.local import LocalFileSystem

# fsspec protocols that other processes cannot see (memory://) or that cannot be written (http://)
_PROCESS_LOCAL = {"memory"}


class DigestError(OSError):
    """Bytes in storage are not those that were published."""


def sha256_hex(data: bytes | memoryview) -> str:
    """SHA-256 of ``data`` as 64 hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()


class Storage:
    """A folder at an fsspec URL (``/path``, ``file:///path``, ``s3://bucket/prefix``, …).

    Raises ValueError, saying what to do, if the URL names no known or usable file system.
    """

    def __init__(self, url: str, *, _fs: Any = None) -> None:
        if not url:
            raise ValueError("empty storage URL: give a folder (/data/runs) or an fsspec URL (s3://bucket/prefix)")
        self.url = url.rstrip("/") or "/"
        try:
            self.fs, self.root = (_fs, _fs._strip_protocol(self.url)) if _fs else fsspec.core.url_to_fs(self.url)
        except (ValueError, ImportError) as error:
            raise ValueError(f"storage URL {url!r} cannot be opened: {error}") from None
        protocols = {self.fs.protocol} if isinstance(self.fs.protocol, str) else set(self.fs.protocol)
        if protocols & _PROCESS_LOCAL:
            raise ValueError(f"storage URL {url!r} is invisible to other processes: give a folder or an object store")
        self.is_local = isinstance(self.fs, LocalFileSystem)
        if self.is_local:
            # Workers have other working directories than the driver.
            self.url = self.root = os.path.abspath(self.root)  # noqa: PTH100 - keeps symbolic links as typed

    def __repr__(self) -> str:
        return f"Storage({self.url!r})"

    def __reduce__(self) -> tuple[Any, ...]:
        return (Storage, (self.url,))

    def sub(self, name: str) -> Storage:
        """The sub-folder ``name`` as a storage of its own."""
        return Storage(f"{self.url}/{_checked(name)}", _fs=self.fs)

    def path(self, name: str) -> str:
        """Full path of ``name`` in the underlying file system."""
        return f"{self.root}/{_checked(name)}"

    def local_path(self, name: str) -> Path | None:
        """Path of ``name`` on this machine, or None where the storage is remote."""
        return Path(self.path(name)) if self.is_local else None

    # -- reading ------------------------------------------------------------------------------------------------

    def exists(self, name: str) -> bool:
        return bool(self.fs.exists(self.path(name)))

    def size_bytes(self, name: str) -> int:
        return int(self.fs.size(self.path(name)))

    def read(self, name: str, sha256: str | None = None) -> bytes:
        """All bytes of ``name``. With ``sha256`` given, raises DigestError where they are not the published ones."""
        data = cast(bytes, self.fs.cat_file(self.path(name)))
        if sha256 is not None and sha256_hex(data) != sha256:
            raise DigestError(f"{self.url}/{name} is damaged: its SHA-256 is not the recorded one")
        return data

    def read_range(self, name: str, start: int, stop: int) -> bytes:
        """Bytes ``start`` to ``stop`` of ``name``. Raises OSError where the file ends before."""
        data = cast(bytes, self.fs.cat_file(self.path(name), start=start, end=stop))
        if len(data) != stop - start:
            raise OSError(errno.EIO, f"{self.url}/{name} is truncated: {stop - start} bytes at {start} are not there")
        return data

    def read_ranges(self, requests: Sequence[tuple[str, int, int]]) -> list[bytes]:
        """One ``bytes`` per (name, start, stop), in order; an object store serves them concurrently."""
        if self.is_local:
            return [self.read_range(*request) for request in requests]
        names, starts, stops = zip(*requests, strict=True)
        chunks = self.fs.cat_ranges([self.path(n) for n in names], list(starts), list(stops), on_error="raise")
        for (name, start, stop), chunk in zip(requests, chunks, strict=True):
            if len(chunk) != stop - start:
                raise OSError(
                    errno.EIO,
                    f"{self.url}/{name} is truncated: {stop - start} bytes at {start} are not there",
                )
        return cast(list[bytes], chunks)

    @contextmanager
    def reading(self, name: str) -> Iterator[IO[bytes]]:
        """A seekable binary stream over ``name``."""
        with self.fs.open(self.path(name), "rb") as stream:
            yield stream

    def files(self, name: str = "") -> list[str]:
        """Names of the files directly in sub-folder ``name``, sorted, relative to this storage; [] if there is none."""
        folder = self.path(name) if name else self.root
        # An object store's listing may be cached by fsspec; another process may have written since.
        self.fs.invalidate_cache(folder)
        try:
            entries = self.fs.ls(folder, detail=True)
        except (FileNotFoundError, NotADirectoryError):
            return []
        prefix = f"{name}/" if name else ""
        found = [prefix + PurePosixPath(e["name"]).name for e in entries if e["type"] == "file"]
        return sorted(n for n in found if not PurePosixPath(n).name.startswith(".tmp-"))

    def sizes_bytes(self, name: str) -> dict[str, int]:
        """Size of every file directly in sub-folder ``name``, by its name relative to this storage; one listing."""
        self.fs.invalidate_cache(self.path(name))
        try:
            entries = self.fs.ls(self.path(name), detail=True)
        except (FileNotFoundError, NotADirectoryError):
            return {}
        return {f"{name}/{PurePosixPath(e['name']).name}": int(e["size"]) for e in entries if e["type"] == "file"}

    def find(self) -> dict[str, int]:
        """Size in bytes of every file at any depth, by its name relative to this storage, sorted; {} if there is none.

        Hidden files and folders (``.DS_Store``, ``.parts``) are passed over. Links are followed.
        """
        if self.is_local:
            found: dict[str, int] = {}
            walked: set[str] = set()
            for folder, folders, names in os.walk(self.root, followlinks=True):
                if (real := os.path.realpath(folder)) in walked:  # a link to a folder that holds it
                    folders.clear()
                    continue
                walked.add(real)
                folders[:] = sorted(n for n in folders if not n.startswith("."))
                for name in names:
                    path = Path(folder, name)
                    if not name.startswith(".") and path.is_file():
                        found[path.relative_to(self.root).as_posix()] = path.stat().st_size
            return dict(sorted(found.items()))
        self.fs.invalidate_cache(self.root)
        entries = cast(dict[str, Any], self.fs.find(self.root, detail=True))
        sizes = {path[len(self.root) + 1 :]: int(entry["size"]) for path, entry in entries.items()}
        return {n: size for n, size in sorted(sizes.items()) if not any(p.startswith(".") for p in n.split("/"))}

    def folders(self, name: str) -> list[str]:
        """Names of the folders directly in sub-folder ``name``, sorted, relative to this storage."""
        path = self.path(name)
        self.fs.invalidate_cache(path)
        try:
            entries = self.fs.ls(path, detail=True)
        except (FileNotFoundError, NotADirectoryError):
            return []
        return sorted(f"{name}/{PurePosixPath(e['name']).name}" for e in entries if e["type"] == "directory")

    # -- writing ------------------------------------------------------------------------------------------------

    def publish(self, name: str, data: bytes) -> None:
        """Write ``data`` as ``name``, whole or not at all, replacing what was there."""
        with self.publishing(name) as stream:
            stream.write(data)

    @contextmanager
    def publishing(self, name: str) -> Iterator[IO[bytes]]:
        """A binary stream whose content appears as ``name`` when the block ends, and never if it raises."""
        target = self.path(name)
        if not self.is_local:
            stream = self.fs.open(target, "wb")
            try:
                yield stream
            except BaseException:
                stream.discard() if hasattr(stream, "discard") else None
                stream.closed = True  # keeps fsspec's finalizer from uploading the fragment
                raise
            stream.close()
            return
        folder = Path(target).parent
        folder.mkdir(parents=True, exist_ok=True)
        temporary = folder / f".tmp-{secrets.token_hex(8)}"
        try:
            with open(temporary, "xb") as stream:
                yield stream
                stream.flush()
                os.fsync(stream.fileno())
            temporary.replace(target)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        _sync_folder(folder)

    def create(self, name: str, data: bytes) -> bool:
        """Write ``name`` only if nothing has that name; True if this call wrote it.

        Exclusive among processes on local disks (a hard link fails on an existing name) and on S3 (If-None-Match).
        """
        target = self.path(name)
        if not self.is_local:
            try:
                self.fs.pipe_file(target, data, mode="create")
            except FileExistsError:
                return False
            return True
        folder = Path(target).parent
        folder.mkdir(parents=True, exist_ok=True)
        temporary = folder / f".tmp-{secrets.token_hex(8)}"
        try:
            with open(temporary, "xb") as stream:
                stream.write(data)
                stream.flush()
                os.fsync(stream.fileno())
            os.link(temporary, target)
        except FileExistsError:
            return False
        finally:
            temporary.unlink(missing_ok=True)
        _sync_folder(folder)
        return True

    def delete(self, name: str) -> None:
        """Remove the file or sub-folder ``name``; nothing happens if it is not there."""
        path = self.path(name)
        if self.fs.exists(path):
            self.fs.rm(path, recursive=True)

    def delete_fragments(self, name: str = "") -> None:
        """Remove what killed writers have left half-written in sub-folder ``name``; no writer may be at work there.

        On an object store there are none to see: an unfinished upload expires by the bucket's own rules.
        """
        if self.is_local:
            for fragment in Path(self.path(name) if name else self.root).glob(".tmp-*"):
                fragment.unlink(missing_ok=True)

    def free_bytes(self) -> int | None:
        """Free space in bytes where the storage is a local disk, else None."""
        if not self.is_local:
            return None
        folder = Path(self.root)
        while not folder.exists():
            folder = folder.parent
        return shutil.disk_usage(folder).free

    def check_writable(self) -> None:
        """Write, read back and delete a small file. Raises ValueError, saying what to do, where that fails."""
        probe = f".probe-{secrets.token_hex(8)}"
        try:
            self.publish(probe, b"probe")
            if self.read(probe) != b"probe":
                raise OSError("what was written did not come back")
            self.delete(probe)
        except Exception as error:
            raise ValueError(
                f"storage {self.url!r} cannot be written ({type(error).__name__}: {error}): "
                "check that it exists, its permissions and, for an object store, endpoint and credentials"
            ) from None


def _checked(name: str) -> str:
    """``name`` as it is, unless it would leave the folder."""
    parts = PurePosixPath(name).parts
    if not name or name.startswith("/") or ".." in parts:
        raise ValueError(f"{name!r} is no name inside a storage folder")
    return name


def _sync_folder(folder: Path) -> None:
    """Make a rename inside ``folder`` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
