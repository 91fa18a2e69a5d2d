"""Shards of a remote set on a node's disk, over a real S3 server: read at once, staged behind, within the budget."""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from orchestrator.config import Order, PlacementConfig, TrainConfig
from orchestrator.data.cache import ShardCache
from orchestrator.data.decoder import DecodeSettings
from orchestrator.data.pipeline import Mean, TrainInput
from orchestrator.data.sampling import SampleStream
from orchestrator.data.shards import DataSet
from orchestrator.data.views import ColourAxes, TrainView
from orchestrator.storage import Storage
from orchestrator.training.assembly import shard_cache
from tests.data.build import build, jpeg, noise_image
from tests.s3_server import BUCKET, S3Server

ROOT = Path(__file__).parents[2]
NUM_IMAGES, NUM_SHARDS = 48, 8


@pytest.fixture(scope="session")
def local(tmp_path_factory: pytest.TempPathFactory) -> DataSet:
    """48 images in 8 shards a split."""
    rng = np.random.default_rng(0)
    images = [(f"i{i}.jpg", jpeg(noise_image(rng, 60 + i, 50)), i % 3) for i in range(NUM_IMAGES)]
    return build(tmp_path_factory.mktemp("local"), images, shards=NUM_SHARDS)


@pytest.fixture
def remote(local: DataSet, s3: S3Server, tmp_path: Path) -> DataSet:
    """The same set in a bucket."""
    storage = Storage(f"s3://{BUCKET}/{tmp_path.name}")
    for name in local.storage.find():
        storage.publish(name, local.storage.read(name))
    return DataSet(storage)


def until(condition: Callable[[], bool], timeout_s: float = 30) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.02)


def shard_bytes(data: DataSet, split: str = "train") -> list[int]:
    return [shard.nbytes for shard in data.manifest.splits[split].shards]


def images_of(data: DataSet, cache: ShardCache | None) -> list[bytes]:
    split = data.split("train", cache.open if cache else None)
    read = split.read(np.arange(len(split)))
    split.close()
    return [image.tobytes() for image in read]


def test_the_index_and_the_images_are_the_same(local: DataSet, remote: DataSet) -> None:
    assert remote.digest == local.digest
    assert images_of(remote, None) == images_of(local, None)


def test_reads_do_not_wait_and_what_is_staged_is_not_asked_for_again(
    local: DataSet, remote: DataSet, s3: S3Server, tmp_path: Path
) -> None:
    cache = ShardCache(remote.storage, remote.digest, tmp_path / "cache", None)
    assert images_of(remote, cache) == images_of(local, None)  # nothing is staged yet
    assert cache.staged_bytes() == 0
    shards = remote.manifest.splits["train"].shards
    cache.want("train", shards)
    until(lambda: all(cache.path(shard.name).exists() for shard in shards))
    cache.close()
    again = ShardCache(remote.storage, remote.digest, tmp_path / "cache", None)  # that of a later run
    split = remote.split("train", again.open)
    s3.tell("stop")
    assert [image.tobytes() for image in split.read(np.arange(NUM_IMAGES))] == images_of(local, None)


def test_the_budget_is_kept_and_the_rest_is_read_from_the_store(
    local: DataSet, remote: DataSet, tmp_path: Path
) -> None:
    sizes = shard_bytes(remote)
    budget_bytes = sum(sizes[:3]) + 100
    cache = ShardCache(remote.storage, remote.digest, tmp_path / "cache", budget_bytes)
    shards = remote.manifest.splits["train"].shards
    cache.want("train", shards)
    until(lambda: cache.path(shards[2].name).exists())
    for _ in range(10):
        assert cache.staged_bytes() <= budget_bytes
        time.sleep(0.02)
    assert images_of(remote, cache) == images_of(local, None)
    # Other shards are wanted now: those behind make room for them.
    cache.want("train", [shards[7], shards[6], shards[0]])
    until(lambda: cache.path(shards[7].name).exists() and cache.path(shards[6].name).exists())
    assert cache.staged_bytes() <= budget_bytes
    assert images_of(remote, cache) == images_of(local, None)
    cache.close()


def own_folder(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "resnet-orchestrator-shards"


def test_what_another_run_uses_is_not_evicted(remote: DataSet, tmp_path: Path) -> None:
    other = own_folder(tmp_path) / ("0123456789abcdef")
    other.mkdir(parents=True)
    (other / "used.tar").write_bytes(bytes(1000))
    (other / "forgotten.tar").write_bytes(bytes(1000))
    os.utime(other / "forgotten.tar", (1, 1))
    sizes = shard_bytes(remote)
    cache = ShardCache(remote.storage, remote.digest, tmp_path / "cache", sizes[0] + 1500)
    shards = remote.manifest.splits["train"].shards
    cache.want("train", shards)
    until(lambda: cache.path(shards[0].name).exists())
    cache.close()
    assert (other / "used.tar").exists()
    assert not (other / "forgotten.tar").exists()


def test_two_runs_on_one_set_leave_each_other_what_they_use(remote: DataSet, tmp_path: Path) -> None:
    shards, sizes = remote.manifest.splits["train"].shards, shard_bytes(remote)
    budget_bytes = 3 * max(sizes)
    one, other = (ShardCache(remote.storage, remote.digest, tmp_path / "cache", budget_bytes) for _ in range(2))
    one.want("train", shards[:2])
    until(lambda: all(one.path(shard.name).exists() for shard in shards[:2]))
    other.want("train", shards[4:6])
    until(lambda: other.path(shards[4].name).exists())
    time.sleep(0.5)
    assert all(one.path(shard.name).exists() for shard in shards[:2])
    one.want("train", shards[2:3])  # now it has let go of its two
    until(lambda: one.path(shards[2].name).exists())
    assert other.path(shards[4].name).exists()
    one.close()
    other.close()


def test_nothing_but_our_copies_is_counted_or_removed(remote: DataSet, tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    theirs = [folder / "thesis" / "results.tar", folder / "a.tar", own_folder(tmp_path) / "notes" / "b.tar"]
    for path in theirs:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes(1 << 20))
        os.utime(path, (1, 1))
    cache = ShardCache(remote.storage, remote.digest, folder, sum(shard_bytes(remote)))
    assert cache.staged_bytes() == 0
    shards = remote.manifest.splits["train"].shards
    cache.want("train", shards)
    until(lambda: all(cache.path(shard.name).exists() for shard in shards))
    cache.close()
    assert all(path.stat().st_size == 1 << 20 for path in theirs)


def test_an_evicted_copy_gives_its_place_on_the_disk_back(local: DataSet, remote: DataSet, tmp_path: Path) -> None:
    cache = ShardCache(remote.storage, remote.digest, tmp_path / "cache", None)
    shards = remote.manifest.splits["train"].shards
    cache.want("train", shards)
    until(lambda: all(cache.path(shard.name).exists() for shard in shards))
    split = remote.split("train", cache.open)
    split.read(np.arange(NUM_IMAGES))  # opens every copy
    for shard in shards[:5]:
        cache.path(shard.name).unlink()
    assert [image.tobytes() for image in split.read(np.arange(NUM_IMAGES))] == images_of(local, None)
    links = [str(link.readlink()) for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]
    assert not [link for link in links if str(tmp_path) in link and "(deleted)" in link]
    cache.close()
    split.close()


def test_staging_goes_on_without_its_lock(remote: DataSet, tmp_path: Path) -> None:
    """Cleaners of temporary folders remove what looks old."""
    cache = ShardCache(remote.storage, remote.digest, tmp_path / "cache", None)
    shards = remote.manifest.splits["train"].shards
    cache.want("train", shards[:1])
    until(lambda: cache.path(shards[0].name).exists())
    (own_folder(tmp_path) / ".lock").unlink()
    cache.want("train", shards[1:2])
    until(lambda: cache.path(shards[1].name).exists())
    shutil.rmtree(own_folder(tmp_path))
    cache.want("train", shards[2:3])
    until(lambda: cache.path(shards[2].name).exists())
    cache.close()


def test_a_damaged_shard_is_told_and_not_kept(
    remote: DataSet, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shards = remote.manifest.splits["train"].shards
    name = shards[1].name
    data = bytearray(remote.storage.read(name))
    data[len(data) // 2] ^= 1
    remote.storage.publish(name, bytes(data))
    cache = ShardCache(remote.storage, remote.digest, tmp_path / "cache", None)
    with caplog.at_level(logging.WARNING):
        cache.want("train", shards)
        until(lambda: cache.path(shards[-1].name).exists())
    cache.close()
    assert not cache.path(name).exists()
    assert f"{name} is damaged (its SHA-256 is not the recorded one)" in caplog.text
    assert len(images_of(remote, cache)) == NUM_IMAGES


def test_a_copy_that_is_cut_or_removed_is_read_from_the_store(local: DataSet, remote: DataSet, tmp_path: Path) -> None:
    cache = ShardCache(remote.storage, remote.digest, tmp_path / "cache", None)
    shards = remote.manifest.splits["train"].shards
    cache.want("train", shards)
    until(lambda: all(cache.path(shard.name).exists() for shard in shards))
    cache.close()
    split = remote.split("train", cache.open)
    split.read(np.arange(len(split)))  # opens every copy
    os.truncate(cache.path(shards[0].name), 600)
    cache.path(shards[1].name).unlink()
    read = [image.tobytes() for image in split.read(np.arange(len(split)))]
    split.close()
    assert read == images_of(local, None)
    assert images_of(remote, cache) == images_of(local, None)


def test_a_store_that_is_away_does_not_end_the_staging(remote: DataSet, s3: S3Server, tmp_path: Path) -> None:
    cache = ShardCache(remote.storage, remote.digest, tmp_path / "cache", None)
    shards = remote.manifest.splits["train"].shards
    s3.tell("stop")
    cache.want("train", shards)
    time.sleep(1)
    s3.tell("start")
    until(lambda: all(cache.path(shard.name).exists() for shard in shards))
    cache.close()


STAGE = """
import sys
from pathlib import Path
from orchestrator.data.cache import ShardCache
from orchestrator.data.shards import DataSet
from orchestrator.storage import Storage
data = DataSet(Storage(sys.argv[1]))
cache = ShardCache(data.storage, data.digest, Path(sys.argv[2]), None)
shards = data.manifest.splits["train"].shards
print("ready", flush=True)
sys.stdin.readline()
cache.want("train", shards)
while not all(cache.path(s.name).exists() for s in shards):
    pass
"""


def test_processes_of_a_node_fetch_each_shard_once(remote: DataSet, s3: S3Server, tmp_path: Path) -> None:
    command = [sys.executable, "-c", STAGE, remote.storage.url, str(tmp_path / "cache")]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    processes = [subprocess.Popen(command, cwd=ROOT, text=True, **pipes) for _ in range(3)]
    for process in processes:
        assert process.stdout
        assert process.stdout.readline() == "ready\n"
    before = s3.num_requests()
    for process in processes:
        assert process.stdin
        process.stdin.write("\n")
        process.stdin.close()
    assert [process.wait(60) for process in processes] == [0, 0, 0]
    # One ranged read a shard, and what each process asks to open its connection.
    assert s3.num_requests() - before <= NUM_SHARDS + 3


def test_what_another_process_has_just_staged_is_not_begun_again(remote: DataSet, tmp_path: Path) -> None:
    """It was not there when this process looked, and is when it has the lock."""
    cache = ShardCache(remote.storage, remote.digest, tmp_path / "cache", None)
    shard = remote.manifest.splits["train"].shards[0]
    cache.want("train", [shard])
    until(lambda: cache.path(shard.name).exists())
    cache.close()
    part = cache.path(shard.name).with_suffix(".tar.part")
    assert cache._begin(part, shard.nbytes, {}, 0) is None
    assert not part.exists()


def test_what_a_killed_process_was_fetching_is_fetched_again(remote: DataSet, tmp_path: Path) -> None:
    shards = remote.manifest.splits["train"].shards
    cache = ShardCache(remote.storage, remote.digest, tmp_path / "cache", None)
    part = cache.path(shards[0].name).with_suffix(".tar.part")
    code = "import fcntl, sys, time; f = open(sys.argv[1], 'xb'); fcntl.flock(f, fcntl.LOCK_EX); print(1, flush=True); "
    holder = subprocess.Popen([sys.executable, "-c", code + "time.sleep(99)", str(part)], stdout=subprocess.PIPE)
    assert holder.stdout
    holder.stdout.readline()
    cache.want("train", shards)
    until(lambda: all(cache.path(shard.name).exists() for shard in shards[1:]))
    assert not cache.path(shards[0].name).exists()
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with part.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the lock went with its holder
    cache.want("train", shards)
    until(lambda: cache.path(shards[0].name).exists())
    assert not part.exists()
    cache.close()


def test_without_a_usable_folder_training_goes_on(
    remote: DataSet, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    config = TrainConfig(placement=PlacementConfig(cache_dir=str(tmp_path / "file")))
    with caplog.at_level(logging.WARNING):
        assert shard_cache(config, remote) is None
    assert "no shards are staged on this machine" in caplog.text
    assert shard_cache(TrainConfig(placement=PlacementConfig(cache_gb=0.0)), remote) is None


def test_a_copy_that_cannot_be_opened_is_read_from_the_store(local: DataSet, remote: DataSet, tmp_path: Path) -> None:
    cache = ShardCache(remote.storage, remote.digest, tmp_path / "cache", None)
    for shard in remote.manifest.splits["train"].shards[:2]:
        cache.path(shard.name).mkdir()
    assert images_of(remote, cache) == images_of(local, None)


@pytest.mark.parametrize("order", [Order.FULL, Order.WINDOWED])
def test_batches_are_the_same_bytes_from_a_disk_and_from_a_bucket(
    order: Order, local: DataSet, remote: DataSet, tmp_path: Path
) -> None:
    """Two epochs, the store and a cache with room for three shards against the local files."""

    def batches(data: DataSet, cache: ShardCache | None) -> list[tuple[torch.Tensor, torch.Tensor]]:
        split = data.split("train", cache.open if cache else None)
        stream = SampleStream(len(split), 3, order, split.shard_counts, 2)
        source = TrainInput(
            split,
            stream,
            TrainView(crop=32, scale_min=36, scale_max=60),
            ColourAxes(np.array([14000.0, 1200.0, 290.0]), np.eye(3)),
            Mean(np.zeros(3, np.float32)),
            DecodeSettings(num_threads=1),
            lambda step: np.arange(step * 12, (step + 1) * 12),
            0,
            0,
            cache.follow(split, stream.upcoming_shards) if cache else lambda position: None,
        )
        found = [(batch.images.clone(), batch.labels) for batch, _ in zip(source, range(8), strict=False)]
        source.close()
        return found

    budget_bytes = 3 * max(shard_bytes(remote))
    cache = ShardCache(remote.storage, remote.digest, tmp_path / "cache", budget_bytes)
    for one, other in zip(batches(local, None), batches(remote, cache), strict=True):
        assert torch.equal(one[0], other[0])
        assert torch.equal(one[1], other[1])
    until(lambda: cache.staged_bytes() > 0)
    assert cache.staged_bytes() <= budget_bytes
    cache.close()
