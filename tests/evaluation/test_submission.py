"""The classification file: its lines by hand, what is refused, and where it came from."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from orchestrator.data.shards import DataSet
from orchestrator.evaluation import ensemble, scores, submission
from orchestrator.evaluation.scores import Scores
from orchestrator.evaluation.submission import Format, Written
from orchestrator.storage import Storage
from tests.evaluation.score_files import info_of, member, softmax

OFFICIAL = "ILSVRC2012_test_{:08d}.JPEG"
# Three images of seven classes: label 6 first, then 5, …; ties; label 2 first.
VALUES = np.array([[0, 1, 2, 3, 4, 5, 6], [1, 1, 0, 0, 0, 0, 0], [3, 2, 9, 1, 0, 0, 0]], np.float32)


def scored(tmp_path: Path, names: list[str] | None = None, values: np.ndarray = VALUES, **changed: Any) -> Scores:
    member(tmp_path, "a", values, names=names or [OFFICIAL.format(i + 1) for i in range(len(values))], **changed)
    return scores.load(f"{tmp_path}/a/scores/x.arrow")


def write(file: Scores, out: Path, name: str = "s.txt", **options: Any) -> Written:
    return submission.write(file, Storage(str(out)), name, code_version="abc", **options)


def test_the_lines_by_hand(tmp_path: Path) -> None:
    """Label l has the ILSVRC id 7 − l here."""
    file = scored(tmp_path, info={"split": "test"})
    written = write(file, tmp_path)
    assert (tmp_path / "s.txt").read_text() == "1 2 3 4 5\n7 6 5 4 3\n5 7 6 4 3\n"
    assert (written.num_images, written.nbytes) == (3, 30)
    (note,) = written.notes
    assert note.startswith("3 images, where the whole of ILSVRC2012_test has 100000")


def test_kaggles_form(tmp_path: Path) -> None:
    file = scored(
        tmp_path, values=VALUES[:2, :2], width=np.array([500, 0], np.int32), height=np.array([375, 0], np.int32)
    )
    write(file, tmp_path, "s.csv", form=Format.KAGGLE)
    assert (tmp_path / "s.csv").read_text().splitlines() == [
        "ImageId,PredictionString",
        "ILSVRC2012_test_00000001,n00000001 0 0 500 375 n00000000 0 0 500 375",
        "ILSVRC2012_test_00000002,n00000000 0 0 1 1 n00000001 0 0 1 1",
    ]


def test_lines_are_in_file_name_order(tmp_path: Path) -> None:
    names = [OFFICIAL.format(i) for i in (3, 1, 2)]
    write(scored(tmp_path, names), tmp_path)
    assert (tmp_path / "s.txt").read_text() == "7 6 5 4 3\n5 7 6 4 3\n1 2 3 4 5\n"


def test_an_undecodable_image_gets_the_prior(tmp_path: Path) -> None:
    prior = np.array([0.1, 0.3, 0.05, 0.25, 0.2, 0.04, 0.06])
    written = write(scored(tmp_path, values=np.stack([prior]), decoded=np.array([False])), tmp_path)
    assert (tmp_path / "s.txt").read_text() == "6 4 3 7 1\n"
    assert any("1 images could not be decoded" in note for note in written.notes)


def test_the_same_input_gives_the_same_bytes(tmp_path: Path) -> None:
    file = scored(tmp_path)
    for folder in ("one", "two", "one"):
        write(file, tmp_path / folder)
    assert sorted(p.name for p in (tmp_path / "one").iterdir()) == ["s.txt", "s.txt.lineage.json"]
    for name in ("s.txt", "s.txt.lineage.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_lineage_leads_to_the_archives(tmp_path: Path) -> None:
    """Through an ensemble, one of whose members is an ensemble."""
    rng = np.random.default_rng(0)
    sources = [{"name": "ILSVRC2012_img_test.tar", "nbytes": 1, "md5": "e" * 32, "official": True}]
    data = {"url": "/data", "sha256": "d" * 64, "name": "ilsvrc2012", "sources": sources}
    files = []
    for name in "abc":
        model = {"name": name, "recipe": "resnet18", "weights_sha256": name * 64, "config": {"seed": ord(name)}}
        model |= {"checkpoint": f"/runs/{name}/checkpoints/7", "checkpoint_sha256": name * 64, "data_sha256": "d" * 64}
        member(tmp_path, name, softmax(rng.normal(size=(3, 7))), info={"model": model, "data": data, "split": "test"})
        files.append(scores.load(f"{tmp_path}/{name}/scores/x.arrow"))
    two = ensemble.build(files[:2], Storage(str(tmp_path / "two")), code_version="abc")
    both = scores.load(f"{tmp_path}/two/{two.scores['test']}")
    given = {"choice": ensemble.Choice.GIVEN, "weights": [2, 2]}
    three = ensemble.build([both, files[2]], Storage(str(tmp_path / "three")), code_version="abc", **given)
    file = scores.load(f"{tmp_path}/three/{three.scores['test']}")
    written = write(file, tmp_path)
    plain = json.loads((tmp_path / "s.txt.lineage.json").read_text())
    assert plain["file"] == {
        "name": "s.txt",
        "sha256": written.sha256,
        "nbytes": written.nbytes,
        "format": "ilsvrc",
        "images": 3,
    }
    assert plain["scores"]["sha256"] == file.sha256
    assert [(m["share"], m["model"]["name"]) for m in plain["models"]] == [(0.25, "a"), (0.25, "b"), (0.5, "c")]
    assert [m["scores"] for m in plain["models"]] == [{"url": f.url, "sha256": f.sha256} for f in files]
    assert [m["model"] for m in plain["models"]] == [f.info.model for f in files]
    assert plain["sources"] == sources
    assert plain["data"] == {"url": "/data", "sha256": "d" * 64, "name": "ilsvrc2012"}


# -- what is refused --------------------------------------------------------------------------------------------


def refused(tmp_path: Path, file: Scores, says: str, **options: Any) -> None:
    with pytest.raises(ValueError, match=says):
        write(file, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_classes_without_a_name(tmp_path: Path) -> None:
    """As a set made of image folders has them."""
    known = info_of(7).classes
    folders = tuple(replace(c, wnid=f"kind{c.label}", ilsvrc_id=None) for c in known)
    file = scored(tmp_path, info={"classes": folders})
    refused(tmp_path, file, r"7 of 7 classes have no ILSVRC2012_ID, first of them class 0 \(kind0\)")
    refused(tmp_path, file, "7 of 7 classes have no WordNet id", form=Format.KAGGLE)
    one = (*known[:5], replace(known[5], ilsvrc_id=None), known[6])
    refused(
        tmp_path,
        scored(tmp_path, info={"classes": one}),
        "1 of 7 classes have no ILSVRC2012_ID, first of them class 5",
    )


def test_missing_images(tmp_path: Path) -> None:
    file = scored(tmp_path, [OFFICIAL.format(i) for i in (1, 2, 5)])
    refused(tmp_path, file, "images are missing in .*: ILSVRC2012_test_00000003, ILSVRC2012_test_00000004: every line")
    refused(tmp_path, scored(tmp_path), "has 3 images where 100000 are expected", num_images=100_000)
    refused(tmp_path, scored(tmp_path, [OFFICIAL.format(1)] * 3), "two images of the name ILSVRC2012_test_00000001")
    assert write(scored(tmp_path, ["x.JPEG", "y.JPEG", "z.JPEG"]), tmp_path / "other").notes == ()


@pytest.mark.parametrize(
    ("names", "says"),
    [
        (["a/0.jpg", "b/0.jpg", "c/1.jpg"], r"the images a/0.jpg and b/0.jpg, which are both 0 in Kaggle's form"),
        (["x.JPEG", "x.jpg", "y.jpg"], r"the images x.JPEG and x.jpg, which are both x"),
        (["zoë.jpg", "a.jpg", "b.jpg"], r"the image 'zoë.jpg', whose name Kaggle's form cannot hold"),
        (["a,b.jpg", "a.jpg", "b.jpg"], r"the image 'a,b.jpg', whose name Kaggle's form cannot hold"),
    ],
)
def test_names_that_kaggles_form_cannot_hold(tmp_path: Path, names: list[str], says: str) -> None:
    file = scored(tmp_path, names)
    refused(tmp_path, file, says, form=Format.KAGGLE)
    write(file, tmp_path / "ilsvrc")
    assert len((tmp_path / "ilsvrc/s.txt").read_text().splitlines()) == 3


def test_scores_of_another_data_set(tmp_path: Path, data: DataSet) -> None:
    split, classes = data.split("test"), data.manifest.classes
    names = split.names.to_pylist()
    values = np.random.default_rng(0).random((len(names), len(classes)))
    member(tmp_path, "a", values, names=names, info={"split": "test", "classes": classes})
    file = scores.load(f"{tmp_path}/a/scores/x.arrow")
    assert write(file, tmp_path, data=data).num_images == len(names)
    fewer = replace(file, names=pa.array(names[:-2]), scores=file.scores[:-2], decoded=file.decoded[:-2])
    refused(tmp_path, fewer, rf"2 images are missing \({names[-2]}, {names[-1]}\)", data=data)
    renamed = replace(file, names=pa.array([*names[:-1], "zebra.JPEG"]))
    refused(tmp_path, renamed, r"1 images are missing .*; 1 are not in it \(zebra.JPEG\)", data=data)
    other = (*classes[:-1], replace(classes[-1], wnid="n99999999"))
    refused(tmp_path, replace(file, info=replace(file.info, classes=other)), "class 5 is n99999999 .* and n", data=data)
    refused(tmp_path, replace(file, info=replace(file.info, split="trial")), "has no split 'trial'", data=data)
