"""Preparation and verification as Ray tasks: the same as in one process. They share one Ray: it is slow to start."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from data_prep import fan_out, ilsvrc, image_folder
from data_prep.verify import verify
from orchestrator.ray_session import ray_session
from orchestrator.storage import Storage
from tests.data_prep.test_image_folder import CROP, TREE, write

pytestmark = pytest.mark.ray_cluster
NUM_TASKS = 2


@pytest.fixture(scope="module")
def ray_tasks() -> Iterator[None]:
    """What each of the commands does by itself; one that finds Ray connected uses it.

    A cluster of its own, also where ``ray start`` has left word of another on this machine.
    """
    with (
        tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp", ignore_cleanup_errors=True) as folder,
        pytest.MonkeyPatch.context() as patched,
    ):
        patched.setenv("RAY_TMPDIR", folder)
        (Path(folder) / "ray").mkdir()
        (Path(folder) / "ray/ray_current_cluster").write_text("127.0.0.1:9")
        with ray_session(num_cpus=NUM_TASKS) as cluster:
            assert cluster.cpus == NUM_TASKS
            yield
            assert "RAY_AUTH_TOKEN_PATH" in os.environ
    assert not sys.modules["ray"].is_initialized()
    assert "RAY_AUTH_TOKEN_PATH" not in os.environ


def test_archives(ray_tasks: None, prepared: Any, tmp_path: Path, tree: Callable) -> None:
    arguments = ilsvrc.Arguments(archives=str(prepared.archives), out=str(tmp_path / "o"), crop=32, num_tasks=NUM_TASKS)
    report = ilsvrc.prepare(arguments, images_per_unit=5)
    assert tree(tmp_path / "o") == prepared.tree
    assert report.manifest == prepared.report.manifest


def test_a_folder_and_its_verification(ray_tasks: None, tmp_path: Path, tree: Callable) -> None:
    folder = str(write(tmp_path / "animals", TREE))
    for out, num_tasks in (("here", 0), ("there", NUM_TASKS)):
        arguments = image_folder.Arguments(
            folder, str(tmp_path / out), crop=CROP, num_tasks=num_tasks, images_per_shard=5
        )
        image_folder.prepare(arguments)
    assert tree(tmp_path / "here") == tree(tmp_path / "there")

    shard = sorted((tmp_path / "there" / "train").glob("*.tar"))[1]
    data = bytearray(shard.read_bytes())
    data[700] ^= 0x55
    shard.write_bytes(data)
    found = [verify(Storage(str(tmp_path / "there")), num_tasks=num_tasks) for num_tasks in (0, NUM_TASKS)]
    assert found[0].problems == found[1].problems != []
    assert (found[0].num_problems, found[0].warnings) == (found[1].num_problems, found[1].warnings)


def _process_of(item: int) -> int:
    return os.getpid()


def test_the_work_is_done_elsewhere(ray_tasks: None) -> None:
    found = [pid for _, pid, _ in fan_out.fan_out(_process_of, [1, 2, 3], num_tasks=NUM_TASKS)]
    assert len(found) == 3
    assert os.getpid() not in found
