"""A store that fails at every write boundary in turn: a run recovers, by itself or by the same command.

Most of it is driven by a small loop that does to storage what training does; real training runs go through a few
boundaries, through all of them with FAULT_SEEDS > 1 (``make test-faults``).
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from orchestrator.config import BatchConfig, GuardConfig, ModelConfig, TrainConfig
from orchestrator.data.shards import DataSet
from orchestrator.storage import Storage
from orchestrator.training import checkpoint
from orchestrator.training.checkpoint import Checkpoints, Snapshot, weights_sha256
from orchestrator.training.failures import StorageFailedError
from orchestrator.training.ownership import claim
from orchestrator.training.run import Outcome, finish, finished, fix_identity, run_storage
from orchestrator.training.trainer import train
from orchestrator.world import World
from tests.faulty_fs import Fault, impatient, inject
from tests.training.group import EVERY_FAULT, small_config

FAULT_SEEDS = int(os.environ.get("FAULT_SEEDS", "1"))
LEASE_S = 0.2
STEPS = 3


def loop(run: Storage, config: TrainConfig, data: DataSet, notices: list[str], patience_s: float = 0.1) -> str:
    """One start of a run that trains three numbers. The digest of its weights and its journal."""
    impatient(run)
    if finished(run) is None:
        fix_identity(run, config, data)
        with claim(run, lease_s=LEASE_S, take_over=False, tell=notices.append) as owner:
            checkpoints = Checkpoints(
                run, attempt=owner.number, keep_last=1, notice=notices.append, patience_s=patience_s
            )
            found = checkpoints.newest()
            checkpoints.collect_orphans()
            step, weights, journal = 0, torch.ones(3), []
            if found is not None:
                step, weights, journal = found.step, found.tensors["model/w"], found.journal
            while step < STEPS:
                step, weights = step + 1, (weights * 1.1 + step).sin()
                journal.append({"kind": "train", "step": step, "loss": float(weights.sum())})
                error = 50.0 - step if step < 3 else None
                checkpoints.save(Snapshot(step, {"model/w": weights.clone()}, {"step": step}, list(journal), error))
                checkpoints.wait()  # else which write comes next would depend on the threads
            checkpoints.close()
            newest, best = checkpoints.records()[-1], checkpoints.best()
            assert best is not None
            digest = weights_sha256({"model/w": weights})
            finish(run, Outcome(step, 1.0, 1.0, 1.0, newest.folder, best.folder, digest))
    reader = Checkpoints(run, attempt=0, keep_last=1, notice=notices.append)
    last, outcome = reader.newest(), finished(run)
    assert last is not None
    assert outcome is not None
    assert [r.step for r in reader.records()] == [2, 3]
    assert len(run.folders("checkpoints")) == 2, "something was not collected"
    return json.dumps([outcome.weights_sha256, weights_sha256(last.tensors), last.journal])


@pytest.fixture(scope="module")
def config(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    return small_config(prepared, tmp_path_factory.mktemp("stores"), "none")


@pytest.fixture(scope="module", params=["faulty://", ""], ids=["fsspec", "disk"])
def store(
    request: pytest.FixtureRequest, config: TrainConfig, data: DataSet, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, str, list[str]]:
    """Where a run is stored; the result of an undisturbed one; its writes in order."""
    folder = tmp_path_factory.mktemp("undisturbed")
    url = f"{request.param}{folder}"
    with inject(url) as plan:
        expected = loop(Storage(url), config, data, [])
    assert len(plan.writes) > 15
    return request.param, expected, plan.writes


@pytest.mark.parametrize("fault", [Fault.BEFORE, Fault.AFTER, Fault.TORN, Fault.DOWN, Fault.FULL])
def test_every_write_may_fail(
    fault: Fault,
    store: tuple[str, str, list[str]],
    config: TrainConfig,
    data: DataSet,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Once, or from then on until the same command is given again."""
    monkeypatch.setattr(checkpoint, "_FIRST_PAUSE_S", 0.02)
    scheme, expected, writes = store
    if not scheme and fault in (Fault.AFTER, Fault.TORN):
        pytest.skip("a disk's writes are renamed into place: after one is before the next")
    if scheme and fault is Fault.FULL:
        pytest.skip(
            "of a disk; another store that is away for a while is waited for by remote, which has tests of its own"
        )
    by_itself = 0
    # A disk has three operations for each write: one in three in the small form, all in "make test-faults".
    tried = range(0, len(writes), 1 if scheme or EVERY_FAULT else 3)
    for at in tried:
        url = f"{scheme}{tmp_path}/{at}"
        run, notices = Storage(url), list[str]()
        with inject(url, fault, at, full_s=0.1):
            result = ""
            with suppress(OSError):
                result = loop(run, config, data, notices, patience_s=0.05 if fault is Fault.DOWN else 30)
                by_itself += 1
        if not result:
            result = loop(run, config, data, notices)
        assert result == expected, (at, writes[at], notices)
    if scheme and fault is not Fault.DOWN:
        assert by_itself == len(tried)
    elif fault is not Fault.DOWN:
        assert by_itself > len(tried) / 2  # all that belongs to checkpoints


def test_a_store_that_is_down_for_good_ends_the_run_and_keeps_what_was_stored(
    config: TrainConfig, data: DataSet, tmp_path: Path
) -> None:
    notices: list[str] = []
    with inject(str(tmp_path)) as plan:
        loop(Storage(str(tmp_path / "whole")), config, data, notices)
    second = next(i for i, path in enumerate(plan.writes) if "000000002-a" in path)
    with inject(f"{tmp_path}/run", Fault.DOWN, second), pytest.raises(StorageFailedError) as caught:
        loop(Storage(str(tmp_path / "run")), config, data, notices)
    text = str(caught.value)
    assert f"run {tmp_path}/run: the checkpoint of step 2 could not be stored for" in text
    assert "Input/output error" in text
    assert "the checkpoint of step 1 is kept; mend the storage, then the same command goes on" in text
    assert "the checkpoint of step 2 cannot be stored" in notices[0]
    assert len(notices) == 1


# -- a real full disk -------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 1 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if os.geteuid() or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("only root may mount a small disk")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def big(step: int) -> Snapshot:
    return Snapshot(step, {"model/w": torch.full((60_000,), float(step))}, {}, [])  # 240 kB


def until(condition: Callable[[], object]) -> None:
    deadline_s = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.02)


def test_a_full_disk_is_waited_for_while_training_goes_on(small_disk: Path) -> None:
    run, notices, waits = Storage(str(small_disk / "run")), list[str](), list[bool]()
    with claim(run, lease_s=30, take_over=False, tell=print) as owner:
        checkpoints = Checkpoints(
            run, attempt=owner.number, keep_last=2, notice=notices.append, patience_s=60, waiting=waits.append
        )
        assert checkpoints.newest() is None
        checkpoints.save(big(1))
        checkpoints.wait()
        waits.clear()
        Path(small_disk / "somebody else's").write_bytes(bytes(600_000))
        checkpoints.save(big(2))
        until(lambda: notices)  # this thread goes on meanwhile
        assert waits == []
        assert "No space left on device" in notices[0]
        assert "training goes on; the checkpoint of step 1 is kept" in notices[0]
        assert run.folders("checkpoints") == ["checkpoints/000000001-a000001"]  # what failed does not keep it full
        assert not list(small_disk.rglob(".tmp-*"))
        timer = threading.Timer(1.0, Path(small_disk / "somebody else's").unlink)
        timer.start()
        checkpoints.save(big(3))
        checkpoints.close()
        assert waits[:2] == [True, False]
        assert "the checkpoint of step 2 is stored now" in notices[1]
        newest = checkpoints.newest()
        assert newest is not None
        assert newest.step == 3
        assert len(notices) == 2


def test_a_disk_that_stays_full_ends_the_run_with_what_to_do(small_disk: Path) -> None:
    run = Storage(str(small_disk / "run"))
    with claim(run, lease_s=30, take_over=False, tell=print) as owner:
        checkpoints = Checkpoints(run, attempt=owner.number, keep_last=2, notice=print, patience_s=1)
        checkpoints.save(big(1))
        checkpoints.wait()
        Path(small_disk / "somebody else's").write_bytes(bytes(600_000))
        checkpoints.save(big(2))
        with pytest.raises(StorageFailedError, match=r"0\.\d MB are free, 0\.2 MB needed") as caught:
            checkpoints.close()
        assert "the checkpoint of step 1 is kept; make room, then the same command goes on" in str(caught.value)
        newest = checkpoints.newest()
        assert newest is not None
        assert newest.step == 1


# -- training -----------------------------------------------------------------------------------------------------


def train_once(config: TrainConfig, data: DataSet) -> str:
    """One start of a training run in this process; the digest of its weights."""
    run = impatient(run_storage(config))
    done = finished(run)
    if done is None:
        fix_identity(run, config, data)
        with claim(run, lease_s=LEASE_S, take_over=False, tell=print) as owner:
            done = train(config, World(), attempt=owner.number, cpus=1)
    return done.weights_sha256


@pytest.mark.timeout(3600)
def test_training_on_a_failing_store_ends_with_the_same_weights(
    prepared: Path, data: DataSet, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = small_config(prepared, tmp_path, "clean", model=ModelConfig(factory="tests.training.networks:tiny"))
    config = replace(
        config,
        storage=f"faulty://{tmp_path}",
        batch=BatchConfig(global_batch_size=4, bn_group_size=2),
        schedule=replace(config.schedule, max_steps=2),
        rhythm=replace(config.rhythm, checkpoint_every_steps=1, validate_every_epochs=100.0, keep_last=1),
        guard=GuardConfig(storage_patience_s=1.0),
    )
    with inject(config.storage) as plan:
        expected = train_once(config, data)
    cases = [(at, fault) for at in range(len(plan.writes)) for fault in (Fault.BEFORE, Fault.TORN, Fault.DOWN)]
    if FAULT_SEEDS == 1:
        cases = random.Random(0).sample(cases, 4)
    again = 0
    for at, fault in cases:
        each = replace(config, name=f"{at}-{fault.value}")
        result = ""
        with inject(config.storage, fault, at), suppress(OSError):
            result = train_once(each, data)
        if not result:
            again += 1
            result = train_once(each, data)
        assert result == expected, (plan.writes[at], fault)
    with capsys.disabled():
        print(f"\n{len(cases)} runs on a store that failed at one of {len(plan.writes)} writes, {again} started again")
