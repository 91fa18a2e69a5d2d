"""Any file for the competition is checked to the line, and scored where the truth is known."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.evaluation import ranking, scores, submission, submission_check
from orchestrator.evaluation.submission import Format
from orchestrator.evaluation.submission_check import Expected, errors, form_of, read, read_truth
from orchestrator.storage import Storage
from tests.evaluation.score_files import member, softmax

IDS = [str(i + 1) for i in range(7)]
WNIDS = [f"n{i:08d}" for i in range(7)]
NAMES = ["a.JPEG", "b.JPEG", "c.JPEG"]
GOOD = ["1 2 3 4 5", "7 6 5 4 3", "2 4 6 1 3"]
BOX = "0 0 9 8"


def problems(lines: list[str], expected: Expected | None = None, end: str = "\n") -> list[str]:
    return read(("\n".join(lines) + end).encode(), expected or Expected(IDS, 3)).problems


def csv_line(image: str, classes: str = "0 1 2 3 4") -> str:
    return f"{image},{' '.join(f'{WNIDS[int(c)]} {BOX}' for c in classes.split())}"


CSV = ["ImageId,PredictionString", *(csv_line(name[0]) for name in NAMES)]


def test_a_good_file_has_no_problems() -> None:
    assert problems(GOOD) == problems(GOOD, end="") == problems(GOOD, Expected(IDS)) == []
    assert problems(CSV, Expected(WNIDS, names=NAMES)) == problems(CSV, Expected(WNIDS)) == []
    assert problems(["3 1 2"], Expected(["1", "2", "3"])) == []  # fewer than five classes: all of them


def test_images_of_one_id_are_problems() -> None:
    """Whoever wrote such a file: it is told what is wrong, line by line."""
    names = ["a/0.jpg", "b/0.jpg", "c/1.jpg"]
    found = problems([CSV[0], csv_line("0"), csv_line("0"), csv_line("1")], Expected(WNIDS, names=names))
    assert found == ["line 3: the image 0 is in line 2 already"]
    found = problems([CSV[0], csv_line("1"), csv_line("0")], Expected(WNIDS, names=names))
    assert [each.partition(":")[0] for each in found] == ["2 lines of images where there are 3 images", "line 2"]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("1 2 3 4", ["line 2: 4 classes where 5 are expected"]),
        ("1 2 3 4 5 6", ["line 2: 6 classes where 5 are expected"]),
        ("", ["line 2: 0 classes where 5 are expected"]),
        ("1 2 3 4 8", ["line 2: '8' is no class: they are 1 to 7"]),
        ("0 2 3 4 5", ["line 2: '0' is no class: they are 1 to 7"]),
        ("1 2 x 4 5", ["line 2: 'x' is no class: they are 1 to 7"]),
        ("1,2,3,4,5", ["line 2: 1 classes where 5 are expected", "line 2: '1,2,3,4,5' is no class: they are 1 to 7"]),
        ("1 2 3 4 5\r", ["line 2: '5\\r' is no class: they are 1 to 7"]),
        ("1 2  3 4 5", ["line 2: 6 classes where 5 are expected", "line 2: '' is no class: they are 1 to 7"]),
        ("1 2 3 2 5", ["line 2: 2 is there 2 times"]),
        ("1 2 3 4 5 ", ["line 2: 6 classes where 5 are expected", "line 2: '' is no class: they are 1 to 7"]),
        ("01 2 3 4 5", ["line 2: '01' is no class: they are 1 to 7"]),
    ],
)
def test_a_bad_line(line: str, says: list[str]) -> None:
    assert problems([GOOD[0], line, GOOD[2]]) == says


def test_too_few_and_too_many_lines() -> None:
    assert problems(GOOD[:2]) == ["2 lines of images where there are 3 images"]
    assert problems([*GOOD, GOOD[0]]) == ["4 lines of images where there are 3 images"]
    assert problems([], end="") == ["0 lines of images where there are 3 images"]
    assert problems([], Expected(IDS), end="") == ["the file has no line of an image"]
    assert read("1 2 3 4 5\n1 2 3 ４ 5\n".encode(), Expected(IDS)).problems[0].startswith("line 2: not ASCII text")


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        ([CSV[0], CSV[1], CSV[3]], ["2 lines of images where there are 3 images", "images without a line: b"]),
        ([CSV[0], CSV[2], CSV[1], CSV[3]], ["line 2: the image b where a is expected: file-name order"]),
        (
            [*CSV, CSV[2]],
            ["4 lines of images where there are 3 images", "line 5: the image b is in line 3 already"],
        ),
        (
            [*CSV[:3], csv_line("d")],
            ["images without a line: c", "lines of images that are not in the split: d"],
        ),
        (["ImageID,Prediction", *CSV[1:]], ["line 1: the header is 'ImageID,Prediction' where it should be"]),
        ([CSV[0], csv_line("a", "0 1 2 3"), *CSV[2:]], ["line 2: 4 classes where 5 are expected"]),
        ([CSV[0], csv_line("a", "0 1 2 3 3"), *CSV[2:]], ["line 2: n00000003 is there 2 times"]),
        ([CSV[0], CSV[1].replace("n00000001", "n7"), *CSV[2:]], ["line 2: 'n7' is no class: they are n00000000, "]),
        ([CSV[0], CSV[1].replace(BOX, "9 0 0 8", 1), *CSV[2:]], ["line 2: '9 0 0 8' is no box"]),
        ([CSV[0], CSV[1].replace(BOX, "0 0 -9 8", 1), *CSV[2:]], ["line 2: '0 0 -9 8' is no box"]),
        (
            [CSV[0], CSV[1] + " 7", *CSV[2:]],
            ["line 2: 26 words where each class needs five", "line 2: 6 classes", "line 2: '7'"],
        ),
        ([CSV[0], "a", *CSV[2:]], ["line 2: 0 classes where 5 are expected"]),
    ],
)
def test_a_bad_file_of_kaggles_form(lines: list[str], says: list[str]) -> None:
    found = problems(lines, Expected(WNIDS, names=NAMES))
    assert len(found) == len(says), found
    assert all(text.startswith(start) for text, start in zip(found, says, strict=True)), found


def test_order_is_checked_without_a_data_set() -> None:
    (problem,) = problems([CSV[0], CSV[2], CSV[1]], Expected(WNIDS))
    assert problem == "line 2: the image b where a is expected: file-name order"


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=60) | st.text("0123456789 n,\nImageId", max_size=80).map(str.encode))
def test_nothing_in_a_file_is_too_much(data: bytes) -> None:
    """What is read never raises; what is not written by the rules has a problem."""
    content = read(data, Expected(IDS, 2))
    if not content.problems:
        assert len(data.splitlines()) == 2


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 9), st.integers(2, 8), st.integers(0, 1000), st.sampled_from(Format))
def test_what_is_written_is_read(
    tmp_path_factory: pytest.TempPathFactory, n: int, c: int, seed: int, form: Format
) -> None:
    """Without problems, and with the errors of the scores."""
    folder, rng = tmp_path_factory.mktemp("written"), np.random.default_rng(seed)
    labels = rng.integers(0, c, n)
    member(folder, "a", softmax(rng.normal(size=(n, c))), labels)
    file = scores.load(f"{folder}/a/scores/x.arrow")
    submission.write(file, Storage(str(folder)), "s", form=form, code_version="abc")
    data, tokens = (folder / "s").read_bytes(), submission.tokens_of(file.info.classes, form)
    assert form_of(data) is form
    content = read(data, Expected(tokens, n, file.names.to_pylist()))
    assert content.problems == []
    assert errors(content, labels) == ranking.errors(file)
    truth = "".join(f"{file.info.classes[label].ilsvrc_id}\n" for label in labels).encode()
    ids = submission.tokens_of(file.info.classes, Format.ILSVRC)
    assert read_truth(truth, ids).tolist() == labels.tolist()


def test_errors_by_hand() -> None:
    content = read("\n".join(GOOD).encode(), Expected(IDS))
    assert errors(content, np.array([0, 5, 6])) == (3, 2, 1)
    assert errors(content, np.array([0, -1, 6])) == (2, 1, 1)
    with pytest.raises(ValueError, match="the truth of no image is known"):
        errors(content, np.full(3, -1))
    with pytest.raises(ValueError, match="the truth of 2 images is known, the file speaks of 3"):
        errors(content, np.zeros(2, int))
    with pytest.raises(ValueError, match="2 problems, first of them: line 1: 4 classes"):
        errors(read(b"1 2 3 4\n1 1 2 3 4\n", Expected(IDS)), np.zeros(2, int))
    with pytest.raises(ValueError, match="the ground truth's line 2, '8', is no class: they are 1 to 7"):
        read_truth(b"1\n8\n", IDS)


def test_only_what_is_a_class_is_a_class(tmp_path: Path) -> None:
    """Ids need not be 1 to N: a set of some of ILSVRC's classes has theirs."""
    assert problems(["9 7 400"], Expected(["400", "9", "7"])) == []
    (problem,) = problems(["9 7 1"], Expected(["400", "9", "7"]))
    assert problem == "line 1: '1' is no class: they are 400, 7, 9"
    assert submission_check.form_of(b"") is Format.ILSVRC
