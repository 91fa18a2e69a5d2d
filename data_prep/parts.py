"""Units of preparation and what they leave behind, and a data set put together from it.

While a data set is being prepared its folder also holds::

    .parts/preparation.json       what is being prepared from what: another preparation is refused
    .parts/<key>.safetensors      sums over the images of one unit of the training set (PixelSums)
    .parts/<key>.json             published last: the unit's shards are there, whole, and this is in them

The key digests all that a part depends on. A preparation that was killed at any moment finds the parts that are done,
and does the others again: the same bytes under the same names.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from data_prep.archives import Member, walk
from data_prep.images import MAX_IMAGE_BYTES, prepare_image
from data_prep.statistics import PixelSums, centre_view, statistics_bytes
from orchestrator.data.shards import (
    INDEX_SCHEMA,
    ClassInfo,
    Manifest,
    OddImage,
    ShardInfo,
    ShardWriter,
    Source,
    SplitInfo,
    key_of,
    write_index,
)
from orchestrator.storage import Storage, sha256_hex

PARTS = ".parts"
PREPARATION = f"{PARTS}/preparation.json"
STATISTICS = "statistics.safetensors"
MANIFEST = "manifest.json"
SHARD_BYTES = 256 << 20

# Part of every key: to be changed with anything that changes the bytes of a shard, an index row or a sum.
_CODE_VERSION = 1


@dataclass(frozen=True)
class Unit:
    """A run of images from one archive; they go into shards of their own.

    Either all files of the tar in bytes ``start`` to ``stop`` of the archive, all with the label ``labels[0]``, or the
    ``members`` of it, each with its own label.
    """

    split: str
    stem: str  # of the names of its shards: <split>/<stem>-000.tar
    archive: str
    archive_nbytes: int
    start: int
    stop: int
    labels: tuple[int, ...]
    members: tuple[Member, ...] = ()
    crop: int = 0  # pixels: side of the views of the statistics; 0: no statistics
    keep_undecodable: bool = False  # with a placeholder, in its place, instead of leaving it out
    shard_bytes: int = SHARD_BYTES

    @property
    def key(self) -> str:
        what = {"code": _CODE_VERSION, **asdict(self)}
        return sha256_hex(json.dumps(what, sort_keys=True).encode())[:32]

    @property
    def nbytes(self) -> int:
        """Size of what is read, in bytes."""
        return sum(m.nbytes for m in self.members) if self.members else self.stop - self.start


@dataclass(frozen=True)
class Part:
    """What a unit came to: its shards, one row an image, its odd images, and how many files it saw."""

    shards: tuple[ShardInfo, ...]
    rows: Mapping[str, list[Any]]  # columns of INDEX_SCHEMA, ``shard`` counted within the unit
    odd: tuple[OddImage, ...]
    num_files: int
    sums_sha256: str = ""

    @property
    def nbytes(self) -> int:
        return sum(shard.nbytes for shard in self.shards)


# -- one unit -----------------------------------------------------------------------------------------------------


def write_part(unit: Unit, archives: Storage, out: Storage) -> Part:
    """Write shards, sums and at last the record of ``unit``.

    Holds one image at a time. Raises ValueError where the archive is damaged, OSError where storage fails.
    """
    rows: dict[str, list[Any]] = {name: [] for name in INDEX_SCHEMA.names}
    odd: list[OddImage] = []
    shards: list[ShardInfo] = []
    seen: set[str] = set()
    sums = PixelSums(unit.crop) if unit.crop else None
    images = _source_images(unit, archives)
    exhausted = False
    while not exhausted:
        with _Shards(out, f"{unit.split}/{unit.stem}-{len(shards):03d}.tar") as shard:
            while shard.nbytes < unit.shard_bytes:
                name, data, label = next(images, (None, b"", 0))
                if name is None:
                    exhausted = True
                    break
                key = _checked_key(name, unit, seen)
                prepared = prepare_image(data, with_pixels=sums is not None)
                if prepared.what:
                    done = prepared.done
                    if not prepared.decodable:
                        done = f"{'counted as wrong' if unit.keep_undecodable else 'left out'} ({done})"
                    odd.append(OddImage(unit.split, name, prepared.what, done))
                if not prepared.decodable and not unit.keep_undecodable:
                    continue
                if sums and prepared.pixels:
                    sums.add(centre_view(prepared.pixels, sums.crop))
                rows["offset"].append(shard.add(key, prepared.data, label))
                rows["shard"].append(len(shards))
                rows["nbytes"].append(len(prepared.data))
                rows["width"].append(prepared.width)
                rows["height"].append(prepared.height)
                rows["label"].append(label)
                rows["decodable"].append(int(prepared.decodable))
                rows["name"].append(name)
        shards.extend(shard.infos)
    sums_sha256 = ""
    if sums:
        data = sums.to_bytes()
        sums_sha256 = sha256_hex(data)
        out.publish(f"{PARTS}/{unit.key}.safetensors", data)
    part = Part(tuple(shards), rows, tuple(odd), len(seen), sums_sha256)
    out.publish(f"{PARTS}/{unit.key}.json", (json.dumps(asdict(part)) + "\n").encode())
    return part


def read_part(unit: Unit, out: Storage) -> Part | None:
    """The part of ``unit`` if it is done and all that it names is there; None where it is to be done (again)."""
    try:
        raw = json.loads(out.read(f"{PARTS}/{unit.key}.json"))
        part = Part(
            shards=tuple(ShardInfo(**shard) for shard in raw["shards"]),
            rows=raw["rows"],
            odd=tuple(OddImage(**odd) for odd in raw["odd"]),
            num_files=raw["num_files"],
            sums_sha256=raw["sums_sha256"],
        )
        if any(out.size_bytes(shard.name) != shard.nbytes for shard in part.shards):
            return None
        if part.sums_sha256 and not out.exists(f"{PARTS}/{unit.key}.safetensors"):
            return None
    except (FileNotFoundError, KeyError, TypeError, json.JSONDecodeError):
        return None
    return part


class _Shards:
    """A ShardWriter that begins with its first image: a unit may turn out to have none for it."""

    def __init__(self, out: Storage, name: str) -> None:
        self._out, self._name = out, name
        self._writer: ShardWriter | None = None
        self.infos: list[ShardInfo] = []

    def __enter__(self) -> _Shards:
        return self

    @property
    def nbytes(self) -> int:
        return self._writer.nbytes if self._writer else 0

    def add(self, key: str, image: bytes, label: int) -> int:
        if self._writer is None:
            self._writer = ShardWriter(self._out, self._name).__enter__()
        return self._writer.add(key, image, label)

    def __exit__(self, *error: Any) -> None:
        if self._writer is not None:
            self._writer.__exit__(*error)
            if error[0] is None:
                self.infos.append(self._writer.info)


def _source_images(unit: Unit, archives: Storage) -> Iterator[tuple[str, bytes, int]]:
    """(file name, bytes, label), in the order of the unit."""
    with archives.reading(unit.archive) as stream:
        if unit.members:
            found: Iterable[tuple[Member, int]] = zip(unit.members, unit.labels, strict=True)
        else:
            where = f"{unit.archive} ({unit.stem}.tar)"
            found = ((member, unit.labels[0]) for member in walk(stream, where, unit.start, unit.stop))
        for member, label in found:
            if member.nbytes > MAX_IMAGE_BYTES:
                raise ValueError(f"{unit.archive}: {member.name!r} of {member.nbytes} bytes is no image of this set")
            stream.seek(member.offset)
            data = stream.read(member.nbytes)
            if len(data) != member.nbytes:
                raise ValueError(f"{unit.archive} is truncated within {member.name!r}: download it again")
            yield member.name, data, label


def _checked_key(name: str, unit: Unit, seen: set[str]) -> str:
    key = key_of(name)
    if key in seen:
        raise ValueError(f"{unit.archive}: two files of {unit.stem} have the name {name!r}")
    seen.add(key)
    return key


# -- the whole ----------------------------------------------------------------------------------------------------


def assemble(
    out: Storage,
    units: Sequence[Unit],
    *,
    name: str,
    classes: Sequence[ClassInfo],
    sources: Sequence[Source],
    crop: int,
    max_undecodable: float,
) -> Manifest:
    """Index, statistics and at last the manifest, from the parts of ``units`` (in order, all done).

    Raises ValueError, publishing nothing, where more than the fraction ``max_undecodable`` of a split cannot be
    decoded, or where a part cannot be seen from here.
    """
    sums = PixelSums(crop)
    splits: dict[str, SplitInfo] = {}
    odd: list[OddImage] = []
    gathered = {split: _gather(out, split, units, sums, odd) for split in dict.fromkeys(unit.split for unit in units)}
    for split, (_, _, num_files) in gathered.items():
        _check_undecodable([o for o in odd if o.split == split], split, num_files, max_undecodable)
    statistics = statistics_bytes(sums)
    for split, (shards, columns, _) in gathered.items():
        index_sha256 = write_index(out, f"{split}.arrow", columns)
        splits[split] = SplitInfo(len(columns["name"]), f"{split}.arrow", index_sha256, tuple(shards))
    out.publish(STATISTICS, statistics)
    manifest = Manifest(
        name=name,
        classes=tuple(classes),
        splits=splits,
        statistics=STATISTICS,
        statistics_sha256=sha256_hex(statistics),
        statistics_crop=crop,
        odd=tuple(odd),
        sources=tuple(sources),
    )
    out.publish(MANIFEST, manifest.to_bytes())
    return manifest


def clean_up(out: Storage, splits: Iterable[str]) -> None:
    """Remove what only a preparation under way needs, and what killed ones have left half-written."""
    out.delete(PARTS)
    for folder in ("", *splits):
        out.delete_fragments(folder)


def _gather(
    out: Storage, split: str, units: Sequence[Unit], sums: PixelSums, odd: list[OddImage]
) -> tuple[list[ShardInfo], dict[str, Any], int]:
    """Shards, index columns and number of files of ``split``; adds to ``sums`` and ``odd``."""
    shards: list[ShardInfo] = []
    names: list[str] = []
    pieces: dict[str, list[np.ndarray]] = {c: [] for c in INDEX_SCHEMA.names if c != "name"}
    num_files = 0
    for unit in units:
        if unit.split != split:
            continue
        part = read_part(unit, out)
        if part is None:
            raise ValueError(
                f"shards of {unit.stem} were written but are not at {out.url!r} as seen from here: "
                "give --out as a folder that all machines share, or an object store"
            )
        for column, piece in pieces.items():
            dtype = INDEX_SCHEMA.field(column).type.to_pandas_dtype()
            piece.append(np.array(part.rows[column], dtype) + (len(shards) if column == "shard" else 0))
        names += part.rows["name"]
        shards += part.shards
        odd += part.odd
        num_files += part.num_files
        if part.sums_sha256:
            sums.merge(PixelSums.from_bytes(out.read(f"{PARTS}/{unit.key}.safetensors", part.sums_sha256)))
    columns: dict[str, Any] = {c: np.concatenate(piece) for c, piece in pieces.items()}
    return shards, {**columns, "name": names}, num_files


def _check_undecodable(odd: Sequence[OddImage], split: str, num_files: int, max_undecodable: float) -> None:
    bad = [o for o in odd if o.what == "undecodable"]
    allowed = max(1, int(max_undecodable * num_files)) if max_undecodable > 0 else 0
    if len(bad) > allowed:
        names = "\n".join(f"  {o.name}: {o.done}" for o in bad)
        raise ValueError(
            f"{len(bad)} of {num_files} images of {split} cannot be decoded, {allowed} are allowed: "
            "is the archive damaged? To go on without them, run again with a larger --max-undecodable "
            f"(a fraction; what is done stays done). They are:\n{names}"
        )
