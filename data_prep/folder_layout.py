"""Which images a folder holds: their split, class and order, from their names alone.

Either ``train/<class>/**`` with ``val/<class>/**`` (without val, some of train is set aside), or ``<class>/**``, some
of which is set aside; and ``test/**``, without labels, beside train. Everything drawn is a digest of the seed and an
image's relative name: it depends neither on the machine nor on the order of a listing, and an image that comes or goes
moves hardly any other.
"""

from __future__ import annotations

import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import PurePosixPath

from data_prep.images import MAX_IMAGE_BYTES
from data_prep.preparation import answered
from data_prep.sources import File
from orchestrator.data.shard_writer import path_key
from orchestrator.data.shards import PASSED_OVER, UNLABELLED, ClassInfo, OddImage
from orchestrator.storage import FileStat, Storage, sha256_hex

EXTENSIONS = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".gif", ".bmp", ".webp", ".tif", ".tiff")
SPLITS = ("train", "val", "test")
_MEANT = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}
_MAX_NAMED = 5  # in an error, which is one line


@dataclass(frozen=True)
class Layout:
    """``splits``: the images of train, val and perhaps test, in the order of the data set.

    ``passed_over``: files that are no images of it. ``notes``: what the user should know of it. ``sets_aside``: val was
    drawn from train. ``modified``: when the file of each image was, in ns since 1970; 0 where its store does not tell.
    """

    classes: tuple[ClassInfo, ...]
    splits: Mapping[str, Sequence[File]]
    passed_over: tuple[OddImage, ...]
    notes: tuple[str, ...]
    sets_aside: bool
    modified: Mapping[str, int]

    @property
    def content(self) -> dict[str, object]:
        """What the folder holds, in short: number of images, their size, and a digest of all names and sizes."""
        files = sorted(file for files in self.splits.values() for file in files)
        lines = [f"{file.nbytes} {file.name}\0" for file in files] + [f"{o.name} {o.done}\0" for o in self.passed_over]
        digest = sha256_hex("".join(lines).encode())[:16]
        return {"images": len(files), "nbytes": sum(file.nbytes for file in files), "sha256": digest}


@dataclass
class _Tree:
    """One folder of class folders: the images of each class (name, size in bytes), and what lies about."""

    prefix: str  # "train/", "val/" or ""
    classes: dict[str, list[tuple[str, int]]] = field(default_factory=lambda: defaultdict(list))
    stray: list[str] = field(default_factory=list)  # images that lie in no class folder
    empty: list[str] = field(default_factory=list)  # class folders without images


def read_layout(folder: Storage, *, val_fraction: float | None, seed: int) -> Layout:
    """Raises ValueError, saying what to do, where ``folder`` has neither layout or contradicts itself."""
    listing: dict[str, FileStat] = answered(folder, "listed", folder.listing)
    # An object store may hold an empty object in the place of a folder.
    sizes = {name: found.nbytes for name, found in listing.items() if name and not name.endswith("/")}
    if not sizes:
        raise ValueError(
            f"no files in {folder.url!r}: give a folder with train/<class>/ and val/<class>/, or one folder a class"
        )
    bad = [name for name in sizes if not _is_utf8(name)]
    if bad:
        raise ValueError(
            f"file names that are not UTF-8: {len(bad)}, such as {bad[0]!a}: rename them (convmv -f latin1 -t utf8 -r)"
        )
    top = {name.split("/")[0] for name in sizes if "/" in name}
    splits = _split_folders(folder, top, sizes)

    # -- what there is --------------------------------------------------------------------------------------------
    passed_over: list[OddImage] = []
    trees = {split: _Tree(f"{split}/") for split in splits if split != "test"} or {"train": _Tree("")}
    test: list[tuple[str, int]] = []
    outside: Counter[str] = Counter()
    for name, nbytes in sizes.items():
        first, _, rest = name.partition("/")
        split = first if first in splits and rest else ""
        if splits and rest and not split:
            outside[first] += 1
            continue
        reason = _no_image(name, nbytes)
        if reason:
            passed_over.append(OddImage(split, name, PASSED_OVER, reason))
        elif split == "test":
            test.append((name, nbytes))
        elif splits and not split:
            passed_over.append(OddImage("", name, PASSED_OVER, "lies outside train/, val/ and test/"))
        else:
            tree = trees[split or "train"]
            class_name, _, inside = name.removeprefix(tree.prefix).partition("/")
            if inside:
                tree.classes[class_name].append((name, nbytes))
            else:
                tree.stray.append(name)
    passed_over += [
        OddImage("", f"{name}/", PASSED_OVER, f"lies outside train/, val/ and test/ (files: {number:,})")
        for name, number in sorted(outside.items())
    ]
    for tree in trees.values():
        # What is empty shows in a listing of folders only, and in an object store nowhere.
        paths = answered(folder, "listed", partial(folder.folders, tree.prefix or "."))
        there = {PurePosixPath(path).name for path in paths}
        tree.empty = sorted(n for n in there - tree.classes.keys() if not n.startswith("."))
    _check_classes(folder, trees)

    # -- who goes where -------------------------------------------------------------------------------------------
    notes: list[str] = []
    train = trees["train"].classes
    names = sorted(train)
    if "val" in trees:
        if val_fraction is not None:
            raise ValueError(
                f"--val-fraction sets images aside for validation, but {folder.url!r} has val/: leave it out"
            )
        val = {name: trees["val"].classes.get(name, []) for name in names}
    else:
        train, val = _set_aside(train, 0.1 if val_fraction is None else val_fraction, seed)
        num_val, num_all = (sum(len(files) for c in sets for files in c.values()) for sets in ([val], [train, val]))
        if not num_val:
            raise ValueError("no class has two images, so none can be set aside for validation: add images")
        notes.append(
            f"no val/: {num_val:,} of {num_all:,} images of train are set aside for validation (--val-fraction)"
        )
    without = [name for name in names if not val[name]]
    if without:
        notes.append(f"warning: classes without a validation image: {len(without)} of {len(names)} ({_some(without)})")
    labels = {name: label for label, name in enumerate(names)}
    found: dict[str, list[tuple[str, int, int]]] = {
        "train": [(*file, labels[name]) for name in names for file in train[name]],
        "val": [(*file, labels[name]) for name in names for file in val[name]],
    }
    if test:
        found["test"] = [(*file, UNLABELLED) for file in test]
        notes.append("test/ is taken without labels, whatever its folders")
    files = {split: _files(images) for split, images in found.items()}
    for split in ("train", "val"):
        # Classes are mixed in every shard: training may go through a set shard by shard.
        files[split].sort(key=lambda file: _draw(seed, "order", file.name))
    return Layout(
        classes=tuple(ClassInfo(label, name) for name, label in labels.items()),
        splits=files,
        passed_over=tuple(passed_over),
        notes=tuple(notes),
        sets_aside="val" not in trees,
        modified={file.name: listing[file.name].modified_ns for some in files.values() for file in some},
    )


def _split_folders(folder: Storage, top: set[str], sizes: Iterable[str]) -> list[str]:
    """Which of train, val, test ``folder`` holds as splits; none where its folders are classes."""
    meant = {_MEANT.get(name.lower(), "") for name in top}
    wrong = sorted(name for name in top if _MEANT.get(name.lower(), name) != name)
    if wrong and len(meant - {""}) > 1:
        renames = ", ".join(f"{name}/ to {_MEANT[name.lower()]}/" for name in wrong)
        raise ValueError(
            f"{folder.url!r} must hold train/, val/ and test/ under these names: rename {renames} (or otherwise, if "
            "these are classes)"
        )
    if "val" in top and "train" not in top:
        raise ValueError(f"{folder.url!r} has val/ but no train/: add train/<class>/, or rename val/ if it is a class")
    nested = any(name.startswith("train/") and name.count("/") > 1 for name in sizes)
    if "train" in top and ("val" in top or nested or top <= set(SPLITS)):
        return [split for split in SPLITS if split in top]
    if "test" in top:
        raise ValueError(
            f"{folder.url!r} has test/ beside class folders: is it a class (rename it) or the test set (move the "
            "classes into train/)?"
        )
    return []


def _no_image(name: str, nbytes: int) -> str:
    """Why a file is passed over by its name and size, or ""."""
    extension = PurePosixPath(name).suffix
    if extension.lower() not in EXTENSIONS:
        return f"{extension} is no extension of an image that is read" if extension else "no extension of an image"
    return f"{nbytes} bytes, more than {MAX_IMAGE_BYTES >> 20} MiB" if nbytes > MAX_IMAGE_BYTES else ""


def _check_classes(folder: Storage, trees: Mapping[str, _Tree]) -> None:
    for tree in trees.values():
        if tree.stray:
            where = f"{folder.url}/{tree.prefix}".rstrip("/")
            raise ValueError(
                f"images directly in {where!r}, in no class folder: {len(tree.stray)} ({_some(tree.stray)}): move "
                "them into the folders of their classes, or away"
            )
    train = trees["train"]
    if not train.classes:
        raise ValueError(
            f"no class folders with images in {folder.url}/{train.prefix}: an image's class is the folder it lies in, "
            f"and images end in {', '.join(EXTENSIONS)}"
        )
    if train.empty:
        raise ValueError(
            f"class folders without images in {folder.url}/{train.prefix}: {len(train.empty)} ({_some(train.empty)}): "
            "fill them, or remove them"
        )
    both = {name for tree in trees.values() for name in tree.classes}
    alike: dict[str, list[str]] = defaultdict(list)
    for name in sorted(both):
        alike[unicodedata.normalize("NFC", name).casefold()].append(name)
    for same in alike.values():
        if len(same) > 1:
            raise ValueError(
                f"class folders {same[0]!a} and {same[1]!a} differ only in upper and lower case or in the "
                "coding of accents: merge them, or rename one"
            )
    if "val" in trees:
        unknown = sorted(trees["val"].classes.keys() - train.classes.keys())
        if unknown:
            raise ValueError(
                f"classes of val/ that train/ lacks: {len(unknown)} ({_some(unknown)}): add them to train/, or remove "
                "them from val/"
            )
        if not trees["val"].classes:
            raise ValueError(f"val/ of {folder.url!r} holds no images in class folders: fill it, or remove it")
    if len(train.classes) == 1:
        (only,) = train.classes
        raise ValueError(
            f"{folder.url}/{train.prefix} holds a single class ({only}), so there is nothing to tell apart: add "
            f"classes, or is {folder.url}/{train.prefix}{only} the folder that was meant?"
        )


def _set_aside(
    classes: Mapping[str, list[tuple[str, int]]], fraction: float, seed: int
) -> tuple[dict[str, list[tuple[str, int]]], dict[str, list[tuple[str, int]]]]:
    """Train and val, by class: at least one image of either where a class has two."""
    if not 0 < fraction < 1:
        raise ValueError(f"--val-fraction is a fraction between 0 and 1, not {fraction}")
    train, val = {}, {}
    for name, files in classes.items():
        number = min(len(files) - 1, max(1, round(fraction * len(files))))
        drawn = sorted(files, key=lambda file: _draw(seed, "split", file[0]))
        val[name], train[name] = drawn[:number], drawn[number:]
    return train, val


def _files(images: Iterable[tuple[str, int, int]]) -> list[File]:
    """From name, size in bytes and label; sorted by name, with keys that differ."""
    images = sorted(images)
    keys = Counter(path_key(name) for name, _, _ in images)
    return [
        File(name, nbytes, path_key(name, distinct=keys[path_key(name)] > 1), label) for name, nbytes, label in images
    ]


def _draw(seed: int, purpose: str, name: str) -> str:
    return sha256_hex(f"{seed} {purpose} {name}".encode())


def _is_utf8(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _some(names: Sequence[str]) -> str:
    some = ", ".join(ascii(n)[1:-1] if not n.isprintable() else n for n in names[:_MAX_NAMED])
    return some + (", …" if len(names) > _MAX_NAMED else "")
