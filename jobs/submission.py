"""Write, check and score the classification file of ILSVRC, or Kaggle's form of it.

    python jobs/submission.py write SCORES --out submission.txt [--format kaggle] [--data URL]
    python jobs/submission.py check submission.txt [--data URL] [--images N] [--classes N]
    python jobs/submission.py score submission.txt --data URL [--split val] [--truth FILE]

SCORES is a score file of the test split: an ensemble's (jobs/ensemble.py) or one network's. Where the file came from is
written beside it: FILE.lineage.json. Exit codes: 0 well; 1 the file has problems, all named; 2 refused.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import tyro

from jobs import command_line
from orchestrator.code_version import code_version
from orchestrator.data.shards import ClassInfo, DataSet
from orchestrator.evaluation import scores, submission, submission_check
from orchestrator.evaluation.submission import Format
from orchestrator.evaluation.submission_check import Content, Expected
from orchestrator.storage import Storage, sha256_hex

_SHOWN = 20  # problems


@dataclass(frozen=True)
class Write:
    """Write the file, its lineage beside it, and check it."""

    scores: Annotated[str, tyro.conf.Positional]
    """URL of a score file (….arrow)"""
    out: str
    """file to write, a path or URL"""
    format: Format = Format.ILSVRC
    """ilsvrc: five ids a line; kaggle: ImageId,PredictionString"""
    data: str = ""
    """URL of the data set to compare images and classes with; empty: the one that was scored, if it is there"""
    images: int = 0
    """number of images that must be there; 0: any"""


@dataclass(frozen=True)
class Check:
    """Check any such file, whoever wrote it."""

    file: Annotated[str, tyro.conf.Positional]
    """path or URL"""
    data: str = ""
    """URL of a data set: its classes, and the images of the split, are expected"""
    split: str = "test"
    """split of the data set"""
    images: int = 0
    """number of images expected without a data set; 0: what the lineage beside the file says, else any"""
    classes: int = 1000
    """number of classes without a data set: ids are 1 to this"""


@dataclass(frozen=True)
class Score:
    """Top-1 and top-5 error of such a file, where the truth is known."""

    file: Annotated[str, tyro.conf.Positional]
    """path or URL"""
    data: str = ""
    """URL of a data set, whose classes and, without --truth, labels are used"""
    split: str = "val"
    """split of the data set"""
    truth: str = ""
    """file with one ILSVRC2012_ID a line, in file-name order (the devkit's ILSVRC2012_validation_ground_truth.txt)"""
    classes: int = 1000
    """number of classes without a data set: ids are 1 to this"""


def main() -> int:
    return command_line.launchable_as("submission", run, parse)


def parse(argv: Sequence[str]) -> Write | Check | Score:
    """What is typed."""
    forms: type[Write | Check | Score] = Write | Check | Score  # type: ignore[assignment]
    config = (tyro.conf.EnumChoicesFromValues,)
    return tyro.cli(forms, args=argv, prog="python jobs/submission.py", description=__doc__, config=config)


def run(command: Write | Check | Score) -> int:
    """Do it. Returns the exit code."""
    match command:
        case Write():
            return _write(command)
        case Check():
            return _check(command)
        case Score():
            return _score(command)


def place(url: str) -> tuple[Storage, str]:
    """Folder and name of a file. Raises ValueError where it names none."""
    folder, slash, name = url.rpartition("/")
    if not name:
        raise ValueError(f"{url!r} names no file")
    return Storage(folder or slash or "."), name


def _write(command: Write) -> int:
    out, name = place(command.out)
    file = scores.load(command.scores)
    data, note = _data_of(file, command.data)
    written = submission.write(
        file,
        out,
        name,
        form=command.format,
        data=data,
        num_images=command.images,
        code_version=code_version(),
    )
    for text in [*written.notes, *([note] if note else [])]:
        print(f"note: {text}")
    expected = Expected(submission.tokens_of(file.info.classes, command.format), len(file), file.names.to_pylist())
    content = submission_check.read(out.read(name, written.sha256), expected)
    print(f"wrote {out.url}/{name}: {written.num_images} images, SHA-256 {written.sha256}")
    print(f"lineage {out.url}/{name}{submission.LINEAGE}")
    return _tell(content)


def _data_of(file: scores.Scores, url: str) -> tuple[DataSet | None, str]:
    """The data set to compare with, and why there is none. Raises ValueError where it was named and cannot be read."""
    if url:
        return DataSet(Storage(url)), ""
    try:
        data = DataSet(Storage(file.info.data["url"]))
    except (ValueError, OSError) as error:
        return None, f"images and classes were not compared with the data set's ({error})"
    if data.digest != file.info.data["sha256"]:
        return None, f"images and classes were not compared: {data.storage.url} is another data set by now"
    return data, ""


def _check(command: Check) -> int:
    content = _read(command.file, command.data, command.split, command.classes, command.images)[0]
    folder, name = place(command.file)
    print(f"{folder.url}/{name}: {content.form.value}, {len(content.labels)} images")
    return _tell(content)


def _tell(content: Content) -> int:
    for text in content.problems[:_SHOWN]:
        print(f"wrong: {text}")
    if len(content.problems) > _SHOWN:
        print(f"wrong: and {len(content.problems) - _SHOWN} more")
    print("no problems" if not content.problems else f"{len(content.problems)} problems")
    return command_line.EXIT_FAILED if content.problems else 0


def _read(
    file: str, data: str, split: str, classes: int, images: int
) -> tuple[Content, Sequence[ClassInfo], DataSet | None]:
    """What is in a file, the classes it may name, and the data set. Raises ValueError where it is not there."""
    folder, name = place(file)
    try:
        text = folder.read(name)
    except (FileNotFoundError, IsADirectoryError) as error:
        raise ValueError(f"no submission file at {file!r} ({error})") from None
    form = submission_check.form_of(text)
    source = DataSet(Storage(data)) if data else None
    if source is None and form is Format.KAGGLE:
        raise ValueError("Kaggle's form names classes by WordNet id: give --data URL, whose classes these are")
    known: Sequence[ClassInfo] = source.manifest.classes if source else _numbered(classes)
    names = source.split(split).names.to_pylist() if source else []
    lineage = _lineage(folder, name)
    expected = Expected(submission.tokens_of(known, form), images or int(lineage.get("images", 0)), names)
    content = submission_check.read(text, expected)
    if lineage and lineage.get("sha256") != sha256_hex(text):
        content.problem(f"the lineage beside it ({name}{submission.LINEAGE}) is of another file, by its SHA-256")
    return content, known, source


def _numbered(classes: int) -> list[ClassInfo]:
    if classes < 1:
        raise ValueError(f"--classes is {classes}: there must be at least one")
    return [ClassInfo(label, "", label + 1) for label in range(classes)]


def _lineage(folder: Storage, name: str) -> dict[str, Any]:
    """What the lineage beside a file says of the file; {} where there is none."""
    try:
        return dict(json.loads(folder.read(f"{name}{submission.LINEAGE}"))["file"])
    except FileNotFoundError:
        return {}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"the lineage {folder.url}/{name}{submission.LINEAGE} cannot be read ({error!r}): delete it"
        ) from None


def _score(command: Score) -> int:
    content, classes, data = _read(command.file, command.data, command.split, command.classes, 0)
    if command.truth:
        folder, name = place(command.truth)
        try:
            truth = submission_check.read_truth(folder.read(name), submission.tokens_of(classes, Format.ILSVRC))
        except FileNotFoundError:
            raise ValueError(f"no ground truth at {command.truth!r}") from None
    elif data is not None:
        split = data.split(command.split)
        names = split.names.to_pylist()
        truth = split.label[sorted(range(len(names)), key=names.__getitem__)]
    else:
        raise ValueError("nothing to compare with: give --data URL, or --truth FILE")
    found = submission_check.errors(content, truth)
    print(f"{found.num_images} images: {found.top1_error:.2f} % top-1 error, {found.top5_error:.2f} % top-5 error")
    return 0


if __name__ == "__main__":
    sys.exit(command_line.exit_code(main, interrupted="nothing was written"))
