"""The shard format: any tar reader reads it, any image is one ranged read away, damage is noticed."""

from __future__ import annotations

import hashlib
import io
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.data.index_check import in_order
from orchestrator.data.shard_writer import ShardWriter, key_of, write_index
from orchestrator.data.shards import (
    UNLABELLED,
    ClassInfo,
    DataSet,
    Encoding,
    Manifest,
    OddImage,
    ShardInfo,
    Source,
    SplitInfo,
)
from orchestrator.storage import Storage, sha256_hex
from tests.data.build import build, jpeg, noise_image

IMAGES = [bytes([n]) * size for n, size in enumerate((1, 511, 512, 513, 0, 10_000))]


def write_data_set(folder: Path) -> DataSet:
    """Six "images" in two shards of one split."""
    storage = Storage(str(folder))
    infos, offsets = [], []
    for number in range(2):
        with ShardWriter(storage, f"train/{number}.tar") as shard:
            offsets += [shard.add(f"image_{3 * number + i}", IMAGES[3 * number + i], label=i) for i in range(3)]
        infos.append(shard.info)
    columns = {
        "shard": [0, 0, 0, 1, 1, 1],
        "offset": offsets,
        "nbytes": [len(image) for image in IMAGES],
        "width": [1] * 6,
        "height": [2] * 6,
        "label": [0, 1, 2] * 2,
        "decodable": [1] * 6,
        "name": [f"image_{i}.JPEG" for i in range(6)],
    }
    index_sha256 = write_index(storage, "train.arrow", columns)
    storage.publish("statistics.safetensors", b"")
    manifest = Manifest(
        name="six",
        classes=tuple(ClassInfo(i, f"n0000000{i}", 3 - i, "words, with a comma") for i in range(3)),
        splits={"train": SplitInfo(6, "train.arrow", index_sha256, tuple(infos))},
        statistics="statistics.safetensors",
        statistics_sha256=sha256_hex(b""),
        statistics_crop=8,
        odd=(OddImage("train", "image_1.JPEG", "png", "kept"),),
        sources=(Source("a.tar", 10, "0" * 32, True),),
    )
    storage.publish("manifest.json", manifest.to_bytes())
    return DataSet(storage)


def test_every_image_is_one_ranged_read_away(tmp_path: Path) -> None:
    split = write_data_set(tmp_path).split("train")
    order = np.array([5, 0, 4, 3, 2, 1, 5])
    assert [image.tobytes() for image in split.read(order)] == [IMAGES[i] for i in order]
    assert len(split) == 6
    assert split.names.to_pylist() == [f"image_{i}.JPEG" for i in range(6)]
    assert split.label.tolist() == [0, 1, 2] * 2
    assert split.label.dtype == np.int32


def test_tar_readers_find_the_same(tmp_path: Path) -> None:
    data_set = write_data_set(tmp_path)
    split = data_set.split("train")
    row = 0
    for info in split.info.shards:
        data = (tmp_path / info.name).read_bytes()
        assert hashlib.sha256(data).hexdigest() == info.sha256
        assert len(data) == info.nbytes
        assert len(data) % tarfile.RECORDSIZE == 0
        with tarfile.open(fileobj=io.BytesIO(data)) as tar:
            members = tar.getmembers()
            for image, label in zip(members[::2], members[1::2], strict=True):
                assert image.name == f"image_{row}.jpg"
                assert (image.offset_data, image.size) == (split.offset[row], split.nbytes[row])
                assert label.name == f"image_{row}.cls"
                stream = tar.extractfile(label)
                assert stream is not None
                assert int(stream.read()) == split.label[row]
                row += 1
    assert row == 6


def test_same_images_same_bytes(tmp_path: Path) -> None:
    one, other = write_data_set(tmp_path / "a"), write_data_set(tmp_path / "b")
    assert one.digest == other.digest
    assert one.manifest == other.manifest


def test_unlabelled_images_have_no_class_file(tmp_path: Path) -> None:
    with ShardWriter(Storage(str(tmp_path)), "x.tar") as shard:
        shard.add("a", b"1", UNLABELLED)
        shard.add("b", b"2", UNLABELLED)
    with tarfile.open(tmp_path / "x.tar") as tar:
        assert tar.getnames() == ["a.jpg", "b.jpg"]


def test_keys(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    with ShardWriter(storage, "x.tar") as shard:
        shard.add("cat/a.b.c", b"1", 0)  # WebDataset would split it at its first dot
        shard.add("long" * 50, b"2", 0)
        shard.add("größe", b"3", 0)
        for bad in ("cat/a.b.c", "../x", "/x", "a//b", "", "a/..", "a\\b", "a\nb", "a\0b"):
            with pytest.raises(ValueError, match="name"):
                shard.add(bad, b"3", 0)
    with tarfile.open(tmp_path / "x.tar") as tar:
        assert tar.getnames()[::2] == ["cat/a_b_c.jpg", "long" * 50 + ".jpg", "größe.jpg"]
        stream = tar.extractfile("größe.jpg")
        assert stream is not None
        assert stream.read() == b"3"
    assert key_of("test/ILSVRC2012_test_00000001.JPEG") == "ILSVRC2012_test_00000001"


def test_an_exception_publishes_no_shard(tmp_path: Path) -> None:
    def write() -> None:
        with ShardWriter(Storage(str(tmp_path)), "x.tar") as shard:
            shard.add("a", b"1", 0)
            raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        write()
    assert list(tmp_path.iterdir()) == []


def _missing(folder: Path) -> None:
    (folder / "manifest.json").unlink()


def _of_another_format(folder: Path) -> None:
    text = (folder / "manifest.json").read_text()
    (folder / "manifest.json").write_text(text.replace("shards/1", "shards/99"))


def _unreadable(folder: Path) -> None:
    (folder / "manifest.json").write_text("{")


def _damaged_index(folder: Path) -> None:
    data = bytearray((folder / "train.arrow").read_bytes())
    data[len(data) // 2] ^= 1
    (folder / "train.arrow").write_bytes(data)


def _empty_index(folder: Path) -> None:
    (folder / "train.arrow").write_bytes(b"")


def _no_index(folder: Path) -> None:
    (folder / "train.arrow").unlink()


def _short_shard(folder: Path) -> None:
    data = (folder / "train/1.tar").read_bytes()
    (folder / "train/1.tar").write_bytes(data[:-1])


def _no_shard(folder: Path) -> None:
    (folder / "train/1.tar").unlink()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_missing, "no prepared data set"),
        (_of_another_format, "shards/99"),
        (_unreadable, "cannot be read"),
        (_damaged_index, "damaged"),
        (_empty_index, "prepare the data set again"),
        (_no_index, "prepare the data set again"),
        (_short_shard, "bytes where the manifest says"),
        (_no_shard, "missing"),
    ],
)
@pytest.mark.parametrize("beside", [False, True])
def test_damage_is_a_value_error(tmp_path: Path, damage, message: str, beside: bool) -> None:  # type: ignore[no-untyped-def]
    write_data_set(tmp_path)
    damage(tmp_path)

    def use() -> None:
        data_set = DataSet(Storage(str(tmp_path)))
        data_set.split("train", check_beside=beside).check()
        data_set.check_shards("train")

    with pytest.raises(ValueError, match=message):
        use()


def test_every_bit_of_an_index_is_checked_beside_or_not(tmp_path: Path) -> None:
    write_data_set(tmp_path)
    sound = (tmp_path / "train.arrow").read_bytes()
    for place in range(0, len(sound), 7):
        (tmp_path / "train.arrow").unlink()  # what is mapped stays as it is
        (tmp_path / "train.arrow").write_bytes(sound[:place] + bytes([sound[place] ^ 1]) + sound[place + 1 :])
        for beside in (False, True):
            with pytest.raises(ValueError, match="prepare the data set again"):
                DataSet(Storage(str(tmp_path))).split("train", check_beside=beside).check()


def test_the_order_of_shards_is_checked() -> None:
    counts = [3, 0, 1000, 1] * 50
    shard = np.repeat(np.arange(200, dtype=np.int32), counts)
    assert in_order(shard, counts)
    assert in_order(shard[:0], [])
    assert not in_order(shard[:-1], counts)
    assert not in_order(shard, counts[:-1])
    for place in (0, 2, 3, 1500, len(shard) - 1):
        changed = shard.copy()
        changed[place] += 1
        assert not in_order(changed, counts)


def test_a_shard_truncated_underneath_is_an_os_error(tmp_path: Path) -> None:
    split = write_data_set(tmp_path).split("train")
    _ = split.read(np.array([3]))
    with open(tmp_path / "train/1.tar", "r+b") as stream:
        stream.truncate(600)
    with pytest.raises(OSError, match="truncated"):
        split.read(np.array([5]))


def test_unknown_split(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no split 'val': it has train"):
        write_data_set(tmp_path).split("val")


def test_an_empty_split_can_be_read(tmp_path: Path) -> None:
    data_set = write_data_set(tmp_path)
    columns = ("shard", "offset", "nbytes", "width", "height", "label", "decodable", "name")
    sha256 = write_index(data_set.storage, "val.arrow", {c: [] for c in columns})
    splits = {"val": SplitInfo(0, "val.arrow", sha256, ())}
    data_set.storage.publish("manifest.json", replace(data_set.manifest, splits=splits).to_bytes())
    assert len(DataSet(data_set.storage).split("val")) == 0


text = st.text(max_size=20)


@settings(deadline=None, max_examples=50)
@given(
    name=text,
    words=st.lists(text, max_size=4),
    shards=st.lists(st.tuples(text, st.integers(0, 2**62), st.integers(0, 2**31)), max_size=3),
)
def test_manifests_come_back(name: str, words: list[str], shards: list[tuple[str, int, int]]) -> None:
    manifest = Manifest(
        name=name,
        classes=tuple(ClassInfo(i, f"n{i:08d}", i + 1, w) for i, w in enumerate(words)),
        splits={"val": SplitInfo(3, "val.arrow", "ab", tuple(ShardInfo(n, b, c, "cd") for n, b, c in shards))},
        statistics="statistics.safetensors",
        statistics_sha256="ef",
        statistics_crop=224,
    )
    assert Manifest.from_bytes(manifest.to_bytes()) == manifest
    # Digests of data sets are older than encodings.
    assert b"encoding" not in manifest.to_bytes()
    planes = replace(manifest, encoding=Encoding.PLANES)
    assert Manifest.from_bytes(planes.to_bytes()) == planes


def test_an_unknown_encoding_is_refused(tmp_path: Path) -> None:
    planes = replace(write_data_set(tmp_path).manifest, encoding=Encoding.PLANES).to_bytes()
    with pytest.raises(ValueError, match="encoding 'tiles', which this program cannot read: use the version"):
        Manifest.from_bytes(planes.replace(b'"planes"', b'"tiles"'))
    with pytest.raises(ValueError, match="cannot be read"):
        Manifest.from_bytes(planes.replace(b'"planes"', b"[1]"))


def test_what_is_remembered_is_read_once(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    images = [(f"i{n}", jpeg(noise_image(rng, 20, 20)), 0) for n in range(5)]
    split = build(tmp_path, images).split("train")
    remembered, some = split.remembered(), np.array([3, 1, 3, 0])
    first = remembered.read(some)
    split.close()
    remembered.close()
    for shard in split.info.shards:
        (tmp_path / shard.name).unlink()
    for a, b, index in zip(first, remembered.read(some), some.tolist(), strict=True):
        assert a.tobytes() == b.tobytes() == images[index][1]
    with pytest.raises(OSError):  # noqa: PT011
        remembered.read(np.array([4]))
