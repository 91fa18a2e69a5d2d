"""What a preparation writes of a data set, in the format of ``shards``: shards of both encodings, and indexes."""

from __future__ import annotations

import hashlib
import io
import json
import struct
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath
from types import TracebackType
from typing import IO, Any

import numpy as np
import pyarrow as pa

from orchestrator.data.shards import INDEX_SCHEMA, UNLABELLED, ShardInfo
from orchestrator.storage import Storage, sha256_hex

_PLANES_AT_ONCE = 1000  # images that are copied to be written


class _Digesting:
    """A write-only stream that counts and digests what passes."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self._sha256 = hashlib.sha256()
        self.nbytes = 0

    def write(self, data: bytes) -> int:
        self._sha256.update(data)
        self.nbytes += len(data)
        return self._stream.write(data)

    def hexdigest(self) -> str:
        return self._sha256.hexdigest()


class ShardWriter:
    """Streams images into one tar file, published whole when the block ends::

        with ShardWriter(storage, "train/n01440764-000.tar") as shard:
            offset = shard.add("n01440764_10026", jpeg, label=0)
        info = shard.info

    The same images in the same order give the same bytes (times, owners and modes are fixed).
    """

    def __init__(self, storage: Storage, name: str) -> None:
        self._storage, self.name = storage, name
        self.info: ShardInfo
        self.count = 0
        self._keys: set[str] = set()

    def __enter__(self) -> ShardWriter:
        self._context = self._storage.publishing(self.name)
        self._stream = _Digesting(self._context.__enter__())
        return self

    @property
    def nbytes(self) -> int:
        """Bytes written so far."""
        return self._stream.nbytes

    def add(self, key: str, image: bytes, label: int) -> int:
        """Append one image; returns the offset in bytes of its first byte. ``key`` is the name without extension.

        Raises ValueError for a key that is there already, or that would unpack to somewhere else.
        """
        if key.startswith("/") or {"", ".", ".."} & set(key.split("/")) or not key.isprintable() or "\\" in key:
            raise ValueError(f"{key!r} is no name for an image of a shard: rename that image")
        # WebDataset splits a member's name at the first dot of its base name.
        key = key.replace(".", "_")
        if key in self._keys:
            raise ValueError(f"two images of shard {self.name} have the name {key!r}: rename one")
        self._keys.add(key)
        offset = self._member(f"{key}.jpg", image)
        if label != UNLABELLED:
            self._member(f"{key}.cls", str(label).encode())
        self.count += 1
        return offset

    def _member(self, name: str, data: bytes) -> int:
        header = tarfile.TarInfo(name)
        header.size, header.mode = len(data), 0o644
        # UTF-8 whatever the locale of this machine: the same images give the same bytes.
        self._stream.write(header.tobuf(tarfile.GNU_FORMAT, "utf-8"))
        offset = self._stream.nbytes
        self._stream.write(data)
        self._stream.write(bytes(-len(data) % tarfile.BLOCKSIZE))
        return offset

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if kind is None:
            self._stream.write(bytes(-(self._stream.nbytes + 1024) % tarfile.RECORDSIZE + 1024))
        self._context.__exit__(kind, error, traceback)
        if kind is None:
            self.info = ShardInfo(self.name, self._stream.nbytes, self.count, self._stream.hexdigest())


def write_planes(storage: Storage, name: str, images: np.ndarray) -> tuple[ShardInfo, int]:
    """Publish ``images`` [n, 3, height, width] uint8 as a shard of ``PLANES``.

    Returns it, and the offset in bytes of the first image; the others follow without a gap.
    """
    assert images.dtype == np.uint8
    assert images.shape[1] == 3
    # Written here and not by safetensors, whose versions may lay out a header in another way: the same images give the
    # same bytes.
    tensor = {"dtype": "U8", "shape": list(images.shape), "data_offsets": [0, images.nbytes]}
    header = json.dumps({"images": tensor}, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    with storage.publishing(name) as stream:
        digesting = _Digesting(stream)
        digesting.write(struct.pack("<Q", len(header)) + header)
        offset = digesting.nbytes
        for first in range(0, len(images), _PLANES_AT_ONCE):
            digesting.write(images[first : first + _PLANES_AT_ONCE].tobytes())
    return ShardInfo(name, digesting.nbytes, len(images), digesting.hexdigest()), offset


def write_index(storage: Storage, name: str, columns: Mapping[str, Sequence[Any] | np.ndarray]) -> str:
    """Publish a per-image index (columns of ``INDEX_SCHEMA``); returns its SHA-256."""
    table = pa.table({f.name: pa.array(columns[f.name], f.type) for f in INDEX_SCHEMA}, schema=INDEX_SCHEMA)
    # One uncompressed record batch: a reader maps it into memory and copies nothing.
    sink = io.BytesIO()
    with pa.ipc.new_file(sink, INDEX_SCHEMA) as writer:
        writer.write_table(table.combine_chunks(), max_chunksize=max(1, table.num_rows))
    data = sink.getvalue()
    storage.publish(name, data)
    return sha256_hex(data)


def key_of(file_name: str) -> str:
    """The WebDataset key of a source file: its base name without extension."""
    return PurePosixPath(file_name).stem


def path_key(file_name: str, *, distinct: bool = False) -> str:
    """The WebDataset key of a file of a folder: its relative path without extension, and without what no key may hold.

    ``distinct``: with a digest of the whole name, where the keys of two files would be the same (x.jpg and x.png).
    """
    path = str(PurePosixPath(file_name).with_suffix(""))
    key = "".join(c if c.isprintable() and c not in ".\\" else "_" for c in path)
    return f"{key}-{sha256_hex(file_name.encode())[:8]}" if distinct else key
