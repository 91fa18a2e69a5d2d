"""Score files: what was published comes back, in little memory; anything else is refused and named."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from orchestrator.evaluation import scores
from orchestrator.storage import Storage
from tests.evaluation.score_files import columns, info_of, member, softmax
from tests.s3_server import BUCKET, S3Server

NAME = "scores/val-ten_crop-0123456789ab.arrow"


def published(url: str, seed: int = 0, n: int = 20, c: int = 6) -> dict[str, Any]:
    """The columns of a file that it publishes as ``NAME``."""
    rng = np.random.default_rng(seed)
    decoded = np.arange(n) != 3
    given_columns = columns(softmax(rng.normal(size=(n, c))), rng.integers(0, c, n), decoded=decoded)
    scores.publish(Storage(url), NAME, info_of(c), **given_columns)
    return given_columns


def test_what_was_published_is_read(tmp_path: Path) -> None:
    given_columns = published(str(tmp_path))
    for end in (".arrow", ".json"):
        read = scores.load(f"{tmp_path}/{NAME.removesuffix('.arrow')}{end}")
        assert read.names.to_pylist() == given_columns["names"]
        for column in ("labels", "decoded", "width", "height", "scores"):
            assert getattr(read, column).dtype == given_columns[column].dtype
            assert np.array_equal(getattr(read, column), given_columns[column]), column
        assert read.info == info_of(6)
        assert read.url == f"{tmp_path}/{NAME}"
        assert read.sha256 == hashlib.sha256((tmp_path / NAME).read_bytes()).hexdigest()
    (record,) = scores.find(Storage(str(tmp_path)))
    assert (record.name, record.sha256, record.info) == (NAME, read.sha256, read.info)


def test_a_file_is_mapped_not_copied(tmp_path: Path) -> None:
    published(str(tmp_path), n=2000, c=100)
    before = pa.total_allocated_bytes()
    read = scores.load(f"{tmp_path}/{NAME}")
    assert pa.total_allocated_bytes() - before < read.scores.nbytes / 10
    assert not read.scores.flags.writeable
    # One record batch without compression: the numbers lie in the file as they are.
    assert (tmp_path / NAME).read_bytes().count(read.scores.tobytes()) == 1


def test_same_input_same_bytes(tmp_path: Path) -> None:
    published(str(tmp_path / "a"))
    published(str(tmp_path / "b"))
    for name in (NAME, NAME.replace(".arrow", ".json")):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_scores_mapped_from_a_file(tmp_path: Path) -> None:
    given_columns = published(str(tmp_path / "a"))
    np.save(tmp_path / "x.npy", given_columns["scores"])
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    names = pa.array(given_columns["names"])
    scores.publish(
        Storage(str(tmp_path / "b")), NAME, info_of(6), **(given_columns | {"scores": mapped, "names": names})
    )
    assert (tmp_path / "a" / NAME).read_bytes() == (tmp_path / "b" / NAME).read_bytes()


def test_in_an_object_store(s3: S3Server, tmp_path: Path) -> None:
    given_columns = published(f"s3://{BUCKET}/score-files")
    read = scores.load(f"s3://{BUCKET}/score-files/{NAME}")
    assert np.array_equal(read.scores, given_columns["scores"])
    assert read.sha256 == scores.find(Storage(f"s3://{BUCKET}/score-files"))[0].sha256


@pytest.mark.parametrize("damage", ["torn", "flipped", "lost", "another's", "longer"])
def test_a_damaged_file_is_refused(tmp_path: Path, damage: str) -> None:
    published(str(tmp_path))
    path = tmp_path / NAME
    data = path.read_bytes()
    if damage == "another's":
        published(str(tmp_path / "other"), seed=1)
        path.write_bytes((tmp_path / "other" / NAME).read_bytes())
    elif damage == "lost":
        path.unlink()
    else:
        middle = len(data) // 2
        flipped = data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]
        path.write_bytes({"torn": data[:-100], "flipped": flipped, "longer": data + b"x"}[damage])
    says = {"torn": "bytes where its record says", "longer": "bytes where its record says", "lost": "is missing"}
    with pytest.raises(ValueError, match=says.get(damage, "is damaged")) as told:
        scores.load(str(path))
    assert str(path) in str(told.value)


def test_a_damaged_record_is_refused(tmp_path: Path) -> None:
    published(str(tmp_path))
    path = tmp_path / NAME.replace(".arrow", ".json")
    record = path.read_text()
    for damaged in (
        record[:-50],
        record.replace("ten_crop", "one_crop"),
        record.replace("n00000001", "n00000009"),
    ):
        assert damaged != record
        path.write_text(damaged)
        with pytest.raises(ValueError, match="the record of the score file"):
            scores.load(f"{tmp_path}/{NAME}")
        with pytest.raises(ValueError, match="the record of the score file"):
            scores.find(Storage(str(tmp_path)))
    path.unlink()
    (tmp_path / "scores" / "noise.arrow").write_bytes(b"no arrow")
    with pytest.raises(ValueError, match=r"no score file at .*: there is noise.arrow, val-ten_crop"):
        scores.load(f"{tmp_path}/{NAME}")
    assert scores.find(Storage(str(tmp_path))) == []


def test_a_file_that_does_not_fit_its_record_is_refused(tmp_path: Path) -> None:
    """A record that is whole, of another file of the same size."""
    published(str(tmp_path))
    (record,) = scores.find(Storage(str(tmp_path)))
    forged = replace(record, info=info_of(6, split="test"))
    (tmp_path / NAME.replace(".arrow", ".json")).write_bytes(forged.to_bytes())
    with pytest.raises(ValueError, match="does not fit its record"):
        scores.load(f"{tmp_path}/{NAME}")


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_scores_that_are_no_numbers_are_not_published(tmp_path: Path, value: float) -> None:
    values = np.zeros((4, 3))
    values[2:, 1] = value
    with pytest.raises(ValueError, match="scores of image 2 are not finite"):
        scores.publish(Storage(str(tmp_path)), NAME, info_of(3), **columns(values))
    assert not list(tmp_path.rglob("*.*"))


def test_an_empty_split(tmp_path: Path) -> None:
    member(tmp_path, "a", np.zeros((0, 4)))
    read = scores.load(f"{tmp_path}/a/scores/x.arrow")
    assert read.scores.shape == (0, 4)


def test_the_key_names_everything_that_decides() -> None:
    base = ("w", "d", "val", {"name": "one_crop", "crop_px": 64})
    changed = [("x", *base[1:]), ("w", "x", *base[2:]), ("w", "d", "test", base[3]), (*base[:3], {"name": "one_crop"})]
    assert len({scores.key(*base), *(scores.key(*each) for each in changed)}) == 5
    assert len(scores.key(*base)) == 12


def test_a_record_is_plain(tmp_path: Path) -> None:
    published(str(tmp_path))
    plain = json.loads((tmp_path / NAME.replace(".arrow", ".json")).read_text())["record"]
    assert plain["info"]["classes"][0] == {"label": 0, "wnid": "n00000000", "ilsvrc_id": 6, "words": "thing 0"}
    assert plain["info"]["format"] == scores.FORMAT
