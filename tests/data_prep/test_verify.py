"""Verification: silent on a whole set, and every kind of damage named."""

from __future__ import annotations

import hashlib
import io
import json
import re
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from data_prep import image_folder
from data_prep.verify import main, verify
from orchestrator.data.shard_writer import write_index
from orchestrator.data.shards import DataSet, Manifest
from orchestrator.storage import Storage, sha256_hex
from tests import object_store
from tests.data_prep.test_image_folder import TREE, encoded, write

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """25 images of two classes in shards of 5; one of val cannot be decoded. Not to be changed."""
    folder = write(tmp_path_factory.mktemp("verify") / "f", {**TREE, "val/ant/0.jpg": b"?", "train/cat/x.txt": b""})
    out = folder.parent / "o"
    image_folder.prepare(image_folder.Arguments(str(folder), str(out), crop=16, num_tasks=0, images_per_shard=5))
    return out


@pytest.fixture
def spoilt(whole: Path, tmp_path: Path) -> Path:
    """A copy of ``whole`` to spoil."""
    return Path(shutil.copytree(whole, tmp_path / "o"))


def problems(folder: Path) -> list[str]:
    return verify(Storage(str(folder)), num_tasks=0).problems


# -- a whole set ----------------------------------------------------------------------------------------------------


def test_a_whole_set(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, tree: Callable
) -> None:
    monkeypatch.chdir(tmp_path)
    before = tree(whole)
    assert main([str(whole)]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    for line in [
        r"^ +train +val +test$",
        r"^images +16 +5 +4$",
        r"^undecodable, counted as wrong +0 +1 +0$",
        r"^shards +4 +1 +1$",
        r"^classes +2 +2 +–$",
        r"^images a class: min · median · max +7 · 8 · 9 +2 · 2 · 3 +–$",
        r"^width, pixels +40 · 40 · 40 ",
        r"^height, pixels +30 · 30 · 30 ",
        r"^bytes of an image +\d[\d,]+ · \d[\d,]+ · \d[\d,]+ ",
        r"^odd images: 1 undecodable$",
        r"^passed over: 1 ",
        r"^figure verify.png$",
        rf"^digest {sha256_hex((whole / 'manifest.json').read_bytes())}$",
        r"^all is well: 0 problems in ",
    ]:
        assert re.search(line, captured.out, re.MULTILINE), (line, captured.out)
    assert Image.open(tmp_path / "verify.png").size == (1300, 520)
    assert tree(whole) == before


def test_an_archive_set_is_whole_too(prepared: object) -> None:
    assert problems(prepared.out) == []  # type: ignore[attr-defined]


def test_an_object_store(whole: Path, tmp_path: Path) -> None:
    objects = object_store.Bucket.objects
    objects.clear()
    for path in whole.rglob("*.*"):
        objects[f"bucket/o/{path.relative_to(whole)}"] = path.read_bytes()
    before = dict(objects)
    found = verify(Storage("bucket://bucket/o"), num_tasks=0)
    assert (found.problems, objects) == ([], before)
    shard = shard_of(whole, 1).name
    name = f"bucket/o/train/{shard}"
    objects[name] = objects[name][:-5000]
    found = verify(Storage("bucket://bucket/o"), num_tasks=0)
    objects.clear()
    assert f"train/{shard} has " in found.problems[0]


# -- damage ---------------------------------------------------------------------------------------------------------


def flip(path: Path, offset: int, bits: int = 0x55) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= bits
    path.write_bytes(data)


def shard_of(folder: Path, number: int) -> Path:
    """A shard of train."""
    return folder / DataSet(Storage(str(folder))).manifest.splits["train"].shards[number].name


def image_of(folder: Path, split: str, row: int) -> tuple[Path, int, int, str]:
    """Shard, offset, size in bytes and name of an image."""
    s = DataSet(Storage(str(folder))).split(split)
    shard = folder / s.info.shards[s.shard[row]].name
    return shard, int(s.offset[row]), int(s.nbytes[row]), s.names[row].as_py()


def a_byte_of_pixels(folder: Path) -> str:
    shard, offset, nbytes, _ = image_of(folder, "train", 6)
    flip(shard, offset + nbytes - 40, 1)
    return rf"^{shard.parent.name}/{shard.name} is damaged: its SHA-256 is not the one in the manifest$"


def an_image_that_ends_early(folder: Path) -> str:
    shard, offset, nbytes, name = image_of(folder, "train", 6)
    data = bytearray(shard.read_bytes())
    data[offset + nbytes // 2 : offset + nbytes] = bytes(nbytes - nbytes // 2)
    shard.write_bytes(data)
    return rf"{shard.name}: {name} is no JPEG of 40 × 30 pixels that can be decoded"


def an_image_of_another_size(folder: Path) -> str:
    shard, offset, nbytes, name = image_of(folder, "train", 4)
    other = encoded(1, size=(20, 10), quality=5)
    data = bytearray(shard.read_bytes())
    data[offset : offset + nbytes] = other + bytes(nbytes - len(other))
    shard.write_bytes(data)
    return rf"{shard.name}: {name} is no JPEG of 40 × 30 pixels"


def a_truncated_shard(folder: Path) -> str:
    shard, offset, nbytes, _ = image_of(folder, "train", 13)
    size = shard.stat().st_size
    shard.write_bytes(shard.read_bytes()[: offset + nbytes // 2])
    return rf"{shard.name} has {offset + nbytes // 2} bytes where the manifest says {size}"


def a_missing_shard(folder: Path) -> str:
    shard_of(folder, 2).unlink()
    return r"^train/train-00002-\w+-000.tar is missing$"


def an_empty_shard(folder: Path) -> str:
    shard_of(folder, 2).write_bytes(b"")
    return r"^train/train-00002-\w+-000.tar: images that are not where the index says: 5 of 5 \(train/"


def a_wrong_label(folder: Path) -> str:
    shard, offset, nbytes, name = image_of(folder, "train", 2)
    data = bytearray(shard.read_bytes())
    place = offset + -(-nbytes // 512) * 512 + 512
    label = data[place : place + 1]
    assert label in (b"0", b"1")
    data[place : place + 1] = b"1" if label == b"0" else b"0"
    shard.write_bytes(data)
    return rf"{shard.name}: {name} has label {'1' if label == b'0' else '0'}, in the index {label.decode()}"


def a_damaged_tar_header(folder: Path) -> str:
    shard, offset, _, _ = image_of(folder, "train", 2)
    flip(shard, offset - 512)
    return rf"{shard.name}: images that are not where the index says: 3 of 5"


def a_huge_member(folder: Path) -> str:
    shard, *_ = image_of(folder, "train", 0)
    data = bytearray(shard.read_bytes())
    header = tarfile.TarInfo.frombuf(bytes(data[:512]), "utf-8", "strict")
    header.size = 8 << 30
    data[:512] = header.tobuf(tarfile.GNU_FORMAT)
    shard.write_bytes(data)
    return rf"{shard.name}: \S+ at byte 0 belongs to no data set"


def shards_in_each_others_place(folder: Path) -> str:
    one, other = shard_of(folder, 0), shard_of(folder, 1)
    data = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(data)
    return r"train-00001-\w+-000.tar: \S+.jpg is train/\S+ in the index"


def the_index_of_another_set(folder: Path) -> str:
    names = ["shard", "offset", "nbytes", "width", "height", "label", "decodable"]
    write_index(Storage(str(folder)), "train.arrow", {**{n: [0] * 16 for n in names}, "name": ["x"] * 16})
    return "^index of train: .*train.arrow is damaged: its SHA-256 is not the recorded one"


def no_index(folder: Path) -> str:
    (folder / "val.arrow").unlink()
    return "^index of val: .*val.arrow"


def an_edited_count(folder: Path) -> str:
    edit(folder, lambda raw: raw["splits"]["val"].update(count=6))
    return r"^manifest.json: val has 6 images, its shards together 5$"


def an_edited_shard_count(folder: Path) -> str:
    edit(folder, lambda raw: raw["splits"]["train"]["shards"][1].update(count=4))
    return r"^index of train: .*train.arrow does not fit its manifest"


def a_count_that_is_none(folder: Path) -> str:
    edit(folder, lambda raw: raw["splits"]["train"]["shards"][1].update(count="5"))
    return r"^manifest.json: manifest.json cannot be read \(TypeError\(.a count that is none"


def an_edited_digest(folder: Path) -> str:
    edit(folder, lambda raw: raw["splits"]["test"]["shards"][0].update(sha256="0" * 64))
    return r"^test/test-00000-\w+-000.tar is damaged"


def a_class_less(folder: Path) -> str:
    edit(folder, lambda raw: raw["classes"].pop())
    return r"^train.arrow: has labels that are no class of the manifest$"


def an_unreadable_manifest(folder: Path) -> str:
    (folder / "manifest.json").write_bytes((folder / "manifest.json").read_bytes()[:-30])
    return r"^manifest.json: manifest.json cannot be read"


def a_manifest_of_garbage(folder: Path) -> str:
    (folder / "manifest.json").write_bytes(b"\xff\xfe[]")
    return r"^manifest.json: manifest.json cannot be read"


def damaged_statistics(folder: Path) -> str:
    flip(folder / "statistics.safetensors", 900)
    return r"^statistics.safetensors: .*is damaged: its SHA-256"


def no_statistics(folder: Path) -> str:
    (folder / "statistics.safetensors").unlink()
    return r"^statistics.safetensors is missing$"


def statistics_of_another_crop(folder: Path) -> str:
    edit(folder, lambda raw: raw.update(statistics_crop=17))
    return r"^statistics.safetensors: mean_image is not there, has not the shape \(3, 17, 17\)"


def a_letter_of_a_class(folder: Path) -> str:
    data = (folder / "manifest.json").read_bytes()
    (folder / "manifest.json").write_bytes(data.replace(b'"wnid": "cat"', b'"wnid": "caT"'))
    return r"^manifest.json is not what was published: its SHA-256 is not the one in manifest.sha256$"


def a_split_of_another_name(folder: Path) -> str:
    data = (folder / "manifest.json").read_bytes()
    (folder / "manifest.json").write_bytes(data.replace(b'"val":', b'"vel":'))
    (folder / "manifest.sha256").unlink()
    return r"^manifest.json: lacks val; its splits are test, train, vel$"


def a_digest_of_something_else(folder: Path) -> str:
    (folder / "manifest.sha256").write_bytes(b"\xff")
    return r"^manifest.json is not what was published"


def edit(folder: Path, change: Callable) -> None:
    raw = json.loads((folder / "manifest.json").read_text())
    change(raw)
    (folder / "manifest.json").write_text(json.dumps(raw))


DAMAGES = [
    a_byte_of_pixels,
    an_image_that_ends_early,
    an_image_of_another_size,
    a_truncated_shard,
    a_missing_shard,
    an_empty_shard,
    a_wrong_label,
    a_damaged_tar_header,
    a_huge_member,
    shards_in_each_others_place,
    the_index_of_another_set,
    no_index,
    an_edited_count,
    an_edited_shard_count,
    a_count_that_is_none,
    an_edited_digest,
    a_class_less,
    an_unreadable_manifest,
    a_manifest_of_garbage,
    damaged_statistics,
    no_statistics,
    statistics_of_another_crop,
    a_letter_of_a_class,
    a_split_of_another_name,
    a_digest_of_something_else,
]


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_named(spoilt: Path, capsys: pytest.CaptureFixture, damage: Callable[[Path], str]) -> None:
    expected = damage(spoilt)
    assert main([str(spoilt), "--figure", "None"]) == 1
    lines = capsys.readouterr().err.splitlines()
    end = re.fullmatch(rf"error: (\d+) problems? in {spoilt}: copy the files named above again from .*", lines[-1])
    assert end is not None
    assert int(end[1]) == len(lines) - 1 or len(lines) == 22
    assert all(line.startswith("damaged: ") for line in lines[:-1])
    assert any(re.search(expected, line.removeprefix("damaged: ")) for line in lines[:-1]), lines


def test_long_lists_of_damage_are_cut(spoilt: Path, capsys: pytest.CaptureFixture) -> None:
    for path in spoilt.glob("train/*.tar"):  # every image, and every shard
        data = path.read_bytes()
        path.write_bytes(data.replace(b"\xff\xda", b"\xff\xd9"))
    assert main([str(spoilt), "--figure", "None"]) == 1
    lines = capsys.readouterr().err.splitlines()
    count = re.match(r"error: (\d+) problems", lines[-1])
    assert count is not None
    assert int(count[1]) == 16 + 4 == len(lines) - 1
    edit(spoilt, lambda raw: raw["splits"]["val"].update(count=7))
    assert main([str(spoilt), "--figure", "None"]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 22
    assert re.match(r"damaged: and \d more$", lines[-2])


def test_a_label_too_many_or_few(whole: Path, tmp_path: Path) -> None:
    """Shards that were written wrongly: their digests are right."""
    out = Path(shutil.copytree(whole, tmp_path / "o"))
    storage = Storage(str(out))
    manifest = Manifest.from_bytes((out / "manifest.json").read_bytes())
    table = pa.ipc.open_file(pa.memory_map(str(out / "test.arrow"))).read_all().to_pydict()
    table["label"] = [0] * 4
    digest = write_index(storage, "test.arrow", table)
    test = replace(manifest.splits["test"], index_sha256=digest)
    (out / "manifest.json").write_bytes(replace(manifest, splits={**manifest.splits, "test": test}).to_bytes())
    (out / "manifest.sha256").unlink()
    (problem,) = problems(out)
    assert f"{test.shards[0].name}: images without a label, or with one too many: 4 of 4 (test/" in problem


# -- what is no damage ----------------------------------------------------------------------------------------------


def test_warnings(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    files = {
        **TREE,
        "val/cat/leak.jpg": TREE["train/cat/3.jpg"],
        "train/ant/again.jpg": TREE["train/ant/sub/1.JPG"],
        "train/cat/other.jpg": TREE["train/ant/sub/2.JPG"],
        "train/bee/1.jpg": encoded(900),
        # placeholders are no duplicates
        "val/cat/bad.jpg": b"?",
        "val/cat/worse.jpg": b"!",
    }
    folder = write(tmp_path / "f", files)
    out = str(tmp_path / "o")
    image_folder.prepare(image_folder.Arguments(str(folder), out, crop=16, num_tasks=0, max_undecodable=0.5))
    assert main([out, "--figure", str(tmp_path / "x.png")]) == 0
    printed = capsys.readouterr().out
    assert "warning: leak: images of val that are in train too: 1 (train/cat/3.jpg = val/cat/leak.jpg)\n" in printed
    assert "warning: images that are in train more than once: 2 (" in printed
    assert re.search(r"train/(cat/other|ant/sub/2)\.\w+ = train/\S+ under another label", printed)
    assert "warning: classes without an image in val: 1 (bee)\n" in printed


def test_a_stranger_and_an_older_set(spoilt: Path) -> None:
    write(spoilt, {"train/extra.tar": b"x", "notes/a.txt": b"x"})
    (spoilt / "manifest.sha256").unlink()
    found = verify(Storage(str(spoilt)), num_tasks=0)
    assert found.problems == []
    older, strangers = found.warnings
    assert older.startswith("there is no manifest.sha256 (")
    assert strangers == "files that the manifest does not name: 2 (notes/a.txt, train/extra.tar)"


def test_the_digest_can_be_checked_without_us(whole: Path) -> None:
    ended = subprocess.run(["sha256sum", "-c", "manifest.sha256"], cwd=whole, check=False, capture_output=True)
    assert ended.stdout == b"manifest.json: OK\n"


@pytest.mark.parametrize("num_classes", [2, 21])
def test_the_figure(tmp_path: Path, num_classes: int) -> None:
    """Something is drawn in both halves, in shades of gray."""
    names = [(f"$c_{c:02d}$/{k}.jpg", k) for c in range(num_classes) for k in (1, 2)]
    files = {name: encoded(n, size=(20 + 30 * k, 20)) for n, (name, k) in enumerate(names)}
    folder, figure = write(tmp_path / "f $^2", files), tmp_path / "figures" / "f.png"
    image_folder.prepare(image_folder.Arguments(str(folder), str(tmp_path / "o"), crop=16, num_tasks=0))
    assert main([str(tmp_path / "o"), "--figure", str(figure)]) == 0
    pixels = np.asarray(Image.open(figure).convert("RGB"), np.int64)
    assert np.ptp(pixels, axis=2).max() == 0
    for half in (pixels[80:-80, 80:600], pixels[80:-80, 740:]):
        assert (half < 128).mean() > 0.005


# -- nothing to verify ----------------------------------------------------------------------------------------------


def test_wrong_commands(whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    unfinished = tmp_path / "unfinished"
    write(unfinished, {".parts/preparation.json": b"{}"})
    write(tmp_path, {"file": b""})
    for arguments, message in [
        ([str(tmp_path / "nowhere")], "no prepared data set at .*give the --out of a preparation"),
        ([str(tmp_path / "file")], "no prepared data set at"),
        ([str(unfinished)], "is unfinished: run its preparation again"),
        (["nosuch://bucket/x"], "cannot be opened"),
        ([str(whole), "--figure", "x.pdf"], "must end in .png"),
        ([str(whole), "--figure", str(whole / "x.png")], "would lie inside the data set"),
        ([str(whole), "--figure", str(tmp_path / "file" / "x.png")], "cannot be written"),
        ([str(whole), "--figure", "None", "--num-tasks", "2", "--ray-address", "127.0.0.1:1"], "no Ray cluster"),
    ]:
        arguments = arguments if "--figure" in arguments else [*arguments, "--figure", "None"]
        assert main(arguments) == 2, arguments
        captured = capsys.readouterr()
        assert re.search(message, captured.err), captured.err
        assert captured.err.startswith("error: ")
        assert captured.err.count("\n") == 1
    with pytest.raises(SystemExit) as caught:
        main([str(whole), "--nonsense"])
    assert caught.value.code == 2


def test_the_command(whole: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "data_prep.verify", str(whole), "--figure", str(tmp_path / "x.png")]
    ended = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert (tmp_path / "x.png").exists()


def test_digests_are_what_is_compared(whole: Path) -> None:
    """The verification's own arithmetic, done by hand for one shard."""
    info = DataSet(Storage(str(whole))).manifest.splits["val"].shards[0]
    data = (whole / info.name).read_bytes()
    assert sha256_hex(data) == hashlib.sha256(data).hexdigest() == info.sha256
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        assert sum(m.name.endswith(".jpg") for m in tar) == info.count
