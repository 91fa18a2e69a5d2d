"""One folder of durable state at any fsspec URL: atomic publish, verified read, list. The only door to fsspec.

A name inside a storage is a relative POSIX path ("checkpoints/step-000000100.json"). What is published is whole or
absent: a local file is written beside its final name, synced and renamed; an object store makes an object visible when
its upload completes. Object stores are called through ``remote``, which waits for one that is away.
"""

from __future__ import annotations

import errno
import hashlib
import io
import os
import secrets
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path, PurePosixPath
from typing import IO, Any, NamedTuple, TypeVar, cast
from weakref import WeakKeyDictionary

import fsspec
from fsspec.implementations.local import LocalFileSystem

from orchestrator.remote import Line, StoreUnreachableError, check_no_credentials

Result = TypeVar("Result")

# fsspec protocols that other processes cannot see (memory://) or that cannot be written (http://)
_PROCESS_LOCAL = {"memory"}

# Where mode="create" is one request that fails on an existing name; elsewhere fsspec looks first and then writes.
EXCLUSIVE_PROTOCOLS = {"s3", "s3a"}


class DigestError(OSError):
    """Bytes in storage are not those that were published."""


# Bytes, or pieces that follow each other: to join large ones is to copy them.
Content = bytes | Sequence[memoryview]


class FileStat(NamedTuple):
    """Size in bytes; time of modification in ns since 1970, 0 where the store does not tell."""

    nbytes: int
    modified_ns: int


def sha256_hex(data: Content | memoryview) -> str:
    """SHA-256 of ``data`` as 64 hexadecimal digits."""
    digest = hashlib.sha256()
    for piece in [data] if isinstance(data, bytes | memoryview) else data:
        digest.update(piece)
    return digest.hexdigest()


def size_bytes(data: Content) -> int:
    """Length of ``data``."""
    return len(data) if isinstance(data, bytes) else sum(piece.nbytes for piece in data)


class Storage:
    """A folder at an fsspec URL (``/path``, ``file:///path``, ``s3://bucket/prefix``, …).

    Endpoints, credentials and options are those of fsspec and of the store's own library: environment variables
    (``AWS_*``, ``FSSPEC_*``) and files in ``~/.aws`` and ``~/.config/fsspec``. Raises ValueError, saying what to do, if
    the URL names no known or usable file system, or holds credentials. Of an object store every method may also raise
    StoreRefusedError (a ValueError: a setting is wrong) and StoreUnreachableError (an OSError).
    """

    def __init__(self, url: str, *, _fs: Any = None) -> None:
        if not url:
            raise ValueError("empty storage URL: give a folder (/data/runs) or an fsspec URL (s3://bucket/prefix)")
        check_no_credentials(url)
        self.url = url.rstrip("/") or "/"
        if self.url.endswith(":"):
            raise ValueError(f"storage URL {url!r} names no folder: give s3://bucket/prefix or the like")
        self.root: str
        try:
            self.fs, self.root = (_fs, _fs._strip_protocol(self.url)) if _fs else _open(self.url)
        except (ValueError, ImportError) as error:
            raise ValueError(f"storage URL {url!r} cannot be opened: {error}") from None
        protocols = {self.fs.protocol} if isinstance(self.fs.protocol, str) else set(self.fs.protocol)
        if protocols & _PROCESS_LOCAL:
            raise ValueError(f"storage URL {url!r} is invisible to other processes: give a folder or an object store")
        self.is_local = isinstance(self.fs, LocalFileSystem)
        self.creates_exclusively = self.is_local or bool(protocols & EXCLUSIVE_PROTOCOLS)
        if self.is_local:
            # Workers have other working directories than the driver.
            self.url = self.root = os.path.abspath(self.root)  # noqa: PTH100 - keeps symbolic links as typed
        self._line = _LINES.setdefault(self.fs, Line())
        # Few large parts in memory at a time, whatever the size of a file; fsspec's default is up to 500 MB.
        self._upload = {"chunksize": 16 << 20, "max_concurrency": 2} if "s3" in protocols else {}

    def __repr__(self) -> str:
        return f"Storage({self.url!r})"

    def __reduce__(self) -> tuple[Any, ...]:
        return (Storage, (self.url,))  # without the file system, which holds credentials

    def sub(self, name: str) -> Storage:
        """The sub-folder ``name`` as a storage of its own."""
        return Storage(f"{self.url}/{_checked(name)}", _fs=self.fs)

    def path(self, name: str) -> str:
        """Full path of ``name`` in the underlying file system."""
        return f"{self.root}/{_checked(name)}"

    def local_path(self, name: str) -> Path | None:
        """Path of ``name`` on this machine, or None where the storage is remote."""
        return Path(self.path(name)) if self.is_local else None

    def _call(self, name: str, function: Callable[[], Result]) -> Result:
        """``function()``; of an object store, waiting for it where that can help."""
        return function() if self.is_local else self._line.call(f"{self.url}/{name}".rstrip("/"), function)

    # -- reading ------------------------------------------------------------------------------------------------

    def exists(self, name: str) -> bool:
        return self._call(name, lambda: bool(self.fs.exists(self.path(name))))

    def size_bytes(self, name: str) -> int:
        return self._call(name, lambda: int(self.fs.size(self.path(name))))

    def read(self, name: str, sha256: str | None = None) -> bytes:
        """All bytes of ``name``. With ``sha256`` given, raises DigestError where they are not the published ones."""
        data = self._call(name, lambda: cast(bytes, self.fs.cat_file(self.path(name))))
        if sha256 is not None and sha256_hex(data) != sha256:
            raise DigestError(f"{self.url}/{name} is damaged: its SHA-256 is not the recorded one")
        return data

    def read_range(self, name: str, start: int, stop: int) -> bytes:
        """Bytes ``start`` to ``stop`` of ``name``. Raises OSError where the file ends before."""
        data = self._call(name, lambda: cast(bytes, self.fs.cat_file(self.path(name), start=start, end=stop)))
        return self._whole(name, start, stop, data)

    def read_ranges(self, requests: Sequence[tuple[str, int, int]]) -> list[bytes]:
        """One ``bytes`` per (name, start, stop), in order; an object store serves them concurrently."""
        if self.is_local:
            return [self.read_range(*request) for request in requests]
        names, starts, stops = zip(*requests, strict=True)
        paths = [self.path(n) for n in names]
        chunks: dict[int, bytes] = {}

        def read_missing() -> list[bytes]:
            todo = [i for i in range(len(paths)) if i not in chunks]
            found = self.fs.cat_ranges(
                [paths[i] for i in todo], [starts[i] for i in todo], [stops[i] for i in todo], on_error="return"
            )
            chunks.update((i, data) for i, data in zip(todo, found, strict=True) if not isinstance(data, BaseException))
            if error := next((data for data in found if isinstance(data, BaseException)), None):
                raise error
            return [chunks[i] for i in range(len(paths))]

        read = self._call(names[0], read_missing)
        return [self._whole(*request, chunk) for request, chunk in zip(requests, read, strict=True)]

    def _whole(self, name: str, start: int, stop: int, data: bytes) -> bytes:
        if len(data) != stop - start:
            raise OSError(errno.EIO, f"{self.url}/{name} is truncated: {stop - start} bytes at {start} are not there")
        return data

    @contextmanager
    def reading(self, name: str) -> Iterator[IO[bytes]]:
        """A seekable binary stream over ``name``."""
        if self.is_local:
            with open(self.path(name), "rb") as stream:
                yield stream
        else:
            yield cast(IO[bytes], _RangeReader(self, name))

    def files(self, name: str = "") -> list[str]:
        """Names of the files directly in sub-folder ``name``, sorted, relative to this storage; [] if there is none."""
        return sorted(n for n in self.sizes_bytes(name) if not PurePosixPath(n).name.startswith(".tmp-"))

    def sizes_bytes(self, name: str = "") -> dict[str, int]:
        """Size of every file directly in sub-folder ``name``, by its name relative to this storage; one listing."""
        return {n: size for n, size in self._entries(name).items() if size is not None}

    def folders(self, name: str) -> list[str]:
        """Names of the folders directly in sub-folder ``name``, sorted, relative to this storage."""
        return sorted(n for n, size in self._entries(name).items() if size is None)

    def _entries(self, name: str) -> dict[str, int | None]:
        """What is directly in sub-folder ``name``: bytes of each file, None for a folder. Links are followed."""
        path, prefix = (self.path(name), f"{name}/") if name else (self.root, "")
        found: dict[str, int | None] = {}
        if self.is_local:
            with suppress(FileNotFoundError, NotADirectoryError), os.scandir(path) as listing:
                for each in listing:
                    with suppress(FileNotFoundError):  # removed since, or a link to nothing
                        if each.is_dir():
                            found[prefix + each.name] = None
                        elif each.is_file():
                            found[prefix + each.name] = each.stat().st_size
            return found
        self.fs.invalidate_cache(path)  # another process may have written since
        try:
            entries = self._call(name, lambda: cast(list[dict[str, Any]], self.fs.ls(path, detail=True)))
        except (FileNotFoundError, NotADirectoryError):
            return {}
        for entry in entries:
            if entry["name"].rstrip("/") != path.rstrip("/"):  # some stores list a folder's own marker in it
                is_folder = entry["type"] == "directory"
                found[prefix + PurePosixPath(entry["name"]).name] = None if is_folder else int(entry["size"])
        return found

    def find(self) -> dict[str, int]:
        """Size in bytes of every file at any depth, by its name relative to this storage, sorted; {} if there is none.

        Hidden files and folders (``.DS_Store``, ``.parts``) are passed over. Links are followed, but for those to a
        folder that holds them. Raises OSError for a folder that may not be read, ValueError for a link to nothing:
        leaving either out would lose files in silence.
        """
        return {name: found.nbytes for name, found in self.listing().items()}

    def listing(self) -> dict[str, FileStat]:
        """As ``find``, with the times of modification."""
        if self.is_local:
            walked = dict[str, FileStat]()
            _walk(self.root, "", (), walked)
            return dict(sorted(walked.items()))
        self.fs.invalidate_cache(self.root)
        entries = self._call("", lambda: cast(dict[str, Any], self.fs.find(self.root, detail=True)))
        found = {path[len(self.root) + 1 :]: _stat(entry) for path, entry in entries.items()}
        return {n: stat for n, stat in sorted(found.items()) if not any(p.startswith(".") for p in n.split("/"))}

    # -- writing ------------------------------------------------------------------------------------------------

    def publish(self, name: str, data: Content) -> None:
        """Write ``data`` as ``name``, whole or not at all, replacing what was there."""
        pieces = [data] if isinstance(data, bytes) else data
        if not self.is_local:
            target, whole = self.path(name), b"".join(pieces)
            self._call(name, lambda: self.fs.pipe_file(target, whole))
            return
        with self.publishing(name) as stream:
            for piece in pieces:
                stream.write(piece)

    @contextmanager
    def publishing(self, name: str) -> Iterator[IO[bytes]]:
        """A binary stream whose content appears as ``name`` when the block ends, and never if it raises."""
        target = self.path(name)
        if not self.is_local:
            # On this machine's disk first: what an outage interrupts can be sent again, from its start.
            with tempfile.NamedTemporaryFile(prefix="publishing-") as spool:
                yield cast(IO[bytes], spool)
                spool.flush()
                self._call(name, lambda: self.fs.put_file(spool.name, target, **self._upload))
            return
        folder = Path(target).parent
        _make_folder(folder)
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

        Exclusive among processes where ``creates_exclusively``: on local disks (a hard link fails on an existing name)
        and on S3 (If-None-Match).
        ``data`` must be this caller's alone: what is there and equal to it was written by this call.
        """
        target = self.path(name)
        if not self.is_local:
            try:
                self._call(name, lambda: self.fs.pipe_file(target, data, mode="create"))
            except FileExistsError:
                # The answer to a first try may have been lost, and a library tried again.
                return self.read(name) == data
            return True
        folder = Path(target).parent
        _make_folder(folder)
        temporary = folder / f".tmp-{secrets.token_hex(8)}"
        try:
            with open(temporary, "xb") as stream:
                stream.write(data)
                stream.flush()
                os.fsync(stream.fileno())
            try:
                os.link(temporary, target)
            except OSError as error:
                if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS):
                    raise
                # A disk without hard links (exFAT, some network mounts): exclusive too, but not whole at once.
                with open(target, "xb") as stream:
                    try:
                        stream.write(data)
                        stream.flush()
                        os.fsync(stream.fileno())
                    except BaseException:
                        Path(target).unlink(missing_ok=True)
                        raise
        except FileExistsError:
            return False
        finally:
            temporary.unlink(missing_ok=True)
        _sync_folder(folder)
        return True

    def delete(self, name: str) -> None:
        """Remove the file or sub-folder ``name``; nothing happens if it is not there."""
        path = self.path(name)

        def remove() -> None:
            # Another process, or a try before this one, may have removed some of it.
            with suppress(FileNotFoundError):
                if self.fs.exists(path):
                    self.fs.rm(path, recursive=True)

        self._call(name, remove)

    def delete_fragments(self, name: str = "") -> None:
        """Remove what killed writers have left half-written in sub-folder ``name``; no writer may be at work there.

        On an object store these are the probes of ``check_writable`` alone: what a killed upload has sent goes by the
        bucket's lifecycle rule, if it has one for incomplete multipart uploads.
        """
        if self.is_local:
            for fragment in Path(self.path(name) if name else self.root).glob(".tmp-*"):
                fragment.unlink(missing_ok=True)
            return
        for probe in self.sizes_bytes(name):
            if PurePosixPath(probe).name.startswith(_PROBE):
                self.delete(probe)

    def free_bytes(self) -> int | None:
        """Free space in bytes where the storage is a local disk, else None."""
        if not self.is_local:
            return None
        folder = Path(self.root)
        while not folder.exists():
            folder = folder.parent
        return shutil.disk_usage(folder).free

    def check_writable(self) -> None:
        """Write, read back and delete a small file. Raises ValueError, saying what to do, where that fails, and
        StoreUnreachableError where the store is away.
        """
        probe = f"{_PROBE}{secrets.token_hex(8)}"
        try:
            self.publish(probe, b"probe")
            if self.read(probe) != b"probe":
                raise OSError("what was written did not come back")
            self.delete(probe)
        except StoreUnreachableError:
            raise
        except (ValueError, OSError) as error:
            hint = ": check that it exists, and its permissions" if self.is_local else ""
            raise ValueError(f"storage {self.url!r} cannot be written ({error}){hint}") from None


# Hidden from listings, and a fragment: a kill may leave it behind.
_PROBE = ".tmp-probe-"

# One a store and process, whatever folders of it are in use.
_LINES: WeakKeyDictionary[Any, Line] = WeakKeyDictionary()


# Tries inside the S3 library, of one request; the rest is ours, which knows how long to wait and tells of it.
_S3_TRIES = 3


def _open(url: str) -> tuple[Any, str]:
    """File system and path of ``url``."""
    if not url.startswith(("s3://", "s3a://")):
        return cast(tuple[Any, str], fsspec.core.url_to_fs(url))
    theirs = fsspec.config.conf.get("s3", {}).get("config_kwargs", {})  # what the user has set
    config = {"retries": {"total_max_attempts": _S3_TRIES}, **theirs}
    # Another process may have written since a listing.
    fs, root = fsspec.core.url_to_fs(url, use_listings_cache=False, config_kwargs=config)
    fs.retries = 1
    return fs, root


def _walk(folder: str, prefix: str, above: tuple[str, ...], found: dict[str, FileStat]) -> None:
    """Adds the files below ``folder``; ``above``: the real paths of the folders that hold it."""
    real = os.path.realpath(folder)
    if real in above:
        return
    try:
        entries = list(os.scandir(folder))
    except (FileNotFoundError, NotADirectoryError):
        return
    for entry in entries:
        if entry.name.startswith("."):
            continue
        try:
            status = entry.stat()
        except OSError as error:
            if entry.is_symlink() and error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
                raise ValueError(f"{entry.path} is a link to nothing: mend or remove it") from None
            if isinstance(error, FileNotFoundError):  # removed since
                continue
            raise
        if stat.S_ISDIR(status.st_mode):
            _walk(entry.path, f"{prefix}{entry.name}/", (*above, real), found)
        elif stat.S_ISREG(status.st_mode):
            found[prefix + entry.name] = FileStat(status.st_size, status.st_mtime_ns)


def _stat(entry: dict[str, Any]) -> FileStat:
    """Of an object; S3 tells the time."""
    modified = entry.get("LastModified")
    return FileStat(int(entry["size"]), int(modified.timestamp() * 1e9) if isinstance(modified, datetime) else 0)


class _RangeReader(io.RawIOBase):
    """A seekable stream of ranged reads: small ones while a caller jumps about, larger ones while it reads on."""

    _least_bytes, _most_bytes = 64 << 10, 8 << 20

    def __init__(self, storage: Storage, name: str) -> None:
        self._storage, self._name = storage, name
        self._size = storage.size_bytes(name)
        self._position = self._start = 0
        self._buffer = b""
        self._ahead = self._least_bytes

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}[whence]
        self._position = max(0, base + offset)
        return self._position

    def read(self, size: int = -1) -> bytes:
        stop = self._size if size < 0 else min(self._size, self._position + size)
        if self._position >= stop:
            return b""
        pieces = []
        while self._position < stop:
            end = self._start + len(self._buffer)
            if not self._start <= self._position < end:
                reads_on = self._position == end and end > 0
                self._ahead = min(2 * self._ahead, self._most_bytes) if reads_on else self._least_bytes
                last = min(self._size, max(self._position + self._ahead, min(stop, self._position + self._most_bytes)))
                self._buffer = self._storage.read_range(self._name, self._position, last)
                self._start, end = self._position, last
            pieces.append(self._buffer[self._position - self._start : stop - self._start])
            self._position += len(pieces[-1])
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)


def _checked(name: str) -> str:
    """``name`` as it is, unless it would leave the folder."""
    parts = PurePosixPath(name).parts
    if not name or name.startswith("/") or ".." in parts:
        raise ValueError(f"{name!r} is no name inside a storage folder")
    return name


def _make_folder(folder: Path) -> None:
    """Make ``folder`` and those above it; they survive a power cut."""
    missing = [each for each in (folder, *folder.parents) if not each.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for each in missing:
        _sync_folder(each.parent)


def _sync_folder(folder: Path) -> None:
    """Make a rename inside ``folder`` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
