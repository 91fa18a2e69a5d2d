"""ILSVRC2012's archives → a data set in shards, without unpacking them.

    python -m data_prep.ilsvrc /data/archives --out /data/ilsvrc2012

ARCHIVES is a folder, or the URL of one in an object store, with the files as image-net.org gives them:
ILSVRC2012_img_train.tar, ILSVRC2012_img_val.tar, ILSVRC2012_devkit_t12.tar.gz and ILSVRC2012_img_test_v10102019.tar (or
the older ILSVRC2012_img_test.tar). Killed at any moment, the same command goes on where it was, and ends with the same
bytes. Exit code: 0 finished, 1 storage failed (the same command goes on later), 2 something to mend first (the message
says what), 130 interrupted; nothing is published unless it is 0.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import PurePosixPath
from typing import Annotated

import tyro

from data_prep.archives import Member, check_end, walk
from data_prep.devkit import Devkit, read_devkit
from data_prep.official import DEVKIT, TEST, TRAIN, VAL, Md5, checked_source
from data_prep.parts import Unit, assemble, clean_up
from data_prep.preparation import Preparation, Report, answered, check_folder, check_options, command, modified_ns
from data_prep.sources import InnerTar, Members
from orchestrator.data.shards import UNDECODABLE, UNLABELLED
from orchestrator.storage import Storage

IMAGES_PER_UNIT = 1000  # of val and test: about 130 MB


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


def prepare(arguments: Arguments, *, images_per_unit: int = IMAGES_PER_UNIT) -> Report:
    """Prepare the data set, or find it finished. Raises ValueError, saying what to do, and OSError."""
    check_options(crop=arguments.crop, max_undecodable=arguments.max_undecodable)

    # -- what there is --------------------------------------------------------------------------------------------
    archives, out = Storage(arguments.archives), Storage(arguments.out)
    check_folder(archives, "ARCHIVES")
    names = find_archives(archives, with_test=arguments.test)
    sizes = {name: archives.size_bytes(name) for name in names.values()}
    identity = {
        "name": arguments.name,
        "crop": arguments.crop,
        "sources": [{"name": name, "nbytes": nbytes} for name, nbytes in sizes.items()],
    }
    preparation = Preparation(
        archives,
        out,
        identity,
        modified_ns(archives, sizes),
        num_tasks=arguments.num_tasks,
        ray_address=arguments.ray_address,
    )

    def do() -> Report:
        devkit = read_devkit(archives, names["devkit"])
        units = plan(archives, names, sizes, devkit, crop=arguments.crop, images_per_unit=images_per_unit)
        units = [replace(unit, version=preparation.version([names[unit.split]])) for unit in units]
        sums = [Md5(name, nbytes, preparation.version([name])) for name, nbytes in sizes.items()]
        preparation.work(units, needed_bytes=int(sum(sizes.values()) * 1.1), beside=sums)
        notes: list[str] = []
        manifest = assemble(
            out,
            units,
            name=arguments.name,
            classes=devkit.classes,
            sources=[checked_source(md5, out, notes) for md5 in sums],
            crop=arguments.crop,
            max_undecodable=arguments.max_undecodable,
            claim=preparation.claim,
            notes=notes,
        )
        undecodable = sum(o.split == "train" and o.what == UNDECODABLE for o in manifest.odd)
        num_train = manifest.splits["train"].count + undecodable
        if devkit.num_train_images not in (None, num_train):
            notes.append(f"warning: train has {num_train} images where meta.mat counts {devkit.num_train_images}")
        clean_up(out, manifest.splits)
        return preparation.report(manifest, notes=notes)

    return preparation.carry_out(do)


# -- what there is ------------------------------------------------------------------------------------------------


def find_archives(archives: Storage, *, with_test: bool = True) -> dict[str, str]:
    """File names of "train", "val", "test" and "devkit". Raises ValueError, saying which are missing."""
    found = answered(archives, "listed", archives.files)
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
                    source=Members(archive, nbytes, tuple(members[piece]), tuple(labels[piece])),
                    keep_undecodable=True,
                )
            )
    return units


def _plan_train(archives: Storage, archive: str, nbytes: int, devkit: Devkit, crop: int) -> list[Unit]:
    labels = {c.wnid: c.label for c in devkit.classes}
    tars: dict[str, InnerTar] = {}
    with archives.reading(archive) as stream:
        for member in walk(stream, archive, 0, nbytes):
            wnid = member.name.removesuffix(".tar")
            if wnid not in labels:
                raise ValueError(
                    f"{archive} holds {member.name!r}, which is no leaf class of the devkit's meta.mat: "
                    "do both come from ILSVRC2012 (tasks 1 and 2)?"
                )
            if wnid in tars:
                raise ValueError(f"{archive} holds {member.name!r} twice: download it again")
            stop = member.offset + member.nbytes
            tars[wnid] = InnerTar(archive, nbytes, f"{wnid}.tar", member.offset, stop, labels[wnid])
        for tar in tars.values():
            check_end(stream, f"{archive} ({tar.name})", tar.start, tar.stop)
    missing = sorted(labels.keys() - tars.keys())
    if missing:
        raise ValueError(
            f"{archive} lacks {len(missing)} of the {len(labels)} classes of meta.mat ({', '.join(missing[:5])}…): "
            "download it again, or use a devkit with these classes only"
        )
    return [Unit(split="train", stem=wnid, source=tars[wnid], crop=crop) for wnid in sorted(tars)]


def _scan(archives: Storage, archive: str, nbytes: int) -> list[Member]:
    """The images of a flat archive, sorted by file name (which is the order of the ground truth)."""
    with archives.reading(archive) as stream:
        members = sorted(walk(stream, archive, 0, nbytes), key=lambda m: m.name)
    if not members:
        raise ValueError(f"{archive} holds no images: download it again")
    for one, other in itertools.pairwise(members):
        if one.name == other.name:
            raise ValueError(f"{archive} holds {one.name!r} twice: download it again")
    return members


# -- command line -------------------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    arguments = tyro.cli(Arguments, args=argv, prog="python -m data_prep.ilsvrc", description=__doc__)
    return command(lambda: prepare(arguments))


if __name__ == "__main__":
    # By its importable name: what Ray sends to other processes must not live in __main__.
    from data_prep.ilsvrc import main as importable_main

    sys.exit(importable_main())
