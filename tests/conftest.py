"""Shared by all tests: a small generated data set, and the real one where REAL_DATA says it is."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from filelock import FileLock

from orchestrator import remote
from orchestrator.data.shards import DataSet
from orchestrator.storage import Storage
from tests.s3_server import S3Server, s3_server


def run_module(*arguments: str, **options: object) -> subprocess.CompletedProcess[str]:
    """``python -m`` in a process of its own, output captured."""
    command = [sys.executable, "-m", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, **options)  # type: ignore[call-overload]


Shared = Callable[[str, Callable[[Path], None]], Path]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files whose tests may take longest come first: else one process does them at the end while the others wait."""
    longest: dict[Path, float] = {}
    for item in items:
        marker = item.get_closest_marker("timeout")
        longest[item.path] = max(longest.get(item.path, 0.0), float(marker.args[0]) if marker else 0.0)
    items.sort(key=lambda item: -longest[item.path])  # stable: the order within a file stays


@pytest.fixture(autouse=True)
def _is_not_ending(monkeypatch: pytest.MonkeyPatch) -> None:
    """A job that a test interrupts in this process says that the process ends: not to the tests after it."""
    monkeypatch.setattr(remote, "_stop", threading.Event())
    monkeypatch.setattr(remote, "_trusts", False)


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Shared:
    """Makes a folder once for all test processes that run side by side; nobody may change what is in it."""
    base = tmp_path_factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base

    def folder(name: str, make: Callable[[Path], None]) -> Path:
        out, done = base / name, base / f"{name}.done"
        with FileLock(f"{out}.lock"):
            if not done.exists():
                out.mkdir(exist_ok=True)
                make(out)
                done.touch()
        return out

    return folder


@pytest.fixture(scope="session")
def archives(shared: Shared) -> Path:
    """Archives of 6 classes in ILSVRC's layout: 96 training, 30 validation and 10 test images."""
    sizes = ["--num-classes", "6", "--train-per-class", "16", "--val-per-class", "5", "--test-images", "10"]

    def make(out: Path) -> None:
        done = run_module("data_prep.demo", "--out", str(out), *sizes)
        assert done.returncode == 0, done.stderr

    return shared("archives", make)


@pytest.fixture(scope="session")
def prepared(archives: Path, shared: Shared) -> Path:
    """The data set made of ``archives``."""

    def make(out: Path) -> None:
        done = run_module("data_prep.ilsvrc", str(archives), "--out", str(out), "--crop", "64", "--num-tasks", "0")
        assert done.returncode == 0, done.stderr

    return shared("prepared", make)


@pytest.fixture(scope="session")
def data(prepared: Path) -> DataSet:
    return DataSet(Storage(str(prepared)))


@pytest.fixture(scope="session")
def undisturbed(prepared: Path, shared: Shared) -> dict[int, Path]:
    """The folder of an undisturbed run at 1, 2 and 3 workers, in plain process groups."""
    from tests.training.group import run_to_end, small_config

    def make(folder: Path) -> None:
        for size in (1, 2, 3):
            run_to_end(small_config(prepared, folder, f"w{size}"), size)

    folder = shared("undisturbed", make)
    return {size: folder / f"w{size}" for size in (1, 2, 3)}


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real images. Skips without REAL_DATA."""
    folder = os.environ.get("REAL_DATA")
    if not folder:
        pytest.skip("REAL_DATA is not set: no real images")
    return Path(folder)


@pytest.fixture(scope="session")
def _s3_process() -> Iterator[S3Server]:
    with s3_server() as server:
        yield server


@pytest.fixture
def s3(_s3_process: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Server]:
    """An S3 server that works, and the environment that names it, here and in started processes."""
    for name, value in _s3_process.environment.items():
        monkeypatch.setenv(name, value)
    yield _s3_process
    for command in ("start", "fail 0", "hang 0"):
        _s3_process.tell(command)
