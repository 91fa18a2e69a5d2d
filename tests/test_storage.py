"""What storage promises: whole or absent, one creator, nothing outside the folder."""

from __future__ import annotations

import errno
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestrator.storage import DigestError, Storage, sha256_hex
from tests import object_store
from tests.s3_server import BUCKET

ROOT = Path(__file__).parents[1]


@pytest.fixture(params=["local", "object store", "s3"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Storage]:
    object_store.Bucket.objects.clear()
    match request.param:
        case "local":
            yield Storage(str(tmp_path / "runs"))
        case "object store":
            yield Storage("bucket://bucket/runs")
        case "s3":
            request.getfixturevalue("s3")
            yield Storage(f"s3://{BUCKET}/{tmp_path.name}")
    object_store.Bucket.objects.clear()


def test_published_bytes_come_back(storage: Storage) -> None:
    storage.publish("a/b.bin", b"0123456789")
    assert storage.exists("a/b.bin")
    assert storage.size_bytes("a/b.bin") == 10
    assert storage.read("a/b.bin", sha256_hex(b"0123456789")) == b"0123456789"
    assert storage.read_range("a/b.bin", 2, 5) == b"234"
    assert storage.read_ranges([("a/b.bin", 8, 10), ("a/b.bin", 0, 1)]) == [b"89", b"0"]
    with storage.reading("a/b.bin") as stream:
        stream.seek(7)
        assert stream.read() == b"789"
        stream.seek(-3, os.SEEK_END)
        assert (stream.read(2), stream.tell(), stream.read(), stream.read()) == (b"78", 9, b"9", b"")
    storage.publish("a/b.bin", b"new")
    assert storage.read("a/b.bin") == b"new"


def test_damage_and_truncation_are_noticed(storage: Storage) -> None:
    storage.publish("x", b"0123456789")
    with pytest.raises(DigestError, match="damaged"):
        storage.read("x", sha256_hex(b"other"))
    with pytest.raises(OSError, match="truncated") as caught:
        storage.read_range("x", 5, 11)
    assert caught.value.errno == errno.EIO
    with pytest.raises(OSError, match="truncated"):
        storage.read_ranges([("x", 0, 2), ("x", 5, 11)])
    with pytest.raises(FileNotFoundError):
        storage.read("y")


@pytest.mark.parametrize("before", [None, b"old"])
def test_an_exception_inside_publishing_leaves_what_was_there(storage: Storage, before: bytes | None) -> None:
    if before is not None:
        storage.publish("a/x", before)

    def publish_half() -> None:
        with storage.publishing("a/x") as stream:
            stream.write(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        publish_half()
    if before is None:
        assert storage.files("a") == []
        assert not storage.exists("a/x")
    else:
        assert storage.read("a/x") == before
    folder = storage.local_path("a")
    if folder is not None:
        assert [p.name for p in folder.iterdir()] == (["x"] if before else [])


def test_nothing_is_visible_before_the_block_ends(storage: Storage) -> None:
    with storage.publishing("a/x") as stream:
        stream.write(b"1234")
        stream.flush()
        assert not storage.exists("a/x")
        assert storage.files("a") == []
    assert storage.files("a") == ["a/x"]


def test_a_killed_writer_leaves_only_a_fragment_that_can_be_removed(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys\nfrom orchestrator.storage import Storage\n"
        "with Storage(sys.argv[1]).publishing('a/x') as stream:\n"
        "    stream.write(b'half'); stream.flush(); os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    process = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, check=False)
    assert process.returncode == -signal.SIGKILL
    storage = Storage(str(tmp_path))
    assert len(list((tmp_path / "a").iterdir())) == 1
    assert storage.files("a") == []
    storage.publish("a/y", b"kept")
    storage.delete_fragments("a")
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["y"]
    storage.delete_fragments("not there")


def _create(url: str, start: float, name: str, results: multiprocessing.Queue) -> None:
    storage = Storage(url)
    time.sleep(max(0.0, start - time.time()))
    results.put((name, [storage.create(f"lease-{i}", name.encode()) for i in range(20)]))


def test_create_has_one_winner_among_processes(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    start = time.time() + 2.5
    processes = [context.Process(target=_create, args=(str(tmp_path), start, f"p{n}", results)) for n in range(3)]
    for process in processes:
        process.start()
    won = dict(results.get(timeout=60) for _ in processes)
    for process in processes:
        process.join(timeout=60)
    storage = Storage(str(tmp_path))
    for i in range(20):
        winners = [name for name, created in won.items() if created[i]]
        assert len(winners) == 1, winners
        assert storage.read(f"lease-{i}") == winners[0].encode()
    assert not list(tmp_path.glob(".tmp-*"))


def test_create_keeps_what_is_there(storage: Storage) -> None:
    assert storage.create("a/lease", b"first")
    assert not storage.create("a/lease", b"second")
    assert storage.read("a/lease") == b"first"


def test_list_sub_delete(storage: Storage) -> None:
    for name in ("b", "a", "folder/c", "folder/deep/d"):
        storage.publish(name, name.encode())
    assert storage.files() == ["a", "b"]
    assert storage.files("folder") == ["folder/c"]
    assert storage.files("nothing here") == []
    sub = storage.sub("folder")
    assert sub.files() == ["c"]
    assert sub.read("deep/d") == b"folder/deep/d"
    sub.publish("e", b"e")
    assert storage.read("folder/e") == b"e"
    storage.delete("a")
    storage.delete("a")
    assert storage.files() == ["b"]
    storage.delete("folder")
    assert storage.files("folder") == []
    assert not storage.exists("folder/deep/d")
    assert storage.read("b") == b"b"


def test_find_names_every_visible_file_at_any_depth(storage: Storage) -> None:
    assert storage.find() == {}
    for name in ("b/deep/d.jpg", "b/c.jpg", "a", ".hidden/x", "b/.DS_Store"):
        storage.publish(name, name.encode())
    assert storage.find() == {"a": 1, "b/c.jpg": 7, "b/deep/d.jpg": 12}
    assert storage.sub("b").find() == {"c.jpg": 7, "deep/d.jpg": 12}


def test_find_follows_links_once_and_refuses_those_to_nothing(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path / "a"))
    storage.publish("b/c", b"1")
    (tmp_path / "a" / "b" / "round").symlink_to(tmp_path / "a")
    (tmp_path / "a" / "linked").symlink_to(tmp_path / "a" / "b" / "c")
    assert storage.find() == {"b/c": 1, "linked": 1}
    (tmp_path / "a" / "b" / "c").unlink()
    with pytest.raises(ValueError, match="linked is a link to nothing: mend or remove it"):
        storage.find()


def test_find_goes_behind_every_link_but_those_in_a_circle(tmp_path: Path) -> None:
    pool, storage = Storage(str(tmp_path / "pool")), Storage(str(tmp_path / "a"))
    pool.publish("cat/deep/1", b"1")
    for name in ("train", "val"):
        storage.publish(f"{name}/own", b"")
        (tmp_path / "a" / name / "cat").symlink_to(tmp_path / "pool" / "cat")
    (tmp_path / "pool" / "cat" / "deep" / "up").symlink_to(tmp_path / "pool")
    (tmp_path / "a" / "val" / "sibling").symlink_to(tmp_path / "a" / "train")
    names = ["train/cat/deep/1", "train/own", "val/cat/deep/1", "val/own", "val/sibling/cat/deep/1"]
    found = [name for name in storage.find() if "/up/" not in name]
    assert found == [*names, "val/sibling/own"]
    assert not [name for name in storage.find() if name.count("/up/") > 1]
    assert storage.folders("train") == ["train/cat"]
    (tmp_path / "a" / "itself").symlink_to(tmp_path / "a" / "itself")
    with pytest.raises(ValueError, match="itself is a link to nothing"):
        storage.find()


def test_a_listing_tells_when_files_were_modified(tmp_path: Path) -> None:
    Storage(str(tmp_path)).publish("a/x", b"123")
    os.utime(tmp_path / "a" / "x", ns=(1, 10**18 + 1))
    assert Storage(str(tmp_path)).listing() == {"a/x": (3, 10**18 + 1)}


def test_a_listing_of_s3_tells_when_objects_were_modified(s3: object, tmp_path: Path) -> None:
    storage = Storage(f"s3://{BUCKET}/{tmp_path.name}")
    storage.publish("a/x", b"123")
    (found,) = storage.listing().values()
    assert found.nbytes == 3
    assert abs(found.modified_ns / 1e9 - time.time()) < 60


def test_probes_of_killed_processes_can_be_removed(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    def die(*arguments: object) -> None:
        raise KeyboardInterrupt

    storage.publish("a/x", b"")
    with monkeypatch.context() as patched:
        patched.setattr(Storage, "delete", die)
        for folder in (storage, storage.sub("a")):
            with pytest.raises(KeyboardInterrupt):
                folder.check_writable()
    assert storage.files() == []
    assert (len(storage.sizes_bytes()), len(storage.sizes_bytes("a"))) == (1, 2)
    storage.delete_fragments()
    storage.delete_fragments("a")
    assert (storage.sizes_bytes(), storage.sizes_bytes("a")) == ({}, {"a/x": 0})


def test_links_are_what_they_lead_to(tmp_path: Path) -> None:
    """People link archives of 140 GB to where they want them."""
    storage = Storage(str(tmp_path / "a"))
    storage.publish("there/x.tar", b"123")
    (tmp_path / "a" / "y.tar").symlink_to(tmp_path / "a" / "there" / "x.tar")
    (tmp_path / "a" / "linked").symlink_to(tmp_path / "a" / "there")
    (tmp_path / "a" / "nothing").symlink_to(tmp_path / "a" / "gone")
    assert storage.sizes_bytes() == {"y.tar": 3}
    assert storage.files("linked") == ["linked/x.tar"]
    assert storage.size_bytes("y.tar") == 3


def test_creation_is_exclusive_without_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*paths: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    storage = Storage(str(tmp_path))
    assert storage.create("x", b"first")
    assert not storage.create("x", b"second")
    assert storage.read("x") == b"first"
    assert storage.files() == ["x"]


@pytest.mark.parametrize("name", ["../x", "a/../../x", "/etc/passwd", "", ".."])
def test_names_stay_inside(storage: Storage, name: str) -> None:
    for act in (storage.path, storage.read, storage.sub, storage.delete, lambda n: storage.publish(n, b"")):
        with pytest.raises(ValueError, match="no name inside"):
            act(name)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("memory://x", "invisible"),
        ("", "empty"),
        ("nosuch://x/y", "cannot be opened"),
        ("s3://", "names no folder"),
        ("s3://name:hush@bucket/x", "holds credentials"),
        ("s3://bucket/x?secret=hush", "holds credentials"),
        ("s3://bucket/x?X-Amz-Signature=hush", "holds credentials"),
        ("s3://AKIDEXAMPLE:wJalr/K7MDENG/hush@bucket/x", "holds credentials"),
    ],
)
def test_useless_urls_are_refused(url: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        Storage(url)
    assert "hush" not in str(caught.value)


def test_a_storage_travels_to_other_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    storage = Storage("relative/folder")
    storage.publish("x", b"1")
    data = pickle.dumps(storage)
    monkeypatch.chdir("/")
    assert pickle.loads(data).read("x") == b"1"
    assert Storage(f"file://{tmp_path}/relative/folder").read("x") == b"1"


def test_writability_and_space(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path / "new" / "folder"))
    free_bytes = storage.free_bytes()
    assert free_bytes is not None
    assert free_bytes > 0
    storage.check_writable()
    assert storage.files() == []
    blocked = tmp_path / "file"
    blocked.write_bytes(b"")
    with pytest.raises(ValueError, match="cannot be written"):
        Storage(str(blocked / "folder")).check_writable()
    if os.geteuid():
        tmp_path.chmod(0o500)
        with pytest.raises(ValueError, match="permissions"):
            Storage(str(tmp_path / "other")).check_writable()
        tmp_path.chmod(0o700)
