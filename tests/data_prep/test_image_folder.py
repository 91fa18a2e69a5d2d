"""Image folders: what users have in them, what becomes of it, and the same bytes however they were prepared."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import re
import shutil
import signal
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_prep import image_folder, preparation
from data_prep.folder_layout import read_layout
from data_prep.image_folder import Arguments, main, prepare
from data_prep.images import prepare_image
from data_prep.progress import odd_lines
from data_prep.verify import verify
from orchestrator.config import CropStyle
from orchestrator.data.decoder import DecodeSettings
from orchestrator.data.pipeline import EvalInput, Mean, TrainInput
from orchestrator.data.sampling import SampleStream
from orchestrator.data.shards import UNLABELLED, DataSet
from orchestrator.data.views import ColourAxes, TestView, TrainView
from orchestrator.remote import StoreUnreachableError
from orchestrator.storage import Storage
from tests import object_store
from tests.data.build import DECODED
from tests.data_prep.ending import run_ending

CROP = 16
COMMON = ["--crop", str(CROP), "--num-tasks", "0"]


def encoded(seed: int, kind: str = "JPEG", size: tuple[int, int] = (40, 30), **options: Any) -> bytes:
    """An image of ``size`` (width, height) that no other seed gives."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (3, 4, 3), dtype=np.uint8))
    stream = io.BytesIO()
    small.resize(size, Image.Resampling.BICUBIC).save(stream, kind, **options)
    return stream.getvalue()


def write(folder: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return folder


def flat(counts: dict[str, int]) -> dict[str, bytes]:
    names = [f"{label}/{k}.jpg" for label, count in counts.items() for k in range(count)]
    return {name: encoded(k) for k, name in enumerate(names)}


TREE = {
    **{f"train/cat/{k}.jpg": encoded(k) for k in range(9)},
    **{f"train/ant/sub/{k}.JPG": encoded(100 + k) for k in range(7)},
    **{f"val/cat/deep/er/{k}.jpeg": encoded(200 + k) for k in range(3)},
    **{f"val/ant/{k}.jpg": encoded(300 + k) for k in range(2)},
    **{f"test/{k % 2}/{k}.jpg": encoded(400 + k) for k in range(4)},
}


@dataclass(frozen=True)
class Prepared:
    folder: Path
    out: Path
    tree: dict[str, bytes]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``TREE`` on disk. Not to be changed."""
    return write(tmp_path_factory.mktemp("folder") / "animals", TREE)


@pytest.fixture(scope="module")
def prepared(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    """``folder`` in shards of 5 images, prepared in one go. Not to be changed."""
    out = tmp_path_factory.mktemp("prepared") / "o"
    prepare(Arguments(folder=str(folder), out=str(out), crop=CROP, num_tasks=0, images_per_shard=5))
    return Prepared(folder, out, {str(p.relative_to(out)): p.read_bytes() for p in sorted(out.rglob("*.*"))})


def data_set(out: Path) -> DataSet:
    return DataSet(Storage(str(out)))


def content(data: DataSet, split: str) -> dict[str, tuple[bytes, str]]:
    """Name → (bytes, class) of a split."""
    read = data.split(split)
    classes = {c.label: c.wnid for c in data.manifest.classes} | {UNLABELLED: ""}
    images = read.read(np.arange(len(read)))
    names = zip(read.names.to_pylist(), images, read.label.tolist(), strict=True)
    return {name: (image.tobytes(), classes[label]) for name, image, label in names}


def prepared_from(tmp_path: Path, files: dict[str, bytes], *options: str) -> DataSet:
    write(tmp_path / "f", files)
    assert main([str(tmp_path / "f"), "--out", str(tmp_path / "o"), *COMMON, *options]) == 0
    return data_set(tmp_path / "o")


# -- what is prepared -----------------------------------------------------------------------------------------------


def test_every_image_goes_to_its_split_and_class(prepared: Prepared) -> None:
    data = data_set(prepared.out)
    assert [(c.label, c.wnid, c.ilsvrc_id) for c in data.manifest.classes] == [(0, "ant", None), (1, "cat", None)]
    assert data.manifest.name == "animals"
    for split in ("train", "val", "test"):
        files = {name: image for name, image in TREE.items() if name.startswith(split)}
        labels = {name: "" if split == "test" else name.split("/")[1] for name in files}
        assert content(data, split) == {name: (files[name], labels[name]) for name in files}
    assert data.manifest.odd == ()
    assert data.statistics()["mean_image"].shape == (3, CROP, CROP)


def test_every_shard_mixes_classes(prepared: Prepared) -> None:
    train = data_set(prepared.out).split("train")
    assert [shard.count for shard in train.info.shards] == [5, 5, 5, 1]
    assert [len(set(train.label[train.shard == shard].tolist())) for shard in range(3)] == [2, 2, 2]
    assert data_set(prepared.out).split("test").names.to_pylist() == sorted(n for n in TREE if n.startswith("test"))


def test_some_are_set_aside_by_class(tmp_path: Path) -> None:
    counts = {"one": 1, "two": 2, "five": 5, "many": 40}
    files = flat(counts)
    data = prepared_from(tmp_path, files)
    train, val = content(data, "train"), content(data, "val")
    assert {**train, **val} == {name: (image, name.split("/")[0]) for name, image in files.items()}
    assert not train.keys() & val.keys()
    assert Counter(label for _, label in val.values()) == {"two": 1, "five": 1, "many": 4}
    more = prepared_from(tmp_path / "more", files, "--val-fraction", "0.5")
    assert Counter(label for _, label in content(more, "val").values()) == {"two": 1, "five": 2, "many": 20}


def test_train_without_val(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    data = prepared_from(tmp_path, {f"train/{name}": image for name, image in flat({"a": 10, "b": 10}).items()})
    assert {name: info.count for name, info in data.manifest.splits.items()} == {"train": 18, "val": 2}
    assert "no val/: 2 of 20 images of train are set aside" in capsys.readouterr().out


def test_names_and_seed_alone_decide(tmp_path: Path) -> None:
    def splits(folder: Path, seed: int = 0) -> dict[str, list[str]]:
        layout = read_layout(Storage(str(folder)), val_fraction=None, seed=seed)
        return {split: [file.name for file in files] for split, files in layout.splits.items()}

    files = flat({"a": 30, "b": 30})
    one = splits(write(tmp_path / "one", files))
    assert splits(write(tmp_path / "other", dict(reversed(files.items())))) == one
    assert splits(tmp_path / "one", seed=1)["val"] != one["val"]
    assert splits(tmp_path / "one", seed=1)["train"] != one["train"]
    # An image more leaves the others where they were.
    more = splits(write(tmp_path / "other", {"a/another.jpg": encoded(1000)}))
    assert set(one["val"]) - {"a/another.jpg"} >= set(more["val"]) - {"a/another.jpg"}
    assert [name for name in more["train"] if name in one["train"]] == [n for n in one["train"] if n in more["train"]]


def test_odd_names(tmp_path: Path) -> None:
    names = [
        "x.jpg",
        "x.png",
        "x.y.jpg",
        "x_y.jpg",
        "a b #1?*[2]%20.jpg",
        "größe – 写真.jpg",
        "-rf.jpg",
        "new\nline.jpg",
    ]
    names += ["back\\slash.jpg", "l" * 150 + ".jpg", "'quoted\".jpg", "UPPER.JPG", "v1.2/same.jpg", "v1_2/same.jpg"]
    files = {f"the cat #1.5/{name}": encoded(k, "PNG" if "png" in name else "JPEG") for k, name in enumerate(names)}
    data = prepared_from(tmp_path, {**files, **flat({"dog": 3})}, "--val-fraction", "0.3")
    found = {**content(data, "train"), **content(data, "val")}
    assert found.keys() >= files.keys()
    for name, image in files.items():
        assert (found[name][0] == image) == (not name.endswith("png"))
        assert found[name][1] == "the cat #1.5"
    for shard in tmp_path.glob("o/*/*.tar"):
        assert b"the cat #1_5/" in shard.read_bytes()


def test_large_images_are_made_smaller(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned, which is ignored
    gray = io.BytesIO()
    Image.open(io.BytesIO(encoded(7, size=(200, 100)))).convert("L").save(gray, "JPEG")
    large = {
        "a/wide.jpg": encoded(1, size=(300, 200)),
        "a/high.jpg": encoded(2, size=(90, 181), exif=exif),
        "a/gray.jpg": gray.getvalue(),
        "b/large.png": encoded(3, "PNG", size=(120, 120)),
    }
    small = {"b/exact.jpg": encoded(4, size=(60, 45)), "b/small.jpg": encoded(5, size=(20, 10))}
    data = prepared_from(tmp_path, {**large, **small, **flat({"c": 2})}, "--max-side", "60")
    found = {**content(data, "train"), **content(data, "val")}
    splits = [data.split("train"), data.split("val")]
    assert all(found[name][0] == image for name, image in small.items())
    for name, size in [("a/wide", (60, 40)), ("a/high", (30, 60)), ("a/gray", (60, 30)), ("b/large", (60, 60))]:
        name = next(n for n in large if n.startswith(name))
        image = Image.open(io.BytesIO(found[name][0]))
        assert (image.format, image.size, image.mode) == ("JPEG", size, "L" if "gray" in name else "RGB")
        assert image.getexif() == {}
        expected = Image.open(io.BytesIO(large[name])).resize(size, Image.Resampling.BOX)
        difference = np.asarray(image, np.float64) - np.asarray(expected, np.float64)
        assert np.abs(difference).mean() < 4
        rows = [(s, s.names.to_pylist().index(name)) for s in splits if name in s.names.to_pylist()]
        assert [(s.width[row], s.height[row]) for s, row in rows] == [size]
    assert sum(kinds.get("resized", 0) for kinds in data.manifest.counted.values()) == 4
    printed = capsys.readouterr().out
    assert "resized: 4 images, to 60 pixels at most" in printed
    assert "wide.jpg" not in printed  # not odd
    assert "a/high.jpg: turned, resized to 30 × 60: EXIF orientation 6 is ignored" in printed


def test_shrinking_is_antialiased() -> None:
    """Stripes of one pixel become gray, not stripes of another width."""
    stripes = np.zeros((200, 300, 3), np.uint8)
    stripes[:, ::2] = 255
    stream = io.BytesIO()
    Image.fromarray(stripes).save(stream, "PNG")
    found = prepare_image(stream.getvalue(), with_pixels=True, max_side=100)
    assert found.pixels is not None
    assert (found.width, found.height, found.resized) == (100, 67, True)
    assert np.abs(np.asarray(found.pixels)[:, 2:-2].astype(float) - 127).max() < 25


# -- the same bytes, however ----------------------------------------------------------------------------------------


def test_killed_again_and_again_it_ends_with_the_same_bytes(prepared: Prepared, tmp_path: Path, tree: Callable) -> None:
    out = tmp_path / "o"
    arguments = [str(prepared.folder), "--out", str(out), *COMMON, "--images-per-shard", "5"]
    for where, name, nth in [
        ("inside", "train/", 2),
        ("after", "train/", 2),
        ("inside", "val.arrow", 1),
        ("inside", "manifest.json", 1),
    ]:
        ended = run_ending("data_prep.image_folder", arguments, where, name, nth)
        assert ended.returncode == -signal.SIGKILL, ended.stderr
        assert not (out / "manifest.json").exists()
    ended = run_ending("data_prep.image_folder", arguments, "inside", "statistics", 1, "SIGINT")
    assert (ended.returncode, ended.stderr) == (130, "interrupted: the same command goes on from here\n")
    assert main(arguments) == 0
    assert tree(out) == prepared.tree


def test_an_object_store_gives_the_same_bytes(prepared: Prepared) -> None:
    objects = object_store.Bucket.objects
    objects.clear()
    for name, data in TREE.items():
        objects[f"bucket/animals/{name}"] = data
    folder, out = "bucket://bucket/animals", "bucket://bucket/out"
    prepare(Arguments(folder, out, crop=CROP, num_tasks=0, images_per_shard=5))
    found = {n.removeprefix("bucket/out/"): d for n, d in objects.items() if n.startswith("bucket/out/")}
    objects.clear()
    assert found == prepared.tree


def test_a_finished_data_set_is_recognized(prepared: Prepared, capsys: pytest.CaptureFixture) -> None:
    stamps = {p: p.stat().st_mtime_ns for p in prepared.out.rglob("*")}
    assert main([str(prepared.folder), "--out", str(prepared.out), *COMMON, "--images-per-shard", "5"]) == 0
    printed = capsys.readouterr().out
    assert "already finished" in printed
    assert "test/ is taken without labels" in printed
    assert {p: p.stat().st_mtime_ns for p in prepared.out.rglob("*")} == stamps


@pytest.mark.parametrize("finished", [True, False])
def test_another_preparation_is_refused(
    prepared: Prepared, tmp_path: Path, tree: Callable, capsys: pytest.CaptureFixture, finished: bool
) -> None:
    out, folder = tmp_path / "o", Path(shutil.copytree(prepared.folder, tmp_path / "animals"))
    options = [*COMMON, "--images-per-shard", "5"]
    if finished:
        shutil.copytree(prepared.out, out)
    else:
        ended = run_ending("data_prep.image_folder", [str(folder), "--out", str(out), *options], "after", "train/", 2)
        assert ended.returncode == -signal.SIGKILL
    before = tree(out)
    write(folder, {"train/cat/new.jpg": encoded(7)})
    for source, changed, what in [
        (folder, options, r'another content \(\{"images": 25, .*now \{"images": 26'),
        (prepared.folder, [*options, "--seed", "1"], r"another seed \(0, now 1\)"),
        (prepared.folder, [*options, "--max-side", "99"], r"another max_side \(null, now 99\)"),
        (prepared.folder, COMMON, r"another images_per_shard \(5, now 1000\)"),
        (prepared.folder, [*options, "--name", "x"], r"another name"),
    ]:
        assert main([str(source), "--out", str(out), *changed]) == 2
        message = capsys.readouterr().err
        assert re.search(what, message), message
        assert ("a finished data set" if finished else "an unfinished preparation") in message
        assert message.endswith("give another --out, or delete that folder to start over\n")
    assert tree(out) == before


def test_a_file_that_changes_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write(tmp_path / "f", flat({"a": 4, "b": 4}))
    plan = image_folder.plan

    def spoil(*arguments: Any) -> Any:
        (folder / "a/0.jpg").write_bytes(encoded(99, size=(70, 70)))
        return plan(*arguments)

    monkeypatch.setattr(image_folder, "plan", spoil)
    with pytest.raises(ValueError, match=r"a/\d.jpg has changed since the folder was listed: .*new --out"):
        prepare(Arguments(str(folder), str(tmp_path / "o"), crop=CROP, num_tasks=0))
    assert not (tmp_path / "o" / "manifest.json").exists()


def of_equal_size(path: Path, seed: int) -> bytes:
    """Another image, of as many bytes as the file at ``path`` has; writes it there, with another time."""
    size, time_ns = path.stat().st_size, path.stat().st_mtime_ns
    data = encoded(seed, size=(20, 15)).ljust(size, b"\0")
    assert len(data) == size
    path.write_bytes(data)
    os.utime(path, ns=(time_ns - 10**9, time_ns - 10**9))  # older: a copy, say
    return data


def test_a_file_replaced_before_the_end(prepared: Prepared, tmp_path: Path) -> None:
    """Of the same size, after its shard was written: that one is written again, the others are not."""
    folder, out = Path(shutil.copytree(prepared.folder, tmp_path / "animals")), tmp_path / "o"
    arguments = [str(folder), "--out", str(out), *COMMON, "--images-per-shard", "5"]
    ended = run_ending("data_prep.image_folder", arguments, "after", "train.arrow", 1)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    inodes = {p.name: p.stat().st_ino for p in out.glob("*/*.tar")}
    data = of_equal_size(folder / "train/cat/3.jpg", 999)
    assert main(arguments) == 0
    assert content(data_set(out), "train")["train/cat/3.jpg"] == (data, "cat")
    assert sum(p.stat().st_ino != inodes[p.name] for p in out.glob("*/*.tar")) == 1
    assert verify(Storage(str(out)), num_tasks=0).problems == []


def test_a_file_replaced_while_others_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    folder, written = write(tmp_path / "f", flat({"a": 4, "b": 4})), list[str]()
    write_part = preparation.write_part

    def replacing(unit: Any, *arguments: Any) -> Any:
        part = write_part(unit, *arguments)
        if not written:
            of_equal_size(folder / unit.source.files[0].name, 999)
        written.append(unit.stem)
        return part

    monkeypatch.setattr(preparation, "write_part", replacing)
    arguments = [str(folder), "--out", str(tmp_path / "o"), *COMMON, "--images-per-shard", "2"]
    assert main(arguments) == 2
    message = r"files of '.*' were changed while they were read: 1 \([ab]/\d.jpg\): when nothing writes .*, run again\n"
    assert re.search(message, capsys.readouterr().err)
    done = len(written)
    assert main(arguments) == 0
    assert written[done:] == [written[0]]


def test_a_finished_data_set_tells_of_newer_files(
    prepared: Prepared, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    folder, out = tmp_path / "animals", tmp_path / "o"
    shutil.copytree(prepared.folder, folder)
    shutil.copytree(prepared.out, out)
    os.utime(folder / "val/ant/1.jpg", (2**32, 2**32))
    assert main([str(folder), "--out", str(out), *COMMON, "--images-per-shard", "5"]) == 0
    printed = capsys.readouterr().out
    assert "already finished" in printed
    message = r"warning: files of '.*animals' are newer than the data set: 1 \(val/ant/1.jpg\): .* into a new --out\n"
    assert re.search(message, printed)


def test_leaks_are_told(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    prepared_from(tmp_path, {**TREE, "val/cat/leak.jpg": TREE["train/cat/3.jpg"]})
    line = "warning: leak: images of val that are in train too: 1 (train/cat/3.jpg = val/cat/leak.jpg)\n"
    assert line in capsys.readouterr().out


def test_classes_behind_links(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    pool = write(tmp_path / "pool", flat({"a": 4, "b": 4, "c": 4}))
    folder = write(tmp_path / "f", {"train/own/1.jpg": encoded(900), "val/own/1.jpg": encoded(901)})
    for split, classes in (("train", "abc"), ("val", "ab")):
        for name in classes:
            (folder / split / name).symlink_to(pool / name)
    (folder / "val" / "again").symlink_to(pool / "a")
    (folder / "train" / "again").symlink_to(pool / "a")
    assert main([str(folder), "--out", str(tmp_path / "o"), *COMMON]) == 0
    splits = data_set(tmp_path / "o").manifest.splits
    assert {name: info.count for name, info in splits.items()} == {"train": 17, "val": 13}
    (tmp_path / "nothing").mkdir()
    (folder / "train" / "empty").symlink_to(tmp_path / "nothing")
    assert main([str(folder), "--out", str(tmp_path / "o2"), *COMMON]) == 2
    assert re.search(r"class folders without images in .*: 1 \(empty\)", capsys.readouterr().err)


# -- storage that fails ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (
            OSError(errno.ENOSPC, "No space left on device"),
            2,
            r"no space is left in '\S*/o' of \S+ \(No space left on device\): make room there, then the same command",
        ),
        (OSError(errno.EIO, "Input/output error"), 1, r"OSError: \[Errno 5\] Input/output error: run again to go on"),
        (StoreUnreachableError("s3://b: no answer for 300 s: the same command goes on later"), 1, "s3://b: .*later"),
        (ValueError("mend it"), 2, "mend it"),
    ],
)
@pytest.mark.parametrize("place", ["a unit", "the end"])
def test_what_fails_under_way(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
    error: Exception,
    code: int,
    message: str,
    place: str,
) -> None:
    def fail(*arguments: Any, **options: Any) -> None:
        raise error

    monkeypatch.setattr(*((preparation, "write_part") if place == "a unit" else (image_folder, "assemble")), fail)
    assert main([str(folder), "--out", str(tmp_path / "o"), *COMMON]) == code
    captured = capsys.readouterr().err
    assert re.fullmatch(rf"error: {message}[^\n]*\n", captured), captured
    assert captured.count("goes on") + captured.count("go on") <= 1


def test_a_killed_probe_does_not_stay(folder: Path, tmp_path: Path, tree: Callable, prepared: Prepared) -> None:
    out = tmp_path / "o"
    arguments = [str(folder), "--out", str(out), *COMMON, "--images-per-shard", "5"]
    assert run_ending("data_prep.image_folder", arguments, "after", "probe-", 1).returncode == -signal.SIGKILL
    assert len(list(out.iterdir())) == 1
    assert main(arguments) == 0
    assert tree(out) == prepared.tree


# -- odd files ------------------------------------------------------------------------------------------------------


def test_every_odd_file_is_named(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    files = {
        **TREE,
        "README": b"about",
        "other/a/1.jpg": encoded(1),
        "train/Thumbs.db": b"db",
        "train/cat/notes.txt": b"text",
        "train/cat/live.HEIC": b"heic",
        "train/cat/text.jpg": b"no image",
        "val/ant/empty.png": b"",
        "val/ant/p.png": encoded(500, "PNG"),
        "test/list\x1b[2J.csv": b"",
        ".hidden/x.jpg": b"",
        "train/cat/._x.jpg": b"",
    }
    data = prepared_from(tmp_path, files)
    printed = capsys.readouterr().out
    for line in [
        "odd images: 1 png, 2 undecodable",
        "train/cat/text.jpg: undecodable, left out (no image format)",
        "val/ant/empty.png: undecodable, counted as wrong (empty file)",
        "val/ant/p.png: png, re-encoded as RGB JPEG, quality 95, 4:4:4",
        "passed over: 6 that are no images of the set",
        "README: no extension of an image",
        "other/: lies outside train/, val/ and test/ (files: 1)",
        "train/Thumbs.db: .db is no extension of an image that is read",
        "train/cat/notes.txt: .txt is no extension",
        "train/cat/live.HEIC: .HEIC is no extension",
        r"test/list\x1b[2J.csv: .csv is no extension",
    ]:
        assert line in printed
    # A later reader sees the same.
    assert all(line in printed.splitlines() for line in odd_lines(data.manifest))
    assert data.split("train").label.tolist().count(1) == 9
    assert (data.split("val").decodable == 0).sum() == 1
    assert len(data.split("val")) == 7


def test_long_lists_are_cut(tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_folder, "_MAX_LISTED", 55)
    files = {f"{label}/{k:02d}.png": encoded(k, "PNG", (20, 20)) for label in "ab" for k in range(40)}
    data = prepared_from(tmp_path, {**files, **{f"a/{k:03d}.xml": b"" for k in range(60)}})
    printed = capsys.readouterr().out
    assert "odd images: 80 png" in printed
    assert len(re.findall(r"png: png, re-encoded", printed)) == 50
    assert 'and 30 more: see "odd" and "counted" in manifest.json' in printed
    assert "passed over: 60" in printed
    assert data.manifest.counted == {"": {"passed over": 60}, "train": {"png": 72}, "val": {"png": 8}}
    assert Counter((o.split, o.what) for o in data.manifest.odd) == {
        ("", "passed over"): 55,
        ("train", "png"): 55,
        ("val", "png"): 8,
    }


def test_too_many_undecodable(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder = write(tmp_path / "f", {**TREE, "train/cat/0.jpg": b"", "train/cat/1.jpg": b"?"})
    command = [str(folder), "--out", str(tmp_path / "o"), *COMMON]
    assert main(command) == 2
    message = capsys.readouterr().err
    assert "2 of 16 images of train cannot be decoded, 1 are allowed: are these files damaged?" in message
    assert "archive" not in message
    assert "  train/cat/0.jpg: left out (empty file)\n" in message
    assert not (tmp_path / "o" / "manifest.json").exists()
    suggested = re.search(r"--max-undecodable (\S+)", message)
    assert suggested is not None
    assert main([*command, "--max-undecodable", suggested[1]]) == 0


def test_a_class_of_broken_images_is_told(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    prepared_from(tmp_path, {**TREE, "train/bee/1.jpg": b""})
    printed = capsys.readouterr().out
    assert "warning: no training image of bee can be decoded" in printed
    assert "warning: classes without a validation image: 1 of 3 (bee)" in printed


# -- wrong input ----------------------------------------------------------------------------------------------------


def renamed(**names: str) -> dict[str, bytes]:
    """``TREE`` with other names for some of its splits; "": without it."""
    files = {(names.get(name.split("/")[0], name.split("/")[0]), name.partition("/")[2]): d for name, d in TREE.items()}
    return {f"{split}/{name}": data for (split, name), data in files.items() if split}


FLAT = flat({"a": 3, "b": 3})
JPEG = encoded(1)


@pytest.mark.parametrize(
    ("files", "options", "message"),
    [
        ({}, [], "no files in .*: give a folder with train/<class>/"),
        ({"a.jpg": JPEG, "b.jpg": JPEG}, [], r"images directly in .*in no class folder: 2 \(a.jpg, b.jpg\): move"),
        ({**FLAT, "x.jpg": JPEG}, [], "images directly in"),
        ({**TREE, "train/x.jpg": JPEG}, [], r"images directly in '.*/train', .*: 1 \(train/x.jpg\)"),
        ({**TREE, "val/x.jpg": JPEG}, [], "images directly in '.*/val'"),
        ({"a/x.txt": b"", "b/y.txt": b""}, [], "no class folders with images in .*images end in .jpg"),
        ({"a/1.jpg": JPEG, "a/2.jpg": JPEG}, [], r"a single class \(a\), .*or is .*/a the folder that was meant\?"),
        ({**FLAT, "c/x.txt": b""}, [], r"class folders without images in .*: 1 \(c\): fill them, or remove them"),
        ({**FLAT, "c/": b""}, [], r"class folders without images in .*: 1 \(c\)"),
        ({**TREE, "val/fox/1.jpg": JPEG}, [], r"classes of val/ that train/ lacks: 1 \(fox\): add them"),
        ({**TREE, "val/Cat/1.jpg": JPEG}, [], "class folders 'Cat' and 'cat' differ only in upper and lower case"),
        ({**FLAT, "é/1.jpg": JPEG, "e\u0301/1.jpg": JPEG}, [], r"differ only in .*the coding of accents"),
        ({n: d for n, d in TREE.items() if n[0] == "v"}, [], "has val/ but no train/"),
        (renamed(val="Valid"), [], r"under these names: rename Valid/ to val/ \(or otherwise, if these are classes\)$"),
        (renamed(train="Train", val="Test", test=""), [], r"rename Test/ to test/, Train/ to train/ \("),
        (renamed(train="training", val="testing", test=""), [], r"rename testing/ to test/, training/ to train/ \("),
        (renamed(val="Test", test=""), [], r"rename Test/ to test/ \("),
        (renamed(val="valid", test=""), [], r"rename valid/ to val/ \("),
        (renamed(test="Test"), [], r"rename Test/ to test/ \("),
        ({**FLAT, "test/1.jpg": JPEG}, [], r"has test/ beside class folders: is it a class \(rename it\)"),
        (flat({"a": 1, "b": 1}), [], "no class has two images"),
        (TREE, ["--val-fraction", "0.2"], "--val-fraction sets images aside .*has val/: leave it out"),
        (FLAT, ["--val-fraction", "1"], "--val-fraction is a fraction between 0 and 1, not 1.0"),
        (FLAT, ["--max-side", "0"], "--max-side"),
        (FLAT, ["--images-per-shard", "0"], "--images-per-shard"),
        (FLAT, ["--crop", "0"], "--crop"),
        (FLAT, ["--out", "INSIDE"], "lies inside .*whose images it would join: give another --out"),
        (FLAT, ["--out", "ITSELF"], "lies inside .*whose images it would join: give another --out"),
        (FLAT, ["--out", "LINKED"], "lies inside .*whose images it would join: give another --out"),
        (FLAT, ["--out", "ABOVE"], "FOLDER .* lies inside --out .*: give another --out"),
        (FLAT, ["--out", "memory://x"], "invisible to other processes"),
        (FLAT, ["--out", "USED"], "is not empty"),
    ],
)
def test_wrong_input(
    tmp_path: Path, capsys: pytest.CaptureFixture, files: dict[str, bytes], options: Iterable[str], message: str
) -> None:
    folder, used = tmp_path / "f", tmp_path / "used"
    (folder / "c").mkdir(parents=True) if "c/" in files else folder.mkdir()
    write(folder, {name: data for name, data in files.items() if not name.endswith("/")})
    write(used, {"thesis.tex": b""})
    (tmp_path / "link").symlink_to(folder)
    places = {"INSIDE": str(folder / "o"), "USED": str(used), "ITSELF": str(folder), "ABOVE": str(tmp_path)}
    places["LINKED"] = str(tmp_path / "link" / "o")
    arguments = [str(folder), "--out", str(tmp_path / "o"), *COMMON, *(places.get(o, o) for o in options)]
    before = sorted(tmp_path.rglob("*"))
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert re.search(message, error), error
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_names_that_are_no_text(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder = write(tmp_path / "f", FLAT)
    with open(os.fsencode(folder) + b"/a/caf\xe9.jpg", "wb") as stream:
        stream.write(JPEG)
    assert main([str(folder), "--out", str(tmp_path / "o"), *COMMON]) == 2
    assert r"file names that are not UTF-8: 1, such as 'a/caf\udce9.jpg': rename them" in capsys.readouterr().err


def test_nothing_there(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main([str(tmp_path / "nowhere"), "--out", str(tmp_path / "o"), *COMMON]) == 2
    assert main([__file__, "--out", str(tmp_path / "o"), *COMMON]) == 2
    assert main(["nosuch://bucket/x", "--out", str(tmp_path / "o"), *COMMON]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert re.search("there is no folder .*nowhere': check FOLDER", errors[0])
    assert re.search("FOLDER .* is a file: give the folder that it lies in", errors[1])
    assert "cannot be opened" in errors[2]
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_foreseen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write(
        tmp_path / "f", {f"{label}/{k}.png": encoded(k, "PNG", (300, 300)) for label in "ab" for k in (1, 2)}
    )
    monkeypatch.setattr(Storage, "free_bytes", lambda self: 5000)
    with pytest.raises(ValueError, match=r"has 5\.0 kB free, \d{3}\.\d kB are needed"):
        prepare(Arguments(str(folder), str(tmp_path / "o"), crop=CROP))
    prepare(Arguments(str(folder), str(tmp_path / "o"), crop=CROP, max_side=20))  # takes less than its source


# -- real images ----------------------------------------------------------------------------------------------------

ODD = {
    "broken_exif_dpi.jpg": ("damaged exif", "kept: EXIF is not used"),
    "empty.jpg": ("undecodable", "left out (empty file)"),
    "hopper_16bit_qtables.jpg": ("16-bit tables", "kept: decodes like any other"),
    "hopper_gray.jpg": ("grayscale", "kept: decodes to RGB"),
    "hopper_orientation_6.jpg": ("turned", "kept: EXIF orientation 6 is ignored, the pixels are used as stored"),
    "jpeg_ff00_header.jpg": ("irregular", "re-encoded as RGB JPEG, quality 95, 4:4:4"),
    "junk_jpeg_header.jpg": ("irregular", "re-encoded as RGB JPEG, quality 95, 4:4:4"),
    "monkey12.jpg": ("undecodable", "left out (no image format)"),
    "one_pixel.jpg": ("tiny", "kept: 1 × 1 pixels, views of it are enlarged"),
    "pil_sample_cmyk.jpg": ("cmyk", "re-encoded as RGB JPEG, quality 95, 4:4:4"),
    "png_named.JPEG": ("png", "re-encoded as RGB JPEG, quality 95, 4:4:4"),
    "progressive.jpg": ("progressive", "kept: decodes like any other"),
    "sliver_3x500.jpg": ("tiny", "kept: 3 × 500 pixels, views of it are enlarged"),
    "text.jpg": ("undecodable", "left out (no image format)"),
    "truncated_jpeg.jpg": ("undecodable", "left out (OSError: image file is truncated (8 bytes not processed))"),
}


@pytest.fixture(scope="module")
def odd_photographs(real_data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[DataSet, str]:
    """Photographs with the odd images among those of train and of val; and what the preparation printed."""
    folder = tmp_path_factory.mktemp("odd") / "photos"
    for split in ("train", "val"):
        for path in sorted((real_data / "photos_folder" / split).glob("*/*.jpg"))[::4]:
            write(folder, {f"{split}/{path.parent.name}/{path.name}": path.read_bytes()})
        for name in ODD:
            write(folder, {f"{split}/cat/{name}": (real_data / "odd_images" / name).read_bytes()})
    ended = run_ending(
        "data_prep.image_folder",
        [str(folder), "--out", str(folder.parent / "o"), "--num-tasks", "0", "--max-undecodable", "0.2"],
        "never",
        "",
        0,
    )
    assert ended.returncode == 0, ended.stderr
    return data_set(folder.parent / "o"), ended.stdout


def test_each_odd_image_is_named_with_what_was_done(odd_photographs: tuple[DataSet, str]) -> None:
    data, printed = odd_photographs
    odd = {(o.split, o.name): (o.what, o.done) for o in data.manifest.odd}
    for split in ("train", "val"):
        for name, (what, done) in ODD.items():
            done = done if split == "train" else done.replace("left out", "counted as wrong")
            assert odd[split, f"{split}/cat/{name}"] == (what, done)
            assert f"  {split}/cat/{name}: {what}, {done}\n" in printed
    assert len(data.split("train")) == 60 + 11
    assert len(data.split("val")) == 20 + 15
    assert (data.split("val").decodable == 0).sum() == 4


@pytest.mark.parametrize("style", DECODED)
def test_what_is_prepared_decodes_completely(odd_photographs: tuple[DataSet, str], style: CropStyle) -> None:
    data, _ = odd_photographs
    statistics = data.statistics()
    axes = ColourAxes(statistics["eigenvalues"], statistics["eigenvectors"])
    mean, settings = Mean(statistics["channel_mean"].astype(np.float32)), DecodeSettings(num_threads=2)
    train = data.split("train")
    stream, batch = SampleStream(len(train), 0), 32
    view = TrainView(style=style)
    source = TrainInput(
        train, stream, view, axes, mean, settings, lambda step: np.arange(step * batch, (step + 1) * batch), 0, 0
    )
    seen: set[int] = set()
    for _ in range(-(-2 * len(train) // batch)):  # every image twice, each time in another view
        found = next(source)
        assert found.replaced == ()
        assert bool(found.images.isfinite().all())
        seen |= set(found.indices.tolist())
    assert seen == set(range(len(train)))
    assert source.undecodable == set()
    source.close()

    val = data.split("val")
    checks = EvalInput(val, TestView(), mean, settings, batch_size=8, max_undecodable=0)
    valid = np.concatenate([b.indices[b.valid] for b in checks.batches(0, 1)])
    checks.close()
    # Those that nothing decodes count as wrong; all others are seen once.
    assert valid.tolist() == np.flatnonzero(val.decodable).tolist()


def test_real_photographs(real_data: Path, tmp_path: Path) -> None:
    folder = real_data / "photos_folder"
    assert main([str(folder), "--out", str(tmp_path / "o"), "--num-tasks", "0", "--max-side", "256"]) == 0
    data = data_set(tmp_path / "o")
    assert {name: info.count for name, info in data.manifest.splits.items()} == {"train": 240, "val": 80}
    assert max(data.split("train").width.max(), data.split("train").height.max()) == 256
    sources = {str(p.relative_to(folder)): p.read_bytes() for p in folder.glob("*/*/*.jpg")}
    for name, (image, _) in {**content(data, "train"), **content(data, "val")}.items():
        small = max(Image.open(io.BytesIO(sources[name])).size) <= 256
        assert (image == sources[name]) == small
    manifest = json.loads((tmp_path / "o" / "manifest.json").read_text())
    assert manifest["options"]["max_side"] == 256
    assert hashlib.sha256((tmp_path / "o" / "train.arrow").read_bytes()).hexdigest() in json.dumps(manifest)
