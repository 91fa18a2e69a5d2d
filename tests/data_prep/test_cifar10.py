"""CIFAR-10: every form of the source gives the same images, anything else is refused, a kill loses nothing."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import pickle
import shutil
import struct
import tarfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load

from data_prep import cifar_source, preparation, verify
from data_prep.cifar10 import Arguments, divide, main
from data_prep.cifar_pickle import read_batch, read_class_names
from data_prep.cifar_source import CLASSES, IMAGE_BYTES, RECORD_BYTES, Content, Images
from data_prep.preparation import Preparation
from orchestrator.data.shard_writer import write_index, write_planes
from orchestrator.data.shards import DataSet, Encoding, Manifest, ShardInfo
from orchestrator.storage import Storage
from tests import object_store
from tests.data_prep.ending import run_ending

TRAIN, TEST = 24, 10  # images in each of two training files, and of the test set
OPTIONS = ["--validation", "6", "--seed", "3"]


def batch(number: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Pixels [count, 3072] uint8 and labels [count] uint8, all classes in turn."""
    rng = np.random.default_rng(number)
    return rng.integers(0, 256, (count, IMAGE_BYTES), np.uint8), (np.arange(count) % 10).astype(np.uint8)


BATCHES = {"data_batch_1": batch(1, TRAIN), "data_batch_2": batch(2, TRAIN), "test_batch": batch(3, TEST)}


# -- what sources look like -----------------------------------------------------------------------------------------


def records(pixels: np.ndarray, labels: np.ndarray) -> bytes:
    return np.concatenate([labels[:, None], pixels], axis=1).tobytes()


def of_python_2(value: Any) -> bytes:
    """``value`` as Python 2 and its NumPy pickled it, protocol 2, without the memo."""
    match value:
        case dict():
            return b"}(" + b"".join(of_python_2(v) for item in value.items() for v in item) + b"u"
        case list():
            return b"](" + b"".join(map(of_python_2, value)) + b"e"
        case str():
            return b"U" + bytes([len(value)]) + value.encode()
        case int():
            return b"J" + struct.pack("<i", value)
    rows, columns = value.shape
    kind = b"cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    shape = of_python_2(rows) + of_python_2(columns) + b"\x86"
    data = b"T" + struct.pack("<i", value.size) + value.tobytes()
    made = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
    return made + b"(K\x01" + shape + kind + b"\x89" + data + b"tb"


def by_python_2(content: dict[str, Any]) -> bytes:
    return b"\x80\x02" + of_python_2(content) + b"."


def binary_files() -> dict[str, bytes]:
    files = {f"{name}.bin": records(*held) for name, held in BATCHES.items()}
    return {**files, "batches.meta.txt": ("\n".join(CLASSES) + "\n\n").encode()}


def python_files() -> dict[str, bytes]:
    files = {
        name: by_python_2({"batch_label": name, "labels": labels.tolist(), "data": pixels, "filenames": ["x.png"]})
        for name, (pixels, labels) in BATCHES.items()
    }
    return {**files, "batches.meta": by_python_2({"num_vis": 3072, "label_names": list(CLASSES)})}


def tar_of(files: dict[str, bytes]) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as tar:
        for name, data in files.items():
            header = tarfile.TarInfo(name)
            header.size = len(data)
            tar.addfile(header, io.BytesIO(data))
    return stream.getvalue()


def archive_of(files: dict[str, bytes]) -> bytes:
    inside = {f"cifar-10-batches/{name}": data for name, data in {"readme.html": b"<p>", **files}.items()}
    return gzip.compress(tar_of(inside), mtime=0)


def folder_of(folder: Path, files: dict[str, bytes]) -> str:
    folder.mkdir(parents=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return str(folder)


def archived(folder: Path, name: str, data: bytes) -> str:
    return f"{folder_of(folder, {name: data})}/{name}"


def form(kind: str, folder: Path) -> str:
    match kind:
        case "binary folder":
            return folder_of(folder, binary_files())
        case "python folder":
            return folder_of(folder, python_files())
        case "binary archive":
            return archived(folder, "cifar-10-binary.tar.gz", archive_of(binary_files()))
        case "python archive":
            return archived(folder, "cifar-10-python.tar.gz", archive_of(python_files()))
    assert kind == "tar"
    return archived(folder, "part.tar", tar_of(binary_files()))


FORMS = ["binary folder", "python folder", "binary archive", "python archive", "tar"]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The binary folder. Not to be changed."""
    return form("binary folder", tmp_path_factory.mktemp("source") / "s")


@pytest.fixture(scope="module")
def prepared(source: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The data set of ``source``, prepared in one go. Not to be changed."""
    out = tmp_path_factory.mktemp("prepared") / "o"
    assert main([source, "--out", str(out), *OPTIONS]) == 0
    return out


def data_set(out: Path) -> DataSet:
    return DataSet(Storage(str(out)))


def refused(capsys: pytest.CaptureFixture, source: str, out: Path, *options: str, saying: str) -> None:
    _ = capsys.readouterr()
    assert main([source, "--out", str(out), *options]) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: ")
    assert saying in told
    assert not (out / "manifest.json").exists()


# -- what is prepared -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", FORMS)
def test_every_form_gives_the_same_images(kind: str, prepared: Path, tmp_path: Path, tree: Callable) -> None:
    place = form(kind, tmp_path / "s")
    assert main([place, "--out", str(tmp_path / "o"), *OPTIONS]) == 0
    found, expected = tree(tmp_path / "o"), tree(prepared)
    for name in ("manifest.json", "manifest.sha256"):
        del found[name], expected[name]
    assert found == expected
    manifest = data_set(tmp_path / "o").manifest
    assert replace(manifest, sources=()) == replace(data_set(prepared).manifest, sources=())
    files = [Path(place)] if Path(place).is_file() else [Path(place) / s.name for s in manifest.sources]
    assert [(s.name, s.nbytes, s.md5, s.official) for s in manifest.sources] == [
        (f.name, f.stat().st_size, hashlib.md5(f.read_bytes()).hexdigest(), False) for f in files
    ]


def test_images_and_labels_are_kept(prepared: Path) -> None:
    found = data_set(prepared)
    assert found.manifest.encoding is Encoding.PLANES
    assert [(c.label, c.wnid, c.words) for c in found.manifest.classes] == [(n, c, c) for n, c in enumerate(CLASSES)]
    seen = []
    for name in ("train", "val", "test"):
        split = found.split(name)
        images = split.read(np.arange(len(split)))
        with open(prepared / f"{name}/000.safetensors", "rb") as stream:
            tensors = load(stream.read())
        assert list(tensors) == ["images"]
        assert tensors["images"].shape == (len(split), 3, 32, 32)
        np.testing.assert_array_equal(tensors["images"].reshape(-1, IMAGE_BYTES), np.stack(images))
        for image_name, image, label in zip(split.names.to_pylist(), images, split.label.tolist(), strict=True):
            of, number = image_name.split("/")
            pixels, labels = BATCHES[of]
            assert (of == "test_batch") == (name == "test")
            np.testing.assert_array_equal(image, pixels[int(number)])
            assert label == labels[int(number)]
            seen.append(image_name)
        assert split.names.to_pylist() == sorted(split.names.to_pylist())
        assert set(split.decodable.tolist()) == {1}
        assert {*split.width.tolist(), *split.height.tolist()} == {32}
    assert len(seen) == len(set(seen)) == 2 * TRAIN + TEST
    assert {name: info.count for name, info in found.manifest.splits.items()} == {
        "train": 2 * TRAIN - 6,
        "val": 6,
        "test": TEST,
    }


def test_statistics_are_of_the_training_set_alone(prepared: Path) -> None:
    split = data_set(prepared).split("train")
    images = np.stack(split.read(np.arange(len(split)))).reshape(-1, 3, 32, 32).astype(np.float64)
    found = data_set(prepared).statistics()
    assert found["mean_image"].dtype == np.float32
    np.testing.assert_allclose(found["mean_image"], images.mean(axis=0), rtol=1e-6)
    pixels = images.transpose(1, 0, 2, 3).reshape(3, -1)
    np.testing.assert_allclose(found["channel_mean"], pixels.mean(axis=1))
    np.testing.assert_allclose(found["covariance"], np.cov(pixels, bias=True))
    restored = found["eigenvectors"] @ np.diag(found["eigenvalues"]) @ found["eigenvectors"].T
    np.testing.assert_allclose(restored, found["covariance"])


def test_what_is_set_aside_is_fixed_for_ever(prepared: Path) -> None:
    names = data_set(prepared).split("val").names.to_pylist()
    assert names == [f"data_batch_{n}" for n in ("1/00008", "1/00017", "1/00022", "2/00006", "2/00018", "2/00019")]


def contents(count: int) -> Content:
    pixels, labels = batch(7, count)
    names = tuple(f"data_batch_1/{n:05d}" for n in range(count))
    return Content(Images(pixels.reshape(-1, 3, 32, 32), labels.astype(np.int64), names), None, (), ())


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 20), st.integers(1, 20), st.integers(0, 2**63 - 1))
def test_every_image_is_in_one_split(validation: int, last: int, seed: int) -> None:
    content = contents(300)
    splits = divide(content, Arguments("s", "o", validation=validation, seed=seed, last_as_test=last))
    assert list(splits) == (["train", "val", "test"] if validation else ["train", "test"])
    assert splits["test"].names == content.train.names[300 - last :]
    assert sorted(name for split in splits.values() for name in split.names) == list(content.train.names)
    assert not validation or len(splits["val"]) == validation
    for split in splits.values():
        assert list(split.names) == sorted(split.names)
        rows = [int(name.split("/")[1]) for name in split.names]
        np.testing.assert_array_equal(split.images, content.train.images[rows])
        np.testing.assert_array_equal(split.labels, content.train.labels[rows])


def test_the_test_set_may_stand_in_for_val(source: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = str(tmp_path / "o")
    for _ in range(2):
        assert main([source, "--out", out, "--validation", "0"]) == 0
        assert "note: val is the test set itself: nothing may be chosen by it" in capsys.readouterr().out
    manifest = data_set(tmp_path / "o").manifest
    assert manifest.splits["val"] == manifest.splits["test"]
    assert manifest.splits["train"].count == 2 * TRAIN
    assert not (tmp_path / "o/val").exists()
    assert verify.main([out, "--figure", "None"]) == 0
    told = capsys.readouterr().out
    assert "warning" not in told


def test_a_finished_data_set_is_recognized(
    source: str, prepared: Path, tree: Callable, capsys: pytest.CaptureFixture
) -> None:
    before = tree(prepared)
    assert main([source, "--out", str(prepared), *OPTIONS]) == 0
    assert "already finished" in capsys.readouterr().out
    for change, field in ((["--seed", "4"], "seed"), (["--validation", "7"], "validation")):
        assert main([source, "--out", str(prepared), *OPTIONS, *change]) == 2
        assert f"holds a finished data set with another {field}" in capsys.readouterr().err
    assert tree(prepared) == before


def test_images_that_are_there_twice_are_told(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    files = binary_files()
    files["test_batch.bin"] = files["test_batch.bin"][:-RECORD_BYTES] + files["data_batch_1.bin"][:RECORD_BYTES]
    assert main([folder_of(tmp_path / "s", files), "--out", str(tmp_path / "o"), "--validation", "0"]) == 0
    assert "warning: leak: images of test that are in train too: 1" in capsys.readouterr().out


def test_the_md5_of_an_archive_is_compared(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = form("binary archive", tmp_path / "s")
    md5 = hashlib.md5(Path(place).read_bytes()).hexdigest()
    assert main([place, "--out", str(tmp_path / "o"), *OPTIONS]) == 0
    told = capsys.readouterr().out
    assert f"warning: cifar-10-binary.tar.gz is not as cs.toronto.edu gives it: its MD5 is {md5}, not" in told
    assert "note: cifar-10-binary.tar.gz is a part of CIFAR-10: 58 of its 60,000 images" in told
    monkeypatch.setitem(cifar_source.OFFICIAL, "cifar-10-binary.tar.gz", md5)
    assert main([place, "--out", str(tmp_path / "p"), *OPTIONS]) == 0
    assert "warning" not in capsys.readouterr().out
    assert [s.official for s in data_set(tmp_path / "p").manifest.sources] == [True]


# -- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "without", "saying"),
    [
        (["--validation", "-1"], (), "--validation and --last-as-test are numbers of images"),
        (["--last-as-test", "-1"], (), "--validation and --last-as-test are numbers of images"),
        (["--seed", "-1"], (), "--seed is from 0"),
        ([], (), "--validation 5000 leaves none of 48 images to train on: give less, or 0"),
        (["--validation", "48"], (), "--validation 48 leaves none of 48"),
        (["--validation", "1", "--last-as-test", "3"], (), "test_batch, which is there: leave it out"),
        (["--validation", "1"], ("test_batch",), "there is no test_batch: add it or, of a part of the archive"),
        (["--validation", "1", "--last-as-test", "48"], ("test_batch",), "--last-as-test 48 leaves none of 48 images"),
        (["--validation", "8", "--last-as-test", "40"], ("test_batch",), "--validation 8 leaves none of 8 images"),
        (["--validation", "0", "--last-as-test", "43"], ("test_batch",), "no training image is left of dog, frog, "),
        (["--validation", "1"], ("data_batch_1", "data_batch_2"), "holds no data_batch_1 to data_batch_5"),
    ],
)
def test_splits_that_do_not_add_up(
    options: list[str], without: tuple[str, ...], saying: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    files = {name: data for name, data in binary_files().items() if name.removesuffix(".bin") not in without}
    place = folder_of(tmp_path / "s", files)
    refused(capsys, place, tmp_path / "o", *options, saying=saying)
    assert not (tmp_path / "o").exists()  # nor is anything claimed: other options may follow


def changed(**files: bytes | None) -> dict[str, bytes]:
    """The binary version; dots of names are two underlines here, None leaves a file out."""
    found: dict[str, bytes | None] = {**binary_files(), **{n.replace("__", "."): d for n, d in files.items()}}
    return {name: data for name, data in found.items() if data is not None}


@pytest.mark.parametrize(
    ("files", "saying"),
    [
        ({}, "holds no file of CIFAR-10: give the archive"),
        ({"cifar-10-binary.tar.gz": b""}, "holds no file of CIFAR-10: give the archive"),
        ({**binary_files(), "data_batch_3": b""}, "of the binary and of the Python version (data_batch_1.bin, data_ba"),
        (
            changed(data_batch_2__bin=bytes(RECORD_BYTES - 1)),
            "data_batch_2.bin has 3072 bytes, which is no",
        ),
        (changed(data_batch_2__bin=b""), "data_batch_2.bin is empty"),
        (changed(data_batch_2__bin=bytes(RECORD_BYTES) + b"\x0a" + bytes(IMAGE_BYTES)), "image 1 has the label 10,"),
        (changed(batches__meta__txt=b"airplane\nautomobile"), "batches.meta.txt does not name the classes of CIFAR-10"),
        (changed(batches__meta__txt=" ".join(reversed(CLASSES)).encode()), "does not name the classes of CIFAR-10"),
        ({**python_files(), "batches.meta": by_python_2({"label_names": ["x"]})}, "batches.meta does not name the"),
        ({**python_files(), "batches.meta": by_python_2({})}, "batches.meta has no names of classes"),
    ],
)
def test_folders_that_are_refused(
    files: dict[str, bytes], saying: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    refused(capsys, folder_of(tmp_path / "s", files), tmp_path / "o", *OPTIONS, saying=saying)


def test_a_file_beyond_all_bounds(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    place = folder_of(tmp_path / "s", binary_files())
    os.truncate(tmp_path / "s/data_batch_2.bin", 1 << 40)
    refused(capsys, place, tmp_path / "o", *OPTIONS, saying="'data_batch_2.bin' of 1099511627776 bytes is no file of")
    header = tarfile.TarInfo("data_batch_1.bin")
    header.size = 100 << 20
    place = archived(tmp_path / "a", "a.tar.gz", gzip.compress(header.tobuf()))
    refused(capsys, place, tmp_path / "o", *OPTIONS, saying="a.tar.gz: 'data_batch_1.bin' of 104857600 bytes is no")


def test_a_truncated_archive(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    whole = archive_of(binary_files())
    for place, cut in enumerate([0, 1, 9, 100, len(whole) // 2, len(whole) - 9, len(whole) - 1]):
        given_archive = archived(tmp_path / f"{place}", "a.tar.gz", whole[:cut])
        refused(capsys, given_archive, tmp_path / "o", *OPTIONS, saying="download it again")
    tar = tar_of(binary_files())
    for place, cut in enumerate([0, 511, 512, 5000, 512 * 145, 512 * (len(tar) // 1024)]):
        given_archive = archived(tmp_path / f"tar {place}", "a.tar", tar[:cut])
        refused(capsys, given_archive, tmp_path / "o", *OPTIONS, saying="truncated")


def test_a_flipped_byte_in_an_archive(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    whole = archive_of(binary_files())
    middle = len(whole) // 2
    damaged = whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :]
    place = archived(tmp_path / "s", "a.tar.gz", damaged)
    refused(capsys, place, tmp_path / "o", *OPTIONS, saying="a.tar.gz is truncated or damaged")


def test_members_of_an_archive(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    files = {f"a/{name}": data for name, data in binary_files().items()}
    twice = {**files, "b/data_batch_1.bin": files["a/data_batch_1.bin"]}
    place = archived(tmp_path / "twice", "a.tar", tar_of(twice))
    refused(capsys, place, tmp_path / "o", *OPTIONS, saying="a.tar holds 'data_batch_1.bin' twice")
    place = archived(tmp_path / "both", "a.tar", tar_of({**files, "data_batch_1": b""}))
    refused(capsys, place, tmp_path / "o", *OPTIONS, saying="data_batch_1")
    place = archived(tmp_path / "none", "a.tar.gz", archive_of({}))
    refused(capsys, place, tmp_path / "o", *OPTIONS, saying="a.tar.gz holds no ")
    # A link is no file: what it names on this machine is not read.
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as tar:
        link = tarfile.TarInfo("data_batch_1.bin")
        link.type, link.linkname = tarfile.SYMTYPE, str(tmp_path / "twice/a.tar")
        tar.addfile(link)
    place = archived(tmp_path / "link", "a.tar", stream.getvalue())
    refused(capsys, place, tmp_path / "o", *OPTIONS, saying="holds no ")
    assert not (tmp_path / "o").exists()


def test_a_bomb_is_not_unpacked(tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cifar_source, "_MAX_UNPACKED_BYTES", 4 << 20)
    bomb = gzip.compress(tar_of(binary_files()) + bytes(64 << 20))
    place = archived(tmp_path / "s", "a.tar.gz", bomb)
    refused(capsys, place, tmp_path / "o", *OPTIONS, saying="a.tar.gz holds more than CIFAR-10 has")


@pytest.mark.parametrize(
    ("name", "saying"),
    [("nothing.tar.gz", "cannot be read (FileNotFoundError"), ("nowhere", "there is no folder"), ("f", "is a file")],
)
def test_nothing_there(name: str, saying: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "f").touch()
    refused(capsys, str(tmp_path / name), tmp_path / "o", *OPTIONS, saying=saying)


# -- pickles --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", [2, 3, 4])
def test_pickles_of_python_3_are_read(protocol: int) -> None:
    pixels, labels = batch(1, 20)
    data = pickle.dumps({b"data": pixels, "labels": labels.tolist(), b"none": [None, True, (), (1, 2, 3, 4)]}, protocol)
    found, numbers = read_batch(data, "data_batch_1", IMAGE_BYTES)
    np.testing.assert_array_equal(found, pixels)
    np.testing.assert_array_equal(numbers, labels)
    by_column = pickle.dumps({b"data": np.asfortranarray(pixels), b"labels": labels.tolist()}, protocol)
    np.testing.assert_array_equal(read_batch(by_column, "data_batch_1", IMAGE_BYTES)[0], pixels)
    names = pickle.dumps({"label_names": [*CLASSES]}, protocol)
    assert read_class_names(names, "batches.meta") == list(CLASSES)


def test_long_integers_of_python_2_are_read() -> None:
    """As its NumPy wrote shapes where C's long is short."""
    data = by_python_2({"labels": [3, 4], "data": np.arange(2 * IMAGE_BYTES, dtype=np.uint8).reshape(2, -1)})
    short, long = b"J" + struct.pack("<i", 2) + b"J", b"\x8a\x01\x02J"
    assert short in data
    found, labels = read_batch(data.replace(short, long), "data_batch_1", IMAGE_BYTES)
    assert (found.shape, labels.tolist()) == ((2, IMAGE_BYTES), [3, 4])


class Calling:
    """Unpickled, it calls ``function``."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


def hostile(name: str, trap: Path) -> bytes:
    array = np.zeros((2, IMAGE_BYTES), np.uint8)
    whole = by_python_2({"labels": [0, 1], "data": array})
    match name:
        case "os.system":
            return pickle.dumps({"data": Calling(os.system, f"touch {trap}"), "labels": []}, 2)
        case "eval":
            return pickle.dumps({"data": Calling(eval, f"open({str(trap)!r}, 'w')"), "labels": []}, 4)
        case "a module":
            return b"c__main__\nx\n."
        case "objects":
            return pickle.dumps({"data": np.array([[Calling(os.system, f"touch {trap}")]], object), "labels": [0]}, 2)
        case "an array to be allocated":
            return whole.replace(b"K\x00\x85U\x01b", b"\x8a\x08" + b"\xff" * 7 + b"\x0f\x85U\x01b")
        case "bytes made again and again":
            text = b"X" + struct.pack("<i", 10_000) + b"a" * 10_000 + b"X" + struct.pack("<i", 6) + b"latin1\x86q\x00"
            return b"\x80\x02](c_codecs\nencode\nq\x01" + text + b"R" + b"h\x01h\x00R" * 1_000 + b"e."
        case "a shape without bytes":
            return whole.replace(b"J" + struct.pack("<i", 2) + b"J", b"J" + struct.pack("<i", 1 << 30) + b"J")
        case "a string that is not there":
            return whole.replace(b"T" + struct.pack("<i", array.size), b"T" + struct.pack("<i", (1 << 31) - 1))
        case "a bytearray":
            return b"\x80\x05\x96" + struct.pack("<Q", 1 << 40) + b"."
        case "a memo place":
            return b"\x80\x02Nr" + struct.pack("<I", (1 << 32) - 1) + b"j" + struct.pack("<I", 5) + b"."
        case "a million objects":
            return b"\x80\x02(" + b"}" * 1_000_000 + b"t."
        case "depth as a key":
            return b"\x80\x02})" + b"\x85" * 150_000 + b"K\x01s."
        case "floats":
            return pickle.dumps({"data": np.zeros((2, IMAGE_BYTES)), "labels": [0, 1]}, 2)
        case "an attribute of the array":
            return whole[:-1] + b"}U\x01a}sb."
        case "an extension":
            return b"\x80\x02\x82\x01."
        case "labels that are not there":
            return by_python_2({"data": array})
        case "labels too few":
            return by_python_2({"data": array, "labels": [1]})
        case "labels below zero":
            return by_python_2({"data": array, "labels": [1, -1]})
        case "another size":
            return by_python_2({"data": array[:, 1:], "labels": [1, 2]})
        case "a list":
            return by_python_2([1, 2])  # type: ignore[arg-type]
    assert name == "no end"
    return whole[:-1]


@pytest.mark.parametrize(
    ("name", "saying"),
    [
        ("os.system", "it names 'posix system'"),
        ("eval", "it names 'builtins eval'"),
        ("a module", "it names '__main__ x'"),
        ("objects", "something else than an array of uint8"),
        ("an array to be allocated", "something else than an array of uint8"),
        ("bytes made again and again", "it makes more bytes than it has"),
        ("a shape without bytes", "not all there"),
        ("a string that is not there", "expected 2147483647 bytes"),
        ("a bytearray", "bytes in a bytearray8"),
        ("a memo place", "(5)"),
        ("a million objects", "more instructions than any such file has"),
        ("depth as a key", "a tuple where none belongs"),
        ("floats", "something else than an array of uint8"),
        ("an attribute of the array", "not all there"),
        ("an extension", "instruction EXT1"),
        ("labels that are not there", "has no labels"),
        ("labels too few", "has 2 images and 1 labels"),
        ("labels below zero", "has no labels that are small numbers"),
        ("another size", "has no data of 3072 bytes an image"),
        ("a list", "it holds no dictionary"),
        ("no end", "data_batch_1 is no pickle of CIFAR-10"),
    ],
)
def test_a_pickle_that_wants_more_is_refused(
    name: str, saying: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    trap = tmp_path / "trap"
    files = {**python_files(), "data_batch_1": hostile(name, trap)}
    refused(capsys, folder_of(tmp_path / "s", files), tmp_path / "o", *OPTIONS, saying=saying)
    assert not trap.exists()


SOUND = by_python_2({"labels": [3, 4], "data": batch(1, 2)[0][:, :6]})


@settings(deadline=None, max_examples=400)
@given(st.integers(0, len(SOUND) - 1), st.binary(min_size=0, max_size=3), st.integers(0, 3))
def test_a_damaged_pickle_is_read_or_refused(place: int, put: bytes, cut: int) -> None:
    data = SOUND[:place] + put + SOUND[place + cut :]
    with suppress(ValueError):
        images, labels = read_batch(data, "data_batch_1", 6)
        assert images.shape == (len(labels), 6)
        assert images.dtype == np.uint8


# -- interrupted, and damaged ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("where", "name"),
    [
        ("after", "preparation.json"),
        ("inside", "train/000.safetensors"),
        ("after", "train/000.safetensors"),
        ("inside", "test.arrow"),
        ("after", "statistics.safetensors"),
        ("after", "manifest.sha256"),
        ("inside", "manifest.json"),
        ("after", "manifest.json"),
    ],
)
def test_killed_anywhere_it_ends_with_the_same_bytes(
    where: str, name: str, source: str, prepared: Path, tmp_path: Path, tree: Callable
) -> None:
    out = tmp_path / "o"
    arguments = [source, "--out", str(out), *OPTIONS]
    assert run_ending("data_prep.cifar10", arguments, where, name, 1).returncode == -9
    if (where, name) != ("after", "manifest.json"):
        assert not (out / "manifest.json").exists()
        assert main([source, "--out", str(out), *OPTIONS, "--seed", "9"]) == 2
        assert verify.main([str(out), "--figure", "None"]) == 2
    assert main(arguments) == 0
    assert tree(out) == tree(prepared)


def test_interrupted(
    source: str, prepared: Path, tmp_path: Path, tree: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    arguments = [source, "--out", str(tmp_path / "o"), *OPTIONS]
    with monkeypatch.context() as patch:
        patch.setattr("data_prep.cifar10.statistics_bytes", interrupted)
        assert main(arguments) == 130
        assert not (tmp_path / "o/manifest.json").exists()
        patch.setattr("data_prep.cifar10.statistics_bytes", lambda _: (_ for _ in ()).throw(OSError("away")))
        assert main(arguments) == 1
    assert main(arguments) == 0
    assert tree(tmp_path / "o") == tree(prepared)


def test_a_full_disk_is_foreseen(
    source: str, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Storage, "free_bytes", lambda _: 1000)
    refused(capsys, source, tmp_path / "o", *OPTIONS, saying="are needed: make room")


def test_a_source_that_changes_meanwhile(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    finished = Preparation.finished
    for kind in ("binary folder", "binary archive"):
        place = Path(form(kind, tmp_path / kind))
        file = place / "data_batch_1.bin" if place.is_dir() else place

        def change(self: Preparation, file: Path = file) -> Manifest | None:
            file.write_bytes(file.read_bytes() + bytes(RECORD_BYTES))
            return finished(self)

        with monkeypatch.context() as patch:
            patch.setattr(preparation.Preparation, "finished", change)
            refused(capsys, str(place), tmp_path / "o", *OPTIONS, saying="was changed while it was read")


def test_an_output_that_is_taken_over(
    source: str, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def taken(out: Storage, name: str, images: np.ndarray) -> tuple[ShardInfo, int]:
        written = write_planes(out, name, images)
        out.publish(".parts/preparation.json", b"{}")
        return written

    monkeypatch.setattr("data_prep.cifar10.write_planes", taken)
    refused(capsys, source, tmp_path / "o", *OPTIONS, saying="holds an unfinished preparation with another")
    assert (tmp_path / "o/train").exists()
    assert not (tmp_path / "o/val").exists()


def test_an_object_store_gives_the_same_bytes(source: str, prepared: Path, tree: Callable) -> None:
    objects = object_store.Bucket.objects
    objects.clear()
    for path in Path(source).iterdir():
        objects[f"bucket/{Path(source).name}/{path.name}"] = path.read_bytes()
    assert main([f"bucket://bucket/{Path(source).name}", "--out", "bucket://bucket/out", *OPTIONS]) == 0
    found = {n.removeprefix("bucket/out/"): d for n, d in objects.items() if n.startswith("bucket/out/")}
    assert found == tree(prepared)
    objects["bucket/a/cifar-10-python.tar.gz"] = archive_of(python_files())
    assert main(["bucket://bucket/a/cifar-10-python.tar.gz", "--out", "bucket://bucket/b", *OPTIONS]) == 0
    for name in ("train/000.safetensors", "val.arrow"):
        assert objects[f"bucket/b/{name}"] == objects[f"bucket/out/{name}"]
    objects.clear()


def test_verify_reads_it_all(prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert verify.main([str(prepared), "--figure", str(tmp_path / "f.png")]) == 0
    assert "all is well" in capsys.readouterr().out


@pytest.fixture
def spoiled(prepared: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(prepared, tmp_path / "spoiled"))


def problems(out: Path) -> list[str]:
    return verify.verify(Storage(str(out)), num_tasks=0).problems


@pytest.mark.parametrize("place", [0, 9, 40, 200, 5000, -1])
def test_verify_finds_a_damaged_byte(spoiled: Path, place: int) -> None:
    shard = spoiled / "train/000.safetensors"
    data = bytearray(shard.read_bytes())
    data[place] ^= 4
    shard.write_bytes(data)
    assert any("train/000.safetensors is damaged: its SHA-256 is not the one" in line for line in problems(spoiled))


@pytest.mark.parametrize("size", [0, 7, 8, 50, 5000, -1])
def test_verify_finds_a_truncated_shard(spoiled: Path, size: int) -> None:
    shard = spoiled / "val/000.safetensors"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:size])
    assert any("val/000.safetensors has" in line and "where the manifest says" in line for line in problems(spoiled))
    shard.unlink()
    assert problems(spoiled) == ["val/000.safetensors is missing"]


def republished(out: Path, split: str, shard: bytes) -> None:
    """Another shard under a manifest that names it."""
    (out / f"{split}/000.safetensors").write_bytes(shard)
    manifest = data_set(out).manifest
    info = manifest.splits[split]
    of = replace(info.shards[0], nbytes=len(shard), sha256=hashlib.sha256(shard).hexdigest())
    data = replace(manifest, splits={**manifest.splits, split: replace(info, shards=(of,))}).to_bytes()
    (out / "manifest.json").write_bytes(data)
    (out / "manifest.sha256").write_text(f"{hashlib.sha256(data).hexdigest()}  manifest.json\n")


def planes(header: Any, count: int = 6, behind: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + bytes(count * IMAGE_BYTES) + behind


def tensor(count: int = 6, side: int = 32, kind: str = "U8", start: int = 0) -> dict[str, Any]:
    return {"dtype": kind, "shape": [count, 3, side, side], "data_offsets": [start, count * 3 * side * side]}


@pytest.mark.parametrize(
    ("shard", "saying"),
    [
        (planes({"images": tensor(kind="I8")}), "holds something else than one tensor images"),
        (planes({"images": tensor(start=1)}), "holds something else than one tensor images"),
        (planes({"image": tensor()}), "holds something else than one tensor images"),
        (planes({"images": tensor(), "labels": tensor()}), "holds something else than one tensor images"),
        (planes({"images": {**tensor(), "shape": [6, 1, 96, 32]}}), "holds something else than one tensor images"),
        (planes({"images": {**tensor(), "shape": [6.0, 3, 32, 32]}}), "holds something else than one tensor images"),
        (planes({"images": {**tensor(), "shape": [6, 3, 32.0, 32]}}), "holds something else than one tensor images"),
        (planes({"images": {**tensor(), "shape": [6, 3, 2**40, 2**40]}}), "holds something else than one tensor"),
        (planes({"images": {}}), "is no safetensors file with images in it"),
        (planes([1]), "is no safetensors file with images in it"),
        (planes({}), "is no safetensors file with images in it"),
        (planes(b"{"), "is no safetensors file with images in it"),
        (planes(b"[" * 50_000), "is no safetensors file with images in it"),
        (struct.pack("<Q", 1 << 62), "is no safetensors file with images in it"),
        (planes({"images": tensor(5)}, 5), "holds 5 images, in the index 6"),
        (planes({"images": tensor(7)}, 7), "holds 7 images, in the index 6"),
        (planes({"images": tensor()}, 5), "ends within data_batch"),
        (planes({"images": tensor()}, behind=b"x"), "goes on behind its images"),
        (planes({"images": tensor(side=16)}), "images that are not where the index says: 6 of 6"),
        (planes({"images": tensor(), " " * 64: 1}), "holds something else than one tensor images"),
        (planes(json.dumps({"images": tensor()}).encode() + b" " * 64), "images that are not where the index says"),
        (
            planes({"images": {**tensor(), "shape": [6, 3, 64, 16]}}),
            "images of another size than the index says: 6 of 6",
        ),
    ],
)
def test_verify_holds_a_shard_against_the_index(spoiled: Path, shard: bytes, saying: str) -> None:
    republished(spoiled, "val", shard)
    assert any(saying in line for line in problems(spoiled)), problems(spoiled)


def test_verify_tells_of_another_size(spoiled: Path) -> None:
    storage, split = Storage(str(spoiled)), data_set(spoiled).split("val")
    info, first = write_planes(storage, "val/000.safetensors", np.zeros((6, 3, 16, 64), np.uint8))
    columns: dict[str, Any] = {name: getattr(split, name) for name in ("shard", "nbytes", "label", "decodable")}
    columns |= {"offset": first + IMAGE_BYTES * np.arange(6), "name": split.names}
    sha256 = write_index(storage, "val.arrow", {**columns, "width": [64] * 6, "height": [16] * 6})
    manifest = data_set(spoiled).manifest
    of = replace(manifest.splits["val"], index_sha256=sha256)
    storage.publish("manifest.json", replace(manifest, splits={**manifest.splits, "val": of}).to_bytes())
    republished(spoiled, "val", (spoiled / info.name).read_bytes())
    assert problems(spoiled) == ["manifest.json: images of 2 sizes where all planes have one"]


def test_verify_tells_of_an_image_twice(spoiled: Path) -> None:
    split = data_set(spoiled).split("train")
    images = np.stack(split.read(np.arange(6))).reshape(-1, 3, 32, 32)
    info, _ = write_planes(Storage(str(spoiled)), "val/000.safetensors", images)
    republished(spoiled, "val", (spoiled / info.name).read_bytes())
    found = verify.verify(Storage(str(spoiled)), num_tasks=0)
    assert found.problems == []
    assert found.warnings[0].startswith("leak: images of val that are in train too: 6 (")


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 5), st.integers(1, 40), st.integers(1, 40))
def test_a_shard_of_planes_is_read_by_safetensors(count: int, height: int, width: int) -> None:
    images = np.random.default_rng(0).integers(0, 256, (count, 3, height, width), np.uint8)
    objects = object_store.Bucket.objects
    objects.clear()
    info, first = write_planes(Storage("bucket://bucket/planes"), "x.safetensors", images)
    data = objects["bucket/planes/x.safetensors"]
    np.testing.assert_array_equal(load(data)["images"], images)
    assert (info.nbytes, info.count, info.sha256) == (len(data), count, hashlib.sha256(data).hexdigest())
    size = 3 * height * width
    for k in range(count):
        assert data[first + k * size : first + (k + 1) * size] == images[k].tobytes()
    objects.clear()


def test_a_real_part(real_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder = real_data / "cifar10_part"
    out = str(tmp_path / "o")
    assert main([str(folder), "--out", out, "--validation", "0", "--last-as-test", "800"]) == 0
    found = data_set(tmp_path / "o")
    assert {name: info.count for name, info in found.manifest.splits.items()} == {
        "train": 3200,
        "val": 800,
        "test": 800,
    }
    raw = np.frombuffer((folder / "data_batch_1.bin").read_bytes(), np.uint8).reshape(-1, RECORD_BYTES)
    for name, rows in (("train", raw[:3200]), ("test", raw[3200:])):
        split = found.split(name)
        np.testing.assert_array_equal(np.stack(split.read(np.arange(len(split)))), rows[:, 1:])
        np.testing.assert_array_equal(split.label, rows[:, 0])
    # Photographs: the mean of CIFAR-10 is (125.3, 123.0, 113.9), in this order of channels.
    np.testing.assert_allclose(found.statistics()["channel_mean"], [125.3, 123.0, 113.9], atol=3)
    assert verify.main([out, "--figure", "None"]) == 0
    assert "all is well" in capsys.readouterr().out
