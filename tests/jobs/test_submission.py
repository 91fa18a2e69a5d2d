"""``jobs/ensemble.py`` and ``jobs/submission.py`` as they are typed: exit codes, what is said, what is left."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from jobs import ensemble, submission
from orchestrator.data.shards import DataSet
from orchestrator.evaluation import ranking, scores
from tests.data.build import build, jpeg
from tests.evaluation.score_files import member
from tests.evaluation.scored_runs import scored_runs
from tests.jobs.conftest import Run

Typed = Callable[..., tuple[int, str]]
Urls = dict[str, dict[str, str]]  # of score files, by split and run


@pytest.fixture(scope="module")
def urls(data: DataSet, tmp_path_factory: pytest.TempPathFactory) -> Urls:
    return scored_runs(tmp_path_factory.mktemp("runs"), data)


@pytest.fixture
def average(typed: Run, monkeypatch: pytest.MonkeyPatch) -> Typed:
    monkeypatch.setenv("COLUMNS", "160")

    def run(*arguments: str) -> tuple[int, str]:
        code, text = typed(*arguments, main=ensemble.main)
        assert "Traceback" not in text
        return code, " ".join(text.split())

    return run


@pytest.fixture
def submit(typed: Run) -> Typed:
    def run(*arguments: str) -> tuple[int, str]:
        code, text = typed(*arguments, main=submission.main)
        assert "Traceback" not in text
        return code, text

    return run


# -- ensemble ---------------------------------------------------------------------------------------------------


def test_an_ensemble_is_shown(average: Typed, urls: Urls, tmp_path: Path) -> None:
    files = [*urls["val"].values(), *urls["test"].values()]
    code, text = average("--scores", *files, "--out", str(tmp_path / "e"), "--greedy", "--folds", "3")
    assert code == 0, text
    for words in ("Members and their average", "greedy choice, held out", "Agreement", f"{tmp_path}/e/figures/val.png"):
        assert words in text
    made = json.loads((tmp_path / "e/ensemble.json").read_text())
    assert made["choice"] == "greedy"
    again = {p: p.read_bytes() for p in (tmp_path / "e").rglob("*") if p.is_file()}
    assert average("--scores", *files, "--out", str(tmp_path / "e"), "--greedy", "--folds", "3")[0] == 0
    assert again == {p: p.read_bytes() for p in (tmp_path / "e").rglob("*") if p.is_file()}


def test_what_an_ensemble_refuses(average: Typed, urls: Urls, tmp_path: Path) -> None:
    val, out = list(urls["val"].values()), ("--out", str(tmp_path / "e"))
    for arguments, says in (
        (["--scores", val[0], val[0]], "are the same scores"),
        (["--scores", *val, "--greedy", "--weights", "1", "1", "1"], "--greedy chooses the weights"),
        (["--scores", *val, "--weights", "1"], "1 weights for 3 members"),
        (["--scores", *val, "--greedy", "--folds", "1"], "30 labelled images cannot be dealt out to 1 folds"),
        (["--scores", *val, urls["test"]["a"]], "no score file of b, c for the split test"),
        (["--scores", f"{val[0]}x"], "no score file at"),
        (["--scores"], "needs at least one score file"),
    ):
        code, text = average(*arguments, *out)
        assert code == 2, text
        assert says in text
        assert not (tmp_path / "e").exists()


# -- submission -------------------------------------------------------------------------------------------------


def test_written_checked_and_scored(submit: Typed, urls: Urls, data: DataSet, archives: Path) -> None:
    """In both forms, against the data set and against the devkit's ground truth."""
    file = scores.load(urls["val"]["a"])
    wanted = ranking.errors(file)
    said = f"30 images: {wanted.top1_error:.2f} % top-1 error, {wanted.top5_error:.2f} % top-5 error"
    with tarfile.open(archives / "ILSVRC2012_devkit_t12.tar.gz") as devkit:
        member_of = next(m for m in devkit if m.name.endswith("validation_ground_truth.txt"))
        stream = devkit.extractfile(member_of)
        assert stream
        Path("truth.txt").write_bytes(stream.read())
    for name, options in (("s.txt", ()), ("s.csv", ("--format", "kaggle"))):
        code, text = submit("write", urls["val"]["a"], "--out", name, *options)
        assert code == 0, text
        assert "no problems" in text
        assert "note: 30 images, where the whole of ILSVRC2012_val has 50000" in text
        assert submit("check", name, "--data", data.storage.url, "--split", "val")[0] == 0
        code, text = submit("score", name, "--data", data.storage.url)
        assert (code, text.strip()) == (0, said)
        code, text = submit("score", name, "--data", data.storage.url, "--truth", "truth.txt")
        assert (code, text.strip()) == (0, said)
    assert submit("check", "s.txt", "--classes", "6", "--images", "30")[0] == 0
    assert submit("score", "s.txt", "--classes", "6", "--truth", "truth.txt")[1].strip() == said


def test_a_file_with_problems(submit: Typed, urls: Urls, data: DataSet) -> None:
    assert submit("write", urls["test"]["b"], "--out", "s.txt")[0] == 0
    good = Path("s.txt").read_text().splitlines()
    Path("s.txt").write_text("\n".join([*good[:4], "1 2 3 3 9", *good[5:]]) + "\n")
    code, text = submit("check", "s.txt", "--data", data.storage.url)
    assert code == 1
    assert "wrong: line 5: '9' is no class: they are 1 to 6" in text
    assert "wrong: line 5: 3 is there 2 times" in text
    assert "wrong: the lineage beside it (s.txt.lineage.json) is of another file" in text
    assert text.endswith("3 problems\n")
    Path("s.txt").write_text("1 2 3 4 7\n" * 30)
    code, text = submit("check", "s.txt", "--data", data.storage.url)
    assert code == 1
    assert text.count("wrong: ") == 21
    assert "wrong: and 12 more" in text
    Path("s.txt").write_text("\n".join(good[:-1]) + "\n")
    Path("s.txt.lineage.json").unlink()
    assert (
        "wrong: 9 lines of images where there are 10 images" in submit("check", "s.txt", "--data", data.storage.url)[1]
    )
    assert submit("check", "s.txt", "--classes", "6")[0] == 0  # nothing says how many there should be


def test_what_a_submission_refuses(submit: Typed, urls: Urls, data: DataSet, tmp_path: Path) -> None:
    test, url = urls["test"]["a"], data.storage.url
    assert submit("write", test, "--out", "good.csv", "--format", "kaggle")[0] == 0
    assert submit("write", test, "--out", "good.txt")[0] == 0
    Path("truth.txt").write_text("1\n7\n")
    pixels = np.zeros((40, 40, 3), np.uint8)
    other = build(tmp_path / "other", [("x", jpeg(pixels), 0), ("y", jpeg(pixels), 5)])
    before = sorted(tmp_path.rglob("*"))
    for arguments, says in (
        (("write", test, "--out", "x.txt", "--images", "100000"), "has 10 images where 100000 are expected"),
        (("write", test, "--out", "x.txt", "--data", other.storage.url), "the classes of"),
        (("write", test, "--out", "x.txt", "--data", str(tmp_path)), "no prepared data set at"),
        (("write", test, "--out", "folder/"), "'folder/' names no file"),
        (("write", "nothing.arrow", "--out", "x.txt"), "no score file at 'nothing.arrow'"),
        (("check", "nothing.txt"), "no submission file at 'nothing.txt'"),
        (("check", "good.csv"), "Kaggle's form names classes by WordNet id"),
        (("check", "good.txt", "--classes", "0"), "--classes is 0"),
        (("score", "good.txt", "--classes", "6"), "nothing to compare with"),
        (("score", "good.txt", "--data", url, "--split", "test"), "the truth of no image is known"),
        (("score", "good.txt", "--data", url), "first of them: 10 lines of images where there are 30 images"),
        (("score", "good.txt", "--classes", "6", "--truth", "truth.txt"), "ground truth's line 2, '7', is no class"),
        (("score", "good.txt", "--classes", "6", "--truth", "none.txt"), "no ground truth at 'none.txt'"),
    ):
        code, text = submit(*arguments)
        assert code == 2, text
        assert says in text
    assert sorted(tmp_path.rglob("*")) == before


def test_scores_of_folders_are_no_submission(submit: Typed, tmp_path: Path) -> None:
    pixels = np.zeros((40, 40, 3), np.uint8)
    known = build(tmp_path / "set", [("x", jpeg(pixels), 0), ("y", jpeg(pixels), 1)]).manifest.classes
    folders = tuple(type(c)(c.label, f"kind-{c.label}") for c in known)
    member(tmp_path, "a", np.eye(2), info={"classes": folders, "split": "test"})
    code, text = submit("write", f"{tmp_path}/a/scores/x.arrow", "--out", "s.txt")
    assert code == 2
    assert "the class map does not fit a submission: 2 of 2 classes have no ILSVRC2012_ID" in text
    assert not Path("s.txt").exists()


def test_without_the_data_set_it_says_so(submit: Typed, urls: Urls, tmp_path: Path) -> None:
    member(tmp_path, "a", np.eye(7))  # speaks of /data/set, which is not there
    code, text = submit("write", f"{tmp_path}/a/scores/x.json", "--out", "s.txt")
    assert code == 0, text
    assert "note: images and classes were not compared with the data set's (no prepared data set at '/data/set'" in text
    assert io.StringIO(Path("s.txt").read_text()).readline() == "7 6 5 4 3\n"
