"""A folder of images → a data set in shards.

    python -m data_prep.image_folder /data/photos --out /data/photos_shards

FOLDER is a folder, or the URL of one in an object store, with train/<class>/ and val/<class>/ (and test/, without
labels), or with one folder a class, of which every tenth image is set aside for validation. Classes are named by their
folders, and labelled in the order of the sorted names; folders inside a class folder belong to it. Images are kept byte
by byte, but for those that the training pipeline cannot read and those that --max-side makes smaller. Killed at any
moment, the same command goes on where it was, and ends with the same bytes. Exit code: 0 finished, 1 storage failed
(the same command goes on later), 2 something to mend first (the message says what), 130 interrupted; nothing is
published unless it is 0.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Annotated

import numpy as np
import tyro

from data_prep.folder_layout import Layout, read_layout
from data_prep.parts import Unit, assemble, clean_up
from data_prep.preparation import Preparation, Report, check_folder, check_options, command
from data_prep.sources import Files
from orchestrator.data.shards import UNDECODABLE, DataSet, Manifest, Source
from orchestrator.storage import Storage

_MAX_LISTED = 1000  # odd files of a kind and split in the manifest: every worker reads it


@dataclass(frozen=True)
class Arguments:
    """Prepare a folder of images."""

    folder: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER")]
    """Folder or fsspec URL that holds train/ and val/, or one folder a class."""
    out: str
    """Folder or fsspec URL for the data set; new, empty, or of an interrupted preparation; not inside FOLDER."""
    name: str | None = None
    """Name of the data set, for people. Left out: FOLDER's."""
    max_side: int | None = None
    """Pixels: images whose longer side is larger are made smaller and re-encoded (JPEG, quality 95)."""
    val_fraction: float | None = None
    """Part of each class that is set aside for validation where there is no val/. Left out: 0.1."""
    seed: int = 0
    """Draws what is set aside, and the order of the images."""
    images_per_shard: int = 1000
    """Images in one shard, at most; none grows far beyond 256 MiB."""
    crop: int = 224
    """Side of the mean image in pixels."""
    num_tasks: int | None = None
    """Ray tasks at once; 0 or 1: in this process. Left out: as many as there are CPUs, or 0 for less than 256 MiB."""
    ray_address: str | None = None
    """Ray cluster to use. Left out: RAY_ADDRESS, else one started on this machine."""
    max_undecodable: float = 0.001
    """Fraction of a split that may be undecodable; one image may always be, unless this is 0."""


def prepare(arguments: Arguments) -> Report:
    """Prepare the data set, or find it finished. Raises ValueError, saying what to do, and OSError."""
    check_options(crop=arguments.crop, max_undecodable=arguments.max_undecodable)
    if arguments.images_per_shard < 1 or (arguments.max_side is not None and arguments.max_side < 1):
        raise ValueError("--images-per-shard and --max-side (pixels) are at least 1")

    # -- what there is --------------------------------------------------------------------------------------------
    folder, out = Storage(arguments.folder), Storage(arguments.out)
    check_folder(folder, "FOLDER")
    _check_apart(folder, out)
    layout = read_layout(folder, val_fraction=arguments.val_fraction, seed=arguments.seed)
    content = layout.content
    source = Source(PurePosixPath(folder.url).name, sum(f.nbytes for files in layout.splits.values() for f in files))
    name = arguments.name if arguments.name is not None else source.name
    fraction = 0.1 if arguments.val_fraction is None else arguments.val_fraction
    options = {
        "content": content,
        "max_side": arguments.max_side,
        "val_fraction": fraction if layout.sets_aside else None,
        "seed": arguments.seed,
        "images_per_shard": arguments.images_per_shard,
    }
    identity = {
        **options,
        "name": name,
        "crop": arguments.crop,
        "sources": [{"name": source.name, "nbytes": source.nbytes}],
    }
    preparation = Preparation(
        folder,
        out,
        identity,
        layout.modified,
        num_tasks=arguments.num_tasks,
        ray_address=arguments.ray_address,
    )

    def do() -> Report:
        units = [
            replace(unit, version=preparation.version([file.name for file in files.files]))
            for unit, files in plan(layout, arguments)
        ]
        preparation.work(units, needed_bytes=_needed_bytes(layout, arguments.max_side))
        notes: list[str] = []
        manifest = assemble(
            out,
            units,
            name=name,
            classes=layout.classes,
            sources=[source],
            crop=arguments.crop,
            max_undecodable=arguments.max_undecodable,
            options=options,
            passed_over=layout.passed_over,
            max_listed=_MAX_LISTED,
            claim=preparation.claim,
            notes=notes,
        )
        clean_up(out, manifest.splits)
        return preparation.report(manifest, notes=notes)

    report = preparation.carry_out(do)
    return replace(report, notes=(*layout.notes, *_bare_classes(out, report.manifest), *report.notes))


def plan(layout: Layout, arguments: Arguments) -> list[tuple[Unit, Files]]:
    """The units of train, val and test and their files, in the order of the data set, whatever works on them.

    The names of their shards hold a digest of all that decides over the bytes: those of another choice have others.
    """
    units = []
    for split, files in layout.splits.items():
        for number, first in enumerate(range(0, len(files), arguments.images_per_shard)):
            source = Files(tuple(files[first : first + arguments.images_per_shard]))
            unit = Unit(
                split=split,
                stem=f"{split}-{number:05d}",
                source=source,
                crop=arguments.crop if split == "train" else 0,
                keep_undecodable=split != "train",
                max_side=arguments.max_side,
                remarks=True,
            )
            units.append((replace(unit, stem=f"{unit.stem}-{unit.key[:8]}"), source))
    return units


def _check_apart(folder: Storage, out: Storage) -> None:
    """Raises ValueError where one lies inside the other, whatever links lead there."""
    inner, outer = (f"{Path(place.url).resolve() if place.is_local else place.url}/" for place in (out, folder))
    if inner.startswith(outer):
        raise ValueError(
            f"--out {out.url!r} lies inside {folder.url!r}, whose images it would join: give another --out"
        )
    if outer.startswith(inner):
        raise ValueError(
            f"FOLDER {folder.url!r} lies inside --out {out.url!r}, whose files it would join: give another --out"
        )


def _needed_bytes(layout: Layout, max_side: int | None) -> int:
    """Space for the data set. A JPEG of quality 95 takes less than a byte a pixel, or thereabouts."""
    most_bytes = sys.maxsize if max_side is None else max_side**2
    return int(1.1 * sum(min(file.nbytes, most_bytes) for files in layout.splits.values() for file in files))


def _bare_classes(out: Storage, manifest: Manifest) -> list[str]:
    """A warning where all training images of a class were left out."""
    if not any(o.split == "train" and o.what == UNDECODABLE for o in manifest.odd):
        return []
    counts = np.bincount(DataSet(out).split("train").label, minlength=len(manifest.classes))
    bare = [c.wnid for c in manifest.classes if not counts[c.label]]
    return [f"warning: no training image of {', '.join(bare)} can be decoded"] if bare else []


# -- command line -------------------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    arguments = tyro.cli(Arguments, args=argv, prog="python -m data_prep.image_folder", description=__doc__)
    return command(lambda: prepare(arguments))


if __name__ == "__main__":
    # By its importable name: what Ray sends to other processes must not live in __main__.
    from data_prep.image_folder import main as importable_main

    sys.exit(importable_main())
