"""ILSVRC's preparation: right, the same however it was run and interrupted, and clear about bad input."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_prep import demo, ilsvrc, official, parts
from data_prep.archives import walk
from data_prep.fan_out import fan_out
from data_prep.ilsvrc import Arguments, main, prepare
from data_prep.images import prepare_image
from orchestrator.data.shards import UNLABELLED, DataSet
from orchestrator.storage import Storage
from tests import object_store
from tests.data_prep import ending

ROOT = Path(__file__).parents[2]
TRAIN, VAL, TEST, DEVKIT = (
    "ILSVRC2012_img_train.tar",
    "ILSVRC2012_img_val.tar",
    "ILSVRC2012_img_test.tar",
    "ILSVRC2012_devkit_t12.tar.gz",
)

# -- an independent reading of the archives -------------------------------------------------------------------------


def files_of(archive: Path | bytes) -> dict[str, bytes]:
    """Base name → bytes of the files of a tar."""
    data = archive.read_bytes() if isinstance(archive, Path) else archive
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        return {Path(m.name).name: tar.extractfile(m).read() for m in tar if m.isreg()}  # type: ignore[union-attr]


def tar_of(files: dict[str, bytes], mode: str = "w") -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode=mode) as tar:  # type: ignore[call-overload]
        for name, data in files.items():
            header = tarfile.TarInfo(name)
            header.size = len(data)
            tar.addfile(header, io.BytesIO(data))
    return stream.getvalue()


def wnid_of_id(archives: Path) -> dict[int, str]:
    from scipy.io import loadmat

    synsets = loadmat(io.BytesIO(files_of(archives / DEVKIT)["meta.mat"]))["synsets"]
    return {int(s["ILSVRC2012_ID"][0][0, 0]): str(s["WNID"][0][0]) for s in synsets}


def truth_of(archives: Path) -> list[int]:
    return [int(i) for i in files_of(archives / DEVKIT)["ILSVRC2012_validation_ground_truth.txt"].split()]


# -- what is prepared -----------------------------------------------------------------------------------------------


def test_counts_and_classes(prepared: Any) -> None:
    data_set = DataSet(Storage(str(prepared.out)))
    assert {name: info.count for name, info in data_set.manifest.splits.items()} == {"train": 40, "val": 12, "test": 7}
    wnids = sorted(name.removesuffix(".tar") for name in files_of(prepared.archives / TRAIN))
    assert [c.wnid for c in data_set.manifest.classes] == wnids
    assert [c.label for c in data_set.manifest.classes] == [0, 1, 2, 3]
    ids = wnid_of_id(prepared.archives)
    assert len(ids) == 6  # with two inner synsets, which are no classes
    assert [ids[c.ilsvrc_id] for c in data_set.manifest.classes] == wnids  # type: ignore[index]
    assert [c.ilsvrc_id for c in data_set.manifest.classes] != [1, 2, 3, 4]
    assert all("," in c.words for c in data_set.manifest.classes)
    assert data_set.digest == hashlib.sha256(prepared.tree["manifest.json"]).hexdigest()


def test_labels_and_order(prepared: Any) -> None:
    data_set = DataSet(Storage(str(prepared.out)))
    wnids = [c.wnid for c in data_set.manifest.classes]
    train, val, test = (data_set.split(name) for name in ("train", "val", "test"))
    inner = {name: list(files_of(data)) for name, data in sorted(files_of(prepared.archives / TRAIN).items())}
    assert train.names.to_pylist() == [name for names in inner.values() for name in names]
    assert [f"{wnids[label]}.tar" for label in train.label] == [tar for tar, names in inner.items() for _ in names]
    ids = wnid_of_id(prepared.archives)
    assert val.names.to_pylist() == sorted(files_of(prepared.archives / VAL))
    assert [wnids[label] for label in val.label] == [ids[i] for i in truth_of(prepared.archives)]
    assert test.names.to_pylist() == sorted(files_of(prepared.archives / TEST))
    assert (test.label == UNLABELLED).all()


def test_images_are_the_archives_bytes_one_ranged_read_away(prepared: Any) -> None:
    data_set = DataSet(Storage(str(prepared.out)))
    sources = {
        "train": {k: v for tar in files_of(prepared.archives / TRAIN).values() for k, v in files_of(tar).items()},
        "val": files_of(prepared.archives / VAL),
        "test": files_of(prepared.archives / TEST),
    }
    changed = {o.name for o in data_set.manifest.odd if o.what in ("png", "cmyk")}
    assert len(changed) == 2
    for name, source in sources.items():
        split = data_set.split(name)
        for row, data in enumerate(split.read(np.arange(len(split)))):
            original = source[split.names[row].as_py()]
            if split.names[row].as_py() not in changed:
                assert data.tobytes() == original
            image = Image.open(io.BytesIO(data.tobytes()))
            assert (image.format, image.size) == ("JPEG", (split.width[row], split.height[row]))
            assert image.size == Image.open(io.BytesIO(original)).size
            assert image.mode in ("RGB", "L")
        assert split.decodable.all()


def test_shards_are_webdatasets_and_fit_the_index(prepared: Any) -> None:
    data_set = DataSet(Storage(str(prepared.out)))
    for name, info in data_set.manifest.splits.items():
        split, row = data_set.split(name), 0
        for number, shard in enumerate(info.shards):
            data = (prepared.out / shard.name).read_bytes()
            assert hashlib.sha256(data).hexdigest() == shard.sha256
            assert shard.nbytes == len(data)
            with tarfile.open(fileobj=io.BytesIO(data)) as tar:
                images = [m for m in tar if m.name.endswith(".jpg")]
                labels = {m.name: int(tar.extractfile(m).read()) for m in tar if m.name.endswith(".cls")}  # type: ignore[union-attr]
            assert len(images) == shard.count
            assert len(labels) == (0 if name == "test" else shard.count)
            for member in images:
                key = split.names[row].as_py().removesuffix(".JPEG")
                assert member.name == f"{key}.jpg"
                assert labels.get(f"{key}.cls", UNLABELLED) == split.label[row]
                assert (split.shard[row], split.offset[row], split.nbytes[row]) == (
                    number,
                    member.offset_data,
                    member.size,
                )
                row += 1
        assert row == len(split)
        assert hashlib.sha256(prepared.tree[info.index]).hexdigest() == info.index_sha256
    assert [len(data_set.manifest.splits[s].shards) for s in ("train", "val", "test")] == [4, 3, 2]
    statistics = prepared.tree["statistics.safetensors"]
    assert hashlib.sha256(statistics).hexdigest() == data_set.manifest.statistics_sha256


def test_nothing_else_is_left_behind(prepared: Any) -> None:
    manifest = prepared.report.manifest
    shards = [shard.name for info in manifest.splits.values() for shard in info.shards]
    indexes = [info.index for info in manifest.splits.values()]
    assert sorted(prepared.tree) == sorted(
        [*shards, *indexes, "manifest.json", "manifest.sha256", "statistics.safetensors"]
    )


def test_odd_images_are_found(prepared: Any) -> None:
    wnids = [c.wnid for c in prepared.report.manifest.classes]
    odd = {o.name: (o.split, o.what, o.done.split(" ")[0]) for o in prepared.report.manifest.odd}
    assert odd == {
        f"{wnids[0]}_1.JPEG": ("train", "png", "re-encoded"),
        f"{wnids[1]}_1.JPEG": ("train", "cmyk", "re-encoded"),
        f"{wnids[1]}_10.JPEG": ("train", "grayscale", "kept:"),
    }
    data_set = DataSet(Storage(str(prepared.out)))
    split = data_set.split("train")
    row = split.names.to_pylist().index(f"{wnids[0]}_1.JPEG")
    png = files_of(files_of(prepared.archives / TRAIN)[f"{wnids[0]}.tar"])[f"{wnids[0]}_1.JPEG"]
    jpeg = Image.open(io.BytesIO(split.read(np.array([row]))[0].tobytes()))
    difference = np.asarray(jpeg, np.int64) - np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))
    assert np.abs(difference).mean() < 5  # noise, through quality 95


def test_sources_are_recorded(prepared: Any) -> None:
    sources = {s.name: s for s in prepared.report.manifest.sources}
    assert list(sources) == [TRAIN, VAL, TEST, DEVKIT]
    for name, source in sources.items():
        data = (prepared.archives / name).read_bytes()
        assert (source.nbytes, source.md5, source.official) == (len(data), hashlib.md5(data).hexdigest(), False)


# -- the same bytes, however -----------------------------------------------------------------------------------------


def run_ending(
    archives: Path, out: Path, where: str, name: str, nth: int, sent: str = "SIGKILL"
) -> subprocess.CompletedProcess:
    arguments = [str(archives), "--out", str(out), "--crop", "32", "--num-tasks", "0"]
    return ending.run_ending("data_prep.ilsvrc", arguments, where, name, nth, sent, {"images_per_unit": 5})


def test_killed_again_and_again_it_ends_with_the_same_bytes(prepared: Any, tmp_path: Path, tree: Callable) -> None:
    out = tmp_path / "data_set"
    inodes: dict[str, int] = {}
    for where, name, nth in [
        ("inside", ".parts/preparation.json", 1),
        ("inside", "train/", 2),  # half a shard beside a finished part
        ("after", "train/", 2),  # a shard of a unit without a record
        ("inside", ".parts/", 4),
        ("after", "val/", 2),
        ("inside", "val.arrow", 1),
        ("after", "statistics.safetensors", 1),
        ("inside", "manifest.json", 1),
        ("after", "manifest.json", 1),
    ]:
        ended = run_ending(prepared.archives, out, where, name, nth)
        assert ended.returncode == -signal.SIGKILL, ended.stderr
        assert (out / "manifest.json").exists() == ((where, name) == ("after", "manifest.json"))
        # what was finished was not done again
        shards = {p.name: p.stat().st_ino for p in out.glob("*/*.tar")}
        assert {n: i for n, i in inodes.items() if shards.get(n) != i} == {}
        records = list(out.glob(".parts/*.json"))
        done = [s["name"] for r in records for s in json.loads(r.read_text()).get("shards", [])]
        inodes = {Path(n).name: shards[Path(n).name] for n in done}
    assert len(inodes) == 9
    report = prepare(Arguments(archives=str(prepared.archives), out=str(out), crop=32, num_tasks=0))
    assert report.already_finished
    assert tree(out) == prepared.tree


def test_interrupted_by_hand(prepared: Any, tmp_path: Path, tree: Callable) -> None:
    ended = run_ending(prepared.archives, tmp_path / "o", "inside", "train/", 3, "SIGINT")
    assert ended.returncode == 130
    assert ended.stderr == "interrupted: the same command goes on from here\n"
    assert not (tmp_path / "o" / "manifest.json").exists()
    ended = run_ending(prepared.archives, tmp_path / "o", "never", "", 0)
    assert ended.returncode == 0, ended.stderr
    assert "going on: 20 images are done" in ended.stdout
    assert tree(tmp_path / "o") == prepared.tree


def test_an_object_store_gives_the_same_bytes(prepared: Any) -> None:
    objects = object_store.Bucket.objects
    objects.clear()
    for path in prepared.archives.iterdir():
        objects[f"bucket/archives/{path.name}"] = path.read_bytes()
    arguments = Arguments(archives="bucket://bucket/archives", out="bucket://bucket/out", crop=32)
    prepare(arguments, images_per_unit=5)
    out = {n.removeprefix("bucket/out/"): d for n, d in objects.items() if n.startswith("bucket/out/")}
    objects.clear()
    assert out == prepared.tree


def test_a_finished_data_set_is_left_alone(prepared: Any, capsys: pytest.CaptureFixture, tree: Callable) -> None:
    stamps = {p: p.stat().st_mtime_ns for p in prepared.out.rglob("*")}
    assert main([str(prepared.archives), "--out", str(prepared.out), "--crop", "32"]) == 0
    printed = capsys.readouterr().out
    assert "already finished" in printed
    assert prepared.report.out.url in printed
    assert {p: p.stat().st_mtime_ns for p in prepared.out.rglob("*")} == stamps


def test_large_units_are_cut_into_shards(prepared: Any, tmp_path: Path) -> None:
    from dataclasses import replace

    archives, out = Storage(str(prepared.archives)), Storage(str(tmp_path))
    names = ilsvrc.find_archives(archives)
    sizes = {name: archives.size_bytes(name) for name in names.values()}
    unit = ilsvrc.plan(archives, names, sizes, ilsvrc.read_devkit(archives, DEVKIT), crop=32)[0]
    unit = replace(unit, shard_bytes=10_000)
    part = parts.write_part(unit, archives, out)
    assert len(part.shards) > 2
    assert [s.count for s in part.shards] == [part.rows["shard"].count(n) for n in range(len(part.shards))]
    assert sum(s.count for s in part.shards) == 10
    assert all(10_000 < s.nbytes < 30_000 for s in part.shards[:-1])
    assert parts.read_part(unit, out) == part
    assert parts.read_part(replace(unit, crop=31), out) is None
    (tmp_path / part.shards[1].name).write_bytes(b"short")
    assert parts.read_part(unit, out) is None


# -- odd images -----------------------------------------------------------------------------------------------------


def encoded(image: Image.Image, kind: str = "JPEG", **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def odd_images() -> dict[str, tuple[bytes, str]]:
    """Name → (bytes, what it should be called)."""
    rng = np.random.default_rng(3)
    small = rng.integers(0, 256, (6, 9, 3), dtype=np.uint8)
    rgb = Image.fromarray(small).resize((90, 60), Image.Resampling.BICUBIC)
    gray16 = Image.fromarray(np.asarray(rgb.convert("L")).astype(np.uint16) * 256 + 99)
    jpeg = encoded(rgb)
    junk = jpeg[:2] + b"junk" + jpeg[2:]
    return {
        "plain": (jpeg, ""),
        "progressive": (encoded(rgb, progressive=True), ""),
        "4:4:4": (encoded(rgb, subsampling=0), ""),
        "bytes after the end": (jpeg + b"\0" * 64, ""),
        "grayscale": (encoded(rgb.convert("L")), "grayscale"),
        "cmyk": (encoded(rgb.convert("CMYK")), "cmyk"),
        "png": (encoded(rgb, "PNG"), "png"),
        "palette png": (encoded(rgb.convert("P"), "PNG"), "png"),
        "16-bit png": (encoded(gray16, "PNG"), "png"),
        "gif": (encoded(rgb, "GIF"), "gif"),
        "bmp": (encoded(rgb, "BMP"), "bmp"),
        "junk in the header": (junk, "irregular" if _opens(junk) else "undecodable"),
        "truncated": (jpeg[: len(jpeg) // 2], "undecodable"),
        "two bytes short": (jpeg[:-2], "undecodable"),
        "empty": (b"", "undecodable"),
        "text": (b"not found", "undecodable"),
        "bomb": (_png_header(60_000, 60_000), "undecodable"),
    }


def _opens(data: bytes) -> bool:
    try:
        Image.open(io.BytesIO(data)).load()
    except OSError:
        return False
    return True


def _png_header(width: int, height: int) -> bytes:
    chunk = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))


@pytest.mark.parametrize("name", list(odd_images()))
@pytest.mark.parametrize("with_pixels", [True, False])
def test_odd_images_are_told_apart(name: str, with_pixels: bool) -> None:
    data, what = odd_images()[name]
    found = prepare_image(data, with_pixels=with_pixels)
    assert found.what == what
    assert bool(found.done) == bool(what)
    assert found.decodable == (what != "undecodable")
    assert (found.width, found.height) == ((90, 60) if found.decodable else (1, 1))
    assert (found.data == data) == (what in ("", "grayscale"))
    assert (found.pixels is not None) == (with_pixels and found.decodable)
    image = Image.open(io.BytesIO(found.data))
    assert (image.format, image.size) == ("JPEG", (found.width, found.height))
    if found.pixels is not None and name != "gif":
        mode = "L" if name in ("grayscale", "16-bit png") else "RGB"
        original = Image.open(io.BytesIO(odd_images()["plain"][0])).convert(mode).convert("RGB")
        difference = np.asarray(found.pixels, np.int64) - np.asarray(original)
        assert np.abs(difference).mean() < (25 if name == "palette png" else 4)


def test_dali_decodes_whatever_goes_into_a_shard() -> None:
    dali = pytest.importorskip("nvidia.dali")
    prepared = [prepare_image(data, with_pixels=False) for data, _ in odd_images().values()]

    @dali.pipeline_def(batch_size=len(prepared), num_threads=1, device_id=None)
    def pipeline() -> Any:
        encoded_images = dali.fn.external_source(source=lambda: [np.frombuffer(p.data, np.uint8) for p in prepared])
        return dali.fn.decoders.image(
            encoded_images, device="cpu", output_type=dali.types.RGB, adjust_orientation=False
        )

    built = pipeline()
    built.build()
    (images,) = built.run()
    for n, image in enumerate(prepared):
        pixels = np.array(images[n])
        assert pixels.shape == (image.height, image.width, 3)
        expected = np.asarray(Image.open(io.BytesIO(image.data)).convert("RGB"), np.int64)
        assert np.abs(pixels - expected).max() <= 1


def spoil_images(archives: Path) -> tuple[str, str]:
    """Truncates one image of train and one of val; returns their names."""
    train = files_of(archives / TRAIN)
    wnid = sorted(train)[2]
    images = files_of(train[wnid])
    train_name = sorted(images)[3]
    images[train_name] = images[train_name][:-50]
    train[wnid] = tar_of(images)
    (archives / TRAIN).write_bytes(tar_of(train))
    val = files_of(archives / VAL)
    val_name = sorted(val)[6]
    val[val_name] = b"this is no image"
    (archives / VAL).write_bytes(tar_of(val))
    return train_name, val_name


def test_undecodable_images(own_archives: Path, tmp_path: Path) -> None:
    train_name, val_name = spoil_images(own_archives)
    arguments = Arguments(archives=str(own_archives), out=str(tmp_path / "o"), crop=32)
    manifest = prepare(arguments, images_per_unit=5).manifest
    odd = {o.name: o for o in manifest.odd if o.what == "undecodable"}
    assert {n: (o.split, o.done.split(" (")[0]) for n, o in odd.items()} == {
        train_name: ("train", "left out"),
        val_name: ("val", "counted as wrong"),
    }
    data_set = DataSet(Storage(str(tmp_path / "o")))
    train, val = data_set.split("train"), data_set.split("val")
    assert len(train) == 39
    assert train_name not in train.names.to_pylist()
    assert len(val) == 12
    assert val.decodable.tolist() == [1] * 6 + [0] + [1] * 5
    assert val.names[6].as_py() == val_name
    assert (val.width[6], val.height[6]) == (1, 1)
    assert Image.open(io.BytesIO(val.read(np.array([6]))[0].tobytes())).convert("RGB").getpixel((0, 0)) == (128,) * 3
    ids = wnid_of_id(own_archives)
    wnids = [c.wnid for c in manifest.classes]
    assert [wnids[label] for label in val.label] == [ids[i] for i in truth_of(own_archives)]


def test_too_many_undecodable_images(own_archives: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    train_name, _ = spoil_images(own_archives)
    command = [str(own_archives), "--out", str(tmp_path / "o"), "--crop", "32", "--max-undecodable"]
    assert main([*command, "0"]) == 2
    message = capsys.readouterr().err
    assert "1 of 40 images of train cannot be decoded, 0 are allowed" in message
    assert train_name in message
    assert not (tmp_path / "o" / "manifest.json").exists()
    assert not (tmp_path / "o" / "train.arrow").exists()
    # the work is not lost
    before = {p.name: p.stat().st_ino for p in (tmp_path / "o").glob("*/*.tar")}
    assert main([*command, "0.05"]) == 0
    assert {p.name: p.stat().st_ino for p in (tmp_path / "o").glob("*/*.tar")} == before


# -- archives as people have them -----------------------------------------------------------------------------------


def test_names_from_archives_stay_inside(own_archives: Path, tmp_path: Path) -> None:
    val = {
        f"../../../{name}" if n % 2 else f"/val/{name}": d
        for n, (name, d) in enumerate(files_of(own_archives / VAL).items())
    }
    (own_archives / VAL).write_bytes(tar_of(dict(reversed(val.items()))))
    before = sorted(p for p in tmp_path.rglob("*") if tmp_path / "o" not in p.parents)
    prepare(Arguments(archives=str(own_archives), out=str(tmp_path / "o"), crop=32))
    assert sorted(p for p in tmp_path.rglob("*") if tmp_path / "o" not in p.parents and p != tmp_path / "o") == before
    split = DataSet(Storage(str(tmp_path / "o"))).split("val")
    assert split.names.to_pylist() == sorted(Path(n).name for n in val)
    wnids, ids = [c.wnid for c in DataSet(Storage(str(tmp_path / "o"))).manifest.classes], wnid_of_id(own_archives)
    assert [wnids[label] for label in split.label] == [ids[i] for i in truth_of(own_archives)]


@pytest.mark.parametrize("kind", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])
def test_the_walk_reads_what_tarfile_writes(kind: int) -> None:
    stream = io.BytesIO()
    names = ["a.JPEG", "folder/" + "x" * 95 + ".JPEG", "empty", "._a.JPEG"]
    if kind != tarfile.USTAR_FORMAT:
        names += ["folder/" + "y" * 300 + "é.JPEG"]
    with tarfile.open(fileobj=stream, mode="w", format=kind) as tar:
        folder = tarfile.TarInfo("folder")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        for name in names:
            header = tarfile.TarInfo(name)
            header.size = 0 if name == "empty" else 700
            tar.addfile(header, io.BytesIO(name.encode().ljust(700)))
    prefix = b"before"
    data = prefix + stream.getvalue()
    found = list(walk(io.BytesIO(data + b"after"), "x.tar", len(prefix), len(data)))
    assert [m.name for m in found] == [Path(n).name for n in names if n != "._a.JPEG"]
    for member in found:
        content = data[member.offset : member.offset + member.nbytes]
        assert not content or Path(content.decode().strip()).name == member.name


def test_every_truncation_is_noticed(own_archives: Path) -> None:
    data = (own_archives / VAL).read_bytes()
    end = len(data.rstrip(b"\0"))
    for stop in [*range(1, end + 512, 997), 512, 1024]:
        with pytest.raises(ValueError, match="truncated"):
            list(walk(io.BytesIO(data[:stop]), "x.tar", 0, stop))


def test_without_a_test_set(own_archives: Path, tmp_path: Path) -> None:
    (own_archives / TEST).unlink()
    manifest = prepare(Arguments(archives=str(own_archives), out=str(tmp_path / "o"), crop=32, test=False)).manifest
    assert list(manifest.splits) == ["train", "val"]


# -- bad input ------------------------------------------------------------------------------------------------------


def _no_folder(archives: Path) -> None:
    shutil.rmtree(archives)


def _nothing_there(archives: Path) -> None:
    shutil.rmtree(archives)
    archives.mkdir()


def _no_val(archives: Path) -> None:
    (archives / VAL).unlink()


def _no_test(archives: Path) -> None:
    (archives / TEST).unlink()


def _two_tests(archives: Path) -> None:
    shutil.copy(archives / TEST, archives / "ILSVRC2012_img_test_v10102019.tar")


def _half_a_train(archives: Path) -> None:
    os.truncate(archives / TRAIN, (archives / TRAIN).stat().st_size // 2)


def _val_without_its_last_image(archives: Path) -> None:
    with tarfile.open(archives / VAL) as tar:
        last = tar.getmembers()[-1]
    os.truncate(archives / VAL, last.offset)


def _a_truncated_class(archives: Path) -> None:
    train = files_of(archives / TRAIN)
    name = sorted(train)[1]
    train[name] = train[name].rstrip(b"\0")[:-600]
    (archives / TRAIN).write_bytes(tar_of(train))


def _a_damaged_header(archives: Path) -> None:
    with tarfile.open(archives / VAL) as tar:
        offset = tar.getmembers()[4].offset
    data = bytearray((archives / VAL).read_bytes())
    data[offset + 3] ^= 1
    (archives / VAL).write_bytes(data)


def _a_damaged_inner_header(archives: Path) -> None:
    train = files_of(archives / TRAIN)
    name = sorted(train)[1]
    with tarfile.open(fileobj=io.BytesIO(train[name])) as tar:
        offset = tar.getmembers()[4].offset
    data = bytearray(train[name])
    data[offset + 3] ^= 1
    train[name] = bytes(data)
    (archives / TRAIN).write_bytes(tar_of(train))


def _an_unknown_class(archives: Path) -> None:
    train = files_of(archives / TRAIN)
    (archives / TRAIN).write_bytes(tar_of({**train, "n12345678.tar": train[sorted(train)[0]]}))


def _an_inner_synset(archives: Path) -> None:
    train = files_of(archives / TRAIN)
    (archives / TRAIN).write_bytes(tar_of({**train, "n00000001.tar": train[sorted(train)[0]]}))


def _a_missing_class(archives: Path) -> None:
    train = files_of(archives / TRAIN)
    del train[sorted(train)[0]]
    (archives / TRAIN).write_bytes(tar_of(train))


def _two_images_of_one_name(archives: Path) -> None:
    val = files_of(archives / VAL)
    names = sorted(val)
    del val[names[0]]
    (archives / VAL).write_bytes(tar_of({**val, f"other/{names[1]}": val[names[1]]}))


def _a_name_with_a_newline(archives: Path) -> None:
    val = files_of(archives / VAL)
    first = sorted(val)[0]
    (archives / VAL).write_bytes(tar_of({**{k: v for k, v in val.items() if k != first}, "a\nb.JPEG": val[first]}))


def _no_images(archives: Path) -> None:
    (archives / TEST).write_bytes(tar_of({}))


def _devkit_with(archives: Path, name: str, data: bytes | None) -> None:
    files = files_of(archives / DEVKIT)
    if data is None:
        del files[name]
    else:
        files[name] = data
    (archives / DEVKIT).write_bytes(tar_of({f"data/{n}": d for n, d in files.items()}, "w:gz"))


TRUTH = "ILSVRC2012_validation_ground_truth.txt"


def _a_short_truth(archives: Path) -> None:
    _devkit_with(archives, TRUTH, b"1\n" * 11)


def _an_id_of_an_inner_synset(archives: Path) -> None:
    _devkit_with(archives, TRUTH, b"1\n" * 11 + b"5\n")


def _no_numbers(archives: Path) -> None:
    _devkit_with(archives, TRUTH, b"cat\n" * 12)


def _no_truth(archives: Path) -> None:
    _devkit_with(archives, TRUTH, None)


def _garbage_meta(archives: Path) -> None:
    _devkit_with(archives, "meta.mat", b"garbage" * 100)


def _half_a_meta(archives: Path) -> None:
    _devkit_with(archives, "meta.mat", files_of(archives / DEVKIT)["meta.mat"][:700])


def _half_a_devkit(archives: Path) -> None:
    os.truncate(archives / DEVKIT, 300)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_no_folder, r"there is no folder .*archives': check ARCHIVES$"),
        (_nothing_there, r"missing in .*train.tar, .*val.tar, .*found: none of the archives"),
        (_no_val, rf"missing in .*: {VAL}; found: {TRAIN}, {TEST}, {DEVKIT}$"),
        (_no_test, r"missing .*ILSVRC2012_img_test\*.tar; .*--no-test"),
        (_two_tests, r"2 test archives .*move all but one away"),
        (_half_a_train, rf"{TRAIN} is truncated: .*download it again"),
        (_val_without_its_last_image, rf"{VAL} is truncated: .*download it again"),
        (_a_truncated_class, rf"{TRAIN} \(n9\d+.tar\) is truncated"),
        (_a_damaged_header, rf"{VAL} is damaged at byte \d+"),
        (_a_damaged_inner_header, rf"{TRAIN} \(n9\d+.tar\) is damaged at byte \d+"),
        (_an_unknown_class, r"holds 'n12345678.tar', which is no leaf class"),
        (_an_inner_synset, r"holds 'n00000001.tar', which is no leaf class"),
        (_a_missing_class, r"lacks 1 of the 4 classes"),
        (_two_images_of_one_name, r"holds 'ILSVRC2012_val_00000002.JPEG' twice"),
        (_a_name_with_a_newline, r"no name for an image"),
        (_no_images, rf"{TEST} holds no images"),
        (_a_short_truth, rf"{VAL} has 12 images, the devkit's ground truth 11 lines"),
        (_an_id_of_an_inner_synset, r"has the ILSVRC2012_ID 5, which is no leaf class"),
        (_no_numbers, r"not a list of numbers"),
        (_no_truth, rf"has no data/{TRUTH}"),
        (_garbage_meta, r"meta.mat of the devkit cannot be read"),
        (_half_a_meta, r"meta.mat of the devkit cannot be read"),
        (_half_a_devkit, rf"{DEVKIT} cannot be unpacked"),
    ],
)
def test_bad_archives(
    own_archives: Path, tmp_path: Path, capsys: pytest.CaptureFixture, spoil: Callable, message: str
) -> None:
    spoil(own_archives)
    assert main([str(own_archives), "--out", str(tmp_path / "o"), "--crop", "32"]) == 2
    captured = capsys.readouterr()
    assert re.search(message, captured.err), captured.err
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert not list((tmp_path / "o").glob("*.json")) + list((tmp_path / "o").glob("*.arrow"))
    # noticed before any work is done, but for what only reading everything can show
    late = spoil in (_a_damaged_inner_header, _a_name_with_a_newline)
    assert bool(list((tmp_path / "o").glob("*/*.tar"))) == late


def test_bad_urls_and_options(archives: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    blocked = tmp_path / "file"
    blocked.write_bytes(b"")
    used = tmp_path / "used"
    used.mkdir()
    (used / "thesis.tex").write_text("")
    for command, message in [
        (["nosuch://bucket/x", "--out", str(tmp_path / "o")], "cannot be opened"),
        ([str(archives), "--out", "memory://x"], "invisible to other processes"),
        ([str(archives), "--out", str(blocked / "x")], "cannot be written"),
        ([str(archives), "--out", str(used)], "is not empty"),
        ([str(archives), "--out", str(tmp_path / "o"), "--crop", "0"], "--crop"),
        ([str(archives), "--out", str(tmp_path / "o"), "--max-undecodable", "5"], "--max-undecodable"),
        ([str(archives), "--out", str(tmp_path / "o"), "--num-tasks", "2", "--ray-address", "127.0.0.1:1"], "no Ray"),
    ]:
        assert main(command) == 2, command
        assert message in capsys.readouterr().err
        assert not (tmp_path / "o" / "manifest.json").exists()
    with pytest.raises(SystemExit) as caught:
        main([str(archives), "--out", str(tmp_path / "o"), "--nonsense", "1"])
    assert caught.value.code == 2
    assert [p.name for p in used.iterdir()] == ["thesis.tex"]


def test_the_exit_code_of_the_command(tmp_path: Path) -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "data_prep.ilsvrc", str(tmp_path), "--out", str(tmp_path / "o")],
        cwd=ROOT,
        check=False,
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 2
    assert ended.stderr.startswith("error: missing in ")
    assert "Traceback" not in ended.stderr
    assert not (tmp_path / "o").exists()


def test_a_full_disk_is_foreseen(
    archives: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    needed_bytes = int(sum(p.stat().st_size for p in archives.iterdir()) * 1.1)
    monkeypatch.setattr(Storage, "free_bytes", lambda self: needed_bytes - 1)
    command = [str(archives), "--out", str(tmp_path / "o"), "--crop", "32"]
    assert main(command) == 2
    size = rf"{needed_bytes / 1000:.1f} kB"
    assert re.search(rf"has {size} free, {size} are needed", capsys.readouterr().err)
    assert not list((tmp_path / "o").glob("*/*.tar"))
    monkeypatch.setattr(Storage, "free_bytes", lambda self: needed_bytes)
    assert main(command) == 0


@pytest.mark.parametrize("finished", [True, False])
def test_another_preparation_is_refused(
    prepared: Any, own_archives: Path, tmp_path: Path, capsys: pytest.CaptureFixture, finished: bool, tree: Callable
) -> None:
    out = tmp_path / "o"
    if finished:
        shutil.copytree(prepared.out, out)
    else:
        run_ending(prepared.archives, out, "after", "train/", 2)
    before = tree(out)
    # other images in an archive of the same name
    (own_archives / TEST).write_bytes(tar_of({"ILSVRC2012_test_00000001.JPEG": b"x" * 5000}))
    for archives, options, what in [
        (prepared.archives, ["--crop", "48"], "another crop (32, now 48)"),
        (prepared.archives, ["--crop", "32", "--name", "mine"], "another name"),
        (own_archives, ["--crop", "32"], "another sources"),
    ]:
        assert main([str(archives), "--out", str(out), *options]) == 2
        message = capsys.readouterr().err
        assert what in message
        assert ("finished data set" if finished else "unfinished preparation") in message
        assert "give another --out, or delete that folder" in message
    assert tree(out) == before


def test_a_damaged_finished_data_set(prepared: Any, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = Path(shutil.copytree(prepared.out, tmp_path / "o"))
    next((out / "val").iterdir()).unlink()
    assert main([str(prepared.archives), "--out", str(out), "--crop", "32"]) == 2
    message = capsys.readouterr().err
    assert re.search(r"holds a damaged data set \(.* is missing\): delete that folder and run again, or give", message)
    assert "prepare the data set again" not in message


@pytest.mark.parametrize(
    ("exact", "size", "genuine", "code", "text"),
    [
        (True, 1.0, True, 0, ""),
        (True, 1.0, False, 2, "is damaged: its MD5 is"),
        (False, 1.0, False, 0, "warning: "),
        (True, 1.05, False, 0, "warning: "),
        (True, 100.0, False, 0, "is not the official archive"),
    ],
)
def test_official_sums(
    archives: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
    exact: bool,
    size: float,
    genuine: bool,
    code: int,
    text: str,
) -> None:
    data = (archives / VAL).read_bytes()
    md5 = hashlib.md5(data).hexdigest() if genuine else "0" * 32
    monkeypatch.setattr(official, "OFFICIAL", {VAL: official.Official(int(len(data) * size), exact, md5)})
    assert main([str(archives), "--out", str(tmp_path / "o"), "--crop", "32"]) == code
    captured = capsys.readouterr()
    printed = captured.err if code else captured.out
    assert (text in printed) if text else ("warning" not in printed and "not the official" not in printed)
    assert (tmp_path / "o" / "manifest.json").exists() == (code == 0)
    if code == 0:
        sources = DataSet(Storage(str(tmp_path / "o"))).manifest.sources
        assert [s.name for s in sources if s.official] == ([VAL] if genuine else [])


def test_an_archive_replaced_before_the_end(own_archives: Path, tmp_path: Path, tree: Callable) -> None:
    """A good copy in the place of a damaged one, say: of the same size."""
    val, out = own_archives / VAL, tmp_path / "o"
    good = val.read_bytes()
    bad = bytearray(good)
    for image in files_of(val).values():
        bad[good.index(image) + 2 : good.index(image) + len(image)] = bytes(len(image) - 2)
    val.write_bytes(bad)
    assert main([str(own_archives), "--out", str(out), "--crop", "32"]) == 2  # too many undecodable images
    val.write_bytes(good)
    prepare(Arguments(archives=str(own_archives), out=str(tmp_path / "other"), crop=32))
    prepare(Arguments(archives=str(own_archives), out=str(out), crop=32))
    assert tree(out) == tree(tmp_path / "other")


def test_the_summary(own_archives: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main([str(own_archives), "--out", str(tmp_path / "o"), "--crop", "32"]) == 0
    printed = capsys.readouterr().out
    digest = hashlib.sha256((tmp_path / "o" / "manifest.json").read_bytes()).hexdigest()
    for piece in (
        "train         40 images",
        "val           12",
        "test           7",
        "4 classes",
        digest,
        f"check     python -m data_prep.verify {tmp_path}/o\n",
        str(tmp_path),
    ):
        assert piece in printed
    assert "odd images: 1 png, 1 cmyk, 1 grayscale" in printed
    assert re.search(r"time +\d+\.\d s; largest process \d+ MiB", printed)


# -- fan-out and demo -----------------------------------------------------------------------------------------------


def _reciprocal(number: int) -> float:
    if number == 0:
        raise OSError("division by zero")
    return 1 / number


def test_fan_out_in_this_process() -> None:
    results = list(fan_out(_reciprocal, [1, 2], beside=[4, 5], num_tasks=0))
    assert sorted((item, result) for item, result, _ in results) == [(1, 1.0), (2, 0.5), (4, 0.25), (5, 0.2)]
    assert all(10 << 20 < peak_bytes < 100 << 30 for _, _, peak_bytes in results)
    for items, beside in (([1, 0], []), ([1], [0])):
        with pytest.raises(OSError, match=r"^OSError: division by zero$"):
            list(fan_out(_reciprocal, items, beside=beside, num_tasks=1))


def test_nothing_starts_ray_for_small_data(archives: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from data_prep.ilsvrc import main\n"
        f"code = main([{str(archives)!r}, '--out', {str(tmp_path / 'o')!r}, '--crop', '32'])\n"
        "sys.exit(code or ('ray' in sys.modules) * 3)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_the_demo_is_a_function_of_its_arguments(archives: Path, tmp_path: Path, tree: Callable) -> None:
    options = {"num_classes": 4, "train_per_class": 10, "val_per_class": 3, "test_images": 7}
    sides = {"min_side": 40, "max_side": 72}
    demo.generate(demo.Arguments(out=str(tmp_path / "same"), **options, **sides))
    demo.generate(demo.Arguments(out=str(tmp_path / "other"), **options, **sides, seed=1))
    assert tree(tmp_path / "same") == tree(archives)
    assert tree(tmp_path / "other")[VAL] != tree(archives)[VAL]


def test_the_demo_has_the_promised_layout(archives: Path) -> None:
    classes = demo.demo_classes(4, 0)
    kinds = {(c.shape, c.texture) for c in classes}
    assert len(kinds) == 4
    assert len({shape for shape, _ in kinds}) == len({texture for _, texture in kinds}) == 2  # neither tells the class
    sizes = {Image.open(io.BytesIO(data)).size for data in files_of(archives / VAL).values()}
    assert len(sizes) > 6
    assert all(40 <= side <= 72 for size in sizes for side in size)
    with tarfile.open(archives / TEST) as tar:
        assert all(name.startswith("test/") for name in tar.getnames())
    for num_classes in (2, 8, 64):
        some = demo.demo_classes(num_classes, 3)
        assert len({(c.shape, c.texture) for c in some}) == num_classes
        assert sorted(c.wnid for c in some) == [c.wnid for c in some]
        assert [c.ilsvrc_id for c in some] != sorted(c.ilsvrc_id for c in some)
    assert demo.main(["--out", "/nowhere", "--num-classes", "65"]) == 2


# -- real photographs -----------------------------------------------------------------------------------------------


@pytest.mark.skipif("REAL_DATA" not in os.environ, reason="REAL_DATA names no folder of real images")
def test_real_photographs(tmp_path: Path) -> None:
    folder = Path(os.environ["REAL_DATA"])
    manifest = prepare(Arguments(archives=str(folder / "ilsvrc_mini"), out=str(tmp_path / "o"))).manifest
    assert {name: info.count for name, info in manifest.splits.items()} == {"train": 800, "val": 300, "test": 100}
    assert [c.wnid for c in manifest.classes] == [
        "n01440764",
        "n02102040",
        "n02979186",
        "n03000684",
        "n03028079",
        "n03394916",
        "n03417042",
        "n03425413",
        "n03445777",
        "n03888257",
    ]
    assert [c.ilsvrc_id for c in manifest.classes] == [9, 7, 3, 10, 4, 1, 6, 5, 8, 2]
    whats = [o.what for o in manifest.odd]
    assert (whats.count("png"), whats.count("cmyk"), whats.count("undecodable")) == (1, 1, 0)
    assert whats.count("grayscale") > 5
    statistics = DataSet(Storage(str(tmp_path / "o"))).statistics()
    # photographs resemble ImageNet: its means are 124, 116, 104, and its first eigenvector is near grey
    np.testing.assert_allclose(statistics["channel_mean"], [124, 116, 104], atol=12)
    assert abs(statistics["eigenvectors"][:, 0] @ np.array([0.5675, 0.5808, 0.5836])) > 0.99


@pytest.mark.skipif("REAL_DATA" not in os.environ, reason="REAL_DATA names no folder of real images")
def test_real_oddities() -> None:
    found = {
        path.name: prepare_image(path.read_bytes(), with_pixels=True).what
        for path in (Path(os.environ["REAL_DATA"]) / "odd_images").iterdir()
        if path.name != "LICENSE"
    }
    assert found == {
        "broken_exif_dpi.jpg": "",
        "empty.jpg": "undecodable",
        "hopper_16bit_qtables.jpg": "",
        "hopper_gray.jpg": "grayscale",
        "hopper_orientation_6.jpg": "",
        "jpeg_ff00_header.jpg": "irregular",
        "junk_jpeg_header.jpg": "irregular",
        "monkey12.jpg": "undecodable",
        "one_pixel.jpg": "",
        "pil_sample_cmyk.jpg": "cmyk",
        "png_named.JPEG": "png",
        "progressive.jpg": "",
        "sliver_3x500.jpg": "",
        "text.jpg": "undecodable",
        "truncated_jpeg.jpg": "undecodable",
    }
