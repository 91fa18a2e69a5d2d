"""Two phases, digests, the newest verified one, one writer."""

from __future__ import annotations

import json
import multiprocessing
from pathlib import Path

import pytest
import torch

from orchestrator.storage import Storage
from orchestrator.training.checkpoint import (
    Checkpoints,
    Snapshot,
    newest_journal,
)
from orchestrator.training.ownership import SupersededError, newest_attempt
from tests.training.group import take_number


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
    with pytest.raises(ValueError, match="not finite"):
        checkpoints.wait()
    assert [r.step for r in checkpoints.records()] == [10]


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
    context = multiprocessing.get_context("spawn")
    numbers: multiprocessing.Queue[int] = context.Queue()
    processes = [context.Process(target=take_numbers, args=(run.url, 10, numbers)) for _ in range(3)]
    for process in processes:
        process.start()
    taken = sorted(numbers.get(timeout=60) for _ in range(30))
    for process in processes:
        process.join()
    assert taken == list(range(1, 31))
    assert newest_attempt(run) == 30


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
