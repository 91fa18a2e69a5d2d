"""Building an ensemble: what is averaged and measured, what is refused, and that it is the same every time."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from orchestrator.data.shards import ClassInfo
from orchestrator.evaluation import ensemble, ranking, scores, submission
from orchestrator.evaluation.ensemble import Choice, Ensemble
from orchestrator.evaluation.scores import Scores
from orchestrator.storage import Storage
from tests.evaluation.score_files import info_of, member, softmax
from tests.evaluation.test_contest import in_memory
from tests.s3_server import BUCKET, S3Server

N, C = 80, 7


def three(folder: Path, split: str = "val", seed: int = 0, labelled: bool = True) -> list[Scores]:
    """Members a, b and c, of different worth; image 5 cannot be decoded."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, C, N)
    decoded = np.arange(N) != 5
    for name, hint in zip("abc", (2.0, 1.5, 0.2), strict=True):
        values = softmax(rng.normal(size=(N, C)) + hint * (np.arange(C) == labels[:, None]))
        truth = labels if labelled else None
        member(folder / split, name, values, truth, info={"split": split}, decoded=decoded)
    return [scores.load(f"{folder}/{split}/{name}/scores/x.arrow") for name in "abc"]


def build(files: Sequence[Scores], out: Path, **options: Any) -> Ensemble:
    return ensemble.build(files, Storage(str(out)), code_version="abc", **options)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


# -- what comes out ---------------------------------------------------------------------------------------------


def test_the_average_is_a_score_file(tmp_path: Path) -> None:
    val, test = three(tmp_path), three(tmp_path, "test", 1, labelled=False)
    made = build([*test, *val], tmp_path / "out")
    assert made.weights == {"a": 1.0, "b": 1.0, "c": 1.0}
    for split, files in (("val", val), ("test", test)):
        averaged = scores.load(f"{tmp_path}/out/{made.scores[split]}")
        mean = sum(f.scores.astype(np.float64) for f in files) / 3
        assert np.array_equal(averaged.scores, mean.astype(np.float32))
        assert averaged.names.equals(files[0].names)
        for column in ("labels", "decoded", "width", "height"):
            assert np.array_equal(getattr(averaged, column), getattr(files[0], column))
        assert [each["sha256"] for each in averaged.info.model["ensemble"]] == [f.sha256 for f in files]
        assert [each["model"] for each in averaged.info.model["ensemble"]] == [f.info.model for f in files]
        assert (averaged.info.split, averaged.info.protocol) == (split, files[0].info.protocol)
    assert made.errors == {"val": ranking.errors(scores.load(f"{tmp_path}/out/{made.scores['val']}"))}
    assert made.members[1].scores["test"] == {"url": test[1].url, "sha256": test[1].sha256}
    assert Ensemble.from_json(json.loads((tmp_path / "out/ensemble.json").read_text())) == made


def test_weights_are_used(tmp_path: Path) -> None:
    files = three(tmp_path)
    made = build(files, tmp_path / "out", choice=Choice.GIVEN, weights=[1, 0.5, 2])
    averaged = scores.load(f"{tmp_path}/out/{made.scores['val']}").scores
    by_hand = (files[0].scores + 0.5 * files[1].scores.astype(np.float64) + 2.0 * files[2].scores) / 3.5
    assert np.allclose(averaged, by_hand, rtol=1e-6, atol=0)
    assert made.weights == {"a": 1.0, "b": 0.5, "c": 2.0}


def test_the_same_input_gives_the_same_bytes(tmp_path: Path) -> None:
    files = [*three(tmp_path), *three(tmp_path, "test", 1, labelled=False)]
    build(files, tmp_path / "one", choice=Choice.GREEDY)
    build(files, tmp_path / "two", choice=Choice.GREEDY)
    one, two = contents(tmp_path / "one"), contents(tmp_path / "two")
    assert one == two
    assert {"ensemble.json", "report.json", "report.md", "figures/val.png"} < one.keys()
    assert len([name for name in one if name.startswith("scores/")]) == 4


def test_what_is_there_is_not_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = three(tmp_path)
    made = build(files, tmp_path / "out")
    before = contents(tmp_path / "out")
    monkeypatch.setattr(ensemble, "Contest", None)
    assert build(files, tmp_path / "out") == made
    monkeypatch.undo()
    record = made.scores["val"].replace(".arrow", ".json")
    for lost in ("figures/val.png", made.scores["val"], record):  # a kill before it was there, or somebody's hand
        (tmp_path / "out" / lost).unlink()
        build(files, tmp_path / "out")
        assert contents(tmp_path / "out") == before, lost
    (tmp_path / "out/ensemble.json").write_bytes(before["ensemble.json"][:100])
    build(files, tmp_path / "out")
    assert contents(tmp_path / "out") == before
    assert build(files, tmp_path / "out", seed=1).inputs != made.inputs
    assert build(files[:2], tmp_path / "out").weights == {"a": 1.0, "b": 1.0}


def test_in_an_object_store(s3: S3Server, tmp_path: Path) -> None:
    """The same bytes as on a disk, and a submission from there."""
    files = [*three(tmp_path), *three(tmp_path, "test", 1, labelled=False)]
    build(files, tmp_path / "out")
    bucket = Storage(f"s3://{BUCKET}/ensemble")
    made = ensemble.build(files, bucket, code_version="abc")
    assert {name: bucket.read(name) for name in bucket.find()} == contents(tmp_path / "out")
    assert ensemble.build(files, bucket, code_version="abc") == made
    file = scores.load(f"{bucket.url}/{made.scores['test']}")
    written = submission.write(file, bucket, "submission.txt", code_version="abc")
    bucket.read("submission.txt", written.sha256)


def test_one_member_is_an_ensemble(tmp_path: Path) -> None:
    (file, *_) = three(tmp_path)
    made = build([file], tmp_path / "out", choice=Choice.GREEDY)
    assert np.array_equal(scores.load(f"{tmp_path}/out/{made.scores['val']}").scores, file.scores)
    assert made.errors["val"] == ranking.errors(file)


def test_ensembles_of_ensembles(tmp_path: Path) -> None:
    a, b, c = three(tmp_path)
    made = build([a, b], tmp_path / "two")
    both = scores.load(f"{tmp_path}/two/{made.scores['val']}")
    of = build([both, c], tmp_path / "three", choice=Choice.GIVEN, weights=[2, 1])
    flat = build([a, b, c], tmp_path / "flat")
    nested, plain = (scores.load(f"{tmp_path}/{f}/{m.scores['val']}") for f, m in (("three", of), ("flat", flat)))
    assert np.allclose(nested.scores, plain.scores, rtol=1e-6, atol=0)
    assert list(of.weights) == ["ensemble", "c"]


def test_members_of_one_name_are_told_apart(tmp_path: Path) -> None:
    files = [replace(f, info=replace(f.info, model={"name": "r50", "n": i})) for i, f in enumerate(three(tmp_path))]
    names = list(build(files, tmp_path / "out").weights)
    assert len(set(names)) == 3
    assert all(name.startswith("r50 ") for name in names)


def test_greedy_leaves_out_what_does_not_help(tmp_path: Path) -> None:
    """A member that is right where the others are, and one that is always wrong."""
    labels = np.arange(40) % C
    good = 0.9 * np.eye(C)[labels] + 0.01
    bad = 0.9 * np.eye(C)[(labels + 1) % C] + 0.01
    member(tmp_path, "good", good, labels)
    member(tmp_path, "bad", bad, labels)
    files = [scores.load(f"{tmp_path}/{name}/scores/x.arrow") for name in ("bad", "good")]
    made = build(files, tmp_path / "out", choice=Choice.GREEDY)
    assert made.weights == {"good": 1.0}
    assert made.left_out == ("bad",)
    assert made.errors["val"] == (40, 0, 0)
    found = json.loads((tmp_path / "out/report.json").read_text())["val"]["labelled"]
    assert found["greedy"]["held_out"]["top1"] == {"value": 0.0, "low": 0.0, "high": 0.0}
    assert [m["without"] for m in found["members"]] == [None, None]


def test_the_report_by_hand(tmp_path: Path) -> None:
    """Four images of two classes, two members: a is wrong about images 1 and 2, b about 2 and 3."""
    labels = np.array([0, 0, 1, 1])
    a = np.array([[0.9, 0.1], [0.2, 0.8], [0.6, 0.4], [0.1, 0.9]])
    b = np.array([[0.9, 0.1], [0.9, 0.1], [0.6, 0.4], [0.6, 0.4]])
    member(tmp_path, "a", a, labels)
    member(tmp_path, "b", b, labels)
    build([scores.load(f"{tmp_path}/{name}/scores/x.arrow") for name in "ab"], tmp_path / "out", num_folds=2)
    split = json.loads((tmp_path / "out/report.json").read_text())["val"]
    assert split["agreement"] == [{"first": "a", "second": "b", "same_top1": 50.0, "both_wrong": 25.0}]
    found = split["labelled"]
    assert [s["top1_error"] for s in found["subsets"]] == [50.0, 50.0, 25.0]
    assert [s["members"] for s in found["subsets"]] == [["a"], ["b"], ["a", "b"]]
    assert [s["top5_error"] for s in found["subsets"]] == [0.0] * 3
    assert [m["gain"]["top1"]["value"] for m in found["members"]] == [-25.0, -25.0]
    assert [m["without"]["top1"]["value"] for m in found["members"]] == [25.0, 25.0]
    words = [("label", "taken_for", "num_images")]
    assert [tuple(c[key] for key in words[0]) for c in found["confused"]] == [(1, 0, 1)]
    assert [c["top1_error"] for c in found["classes"]] == [0.0, 50.0]
    text = (tmp_path / "out/report.md").read_text()
    assert "| **average** |  | 25.00 [" in text
    assert "| thing 1 | thing 0 | 1 |" in text


def test_many_members(tmp_path: Path) -> None:
    """Of more than ten not all subsets of six are tried, and the report says so."""
    rng = np.random.default_rng(0)
    for m in range(12):
        member(tmp_path, f"m{m}", softmax(rng.normal(size=(6, 3))), np.arange(6) % 3)
    build([scores.load(f"{tmp_path}/m{m}/scores/x.arrow") for m in range(12)], tmp_path / "out", num_folds=2)
    found = json.loads((tmp_path / "out/report.json").read_text())["val"]["labelled"]
    assert found["largest_subset"] == 4
    assert len(found["subsets"]) == 12 + 66 + 220 + 495
    assert "Subsets of more than 4 of the 12 members were left out" in (tmp_path / "out/report.md").read_text()


# -- what is refused --------------------------------------------------------------------------------------------


def test_an_empty_ensemble(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="needs at least one score file"):
        build([], tmp_path / "out")


def names(change: dict[int, str] | None = None, n: int = 6) -> list[str]:
    return [(change or {}).get(i, f"image_{i}.JPEG") for i in range(n)]


def classes(**changed: Any) -> tuple[ClassInfo, ...]:
    known = info_of(3).classes
    return (*known[:2], replace(known[2], **changed))


@pytest.mark.parametrize(
    ("info", "columns", "says"),
    [
        ({}, {"names": names({4: "other.JPEG"})}, "the first difference is in row 4: image_4.JPEG and other.JPEG"),
        ({}, {"names": names({1: "image_2.JPEG", 2: "image_1.JPEG"})}, "the same images in another order: .* row 1"),
        ({}, {"labels": np.array([0, 1, 2, 0, 1, 1])}, r"label of image_5.JPEG \(row 5\) is 2 and 1"),
        ({}, {"labels": np.full(6, -1)}, r"label of image_0.JPEG \(row 0\) is 0 and -1"),
        ({}, {"width": np.array([60] * 5 + [61], np.int32)}, "width of image_5.JPEG .* is 60 and 61"),
        ({"classes": classes(wnid="n99999999")}, {}, r"class 2 is n00000002 \(.*\) and n99999999"),
        ({"classes": classes(ilsvrc_id=77)}, {}, "class 2 is .*ILSVRC id 1.* and .*ILSVRC id 77"),
        ({"protocol": {"kind": "one_crop", "crop_px": 64}}, {}, 'kind: "ten_crop" → "one_crop"'),
        ({"data": {"url": "/b", "sha256": "e" * 64}}, {}, r"two data sets: /data/set \(d+…\) and /b \(e+…\)"),
        ({"split": "test"}, {}, "no score file of .* for the split"),
    ],
)
def test_what_does_not_fit_together(tmp_path: Path, info: dict[str, Any], columns: dict[str, Any], says: str) -> None:
    values, labels = np.random.default_rng(0).random((2, 6, 3)), np.arange(6) % 3
    known = {"names": names(), "labels": labels.astype(np.int32)}
    member(tmp_path, "a", values[0], **known)
    member(tmp_path, "b", values[1], info=info, **{**known, **columns})
    files = [scores.load(f"{tmp_path}/{name}/scores/x.arrow") for name in "ab"]
    with pytest.raises(ValueError, match=says) as told:
        build(files, tmp_path / "out")
    if "split" not in info:
        assert f"{files[0].url} and {files[1].url}" in str(told.value)
    assert not (tmp_path / "out").exists()


def test_fewer_images_or_classes(tmp_path: Path) -> None:
    for name, n, c in (("a", 6, 3), ("b", 5, 3), ("c", 6, 4)):
        member(tmp_path, name, np.random.default_rng(n).random((n, c)))
    a, b, c = (scores.load(f"{tmp_path}/{name}/scores/x.arrow") for name in "abc")
    with pytest.raises(ValueError, match=r"6 and 5 images; .* row 5: image_0005.JPEG and no image"):
        build([a, b], tmp_path / "out")
    with pytest.raises(ValueError, match="not have the same classes: 3 and 4"):
        build([a, c], tmp_path / "out")


def test_the_same_member_twice(tmp_path: Path) -> None:
    a, b, _ = three(tmp_path)
    with pytest.raises(ValueError, match="are the same scores"):
        build([a, b, a], tmp_path / "out")
    again = replace(a, sha256="1" * 64, url="other")
    with pytest.raises(ValueError, match="scores of the same weights on val"):
        build([a, b, again], tmp_path / "out")
    one_crop = replace(again, info=replace(a.info, protocol={"kind": "one_crop"}))
    with pytest.raises(ValueError, match="were not tested alike"):
        build([a, b, one_crop], tmp_path / "out")


def test_splits_of_different_protocols(tmp_path: Path) -> None:
    val, test = three(tmp_path), three(tmp_path, "test", 1, labelled=False)
    other = [replace(f, info=replace(f.info, protocol={"kind": "one_crop"})) for f in test]
    with pytest.raises(ValueError, match="were not tested alike"):
        build([*val, *other], tmp_path / "out")
    with pytest.raises(ValueError, match="no score file of c for the split test"):
        build([*val, *test[:2]], tmp_path / "out")


@pytest.mark.parametrize(
    ("weights", "says"),
    [([1.0, 2.0], "2 weights for 3"), ([1.0, 0.0, 1.0], "must be positive"), ([1.0, float("nan"), 1.0], "positive")],
)
def test_weights_that_cannot_be(tmp_path: Path, weights: list[float], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        build(three(tmp_path), tmp_path / "out", choice=Choice.GIVEN, weights=weights)


def test_greedy_without_truth(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a greedy choice needs images whose truth is known"):
        build(three(tmp_path, "test", labelled=False), tmp_path / "out", choice=Choice.GREEDY)
    assert not (tmp_path / "out").exists()


def test_an_image_that_a_member_has_not_decoded(tmp_path: Path) -> None:
    """Averaged over those that have; where none has, the class prior, and wrong."""
    labels, prior = np.zeros(3, int), [0.6, 0.4]
    a = in_memory(np.array([[0.9, 0.1], [0.8, 0.2], prior]), labels, decoded=np.array([True, True, False]))
    b = in_memory(np.array([[0.7, 0.3], prior, prior]), labels, decoded=np.array([True, False, False]))
    b = replace(b, sha256="1" * 64, info=replace(b.info, model={"name": "b"}))
    made = build([a, b], tmp_path / "out", num_folds=2)
    assert made.errors["val"] == (3, 1, 1)
    averaged = scores.load(f"{tmp_path}/out/{made.scores['val']}")
    assert averaged.decoded.tolist() == [True, True, False]
    assert np.allclose(averaged.scores, [[0.8, 0.2], [0.8, 0.2], prior])
    assert ranking.errors(averaged) == made.errors["val"]
    assert json.loads((tmp_path / "out/report.json").read_text())["val"]["num_undecodable"] == 1


# -- the same folder again, with other input, and after an interruption -------------------------------------------


def test_its_own_averages_are_no_members(tmp_path: Path) -> None:
    files = three(tmp_path)
    made = build(files, tmp_path / "out")
    average = scores.load(f"{tmp_path}/out/{made.scores['val']}")
    before = contents(tmp_path / "out")
    assert build([average, *files], tmp_path / "out") == made
    assert contents(tmp_path / "out") == before
    for given in ([average, *files], [files[2], average]):
        with pytest.raises(ValueError, match=r"an ensemble that contains the model of .*/x.arrow, which would count"):
            build(given, tmp_path / "another")
    whole = build([average], tmp_path / "two")
    nested = scores.load(f"{tmp_path}/two/{whole.scores['val']}")
    with pytest.raises(ValueError, match="an ensemble that contains the model of"):
        build([nested, files[0]], tmp_path / "another")
    assert not (tmp_path / "another").exists()


def test_damaged_files_are_made_again(tmp_path: Path) -> None:
    files = three(tmp_path)
    made = build(files, tmp_path / "out")
    before = contents(tmp_path / "out")
    for name in ("figures/val.png", "report.md", made.scores["val"]):
        damaged = bytearray(before[name])
        damaged[len(damaged) // 2] ^= 1
        (tmp_path / "out" / name).write_bytes(damaged)
        assert build(files, tmp_path / "out") == made
        assert contents(tmp_path / "out") == before, name


def test_an_interruption_between_two_ensembles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The report of other weights is never taken for that of the old ones."""
    files, out = three(tmp_path), tmp_path / "out"
    build(files, out)
    before = contents(out)

    def interrupted(*arguments: Any) -> bytes:
        raise KeyboardInterrupt

    monkeypatch.setattr("orchestrator.evaluation.figure.png", interrupted)
    with pytest.raises(KeyboardInterrupt):
        build(files, out, choice=Choice.GIVEN, weights=[1, 2, 3])
    monkeypatch.undo()
    assert contents(out)["report.md"] != before["report.md"]
    assert not (out / "ensemble.json").exists()
    build(files, out)
    assert contents(out) == before  # the averages of the other weights are gone too


def test_what_other_input_has_left_is_removed(tmp_path: Path) -> None:
    """But for what is no average: a run's own scores, in whose folder an ensemble was put."""
    files, out = three(tmp_path), tmp_path / "out"
    build([*files, *three(tmp_path, "extra", 1)], out)
    own = contents(tmp_path / "val/a")
    for name, data in own.items():
        (out / name).write_bytes(data)
    (out / "figures/other.png").write_bytes(b"somebody's")
    for folder in ("", "scores/", "figures/"):
        (out / f"{folder}.tmp-0123").write_bytes(b"what a killed writer has left")
    build(files[:2], out)
    build(files[:2], tmp_path / "alone")
    expected = contents(tmp_path / "alone") | own | {"figures/other.png": b"somebody's"}
    assert contents(out) == expected


def test_a_model_that_was_made_again_is_the_same_member(tmp_path: Path) -> None:
    """Weights tell members apart, not who finished the model when; a copied run is not another member."""

    def of(file: Scores, code: str, weights: str) -> Scores:
        model = {"name": "r50", "weights_sha256": weights, "code_version": code}
        return replace(file, sha256=f"{code}{weights}", info=replace(file.info, model=model))

    val, test = three(tmp_path), three(tmp_path, "test", 1, labelled=False)
    made = build([of(val[0], "1", "w"), of(test[0], "2", "w")], tmp_path / "out")
    assert list(made.weights) == ["r50"]
    with pytest.raises(ValueError, match="are scores of the same weights on val"):
        build([of(val[0], "1", "w"), of(val[1], "2", "w")], tmp_path / "out")


def test_a_greedy_choice_is_marked_where_it_was_made(tmp_path: Path) -> None:
    files = [*three(tmp_path), *three(tmp_path, "extra", 1)]
    made = build(files, tmp_path / "out", choice=Choice.GREEDY)
    text = (tmp_path / "out/report.md").read_text()
    assert text.count("** (chosen on these images) |") == 1
    assert text.index("## val") < text.index("(chosen on these images)") < text.index("## extra")
    found = json.loads((tmp_path / "out/report.json").read_text())["val"]["labelled"]["greedy"]["held_out"]
    assert made.held_out.keys() == {"val"}
    assert made.held_out["val"].top1_error == found["top1"]["value"]
    assert json.loads((tmp_path / "out/ensemble.json").read_text())["held_out"]["val"]["top1_error"] is not None
    plain = build(files, tmp_path / "plain")
    assert plain.held_out == {}
    assert "chosen on these images" not in (tmp_path / "plain/report.md").read_text()
