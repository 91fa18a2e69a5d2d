"""The classification file of ILSVRC, or Kaggle's form of it: written from a score file; with where it came from.

From Python, the same call as often as one likes::

    written = submission.write(scores.load(url), Storage(folder), "submission.txt", data=DataSet(…), code_version=…)
    written.sha256, written.notes

leaves ``submission.txt`` and, beside it, ``submission.txt.lineage.json`` (``lineage``). The same input gives the same
bytes. Images come in file-name order, classes most confident first:

=========== ==========================================================================================================
``ilsvrc``  one line an image: five ILSVRC2012_IDs with spaces between them
``kaggle``  ``ImageId,PredictionString``, then one line an image: its file name without extension, and five times the
            WordNet id and a box, which is the whole image: only the class is known
=========== ==========================================================================================================

Of fewer than five classes all are given. An image that cannot be decoded gets the five most frequent classes: its
scores are the class prior.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import PurePosixPath

import numpy as np

from orchestrator.data.shards import ClassInfo, DataSet
from orchestrator.evaluation import ranking
from orchestrator.evaluation.lineage import lineage_of
from orchestrator.evaluation.scores import Scores, chunks
from orchestrator.storage import Storage, sha256_hex

TOP = 5  # classes an image
HEADER = "ImageId,PredictionString"
LINEAGE = ".lineage.json"
_OFFICIAL = {"ILSVRC2012_test": 100_000, "ILSVRC2012_val": 50_000}  # images, by how their names begin
_NUMBERED = re.compile(r"(?P<set>.*_)(?P<number>\d{8})\.\w+")
_NOT_IN_CSV = set(',"\r\n')
_WNID = re.compile(r"n\d{8}")


class Format(Enum):
    """Of the file."""

    ILSVRC = "ilsvrc"  # as the test server of 2012 to 2017 took it
    KAGGLE = "kaggle"  # of Kaggle's ImageNet Object Localization Challenge


@dataclass(frozen=True)
class Written:
    """What was written. notes: what a reader should know, a sentence each."""

    name: str
    nbytes: int
    sha256: str
    num_images: int
    notes: tuple[str, ...]


def write(
    scores: Scores,
    out: Storage,
    name: str,
    *,
    form: Format = Format.ILSVRC,
    data: DataSet | None = None,
    num_images: int = 0,
    code_version: str,
) -> Written:
    """Publish the file and its lineage. ``data``: what the images and classes are compared with; num_images: how many
    there must be, 0: any number. Raises ValueError, with the difference, where they do not fit or the classes have no
    names that the format needs; OSError where storage fails. Nothing is left then.
    """
    tokens_of(scores.info.classes, form)  # or refuse
    known = scores.names.to_pylist()
    order = np.array(sorted(range(len(known)), key=known.__getitem__), np.int64)
    names = [known[i] for i in order.tolist()]
    notes = _check_images(scores, names, num_images)
    if form is Format.KAGGLE:
        _check_ids(scores, names)
    if data is not None:
        _check_data(scores, data)
    text = "".join(f"{line}\n" for line in _lines(scores, order, form)).encode()
    written = Written(name, len(text), sha256_hex(text), len(names), tuple(notes))
    plain = lineage_of(scores, written.name, written.nbytes, written.sha256, form.value, code_version)
    out.publish(name + LINEAGE, (json.dumps(plain, indent=1, sort_keys=True) + "\n").encode())
    out.publish(name, text)
    return written


def tokens_of(classes: Sequence[ClassInfo], form: Format) -> list[str]:
    """What names each class in a file, by label. Raises ValueError where a class has no such name."""
    if form is Format.ILSVRC:
        without = [c for c in classes if c.ilsvrc_id is None]
        what, hint = "ILSVRC2012_ID", "only a set of ILSVRC's archives (data_prep.ilsvrc) has them"
    else:
        without = [c for c in classes if not _WNID.fullmatch(c.wnid)]
        what, hint = "WordNet id", "only classes named like n01440764 can be submitted"
    if without:
        first = without[0]
        raise ValueError(
            f"the class map does not fit a submission: {len(without)} of {len(classes)} classes have no {what}, first "
            f"of them class {first.label} ({first.wnid}): {hint}"
        )
    return [str(c.ilsvrc_id) if form is Format.ILSVRC else c.wnid for c in classes]


def _lines(scores: Scores, order: np.ndarray, form: Format) -> Iterator[str]:
    """Without line ends. order: [N], rows of the file's lines."""
    tokens = tokens_of(scores.info.classes, form)
    if form is Format.KAGGLE:
        yield HEADER
    for some in chunks(len(order), scores.num_classes):
        rows = order[some]
        for row, labels in zip(rows.tolist(), ranking.top(scores.scores[rows], TOP).tolist(), strict=True):
            if form is Format.ILSVRC:
                yield " ".join(tokens[label] for label in labels)
            else:
                # Of an image without pixels the size is not known.
                box = f"0 0 {max(1, scores.width[row])} {max(1, scores.height[row])}"
                image = image_id(scores.names[row].as_py())
                yield f"{image},{' '.join(f'{tokens[label]} {box}' for label in labels)}"


def image_id(name: str) -> str:
    """Kaggle's ImageId of a file name."""
    return PurePosixPath(name).stem


# -- do images and classes fit ----------------------------------------------------------------------------------


def _check_images(scores: Scores, names: Sequence[str], num_images: int) -> list[str]:
    """Notes. names: sorted. Raises ValueError for missing images."""
    if twice := next((a for a, b in itertools.pairwise(names) if a == b), ""):
        raise ValueError(f"the score file {scores.url} has two images of the name {twice}: no line could be told")
    if missing := missing_numbers(names):
        raise ValueError(
            f"images are missing in {scores.url}: {listed(missing)}: every line after the first of them would be "
            "another image's; prepare the data set again, from the whole archive"
        )
    if num_images and len(names) != num_images:
        raise ValueError(
            f"{scores.url} has {len(names)} images where {num_images} are expected: score the whole split, or give "
            "another --images"
        )
    notes = []
    for begin, official in _OFFICIAL.items():
        if names and names[0].startswith(begin) and len(names) != official:
            notes.append(f"{len(names)} images, where the whole of {begin} has {official}: no server takes such a file")
    if undecodable := int((~scores.decoded).sum()):
        notes.append(f"{undecodable} images could not be decoded: their lines are the most frequent classes")
    return notes


def _check_ids(scores: Scores, names: Sequence[str]) -> None:
    """Raises ValueError where Kaggle's form cannot tell the images apart, or not hold their names."""
    seen = dict[str, str]()
    for name in names:
        image = image_id(name)
        if (other := seen.setdefault(image, name)) != name:
            raise ValueError(
                f"{scores.url} has the images {other} and {name}, which are both {image} in Kaggle's form: name them "
                "apart and prepare the data set again, or write ILSVRC's form"
            )
        if not image.isascii() or _NOT_IN_CSV & set(image):
            raise ValueError(
                f"{scores.url} has the image {name!r}, whose name Kaggle's form cannot hold: it takes ASCII without "
                "commas, quotes and line ends; rename it and prepare the data set again, or write ILSVRC's form"
            )


def missing_numbers(names: Sequence[str]) -> list[str]:
    """Names that a set of images numbered from 1 on lacks, where all are named like ILSVRC2012_test_00000001.JPEG."""
    found = [_NUMBERED.fullmatch(name) for name in names]
    parts = [(match["set"], int(match["number"])) for match in found if match]
    if not parts or len(parts) < len(names) or len({each for each, _ in parts}) > 1:
        return []
    numbers = {number for _, number in parts}
    return [f"{parts[0][0]}{number:08d}" for number in range(1, max(numbers) + 1) if number not in numbers]


def listed(names: Sequence[str]) -> str:
    """The first of them, and how many more there are."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _class(info: ClassInfo) -> str:
    return f"{info.wnid} (ILSVRC id {info.ilsvrc_id}, {info.words!r})"


def _check_data(scores: Scores, data: DataSet) -> None:
    """The scores speak of the images and classes of ``data``. Raises ValueError with the first difference."""
    ours, theirs = scores.info.classes, data.manifest.classes
    if ours != theirs:
        pair = next(((a, b) for a, b in zip(ours, theirs, strict=False) if a != b), None)
        what = f"{len(ours)} and {len(theirs)}"
        if pair:
            what = f"class {pair[0].label} is {_class(pair[0])} and {_class(pair[1])}"
        raise ValueError(f"the classes of {scores.url} are not those of the data set {data.storage.url}: {what}")
    split = data.split(scores.info.split)
    have, want = set(scores.names.to_pylist()), set(split.names.to_pylist())
    if have != want:
        lacks, more = sorted(want - have), sorted(have - want)
        words = [f"{len(lacks)} images are missing ({listed(lacks)})"] if lacks else []
        words += [f"{len(more)} are not in it ({listed(more)})"] if more else []
        raise ValueError(
            f"the images of {scores.url} are not those of {data.storage.url}, split {scores.info.split}: "
            f"{'; '.join(words)}: score that data set"
        )
