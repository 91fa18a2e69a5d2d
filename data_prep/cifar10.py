"""CIFAR-10's archive → a data set whose images are kept as they are, pixel by pixel.

    python -m data_prep.cifar10 /data/cifar-10-binary.tar.gz --out /data/cifar10

SOURCE is cifar-10-binary.tar.gz or cifar-10-python.tar.gz (or one of them as a .tar), or the folder of the files that
such an archive holds; on disks or in an object store. 45,000 of the training images train and 5,000 validate, as in
section 4.2 of the paper. Killed at any moment, the same command goes on, and ends with the same bytes. Exit code: 0
finished, 1 storage failed (the same command goes on later), 2 something to mend first (the message says what), 130
interrupted; nothing is published unless it is 0.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated

import numpy as np
import tyro

from data_prep.cifar_source import CLASSES, IMAGE_BYTES, OFFICIAL, SIDE, CifarSource, Content, Images
from data_prep.overview import images_twice
from data_prep.parts import STATISTICS, check_claim, clean_up, publish_manifest
from data_prep.preparation import Preparation, Report, command, modified_ns
from data_prep.shard_check import DIGEST_BYTES
from data_prep.statistics import PixelSums, statistics_bytes
from orchestrator.data.sampling import mix64, permute
from orchestrator.data.shard_writer import write_index, write_planes
from orchestrator.data.shards import ClassInfo, DataSet, Encoding, Manifest, SplitInfo
from orchestrator.storage import Storage, sha256_hex


@dataclass(frozen=True)
class Arguments:
    """Prepare CIFAR-10."""

    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE")]
    """Archive, or folder of its files; a path or an fsspec URL."""
    out: str
    """Folder or fsspec URL for the data set; new, empty, or of an interrupted preparation."""
    validation: int = 5000
    """Training images that are set aside for validation. 0: all of them train, and the test set stands in for it."""
    seed: int = 0
    """Draws what is set aside."""
    last_as_test: int = 0
    """For a part of the archive without test_batch: so many of the training images, the last ones, are the test set."""


def prepare(arguments: Arguments) -> Report:
    """Prepare the data set, or find it finished. Raises ValueError, saying what to do, and OSError."""
    if arguments.validation < 0 or arguments.last_as_test < 0 or not 0 <= arguments.seed < 2**63:
        raise ValueError("--validation and --last-as-test are numbers of images, --seed is from 0 to 2**63 - 1")
    source, out = CifarSource(arguments.source), Storage(arguments.out)
    options = {"validation": arguments.validation, "seed": arguments.seed, "last_as_test": arguments.last_as_test}
    identity = {
        **options,
        "name": "cifar10",
        "crop": SIDE,
        "sources": [{"name": name, "nbytes": nbytes} for name, nbytes in source.files.items()],
    }
    preparation = Preparation(source.storage, out, identity, modified_ns(source.storage, source.files))

    def do() -> Report:
        content = source.read()
        splits = divide(content, arguments)  # refused before anything is claimed
        preparation.work([], needed_bytes=int(1.1 * sum(len(split) for split in splits.values()) * IMAGE_BYTES))
        infos = {}
        for name, split in splits.items():
            check_claim(out, preparation.claim)
            infos[name] = _write_split(out, name, split)
        infos.setdefault("val", infos["test"])
        sums = PixelSums(SIDE)
        for image in splits["train"].images:
            sums.add(image.transpose(1, 2, 0))
        statistics = statistics_bytes(sums)
        out.publish(STATISTICS, statistics)
        manifest = Manifest(
            name="cifar10",
            classes=tuple(ClassInfo(label, name, words=name) for label, name in enumerate(CLASSES)),
            splits=infos,
            statistics=STATISTICS,
            statistics_sha256=sha256_hex(statistics),
            statistics_crop=SIDE,
            sources=content.sources,
            options=options,
            encoding=Encoding.PLANES,
        )
        check_claim(out, preparation.claim)
        manifest = publish_manifest(out, manifest)
        notes = [*content.notes, *_twice(out, splits)]
        clean_up(out, manifest.splits)
        return preparation.report(manifest, notes=notes)

    report = preparation.carry_out(do)
    return replace(report, notes=(*_remarks(report.manifest, source.archive), *report.notes))


def divide(content: Content, arguments: Arguments) -> dict[str, Images]:
    """Training and test set and, unless the test set stands in for it, the validation set, each in file order.

    What validates: images π(0) to π(validation - 1) of all n that could train, in the order of the files, π being
    ``permute`` under the key ``mix64(seed)``. Raises ValueError where the numbers do not add up, or where no training
    image of a class is left.
    """
    train, test = content.train, content.test
    if test is not None and arguments.last_as_test:
        raise ValueError("--last-as-test is for a part of the archive without test_batch, which is there: leave it out")
    if test is None:
        kept = len(train) - arguments.last_as_test
        if not arguments.last_as_test:
            raise ValueError(
                "there is no test_batch: add it or, of a part of the archive, make the last N training images the test "
                "set with --last-as-test N"
            )
        if kept < 1:
            raise ValueError(
                f"--last-as-test {arguments.last_as_test} leaves none of {len(train)} images to train on: give less"
            )
        train, test = train.some(np.arange(kept)), train.some(np.arange(kept, len(train)))
    splits = {"train": train, "test": test}
    if arguments.validation:
        if arguments.validation >= len(train):
            raise ValueError(
                f"--validation {arguments.validation} leaves none of {len(train)} images to train on: give less, or 0 "
                "to train on all of them"
            )
        key = np.repeat(mix64(np.array([arguments.seed], np.uint64)), arguments.validation)
        aside = np.zeros(len(train), bool)
        aside[permute(key, np.arange(arguments.validation), len(train))] = True
        splits = {
            "train": train.some(np.flatnonzero(~aside)),
            "val": train.some(np.flatnonzero(aside)),
            "test": test,
        }
    counts = np.bincount(splits["train"].labels, minlength=len(CLASSES))
    absent = [name for name, count in zip(CLASSES, counts, strict=True) if not count]
    if absent:
        raise ValueError(
            f"no training image is left of {', '.join(absent)}: add files of the archive, or set less aside with "
            "--validation and --last-as-test"
        )
    return splits


def _write_split(out: Storage, name: str, split: Images) -> SplitInfo:
    shard, first = write_planes(out, f"{name}/000.safetensors", split.images)
    count = len(split)
    columns: dict[str, Sequence[str] | np.ndarray] = {
        "shard": np.zeros(count, np.int32),
        "offset": first + IMAGE_BYTES * np.arange(count, dtype=np.int64),
        "nbytes": np.full(count, IMAGE_BYTES, np.int32),
        "width": np.full(count, SIDE, np.int32),
        "height": np.full(count, SIDE, np.int32),
        "label": split.labels.astype(np.int32),
        "decodable": np.ones(count, np.uint8),
        "name": split.names,
    }
    return SplitInfo(count, f"{name}.arrow", write_index(out, f"{name}.arrow", columns), (shard,))


def _twice(out: Storage, splits: dict[str, Images]) -> list[str]:
    """Warnings of images that are there twice."""
    data_set = DataSet(out)
    digests = {
        name: np.array([hashlib.blake2b(image, digest_size=DIGEST_BYTES).digest() for image in split.images], "S16")
        for name, split in splits.items()
    }
    return [f"warning: {line}" for line in images_twice({name: data_set.split(name) for name in splits}, digests)]


def _remarks(manifest: Manifest, archive: str | None) -> list[str]:
    """What is to be known of a finished data set, told every time."""
    notes = []
    for source in manifest.sources:
        if archive and not source.official:
            notes.append(
                f"warning: {source.name} is not as cs.toronto.edu gives it: its MD5 is {source.md5}, not "
                f"{' or '.join(OFFICIAL.values())}"
            )
    if manifest.splits["val"] == manifest.splits["test"]:
        notes.append(
            "note: val is the test set itself: nothing may be chosen by it, neither a checkpoint nor a learning rate"
        )
    return notes


# -- command line -------------------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    arguments = tyro.cli(Arguments, args=argv, prog="python -m data_prep.cifar10", description=__doc__)
    return command(lambda: prepare(arguments))


if __name__ == "__main__":
    sys.exit(main())
