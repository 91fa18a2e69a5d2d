"""Reads a classification file of ILSVRC or Kaggle's form of it: what is wrong with it, and how good it is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from orchestrator.data.shards import UNLABELLED
from orchestrator.evaluation.ranking import Errors
from orchestrator.evaluation.submission import HEADER, TOP, Format, image_id, listed

_NUMBERS_OF_A_BOX = 4


@dataclass(frozen=True)
class Expected:
    """What a file should hold. tokens: what names the classes, by label. num_images: 0: not known. names: file names of
    the images, in order; empty: not known.
    """

    tokens: Sequence[str]
    num_images: int = 0
    names: Sequence[str] = ()


@dataclass
class Content:
    """What a file holds. labels: of each line, as far as they can be read. problems: a sentence each, with its line."""

    form: Format
    labels: list[list[int]] = field(default_factory=list)
    image_ids: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def problem(self, text: str) -> None:
        self.problems.append(text)


def form_of(data: bytes) -> Format:
    """Kaggle's form begins with a line of letters."""
    return Format.KAGGLE if data[: len(HEADER)].lower().startswith(b"imageid") else Format.ILSVRC


def read(data: bytes, expected: Expected) -> Content:
    """All of a file, and all that is wrong with it. Never raises for what is in it."""
    content = Content(form_of(data))
    try:
        lines = data.decode("ascii").split("\n")
    except UnicodeDecodeError as error:
        number = data[: error.start].count(b"\n") + 1
        content.problem(f"line {number}: not ASCII text: such a file holds digits, letters and spaces alone")
        return content
    if lines and not lines[-1]:
        lines.pop()  # what follows the last line's end
    first = 1
    if content.form is Format.KAGGLE:
        if lines[0] != HEADER:
            content.problem(f"line 1: the header is {lines[0]!r} where it should be {HEADER!r}")
        lines, first = lines[1:], 2
    label_of = {token: label for label, token in enumerate(expected.tokens)}
    for number, line in enumerate(lines, first):
        tokens = line.split(" ")
        if content.form is Format.KAGGLE:
            image, _, rest = line.partition(",")
            content.image_ids.append(image)
            tokens = _without_boxes(content, number, rest)
        content.labels.append(_labels(content, number, tokens, label_of))
    _check_images(content, len(lines), expected, first)
    return content


def _without_boxes(content: Content, number: int, text: str) -> list[str]:
    """The classes of a line of Kaggle's form: wnid xmin ymin xmax ymax, up to five times."""
    words = text.split(" ")
    size = 1 + _NUMBERS_OF_A_BOX
    if text and len(words) % size:
        content.problem(f"line {number}: {len(words)} words where each class needs five: itself and its box")
    groups = [words[i : i + size] for i in range(0, len(words), size)] if text else []
    for group in groups:
        box = group[1:]
        if len(box) == _NUMBERS_OF_A_BOX and not _is_box(box):
            content.problem(f"line {number}: {' '.join(box)!r} is no box: xmin ymin xmax ymax")
    return [group[0] for group in groups]


def _is_box(words: Sequence[str]) -> bool:
    if not all(word.isdigit() for word in words):
        return False
    x_min, y_min, x_max, y_max = map(int, words)
    return x_min <= x_max and y_min <= y_max


def _labels(content: Content, number: int, tokens: Sequence[str], label_of: dict[str, int]) -> list[int]:
    """Of one line, those that are classes."""
    tokens = [] if list(tokens) == [""] else list(tokens)
    wanted = min(TOP, len(label_of))
    if len(tokens) != wanted:
        content.problem(f"line {number}: {len(tokens)} classes where {wanted} are expected")
    if unknown := [token for token in tokens if token not in label_of]:
        content.problem(f"line {number}: {unknown[0]!r} is no class: {_range(label_of)}")
    if twice := sorted({token for token in tokens if tokens.count(token) > 1}):
        content.problem(f"line {number}: {twice[0]} is there {tokens.count(twice[0])} times")
    return [label_of[token] for token in tokens if token in label_of]


def _range(tokens: dict[str, int]) -> str:
    """What classes are called."""
    numbers = sorted(int(token) for token in tokens if token.isdigit())
    if numbers == list(range(1, len(tokens) + 1)):
        return f"they are 1 to {len(tokens)}"
    return f"they are {listed(sorted(tokens))}"


def _check_images(content: Content, num_lines: int, expected: Expected, first: int) -> None:
    """One line an image, in file-name order."""
    wanted = len(expected.names) or expected.num_images
    if wanted and num_lines != wanted:
        content.problem(f"{num_lines} lines of images where there are {wanted} images")
    if not num_lines and not wanted:
        content.problem("the file has no line of an image")
    if content.form is not Format.KAGGLE:
        return
    found = content.image_ids
    if len(set(found)) < len(found):
        seen = dict[str, int]()
        for number, image in enumerate(found, first):
            if seen.setdefault(image, number) != number:
                content.problem(f"line {number}: the image {image} is in line {seen[image]} already")
    # Two names may have one id; such a set has no file of this form without problems.
    ids = list(dict.fromkeys(map(image_id, sorted(expected.names)))) if expected.names else sorted(set(found))
    has, wants = set(found), set(ids)
    if missing := sorted(wants - has):
        content.problem(f"images without a line: {listed(missing)}")
    if strangers := sorted(has - wants):
        content.problem(f"lines of images that are not in the split: {listed(strangers)}")
    known, in_order = [image for image in dict.fromkeys(found) if image in wants], [i for i in ids if i in has]
    row = next((i for i, (a, b) in enumerate(zip(known, in_order, strict=True)) if a != b), None)
    if row is not None:
        number = first + found.index(known[row])
        content.problem(f"line {number}: the image {known[row]} where {in_order[row]} is expected: file-name order")


# -- how good it is ---------------------------------------------------------------------------------------------


def read_truth(data: bytes, tokens: Sequence[str]) -> np.ndarray:
    """Labels [N] int64 of a devkit's ground truth (ILSVRC2012_validation_ground_truth.txt): one id a line.

    Raises ValueError where a line is no class.
    """
    label_of = {token: label for label, token in enumerate(tokens)}
    labels = []
    for number, line in enumerate(data.decode("utf-8", "replace").splitlines(), 1):
        if line.strip() not in label_of:
            raise ValueError(f"the ground truth's line {number}, {line!r}, is no class: {_range(label_of)}")
        labels.append(label_of[line.strip()])
    return np.array(labels, np.int64)


def errors(content: Content, truth: np.ndarray) -> Errors:
    """Top-1 and top-5 errors. truth: [N] labels in file-name order, −1 where unknown.

    Raises ValueError where the file has problems, or speaks of another number of images.
    """
    if content.problems:
        n, first = len(content.problems), content.problems[0]
        raise ValueError(f"the file cannot be scored: {n} problems, first of them: {first}")
    if len(truth) != len(content.labels):
        raise ValueError(f"the truth of {len(truth)} images is known, the file speaks of {len(content.labels)}")
    known = np.flatnonzero(truth != UNLABELLED)
    if not len(known):
        raise ValueError("the truth of no image is known: give a labelled split, or --truth FILE")
    lines = np.array(content.labels, np.int64).reshape(len(truth), -1)[known]
    hit = lines == truth[known, None]
    return Errors(len(known), int((~hit[:, 0]).sum()), int((~hit[:, :TOP].any(axis=1)).sum()))
