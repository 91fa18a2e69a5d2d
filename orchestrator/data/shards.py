"""Shards and manifest: what data_prep writes and the pipeline reads.

A data set is a folder in storage::

    manifest.json             published last: a folder without it is unfinished
    manifest.sha256           its SHA-256, as `sha256sum -c` reads it
    train/<shard>.tar …       WebDataset-compatible: <key>.jpg and, where labelled, <key>.cls (the label in digits), or
                              <shard>.safetensors (``PLANES``): one tensor, images [n, 3, height, width] uint8
    train.arrow …             one row an image (``INDEX_SCHEMA``), so that any image is one ranged read away
    statistics.safetensors    mean_image [3, S, S] float32, channel_mean [3] float64, covariance, eigenvalues,
                              eigenvectors of RGB in 0–255 over the training set

The SHA-256 of ``manifest.json`` names the data set, since the manifest holds the digests of everything else.
"""

from __future__ import annotations

import json
import os
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from enum import Enum
from pathlib import PurePosixPath
from typing import IO, Any

import numpy as np
import pyarrow as pa

from orchestrator.data.index_check import IndexCheck, file_sha256, in_order
from orchestrator.storage import DigestError, Storage, sha256_hex

FORMAT = "resnet-orchestrator-shards/1"
UNLABELLED = -1
# kinds of files in a manifest: images without pixels; files that are no images; images made smaller (only counted)
UNDECODABLE, PASSED_OVER, RESIZED = "undecodable", "passed over", "resized"

INDEX_SCHEMA = pa.schema(
    [
        ("shard", pa.int32()),  # position in the split's list of shards
        ("offset", pa.int64()),  # bytes from the start of the shard to the start of the image
        ("nbytes", pa.int32()),
        ("width", pa.int32()),  # pixels, as stored: the EXIF orientation is ignored
        ("height", pa.int32()),
        ("label", pa.int32()),  # UNLABELLED in a test set
        ("decodable", pa.uint8()),  # 0: kept for its place in an evaluation, counts as wrong
        ("name", pa.string()),  # file name in the source
    ]
)


class Encoding(Enum):
    """What an image's bytes are: a JPEG, or planes of R, G and B, [3, height, width] uint8, of one size in a set."""

    JPEG = "jpeg"
    PLANES = "planes"


@dataclass(frozen=True)
class ClassInfo:
    """One class. ``label`` is 0-based in the order of the sorted wnids; ``ilsvrc_id`` is the devkit's, 1-based."""

    label: int
    wnid: str
    ilsvrc_id: int | None = None
    words: str = ""


@dataclass(frozen=True)
class ShardInfo:
    """One shard: name inside the data set, size in bytes, number of images, SHA-256 of the whole file."""

    name: str
    nbytes: int
    count: int
    sha256: str


@dataclass(frozen=True)
class SplitInfo:
    """One of train, val, test: number of images, per-image index and shards."""

    count: int
    index: str
    index_sha256: str
    shards: tuple[ShardInfo, ...]


@dataclass(frozen=True)
class OddImage:
    """A file that needed attention: what it is ("png", "cmyk", "undecodable", "passed over", …) and what was done.

    ``split`` is "" for a file that belongs to none.
    """

    split: str
    name: str
    what: str
    done: str


@dataclass(frozen=True)
class Source:
    """An input archive or folder: its name, size in bytes, MD5 where computed, and whether that is the official one."""

    name: str
    nbytes: int
    md5: str = ""
    official: bool = False


@dataclass(frozen=True)
class Manifest:
    """All there is to know about a data set without opening a shard."""

    name: str
    classes: tuple[ClassInfo, ...]
    splits: Mapping[str, SplitInfo]
    statistics: str
    statistics_sha256: str
    statistics_crop: int  # pixels: side of the mean image
    odd: tuple[OddImage, ...] = ()
    sources: tuple[Source, ...] = ()
    # Of image folders: what else decides over the images and their order, as a JSON object.
    options: Mapping[str, Any] = field(default_factory=dict)
    # Of image folders: split → kind → how many. Of the undecodable ``odd`` lists all, of others the first of each kind.
    counted: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    encoding: Encoding = Encoding.JPEG
    format: str = FORMAT

    def odd_counts(self) -> dict[tuple[str, str], int]:
        """How many files are odd, by split and kind; ``odd`` itself may list only the first of them."""
        counts: dict[tuple[str, str], int] = {}
        for o in self.odd:
            counts[o.split, o.what] = counts.get((o.split, o.what), 0) + 1
        return counts | {(split, what): n for split, whats in self.counted.items() for what, n in whats.items()}

    def to_bytes(self) -> bytes:
        raw = asdict(self)
        for key in ("options", "counted"):  # left out where empty: digests are older than these fields
            if not raw[key]:
                del raw[key]
        del raw["encoding"]
        if self.encoding is not Encoding.JPEG:
            raw["encoding"] = self.encoding.value
        return (json.dumps(raw, indent=1, sort_keys=True) + "\n").encode()

    @staticmethod
    def from_bytes(data: bytes) -> Manifest:
        """Raises ValueError where ``data`` is no manifest of this format."""
        try:
            raw = json.loads(data)
            if raw["format"] != FORMAT:
                raise ValueError(
                    f"manifest.json has the format {raw['format']!r}, this program reads {FORMAT!r}: prepare the data "
                    "set again"
                )
            encoding = raw.get("encoding", "jpeg")
            if encoding not in {known.value for known in Encoding}:
                raise ValueError(
                    f"manifest.json names the encoding {encoding!r}, which this program cannot read: use the version "
                    "that prepared the data set, or prepare it again"
                )
            manifest = Manifest(
                name=raw["name"],
                classes=tuple(ClassInfo(**c) for c in raw["classes"]),
                splits={
                    key: SplitInfo(**{**s, "shards": tuple(ShardInfo(**shard) for shard in s["shards"])})
                    for key, s in raw["splits"].items()
                },
                statistics=raw["statistics"],
                statistics_sha256=raw["statistics_sha256"],
                statistics_crop=raw["statistics_crop"],
                odd=tuple(OddImage(**o) for o in raw["odd"]),
                sources=tuple(Source(**s) for s in raw["sources"]),
                options=raw.get("options", {}),
                counted=raw.get("counted", {}),
                encoding=Encoding(encoding),
            )
            numbers = [split.count for split in manifest.splits.values()]
            for split in manifest.splits.values():
                numbers += [number for shard in split.shards for number in (shard.count, shard.nbytes)]
            if not all(isinstance(n, int) and n >= 0 for n in numbers):
                raise TypeError("a count that is none")
            return manifest
        except (KeyError, TypeError, AttributeError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise ValueError(f"manifest.json cannot be read ({error!r}): prepare the data set again") from None


# -- reading ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Split:
    """The images of one split, as arrays of length N (dtypes as in ``INDEX_SCHEMA``), and a reader of their bytes."""

    name: str
    info: SplitInfo
    shard: np.ndarray
    offset: np.ndarray
    nbytes: np.ndarray
    width: np.ndarray
    height: np.ndarray
    label: np.ndarray
    decodable: np.ndarray
    names: pa.Array
    _reader: _Reader | _Remembering = field(repr=False)
    _index: IndexCheck = field(repr=False)

    def check(self) -> None:
        """Wait until the whole index is compared with digest and manifest. Raises ValueError where it is damaged."""
        self._index.wait()

    def __len__(self) -> int:
        return self.info.count

    @property
    def shard_counts(self) -> np.ndarray:
        """Images of each shard: [number of shards] int64. Images of a shard are neighbours, in the shards' order."""
        return np.array([shard.count for shard in self.info.shards], np.int64)

    def read(self, indices: np.ndarray) -> list[np.ndarray]:
        """Bytes of the images ``indices`` [n] int64: n arrays [bytes] uint8, in order. Raises OSError."""
        requests = []
        for i in indices.tolist():
            start = int(self.offset[i])
            requests.append((self.info.shards[self.shard[i]].name, start, start + int(self.nbytes[i])))
        return [np.frombuffer(data, np.uint8) for data in self._reader.read(requests)]

    def remembered(self) -> Split:
        """The same images; the bytes of each are read once, and stay in memory as long as this object does."""
        return replace(self, _reader=_Remembering(self._reader))

    def close(self) -> None:
        """Close the shards that are open; a later ``read`` opens them again."""
        self._reader.close()


class _Reader:
    """Ranged reads. Files are read with pread: one truncated underneath is an OSError, not a SIGBUS.

    ``staged``: opens the copy of a remote shard on this machine, if there is one.
    """

    max_open_files = 128

    def __init__(self, storage: Storage, staged: Callable[[str], IO[bytes] | None] | None = None) -> None:
        self._storage, self._staged = storage, staged
        self._files: OrderedDict[str, IO[bytes]] = OrderedDict()

    def read(self, requests: Sequence[tuple[str, int, int]]) -> list[bytes]:
        if self._storage.is_local:
            return [self._pread(*request) for request in requests]
        self._let_go()
        found = [self._read_staged(*request) for request in requests]
        missing = [i for i, data in enumerate(found) if data is None]
        if missing:
            for i, data in zip(missing, self._storage.read_ranges([requests[i] for i in missing]), strict=True):
                found[i] = data
        return [data for data in found if data is not None]

    def close(self) -> None:
        while self._files:
            self._files.popitem()[1].close()

    def _read_staged(self, name: str, start: int, stop: int) -> bytes | None:
        try:
            return self._pread(name, start, stop)
        except FileNotFoundError:
            return None
        except OSError:  # someone has cut the copy, or its disk fails
            self._files.pop(name).close()
            return None

    def _let_go(self) -> None:
        """Close copies that were evicted: an open file keeps its place on the disk."""
        for name in [n for n, file in self._files.items() if not os.fstat(file.fileno()).st_nlink]:
            self._files.pop(name).close()

    def _pread(self, name: str, start: int, stop: int) -> bytes:
        file = self._files.get(name)
        if file is None:
            file = self._open(name)
            self._files[name] = file
            if len(self._files) > self.max_open_files:
                self._files.popitem(last=False)[1].close()
        else:
            self._files.move_to_end(name)
        data = os.pread(file.fileno(), stop - start, start)
        if len(data) != stop - start:
            raise OSError(f"{self._storage.url}/{name} is truncated: prepare the data set again")
        return data

    def _open(self, name: str) -> IO[bytes]:
        if self._storage.is_local:
            return open(self._storage.path(name), "rb", buffering=0)
        file = self._staged(name) if self._staged else None
        if file is None:
            raise FileNotFoundError(name)
        return file


class _Remembering:
    """Reads through ``reader``, nothing twice."""

    def __init__(self, reader: _Reader | _Remembering) -> None:
        self._reader, self._found = reader, dict[tuple[str, int, int], bytes]()

    def read(self, requests: Sequence[tuple[str, int, int]]) -> list[bytes]:
        new = [request for request in dict.fromkeys(requests) if request not in self._found]
        self._found |= zip(new, self._reader.read(new), strict=True)
        return [self._found[request] for request in requests]

    def close(self) -> None:
        self._reader.close()


class DataSet:
    """A prepared data set in storage.

    Raises ValueError where there is none, where it is unfinished, or where manifest and index do not fit together;
    OSError where storage fails for now.
    """

    def __init__(self, storage: Storage) -> None:
        self.storage = storage
        try:
            data = storage.read("manifest.json")
        except FileNotFoundError:
            raise ValueError(
                f"no prepared data set at {storage.url!r} (no manifest.json): make one with "
                "python -m data_prep.ilsvrc ARCHIVES --out URL, data_prep.image_folder FOLDER --out URL, "
                "or data_prep.cifar10 SOURCE --out URL"
            ) from None
        self.manifest = Manifest.from_bytes(data)
        self.digest = sha256_hex(data)

    @property
    def num_classes(self) -> int:
        return len(self.manifest.classes)

    def check_shards(self, name: str) -> None:
        """Every shard of the split is there with its recorded size (one listing, no reading). Raises ValueError."""
        sizes: dict[str, int] = {}
        for folder in {str(PurePosixPath(shard.name).parent) for shard in self._info(name).shards}:
            sizes |= self.storage.sizes_bytes(folder)
        for shard in self._info(name).shards:
            size = sizes.get(shard.name)
            if size is None:
                raise ValueError(f"{self.storage.url}/{shard.name} is missing: prepare the data set again")
            if size != shard.nbytes:
                raise ValueError(
                    f"{self.storage.url}/{shard.name} has {size} bytes where the manifest says {shard.nbytes}: "
                    "prepare the data set again"
                )

    def statistics(self) -> dict[str, np.ndarray]:
        """Arrays of ``statistics.safetensors`` (see the head of this module). Raises DigestError, OSError."""
        from safetensors.numpy import load

        return load(self.storage.read(self.manifest.statistics, self.manifest.statistics_sha256))

    def split(
        self, name: str, staged: Callable[[str], IO[bytes] | None] | None = None, *, check_beside: bool = False
    ) -> Split:
        """The split ``name``. Raises ValueError where the data set has none, or its index is damaged.

        ``staged`` opens the copy of a remote shard on this machine, if there is one (``cache.ShardCache.open``).
        ``check_beside``: the index is mapped, and read whole for its digest beside what the caller does, which must
        call ``Split.check`` before anything comes of the rows. Else that is waited for here.
        """
        info = self._info(name)
        path = self.storage.local_path(info.index)
        what = f"{self.storage.url}/{info.index}"

        def check_digest() -> None:
            try:
                if path is not None and file_sha256(path) != info.index_sha256:
                    raise DigestError(f"{path} is damaged: its SHA-256 is not the recorded one")
            except DigestError as error:
                raise ValueError(f"{error}: prepare the data set again") from None

        try:
            if path is not None:
                buffer = pa.memory_map(str(path)).read_buffer()
                if not check_beside:
                    check_digest()  # first of all: what is damaged may be anything
            else:
                buffer = pa.py_buffer(self.storage.read(info.index, info.index_sha256))
        except (FileNotFoundError, DigestError, pa.ArrowInvalid) as error:
            raise ValueError(f"{error}: prepare the data set again") from None
        try:
            table = pa.ipc.open_file(buffer).read_all()
            table.validate()
        except (OSError, pa.ArrowException) as error:
            check_digest()  # says more
            raise ValueError(f"{error}: prepare the data set again") from None
        if table.num_rows != info.count or table.schema != INDEX_SCHEMA:
            check_digest()
            raise ValueError(f"{what} does not fit its manifest: prepare the data set again")
        columns = {c: table[c].chunk(0) if info.count else pa.array([], table[c].type) for c in table.column_names}
        arrays = {c: a.to_numpy() for c, a in columns.items() if c != "name"}

        def check() -> None:
            if check_beside:
                check_digest()
            if not in_order(arrays["shard"], [shard.count for shard in info.shards]):
                raise ValueError(f"{what} does not fit its manifest: prepare the data set again")

        reader, index = _Reader(self.storage, staged), IndexCheck(check)
        split = Split(name=name, info=info, names=columns["name"], _reader=reader, _index=index, **arrays)
        if not check_beside:
            split.check()
        return split

    def _info(self, name: str) -> SplitInfo:
        if name not in self.manifest.splits:
            have = ", ".join(self.manifest.splits)
            raise ValueError(
                f"data set {self.storage.url!r} has no split {name!r}: it has {have}: prepare one with train and val"
            )
        return self.manifest.splits[name]
