"""Two phases, digests, the newest verified one, one writer."""

from __future__ import annotations

import dataclasses
import errno
import json
import multiprocessing
from pathlib import Path

import pytest
import torch

from orchestrator.data.shards import DataSet
from orchestrator.storage import Storage
from orchestrator.training import checkpoint
from orchestrator.training.checkpoint import (
    Checkpoints,
    Snapshot,
    newest_journal,
)
from orchestrator.training.commit_record import CommitRecord, counting
from orchestrator.training.failures import NotFiniteError
from orchestrator.training.ownership import SupersededError, newest_attempt
from orchestrator.training.run import check_identity, data_digest, finished, fix_identity
from tests.training.group import CONTEXT, small_config, take_number


def snapshot(step: int, error: float | None = None) -> Snapshot:
    journal = [{"kind": "train", "step": s} for s in range(1, step + 1)]
    return Snapshot(step, {"model/w": torch.full((3,), float(step))}, {"lr": 0.1}, journal, error)


@pytest.fixture
def run(tmp_path: Path) -> Storage:
    return Storage(str(tmp_path / "run"))


def open_run(run: Storage, keep_last: int = 2, attempt: int | None = None) -> tuple[Checkpoints, list[str]]:
    notices: list[str] = []
    attempt = take_number(run) if attempt is None else attempt
    return Checkpoints(run, attempt=attempt, keep_last=keep_last, notice=notices.append, patience_s=0), notices


def saved(run: Storage, *steps: int, errors: dict[int, float] | None = None, keep_last: int = 2) -> Checkpoints:
    checkpoints, _ = open_run(run, keep_last)
    for step in steps:
        checkpoints.save(snapshot(step, (errors or {}).get(step)))
    checkpoints.wait()
    return checkpoints


def test_what_was_saved_comes_back(run: Storage) -> None:
    assert open_run(run)[0].newest() is None
    saved(run, 10).close()
    found = open_run(run)[0].newest()
    assert found is not None
    assert (found.step, found.state) == (10, {"lr": 0.1})
    assert found.journal == snapshot(10).journal == newest_journal(run)
    assert torch.equal(found.tensors["model/w"], torch.full((3,), 10.0))


def test_the_newest_and_the_best_are_kept(run: Storage) -> None:
    checkpoints = saved(run, 10, 20, 30, 40, 50, errors={10: 60.0, 20: 40.0, 30: 41.0, 40: 40.0, 50: 44.0})
    assert [r.step for r in checkpoints.records()] == [20, 40, 50]
    best = checkpoints.best()
    assert best is not None
    assert best.step == 20  # the earliest of equals
    assert len(run.folders("checkpoints")) == 3


@pytest.mark.parametrize("name", ["tensors.safetensors", "state.json", "journal.jsonl"])
@pytest.mark.parametrize("damage", ["flip", "truncate", "delete"])
def test_a_damaged_checkpoint_is_passed_over(run: Storage, name: str, damage: str) -> None:
    saved(run, 10, 20)
    path = Path(run.path(f"{run.folders('checkpoints')[-1]}/{name}"))
    data = bytearray(path.read_bytes())
    if damage == "flip":
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    elif damage == "truncate":
        path.write_bytes(data[:-1])
    else:
        path.unlink()
    checkpoints, notices = open_run(run)
    found = checkpoints.newest()
    assert found is not None
    assert found.step == 10
    assert "step 20" in notices[0]


def test_a_damaged_commit_record_is_passed_over(run: Storage) -> None:
    saved(run, 10, 20)
    record = Path(run.path("checkpoints/000000020-a000001.json"))
    record.write_bytes(record.read_bytes()[:40])
    checkpoints, notices = open_run(run)
    found = checkpoints.newest()
    assert found is not None
    assert found.step == 10
    assert "cannot be read" in notices[0]
    # What an unreadable record stands for may be sound: it is kept.
    checkpoints.collect_orphans()
    assert len(run.folders("checkpoints")) == 2


def test_a_run_that_went_back_keeps_what_it_saves(run: Storage) -> None:
    """The damaged checkpoints ahead must not push the new ones out."""
    saved(run, 300, 500, 600, keep_last=2, errors={300: 40.0})
    for step in (500, 600):
        Path(run.path(f"checkpoints/{step:09d}-a000001/state.json")).write_text("{")
    checkpoints, _ = open_run(run, keep_last=1)
    found = checkpoints.newest()
    assert found is not None
    assert found.step == 300
    for step in (310, 320):
        checkpoints.save(snapshot(step))
    checkpoints.wait()
    found = open_run(run)[0].newest()
    assert found is not None
    assert found.step == 320


def test_files_without_a_commit_record_do_not_exist(run: Storage) -> None:
    saved(run, 10, 20)
    Path(run.path("checkpoints/000000020-a000001.json")).unlink()  # killed between the two phases
    checkpoints, _ = open_run(run)
    found = checkpoints.newest()
    assert found is not None
    assert found.step == 10
    checkpoints.collect_orphans()
    assert [f.split("/")[1][:9] for f in run.folders("checkpoints")] == ["000000010"]


def test_what_an_owner_is_writing_is_no_orphan(run: Storage) -> None:
    checkpoints = saved(run, 10)
    run.publish("checkpoints/000000020-a000001/state.json", b"{}")
    checkpoints.collect_orphans()
    assert len(run.folders("checkpoints")) == 2


def test_weights_that_are_not_finite_are_not_saved(run: Storage) -> None:
    checkpoints = saved(run, 10)
    checkpoints.save(Snapshot(20, {"model/w": torch.tensor([1.0, float("nan")])}, {}, []))
    with pytest.raises(NotFiniteError, match="not finite"):
        checkpoints.wait()
    assert [r.step for r in checkpoints.records()] == [10]


def test_a_run_whose_records_are_all_damaged_does_not_begin_again(run: Storage) -> None:
    saved(run, 10, 20)
    for name in run.files("checkpoints"):
        Path(run.path(name)).write_bytes(run.read(name).replace(b"sha256", b"sha257", 1))
    with pytest.raises(ValueError, match=r"none of the 2 checkpoints of .* is usable"):
        open_run(run)[0].newest()


def test_a_late_writer_of_the_same_step_is_not_what_the_others_load(run: Storage) -> None:
    saved(run, 10)
    first, _ = open_run(run, attempt=0)
    assert first.newest() is not None
    found = first.record(10, first.loaded_attempt)
    assert found is not None
    assert (found.step, found.attempt) == (10, first.loaded_attempt)
    saved(run, 10)  # by a later start
    other, _ = open_run(run, attempt=0)
    assert other.newest() is not None
    assert other.loaded_attempt > first.loaded_attempt
    assert other.record(10, first.loaded_attempt) is None  # to be waited for, not to be replaced by another


def test_the_same_step_can_be_saved_again(run: Storage) -> None:
    saved(run, 10)
    again = saved(run, 10)
    again.collect_orphans()
    found = again.newest()
    assert found is not None
    assert found.step == 10
    assert len(run.folders("checkpoints")) == 1


def test_an_older_attempt_may_not_write(run: Storage) -> None:
    old = saved(run, 10)
    take_number(run)
    old.save(snapshot(20))
    with pytest.raises(SupersededError, match="start number 2"):
        old.wait()
    with pytest.raises(SupersededError):
        old.collect_orphans()  # it might delete what the owner is writing
    assert [r.step for r in old.records()] == [10]


def take_numbers(url: str, count: int, numbers: multiprocessing.Queue) -> None:  # type: ignore[type-arg]
    for _ in range(count):
        numbers.put(take_number(Storage(url)))


def test_attempts_are_numbered_without_gaps_or_repeats(run: Storage) -> None:
    numbers: multiprocessing.Queue[int] = CONTEXT.Queue()
    processes = [CONTEXT.Process(target=take_numbers, args=(run.url, 4, numbers)) for _ in range(3)]
    for process in processes:
        process.start()
    taken = sorted(numbers.get(timeout=60) for _ in range(12))
    for process in processes:
        process.join()
    assert taken == list(range(1, 13))
    assert newest_attempt(run) == 12


def test_a_failing_store_is_an_error_and_leaves_the_last_good_state(run: Storage) -> None:
    checkpoints = saved(run, 10)
    Path(run.path("checkpoints/000000020-a000001")).write_text("a file where the folder should go")
    checkpoints.save(snapshot(20))
    with pytest.raises(OSError, match="000000020"):
        checkpoints.wait()
    found = checkpoints.newest()
    assert found is not None
    assert found.step == 10


def test_the_journal_survives_a_damaged_checkpoint(run: Storage) -> None:
    saved(run, 10, 20)
    Path(run.path(f"{run.folders('checkpoints')[-1]}/journal.jsonl")).write_text("{}\n")
    assert len(newest_journal(run)) == 10
    assert newest_journal(Storage(run.url + "-other")) == []


def test_nothing_in_a_checkpoint_is_pickled(run: Storage) -> None:
    saved(run, 10)
    folder = run.folders("checkpoints")[0]
    assert {f.rsplit("/", 1)[1] for f in run.files(folder)} == {"tensors.safetensors", "state.json", "journal.jsonl"}
    json.loads(run.read("checkpoints/000000010-a000001.json"))


# -- superseded starts ----------------------------------------------------------------------------------------------


def record(step: int, attempt: int, *starts: tuple[int, int]) -> CommitRecord:
    return CommitRecord(step, attempt, {}, starts)


def test_records_count_that_led_to_the_newest() -> None:
    one, two = ((1, 0),), ((1, 0), (2, 200))
    first = [record(step, 1, *one) for step in (100, 200, 300)]
    assert [r.step for r in counting(first)] == [100, 200, 300]
    # Start 2 went on from 200 (300 was damaged, or came late): 300 of start 1 is on no way to anything.
    newest = record(250, 2, *two)
    assert [(r.step, r.attempt) for r in counting([newest, *first])] == [(100, 1), (200, 1), (250, 2)]
    # Start 3 went on from 200 too: what start 2 still published is void.
    third = record(220, 3, *two, (3, 200))
    assert [(r.step, r.attempt) for r in counting([*first, newest, third])] == [(100, 1), (200, 1), (220, 3)]
    # Of one step the later start's.
    again = record(200, 2, *two)
    assert [(r.step, r.attempt) for r in counting([*first[:2], again])] == [(100, 1), (200, 2)]
    assert counting([]) == []


def test_a_late_record_of_a_superseded_driver_is_ignored_and_collected(run: Storage) -> None:
    saved(run, 10, 20)
    old, _ = open_run(run, attempt=1)
    assert old.newest() is not None
    owner, _ = open_run(run)
    assert owner.newest() is not None
    owner.save(snapshot(25))
    owner.wait()
    # It had looked whose the run was just before that, and was stopped for a while.
    late = CommitRecord.from_bytes(run.read("checkpoints/000000020-a000001.json"), "checkpoints/000000020-a000001.json")
    late = dataclasses.replace(late, step=40, validation_top1_error=0.0)
    for name in late.files:
        run.publish(f"{late.folder}/{name}", run.read(f"checkpoints/000000020-a000001/{name}"))
    run.publish(late.name, late.to_bytes())
    reader, notices = open_run(run, attempt=0)
    assert [r.step for r in reader.records()] == [20, 25]
    assert reader.best() is None
    found = reader.newest()
    assert found is not None
    assert (found.step, len(newest_journal(run)), notices) == (25, 25, [])
    owner.save(snapshot(30))
    owner.wait()
    assert not run.exists(late.name)
    assert len(run.folders("checkpoints")) == 2


def test_a_run_that_went_back_does_not_return_to_what_lay_ahead(run: Storage) -> None:
    """The checkpoint that could not be read comes back: restored by somebody, after the run has gone on without it."""
    saved(run, 10, 20)
    state = Path(run.path("checkpoints/000000020-a000001/state.json"))
    state.rename(state.with_name("away"))
    second, notices = open_run(run, keep_last=5)
    found = second.newest()
    assert found is not None
    assert found.step == 10
    assert "checkpoint of step 20 is not usable" in notices[0]
    second.save(snapshot(15))
    second.wait()
    assert [(r.step, r.attempt, r.starts) for r in second.records()] == [
        (10, 1, ((1, 0),)),
        (15, 2, ((1, 0), (2, 10))),
    ]


def test_a_commit_record_is_verified_too(run: Storage) -> None:
    saved(run, 10, 20)
    path = Path(run.path("checkpoints/000000020-a000001.json"))
    text = path.read_text()
    path.write_text(text.replace('"validation_top1_error": null', '"validation_top1_error": 1.5'))
    reader, notices = open_run(run, attempt=0)
    assert [r.step for r in reader.records()] == [10]
    assert "its SHA-256 is not right" in notices[0]
    path.write_text(text)
    path.rename(path.with_name("000000030-a000001.json"))
    reader, notices = open_run(run, attempt=0)
    assert [r.step for r in reader.records()] == [10]
    assert "it belongs to checkpoints/000000020-a000001.json" in notices[0]


def test_an_error_of_the_store_is_no_damage(run: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    """Going back because a disk did not answer for a moment would give steps up for nothing."""
    saved(run, 10, 20)
    read, num_failures = Storage.read, [2]

    def fail(self: Storage, name: str, sha256: str | None = None) -> bytes:
        if name.endswith("000000020-a000001/state.json") and num_failures[0]:
            num_failures[0] -= 1
            raise OSError(errno.EIO, "Input/output error")
        return read(self, name, sha256)

    monkeypatch.setattr(Storage, "read", fail)
    monkeypatch.setattr(checkpoint, "_READ_PAUSES_S", (0.01,) * 3)
    reader, notices = open_run(run, attempt=0)
    found = reader.newest()
    assert found is not None
    assert (found.step, notices) == (20, [])
    num_failures[0] = 1000  # a bad sector: for good
    found = reader.newest()
    assert found is not None
    assert found.step == 10
    assert "step 20 is not usable" in notices[0]


def test_a_restart_deletes_what_an_earlier_one_could_not(run: Storage) -> None:
    saved(run, 10, 20, 30, 40, errors={10: 5.0}, keep_last=5)
    checkpoints, _ = open_run(run, keep_last=2)
    assert checkpoints.newest() is not None
    checkpoints.collect_orphans()
    assert [r.step for r in checkpoints.records()] == [10, 30, 40]


# -- files of a run ---------------------------------------------------------------------------------------------------


def test_a_torn_identity_of_a_new_run_is_written_again(tmp_path: Path, data: DataSet) -> None:
    """A disk without hard links shows a file before it is whole."""
    config = small_config(tmp_path, tmp_path, "run")
    run = Storage(str(tmp_path / "run"))
    for content in (b"", b'{"identity": {}', b'{"identity": {"seed": 1}, "sha256": "0"}'):
        run.publish("config.json", content)
        check_identity(run, config, data)
        fix_identity(run, config, data)
        assert data_digest(run) == data.digest
    saved(run, 10)
    run.publish("config.json", b"")
    with pytest.raises(ValueError, match="is damaged: restore it"):
        fix_identity(run, config, data)
    run.delete("config.json")
    fix_identity(run, config, data)
    with pytest.raises(ValueError, match="seed: 0 → 1"):
        check_identity(run, dataclasses.replace(config, seed=1), data)


def test_a_torn_outcome_is_none_while_there_are_checkpoints(run: Storage) -> None:
    saved(run, 10)
    for content in (b"", b'{"steps": 1', b'{"steps": 1}', b"[]"):
        run.publish("finished.json", content)
        assert finished(run) is None
    run.delete("checkpoints")
    with pytest.raises(ValueError, match="delete it to train the run again"):
        finished(run)
