"""Units of preparation and what they leave behind, and a data set put together from it.

While a data set is being prepared its folder also holds::

    .parts/preparation.json       created first: what is being prepared from what; another preparation is refused
    .parts/<key>.safetensors      sums over the images of one unit of the training set (PixelSums)
    .parts/<key>.json             published last: the unit's shards are there, whole, and this is in them

The key digests all that a part depends on, the times of modification of its files included. A preparation that was
killed at any moment finds the parts that are done, and does the others again: the same bytes under the same names.

Two at once: the same preparation twice writes the same bytes, and ends once; of two different ones the first to create
preparation.json goes on. Every shard, record and manifest is published only while preparation.json is what it was.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from data_prep.images import prepare_image
from data_prep.overview import images_twice
from data_prep.progress import MAX_LISTED, printable
from data_prep.sources import ImageSource
from data_prep.statistics import PixelSums, centre_view, statistics_bytes
from orchestrator.data.shard_writer import ShardWriter, write_index
from orchestrator.data.shards import (
    INDEX_SCHEMA,
    RESIZED,
    UNDECODABLE,
    ClassInfo,
    DataSet,
    Manifest,
    OddImage,
    ShardInfo,
    Source,
    SplitInfo,
)
from orchestrator.storage import Storage, sha256_hex

PARTS = ".parts"
PREPARATION = f"{PARTS}/preparation.json"
STATISTICS = "statistics.safetensors"
MANIFEST = "manifest.json"
MANIFEST_SHA256 = "manifest.sha256"  # for sha256sum -c
SHARD_BYTES = 256 << 20
_DIGEST_BYTES = 16  # of an image, to find those that are there twice

# Part of every key: to be changed with anything that changes the bytes of a shard, an index row or a sum.
_CODE_VERSION = 3


@dataclass(frozen=True)
class Unit:
    """A run of images; they go into shards of their own."""

    split: str
    stem: str  # of the names of its shards: <split>/<stem>-000.tar
    source: ImageSource
    crop: int = 0  # pixels: side of the views of the statistics; 0: no statistics
    keep_undecodable: bool = False  # with a placeholder, in its place, instead of leaving it out
    shard_bytes: int = SHARD_BYTES
    max_side: int | None = None  # pixels: larger images are made smaller
    remarks: bool = False  # tell of what is kept as it is but might surprise
    version: str = ""  # digest of when its files were modified: decides what is done again, and over no byte

    @cached_property
    def key(self) -> str:
        what = {"code": _CODE_VERSION, "from": type(self.source).__name__, **asdict(self)}
        return sha256_hex(json.dumps(what, sort_keys=True).encode())[:32]

    @property
    def nbytes(self) -> int:
        """Size of what is read, in bytes."""
        return self.source.nbytes


@dataclass(frozen=True)
class Part:
    """What a unit came to: its shards, one row an image, its odd images, and how many files it saw."""

    shards: tuple[ShardInfo, ...]
    rows: Mapping[str, list[Any]]  # columns of INDEX_SCHEMA, ``shard`` counted within the unit
    odd: tuple[OddImage, ...]
    num_files: int
    num_resized: int = 0
    sums_sha256: str = ""
    digests: str = ""  # of the images' bytes: 32 hexadecimal digits a row

    @property
    def nbytes(self) -> int:
        return sum(shard.nbytes for shard in self.shards)


# -- one unit -----------------------------------------------------------------------------------------------------


def write_part(unit: Unit, storage: Storage, out: Storage, claim: bytes | None = None) -> Part:
    """Write shards, sums and at last the record of ``unit``, whose images lie in ``storage``.

    Holds a few images at a time. ``claim``: see ``check_claim``. Raises ValueError where the source is damaged, OSError
    where storage fails.
    """
    rows: dict[str, list[Any]] = {name: [] for name in INDEX_SCHEMA.names}
    odd: list[OddImage] = []
    shards: list[ShardInfo] = []
    digests: list[str] = []
    num_files = num_resized = 0
    sums = PixelSums(unit.crop) if unit.crop else None
    images = unit.source.images(storage)
    exhausted = False
    while not exhausted:
        with _Shards(out, f"{unit.split}/{unit.stem}-{len(shards):03d}.tar") as shard:
            while shard.nbytes < unit.shard_bytes:
                image = next(images, None)
                if image is None:
                    exhausted = True
                    break
                num_files += 1
                prepared = prepare_image(
                    image.data, with_pixels=sums is not None, max_side=unit.max_side, remarks=unit.remarks
                )
                num_resized += prepared.resized
                if prepared.what:
                    done = prepared.done
                    if not prepared.decodable:
                        done = f"{'counted as wrong' if unit.keep_undecodable else 'left out'} ({done})"
                    odd.append(OddImage(unit.split, image.name, prepared.what, done))
                if not prepared.decodable and not unit.keep_undecodable:
                    continue
                if sums and prepared.pixels:
                    sums.add(centre_view(prepared.pixels, sums.crop))
                rows["offset"].append(shard.add(image.key, prepared.data, image.label))
                rows["shard"].append(len(shards))
                rows["nbytes"].append(len(prepared.data))
                rows["width"].append(prepared.width)
                rows["height"].append(prepared.height)
                rows["label"].append(image.label)
                rows["decodable"].append(int(prepared.decodable))
                rows["name"].append(image.name)
                digests.append(hashlib.blake2b(prepared.data, digest_size=_DIGEST_BYTES).hexdigest())
            check_claim(out, claim)
        shards.extend(shard.infos)
    check_claim(out, claim)
    sums_sha256 = ""
    if sums:
        data = sums.to_bytes()
        sums_sha256 = sha256_hex(data)
        out.publish(f"{PARTS}/{unit.key}.safetensors", data)
    part = Part(tuple(shards), rows, tuple(odd), num_files, num_resized, sums_sha256, "".join(digests))
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
            num_resized=raw["num_resized"],
            sums_sha256=raw["sums_sha256"],
            digests=raw["digests"],
        )
        if any(out.size_bytes(shard.name) != shard.nbytes for shard in part.shards):
            return None
        if part.sums_sha256 and not out.exists(f"{PARTS}/{unit.key}.safetensors"):
            return None
    except (FileNotFoundError, KeyError, TypeError, json.JSONDecodeError):
        return None
    return part


def check_claim(out: Storage, claim: bytes | None) -> None:
    """Raises ValueError unless ``claim`` is what preparation.json holds. None: nothing is claimed."""
    try:
        if claim is None or out.read(PREPARATION) == claim:
            return
    except FileNotFoundError:
        pass
    raise ValueError(
        f"the unfinished preparation at {out.url!r} was deleted or taken over while this one was at work: run again, "
        "or give another --out"
    )


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
    options: Mapping[str, Any] | None = None,
    passed_over: Sequence[OddImage] = (),
    max_listed: int | None = None,
    claim: bytes | None = None,
    notes: list[str] | None = None,
) -> Manifest:
    """Index, statistics and at last the manifest, from the parts of ``units`` (in order, all done).

    ``max_listed``: of each kind of odd files of a split but the undecodable, the manifest lists so many by name, and
    counts all; None: it lists all of them and counts none. Warnings of images that are there twice go to ``notes``.
    Raises ValueError, publishing nothing, where more than the fraction ``max_undecodable`` of a split cannot be
    decoded, where a part cannot be seen from here, or where ``claim`` (see ``check_claim``) does not hold any more.
    """
    sums = PixelSums(crop)
    gathered = {split: _gather(out, split, units, sums) for split in dict.fromkeys(unit.split for unit in units)}
    for split, found in gathered.items():
        _check_undecodable(found.odd, split, found.num_files, max_undecodable)
    odd = [o for found in gathered.values() for o in found.odd] + list(passed_over)
    counted: dict[str, dict[str, int]] = {}
    if max_listed is not None:
        counted = _counted(odd)
        for split, found in gathered.items():
            if found.num_resized:
                counted.setdefault(split, {})[RESIZED] = found.num_resized
        odd = _first(odd, max_listed)
    statistics = statistics_bytes(sums)
    splits: dict[str, SplitInfo] = {}
    for split, found in gathered.items():
        index_sha256 = write_index(out, f"{split}.arrow", found.columns)
        splits[split] = SplitInfo(len(found.columns["name"]), f"{split}.arrow", index_sha256, tuple(found.shards))
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
        options=dict(options or {}),
        counted=counted,
    )
    check_claim(out, claim)
    manifest = publish_manifest(out, manifest)
    if notes is not None:
        data_set = DataSet(out)
        images = {split: data_set.split(split) for split in gathered}
        digests = {split: found.digests for split, found in gathered.items()}
        notes += [f"warning: {line}" for line in images_twice(images, digests)]
    return manifest


def publish_manifest(out: Storage, manifest: Manifest) -> Manifest:
    """Publish ``manifest``, which ends the preparation; returns what is published.

    That is another's where the same preparation, begun twice, has ended before: the same, but for the words in which
    other versions of libraries tell of damaged images.
    """
    data = manifest.to_bytes()
    out.publish(MANIFEST_SHA256, _sum_line(data))
    if out.create(MANIFEST, data) or (published := out.read(MANIFEST)) == data:
        return manifest
    out.publish(MANIFEST_SHA256, _sum_line(published))
    theirs = Manifest.from_bytes(published)
    if any(getattr(theirs, of) != getattr(manifest, of) for of in ("name", "sources", "statistics_crop", "options")):
        raise ValueError(f"another preparation has been published at {out.url!r} meanwhile: give another --out")
    return theirs


def _sum_line(manifest: bytes) -> bytes:
    return f"{sha256_hex(manifest)}  {MANIFEST}\n".encode()


def clean_up(out: Storage, splits: Iterable[str]) -> None:
    """Remove what only a preparation under way needs, and what killed ones have left half-written.

    What cannot be removed now (the same preparation, begun twice, may be at work there) harms nothing: the next run
    does it.
    """
    with suppress(OSError):
        out.delete(PARTS)
        for folder in ("", *splits):
            out.delete_fragments(folder)


@dataclass
class _Gathered:
    """What the parts of one split come to; ``columns`` of INDEX_SCHEMA."""

    shards: list[ShardInfo] = field(default_factory=list)
    columns: dict[str, Any] = field(default_factory=dict)
    odd: list[OddImage] = field(default_factory=list)
    digests: np.ndarray = field(default_factory=lambda: np.zeros(0, f"S{_DIGEST_BYTES}"))
    num_files: int = 0
    num_resized: int = 0


def _gather(out: Storage, split: str, units: Sequence[Unit], sums: PixelSums) -> _Gathered:
    """All parts of ``split``; adds to ``sums``."""
    found = _Gathered()
    names: list[str] = []
    pieces: dict[str, list[np.ndarray]] = {c: [] for c in INDEX_SCHEMA.names if c != "name"}
    digests = bytearray()
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
            piece.append(np.array(part.rows[column], dtype) + (len(found.shards) if column == "shard" else 0))
        names += part.rows["name"]
        digests += bytes.fromhex(part.digests)
        found.shards += part.shards
        found.odd += part.odd
        found.num_files += part.num_files
        found.num_resized += part.num_resized
        if part.sums_sha256:
            sums.merge(PixelSums.from_bytes(out.read(f"{PARTS}/{unit.key}.safetensors", part.sums_sha256)))
    found.digests = np.frombuffer(bytes(digests), f"S{_DIGEST_BYTES}")
    found.columns = {**{c: np.concatenate(piece) for c, piece in pieces.items()}, "name": names}
    return found


def _counted(odd: Sequence[OddImage]) -> dict[str, dict[str, int]]:
    """Split → kind → number."""
    counted: dict[str, dict[str, int]] = {}
    for (split, what), number in sorted(Counter((o.split, o.what) for o in odd).items()):
        counted.setdefault(split, {})[what] = number
    return counted


def _first(odd: Sequence[OddImage], max_listed: int) -> list[OddImage]:
    """In the order of their names; of each kind of a split the first ``max_listed``, but all that are undecodable."""
    listed: Counter[tuple[str, str]] = Counter()
    first = []
    for o in sorted(odd, key=lambda o: (o.split, o.name)):
        listed[o.split, o.what] += 1
        if o.what == UNDECODABLE or listed[o.split, o.what] <= max_listed:
            first.append(o)
    return first


def _check_undecodable(odd: Sequence[OddImage], split: str, num_files: int, max_undecodable: float) -> None:
    bad = [o for o in odd if o.what == UNDECODABLE]
    allowed = max(1, math.floor(max_undecodable * num_files + 1e-9)) if max_undecodable > 0 else 0
    if len(bad) > allowed:
        names = "\n".join(f"  {printable(o.name)}: {o.done}" for o in bad[:MAX_LISTED])
        more = f"\n  and {len(bad) - MAX_LISTED} more" if len(bad) > MAX_LISTED else ""
        enough = math.ceil(1000 * len(bad) / num_files) / 1000
        raise ValueError(
            f"{len(bad)} of {num_files} images of {split} cannot be decoded, {allowed} are allowed: are these files "
            f"damaged? To go on as said below of each, run again with --max-undecodable {enough} (a fraction; what is "
            f"done stays done). They are:\n{names}{more}"
        )
