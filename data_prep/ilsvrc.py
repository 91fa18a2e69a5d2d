"""ILSVRC2012's archives → a data set in shards, without unpacking them.

    python -m data_prep.ilsvrc /data/archives --out /data/ilsvrc2012

ARCHIVES is a folder, or the URL of one in an object store, with the files as image-net.org gives them:
ILSVRC2012_img_train.tar, ILSVRC2012_img_val.tar, ILSVRC2012_devkit_t12.tar.gz and ILSVRC2012_img_test_v10102019.tar (or
the older ILSVRC2012_img_test.tar). Killed at any moment, the same command goes on where it was, and ends with the same
bytes. Exit code: 0 finished, 2 refused or failed (nothing is published; the message says what to do), 130 interrupted.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import PurePosixPath
from typing import Annotated, Any

import tyro

from data_prep.archives import Member, check_end, walk
from data_prep.devkit import Devkit, read_devkit
from data_prep.fan_out import fan_out, peak_rss_bytes
from data_prep.parts import MANIFEST, PARTS, PREPARATION, Unit, assemble, clean_up, read_part, write_part
from data_prep.progress import Progress, print_summary
from orchestrator.data.shards import UNLABELLED, DataSet, Manifest, Source
from orchestrator.storage import Storage, sha256_hex

TRAIN = "ILSVRC2012_img_train.tar"
VAL = "ILSVRC2012_img_val.tar"
TEST = "ILSVRC2012_img_test*.tar"
DEVKIT = "ILSVRC2012_devkit_t12.tar.gz"

IMAGES_PER_UNIT = 1000  # of val and test: about 130 MB
_SMALL_BYTES = 256 << 20  # starting Ray takes as long as preparing this much


@dataclass(frozen=True)
class _Official:
    """``nbytes`` is exact where ``exact``; else from the rounded size on the download page."""

    nbytes: int
    exact: bool
    md5: str


# Sums: the download page of image-net.org, as quoted by many. The exact sizes of the test archives and of the devkit
# could not be confirmed.
_OFFICIAL = {
    TRAIN: _Official(147_897_477_120, True, "1d675b47d978889d74fa0da5fadfb00e"),
    VAL: _Official(6_744_924_160, True, "29b22e2961454d5413ddabcf34fc5622"),
    "ILSVRC2012_img_test.tar": _Official(13_000_000_000, False, "fe64ceb247e473635708aed23ab6d839"),
    "ILSVRC2012_img_test_v10102019.tar": _Official(13_000_000_000, False, "e1b8681fff3d63731c599df9b4b6fc02"),
    DEVKIT: _Official(2_500_000, False, "fa75699e90414af021442c21a62c3abf"),
}


@dataclass(frozen=True)
class Arguments:
    """Prepare ILSVRC2012 from its archives."""

    archives: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="ARCHIVES")]
    """Folder or fsspec URL that holds the archives."""
    out: str
    """Folder or fsspec URL for the data set; new, empty, or of an interrupted preparation."""
    name: str = "ilsvrc2012"
    """Name of the data set, for people."""
    crop: int = 224
    """Side of the mean image in pixels."""
    num_tasks: int | None = None
    """Ray tasks at once; 0 or 1: in this process. Left out: as many as there are CPUs, or 0 for less than 256 MiB."""
    ray_address: str | None = None
    """Ray cluster to use. Left out: RAY_ADDRESS, else one started on this machine."""
    max_undecodable: float = 0.001
    """Fraction of a split that may be undecodable; one image may always be, unless this is 0."""
    test: bool = True
    """--no-test: prepare without a test set."""


@dataclass(frozen=True)
class Md5:
    """The MD5 sum of a whole archive, as an item of work."""

    archive: str
    nbytes: int

    @property
    def record(self) -> str:
        return f"{PARTS}/md5-{sha256_hex(f'{self.archive} {self.nbytes}'.encode())[:32]}.json"


@dataclass(frozen=True)
class Report:
    """``manifest`` of the data set at ``out``; how long it took and the most memory a process held."""

    out: Storage
    manifest: Manifest
    seconds: float
    peak_rss_bytes: int
    already_finished: bool = False
    notes: tuple[str, ...] = ()


def prepare(arguments: Arguments, *, images_per_unit: int = IMAGES_PER_UNIT) -> Report:
    """Prepare the data set, or find it finished. Raises ValueError, saying what to do, and OSError."""
    started_s = time.monotonic()
    if arguments.crop < 1 or not 0 <= arguments.max_undecodable <= 1:
        raise ValueError("--crop is a number of pixels, --max-undecodable a fraction from 0 to 1")

    # -- what there is --------------------------------------------------------------------------------------------
    archives, out = Storage(arguments.archives), Storage(arguments.out)
    names = find_archives(archives, with_test=arguments.test)
    sizes = {name: archives.size_bytes(name) for name in names.values()}
    identity = {
        "name": arguments.name,
        "crop": arguments.crop,
        "sources": [{"name": name, "nbytes": nbytes} for name, nbytes in sizes.items()],
    }
    if _is_finished(out):
        manifest = _finished(out, identity)
        clean_up(out, manifest.splits)
        return Report(out, manifest, time.monotonic() - started_s, peak_rss_bytes(), already_finished=True)
    _check_unfinished(out, identity)

    # -- what is to be done ---------------------------------------------------------------------------------------
    devkit = read_devkit(archives, names["devkit"])
    units = plan(archives, names, sizes, devkit, crop=arguments.crop, images_per_unit=images_per_unit)
    out.check_writable()
    out.publish(PREPARATION, (json.dumps(identity, indent=1, sort_keys=True) + "\n").encode())
    remaining, done_images, done_bytes = [], 0, 0
    for unit in units:
        part = read_part(unit, out)
        if part is None:
            remaining.append(unit)
        else:
            done_images, done_bytes = done_images + part.num_files, done_bytes + part.nbytes
    _check_space(out, sum(sizes.values()), done_bytes)

    # -- do it ----------------------------------------------------------------------------------------------------
    sums = [Md5(name, nbytes) for name, nbytes in sizes.items()]
    num_tasks = arguments.num_tasks
    if num_tasks is None and sum(unit.nbytes for unit in remaining) < _SMALL_BYTES:
        num_tasks = 0
    work = _Work(archives, out)
    worst_bytes = 0
    with Progress(
        total_bytes=sum(unit.nbytes for unit in units),
        done_bytes=sum(unit.nbytes for unit in units) - sum(unit.nbytes for unit in remaining),
        done_images=done_images,
    ) as progress:
        todo = [md5 for md5 in sums if not out.exists(md5.record)]
        if todo or remaining:
            for item, num_images, peak_bytes in fan_out(
                work, list[Unit | Md5](remaining), beside=todo, num_tasks=num_tasks, ray_address=arguments.ray_address
            ):
                worst_bytes = max(worst_bytes, peak_bytes)
                if isinstance(item, Unit):
                    progress.advance(num_images, item.nbytes)

    # -- put it together ------------------------------------------------------------------------------------------
    notes: list[str] = []
    sources = [_checked_source(md5, json.loads(out.read(md5.record))["md5"], notes) for md5 in sums]
    manifest = assemble(
        out,
        units,
        name=arguments.name,
        classes=devkit.classes,
        sources=sources,
        crop=arguments.crop,
        max_undecodable=arguments.max_undecodable,
    )
    num_train = manifest.splits["train"].count + sum(
        o.split == "train" and o.what == "undecodable" for o in manifest.odd
    )
    if devkit.num_train_images not in (None, num_train):
        notes.append(f"warning: train has {num_train} images where meta.mat counts {devkit.num_train_images}")
    clean_up(out, manifest.splits)
    worst_bytes = max(worst_bytes, peak_rss_bytes())
    return Report(out, manifest, time.monotonic() - started_s, worst_bytes, notes=tuple(notes))


# -- what there is ------------------------------------------------------------------------------------------------


def find_archives(archives: Storage, *, with_test: bool = True) -> dict[str, str]:
    """File names of "train", "val", "test" and "devkit". Raises ValueError, saying which are missing."""
    try:
        found = archives.files()
    except Exception as error:  # object stores raise exceptions of their own libraries
        raise ValueError(
            f"{archives.url!r} cannot be listed ({type(error).__name__}: {error}): check the URL, its permissions and, "
            "for an object store, endpoint and credentials"
        ) from None
    # ILSVRC2012_img_test_patch_v10102019.tar holds only the few replaced images.
    tests = [n for n in found if PurePosixPath(n).match(TEST) and "_patch_" not in n]
    if with_test and len(tests) > 1:
        raise ValueError(
            f"{archives.url!r} holds {len(tests)} test archives ({', '.join(tests)}): move all but one away "
            "(the patched one is ILSVRC2012_img_test_v10102019.tar)"
        )
    names = {"train": TRAIN, "val": VAL, **({"test": tests[0] if tests else TEST} if with_test else {})}
    names["devkit"] = DEVKIT
    missing = [name for name in names.values() if name not in found]
    if missing:
        have = ", ".join(n for n in names.values() if n in found) or "none of the archives"
        hint = " (--no-test prepares without a test set)" if TEST in missing else ""
        raise ValueError(f"missing in {archives.url!r}: {', '.join(missing)}; found: {have}{hint}")
    return names


def plan(
    archives: Storage,
    names: dict[str, str],
    sizes: dict[str, int],
    devkit: Devkit,
    *,
    crop: int,
    images_per_unit: int = IMAGES_PER_UNIT,
) -> list[Unit]:
    """The units of train, val and test, in the order of the data set, whatever works on them.

    Raises ValueError where an archive is truncated, damaged, or does not fit the devkit.
    """
    units = _plan_train(archives, names["train"], sizes[names["train"]], devkit, crop)
    for split in ("val", "test"):
        if split not in names:
            continue
        archive, nbytes = names[split], sizes[names[split]]
        members = _scan(archives, archive, nbytes)
        labels = [UNLABELLED] * len(members)
        if split == "val":
            if len(devkit.ground_truth) != len(members):
                raise ValueError(
                    f"{archive} has {len(members)} images, the devkit's ground truth {len(devkit.ground_truth)} lines: "
                    "one of them is incomplete or of another year: download both again"
                )
            labels = [devkit.labels[i] for i in devkit.ground_truth]
        for number, first in enumerate(range(0, len(members), images_per_unit)):
            piece = slice(first, first + images_per_unit)
            units.append(
                Unit(
                    split=split,
                    stem=f"{split}-{number:05d}",
                    archive=archive,
                    archive_nbytes=nbytes,
                    start=0,
                    stop=nbytes,
                    labels=tuple(labels[piece]),
                    members=tuple(members[piece]),
                    keep_undecodable=True,
                )
            )
    return units


def _plan_train(archives: Storage, archive: str, nbytes: int, devkit: Devkit, crop: int) -> list[Unit]:
    labels = {c.wnid: c.label for c in devkit.classes}
    units: dict[str, Unit] = {}
    with archives.reading(archive) as stream:
        for member in walk(stream, archive, 0, nbytes):
            wnid = member.name.removesuffix(".tar")
            if wnid not in labels:
                raise ValueError(
                    f"{archive} holds {member.name!r}, which is no leaf class of the devkit's meta.mat: "
                    "do both come from ILSVRC2012 (tasks 1 and 2)?"
                )
            if wnid in units:
                raise ValueError(f"{archive} holds {member.name!r} twice")
            units[wnid] = Unit(
                split="train",
                stem=wnid,
                archive=archive,
                archive_nbytes=nbytes,
                start=member.offset,
                stop=member.offset + member.nbytes,
                labels=(labels[wnid],),
                crop=crop,
            )
        for unit in units.values():
            check_end(stream, f"{archive} ({unit.stem}.tar)", unit.start, unit.stop)
    missing = sorted(labels.keys() - units.keys())
    if missing:
        raise ValueError(
            f"{archive} lacks {len(missing)} of the {len(labels)} classes of meta.mat ({', '.join(missing[:5])}…): "
            "download it again, or use a devkit with these classes only"
        )
    return [units[wnid] for wnid in sorted(units)]


def _scan(archives: Storage, archive: str, nbytes: int) -> list[Member]:
    """The images of a flat archive, sorted by file name (which is the order of the ground truth)."""
    with archives.reading(archive) as stream:
        members = sorted(walk(stream, archive, 0, nbytes), key=lambda m: m.name)
    if not members:
        raise ValueError(f"{archive} holds no images: download it again")
    for one, other in itertools.pairwise(members):
        if one.name == other.name:
            raise ValueError(f"{archive} holds {one.name!r} twice")
    return members


# -- what is at the output ----------------------------------------------------------------------------------------


def _is_finished(out: Storage) -> bool:
    try:
        return out.exists(MANIFEST)
    except Exception as error:  # object stores raise exceptions of their own libraries
        raise ValueError(
            f"{out.url!r} cannot be read ({type(error).__name__}: {error}): check the URL, its permissions and, for an "
            "object store, endpoint and credentials"
        ) from None


def _finished(out: Storage, identity: dict[str, Any]) -> Manifest:
    data_set = DataSet(out)
    manifest = data_set.manifest
    have = {
        "name": manifest.name,
        "crop": manifest.statistics_crop,
        "sources": [{"name": s.name, "nbytes": s.nbytes} for s in manifest.sources],
    }
    _check_same(out, have, identity, "a finished data set")
    for split in manifest.splits:
        data_set.check_shards(split)
    return manifest


def _check_unfinished(out: Storage, identity: dict[str, Any]) -> None:
    if out.exists(PREPARATION):
        _check_same(out, json.loads(out.read(PREPARATION)), identity, "an unfinished preparation")
    elif any(not n.startswith(".") for folder in ("", "train", "val", "test") for n in out.files(folder)):
        raise ValueError(f"{out.url!r} is not empty, and what it holds is no data set: give a new folder as --out")


def _check_same(out: Storage, have: dict[str, Any], want: dict[str, Any], what: str) -> None:
    for field in want:
        if have.get(field) != want[field]:
            raise ValueError(
                f"{out.url!r} holds {what} with another {field} ({json.dumps(have.get(field))}, now "
                f"{json.dumps(want[field])}): give another --out, or delete that folder to start over"
            )


def _check_space(out: Storage, source_bytes: int, done_bytes: int) -> None:
    free_bytes = out.free_bytes()
    needed_bytes = int(source_bytes * 1.1) - done_bytes
    if free_bytes is not None and free_bytes < needed_bytes:
        raise ValueError(
            f"{out.url!r} has {free_bytes / 1e9:.1f} GB free, {needed_bytes / 1e9:.1f} GB are needed: "
            "make room or give another --out"
        )


# -- one item of work ---------------------------------------------------------------------------------------------


class _Work:
    """What runs on the machines of the cluster: a unit or an MD5 sum; returns the number of images seen."""

    def __init__(self, archives: Storage, out: Storage) -> None:
        self.archives, self.out = archives, out

    def __call__(self, item: Unit | Md5) -> int:
        if isinstance(item, Unit):
            return write_part(item, self.archives, self.out).num_files
        digest = hashlib.md5(usedforsecurity=False)
        with self.archives.reading(item.archive) as stream:
            while chunk := stream.read(8 << 20):
                digest.update(chunk)
        self.out.publish(item.record, (json.dumps({**asdict(item), "md5": digest.hexdigest()}) + "\n").encode())
        return 0


def _checked_source(item: Md5, md5: str, notes: list[str]) -> Source:
    """Raises ValueError for an archive that must be a damaged copy of the official one; adds to ``notes``."""
    official = _OFFICIAL.get(item.archive)
    genuine = official is not None and md5 == official.md5
    if official is not None and not genuine:
        if official.exact and item.nbytes == official.nbytes:
            raise ValueError(
                f"{item.archive} is damaged: its MD5 is {md5}, not {official.md5}: download it again and delete "
                "the unfinished output"
            )
        if item.nbytes >= 0.9 * official.nbytes:
            # Anything else than an error would be a guess: people merge the test set's patch themselves.
            notes.append(f"warning: {item.archive} has the MD5 {md5}; image-net.org's has {official.md5}")
        else:
            notes.append(f"note: {item.archive} is not the official archive ({item.nbytes} bytes)")
    return Source(item.archive, item.nbytes, md5, genuine)


# -- command line -------------------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    arguments = tyro.cli(Arguments, args=argv, prog="python -m data_prep.ilsvrc", description=__doc__)
    try:
        report = prepare(arguments)
    except (ValueError, OSError) as error:
        message = (
            str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}: run again to go on"
        )
        print(f"error: {message}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: the same command goes on from here", file=sys.stderr)
        return 130
    print_summary(
        report.out,
        report.manifest,
        seconds=report.seconds,
        peak_rss_bytes=report.peak_rss_bytes,
        already_finished=report.already_finished,
        notes=report.notes,
    )
    return 0


if __name__ == "__main__":
    # By its importable name: what Ray sends to other processes must not live in __main__.
    from data_prep.ilsvrc import main as importable_main

    sys.exit(importable_main())
