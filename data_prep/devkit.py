"""ILSVRC2012's development kit (tasks 1 and 2): the classes, and the labels of the validation set."""

from __future__ import annotations

import gzip
import io
import re
import tarfile
import zlib
from dataclasses import dataclass
from pathlib import PurePosixPath

from orchestrator.data.shards import ClassInfo
from orchestrator.storage import Storage

_MAX_DEVKIT_BYTES = 64 << 20


@dataclass(frozen=True)
class Devkit:
    """What the development kit says. ``labels``: ILSVRC2012_ID → label of the classes that are leaves."""

    classes: tuple[ClassInfo, ...]
    labels: dict[int, int]
    ground_truth: tuple[int, ...]  # ILSVRC2012_ID of the images of val, in file-name order
    num_train_images: int | None  # as meta.mat counts them


def read_devkit(archives: Storage, name: str) -> Devkit:
    """Classes and ground truth. Raises ValueError where the devkit cannot be read or contradicts itself."""
    if archives.size_bytes(name) > _MAX_DEVKIT_BYTES:
        raise ValueError(f"{name} is too large to be the devkit: download it again")
    files: dict[str, bytes] = {}
    try:
        with tarfile.open(fileobj=io.BytesIO(archives.read(name)), mode="r:gz") as tar:
            for member in tar:
                base = PurePosixPath(member.name).name
                if base in ("meta.mat", "ILSVRC2012_validation_ground_truth.txt") and member.isreg():
                    if member.size > _MAX_DEVKIT_BYTES:
                        raise ValueError(f"{name}: {base} is too large: download it again")
                    stream = tar.extractfile(member)
                    assert stream is not None
                    files[base] = stream.read()
    except (tarfile.TarError, gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{name} cannot be unpacked ({error}): download it again") from None
    for base in ("meta.mat", "ILSVRC2012_validation_ground_truth.txt"):
        if base not in files:
            raise ValueError(f"{name} has no data/{base}: it is not the devkit of tasks 1 and 2: download that")
    classes, num_train_images = _classes(files["meta.mat"])
    labels = {c.ilsvrc_id: c.label for c in classes if c.ilsvrc_id is not None}
    truth = files["ILSVRC2012_validation_ground_truth.txt"].split()
    try:
        ground_truth = tuple(int(line) for line in truth)
    except ValueError:
        raise ValueError(f"{name}: the validation ground truth is not a list of numbers: download it again") from None
    unknown = sorted(set(ground_truth) - set(labels))
    if unknown:
        raise ValueError(
            f"{name}: the validation ground truth has the ILSVRC2012_ID {unknown[0]}, which is no leaf class of "
            "meta.mat: download the devkit again"
        )
    return Devkit(classes, labels, ground_truth, num_train_images)


def _classes(meta_mat: bytes) -> tuple[tuple[ClassInfo, ...], int | None]:
    """The leaf classes in the order of their wnids, and the number of training images if meta.mat counts them."""
    from scipy.io import loadmat

    try:
        synsets = loadmat(io.BytesIO(meta_mat), squeeze_me=True)["synsets"].reshape(-1)
        # The original also holds the inner synsets of the hierarchy, under the IDs 1001 to 1860.
        leaves = [s for s in synsets if int(s["num_children"]) == 0]
        found = sorted((str(s["WNID"]), int(s["ILSVRC2012_ID"]), str(s["words"])) for s in leaves)
        counted = "num_train_images" in synsets.dtype.names
        num_train_images = sum(int(s["num_train_images"]) for s in leaves) if counted else None
    except Exception as error:  # loadmat meets a damaged file with nearly any exception
        raise ValueError(
            f"meta.mat of the devkit cannot be read ({type(error).__name__}: {error}): download it again"
        ) from None
    wnids, ids = [wnid for wnid, _, _ in found], [ilsvrc_id for _, ilsvrc_id, _ in found]
    if not found or len(set(wnids)) < len(wnids) or len(set(ids)) < len(ids):
        raise ValueError("meta.mat of the devkit has no leaf classes or has one twice: download it again")
    bad = [wnid for wnid in wnids if not re.fullmatch(r"n\d{8}", wnid)]
    if bad:
        raise ValueError(f"meta.mat of the devkit has the wnid {bad[0]!r}, which is none: download it again")
    return tuple(ClassInfo(label, *fields) for label, fields in enumerate(found)), num_train_images
