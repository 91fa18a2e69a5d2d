"""What workers print, in one place: the words of a worker that crashes, what is too much, a store that is away."""

from __future__ import annotations

import os
import re
import resource
import subprocess
import sys
import threading
import time
from datetime import UTC, datetime
from pathlib import Path

import pytest

from orchestrator.control import worker_log
from orchestrator.control.worker_log import WorkerLog
from orchestrator.storage import Storage
from tests.cluster.slurm_cluster import wait_for
from tests.control.talking import CRASHED
from tests.s3_server import BUCKET, S3Server
from tests.training.group import EVERY_FAULT, options, small_config

ROOT = Path(__file__).parents[2]


def told(*lines: str, pid: int | str = 55, actor_name: str = "") -> dict[str, object]:
    return {"ip": "10.0.0.2", "pid": pid, "lines": list(lines), "actor_name": actor_name, "is_err": False}


def kept(run: Storage) -> str:
    return "".join(run.read(name).decode() for name in run.files("logs"))


def log_of(run: Storage, start: int = 3) -> WorkerLog:
    return WorkerLog(run, start, lambda: datetime(2026, 11, 24, 5, 12, 3, 214_000, UTC))


def test_each_line_has_its_time_its_rank_and_its_node(tmp_path: Path) -> None:
    run = Storage(str(tmp_path))
    with log_of(run) as log:
        begins = "worker of rank 7 of 16, process 55 on n1: cuda:3"
        log.take(told("before", actor_name="Controller"))
        log.take(told(begins))
        log.take(told("node status", actor_name="PlacementGroupCleaner"))
        log.take(told(begins, "NCCL WARN at https://me:hidden@host"))
        log.take(told("x" * 5000, pid=56))
        log.take(told("y" * 1950 + " https://me:" + "hidden" * 20 + "@host", pid=58))
        log.take(told("[05:19:30 E 11] /tmp is 95% full, available: 12.3 GB", pid="raylet"))
    assert run.files("logs") == ["logs/000003-0001.log"]
    assert "hidden" not in kept(run)
    assert kept(run).splitlines()[:4] + kept(run).splitlines()[5:] == [
        "2026-11-24T05:12:03.214Z  Controller  10.0.0.2 | before",
        "2026-11-24T05:12:03.214Z  rank 7  n1 10.0.0.2 | worker of rank 7 of 16, process 55 on n1: cuda:3",
        "2026-11-24T05:12:03.214Z  rank 7  n1 10.0.0.2 | NCCL WARN at https://***@host",
        "2026-11-24T05:12:03.214Z  process 56  10.0.0.2 | " + "x" * 2000,
        "2026-11-24T05:12:03.214Z  process raylet  10.0.0.2 | [05:19:30 E 11] /tmp is 95% full, available: 12.3 GB",
    ]


@pytest.mark.parametrize("where", ["disk", "s3"])
def test_it_stays_small(where: str, tmp_path: Path, s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_log, "_PART_BYTES", 400)
    monkeypatch.setattr(worker_log, "_MAX_PARTS", 3)
    monkeypatch.setattr(worker_log, "_MAX_WAITING", 40)
    monkeypatch.setattr(worker_log, "_WRITE_EVERY_S", 60.0)
    run = Storage(f"s3://{BUCKET}/worker-log" if where == "s3" else str(tmp_path))
    for start in (8, 9):
        with log_of(run, start) as log:
            for number in range(50):
                log.take(told(f"line {number}"))
    names = run.files("logs")
    assert len(names) == 3
    assert all(name.startswith("logs/000009-") for name in names)
    text = kept(run)
    assert "line 39\n" in text
    assert text.endswith("10 lines came faster than they could be written: they are lost\n")
    assert all(run.size_bytes(name) < 600 for name in names)


def test_what_a_raylet_repeats_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Storage(str(tmp_path))
    with log_of(run) as log:
        for number in range(4):
            log.take(told(f"[05:19:{number}0 E 11] /tmp is 95% full, available: 12.{number} GB", pid="raylet"))
        log.take(told("a worker was killed: 31 GB", pid="raylet"))
        monkeypatch.setattr(worker_log, "_SAME_S", 0.0)  # days later
        log.take(told("a worker was killed: 32 GB", pid="raylet"))
        monkeypatch.setattr(worker_log, "_SAME_S", 600.0)
        log.take(told("a worker was killed: 33 GB", pid="raylet"))
    said = [line.partition(" | ")[2] for line in kept(run).splitlines()]
    assert said == [
        "[05:19:00 E 11] /tmp is 95% full, available: 12.0 GB",
        "3 more like the last one",
        "a worker was killed: 31 GB",
        "a worker was killed: 32 GB",
        "1 more like the last one",
    ]


@pytest.mark.parametrize("how", [None, RuntimeError, SystemExit])
def test_last_words_are_waited_for(how: type[BaseException] | None, tmp_path: Path) -> None:
    run, log = Storage(str(tmp_path)), log_of(Storage(str(tmp_path)))
    begins, ends = "worker of rank 0 of 1, process 55 on n1: cpu", "end of this worker's log"

    def speak() -> None:
        time.sleep(0.5)
        log.take(told("why"))
        log.take(told(ends))
        log.take(told(ends))

    log.__enter__()
    log.take(told(begins))
    log.take(told(begins))
    time.sleep(worker_log._LAST_WORDS_S)  # a worker that was silent for long
    thread = threading.Thread(target=speak)
    thread.start()
    log.__exit__(how)
    assert kept(run).splitlines()[-1].endswith("rank 0  n1 10.0.0.2 | why")
    assert ends not in kept(run)
    thread.join()


def test_a_cluster_that_talks_on_does_not_hold_up_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_log, "_MOST_LAST_WORDS_S", 1.0)
    talks = threading.Event()

    def talk(log: WorkerLog) -> None:
        while not talks.wait(0.1):
            log.take(told("again"))

    log = log_of(Storage(str(tmp_path)))
    log.__enter__()
    log.take(told("worker of rank 0 of 1, process 55 on n1: cpu"))
    thread = threading.Thread(target=talk, args=(log,), daemon=True)
    thread.start()
    log.__exit__(OSError)
    assert thread.is_alive()  # it ended although lines still come
    talks.set()


def test_a_disk_that_is_full_in_the_middle_of_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(worker_log, "_WRITE_EVERY_S", 0.01)
    run, limits = Storage(str(tmp_path)), resource.getrlimit(resource.RLIMIT_FSIZE)
    with log_of(run) as log:
        log.take(told("first"))
        wait_for(lambda: "first" in kept(run), "nothing is written")
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (400, limits[1]))
            log.take(told("second " + "x" * 600))
            wait_for(lambda: bool(caplog.records) and "second" in kept(run), "nothing is refused")
            time.sleep(0.2)  # tried again and again
            assert run.size_bytes(run.files("logs")[0]) == 400
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        log.take(told("third"))
    said = [line.partition(" | ")[2] for line in kept(run).splitlines()]
    assert said == ["first", "second " + "x" * 600, "third"]


def test_a_ray_that_does_not_bring_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "ray._private.ray_logging", None)
    with log_of(Storage(str(tmp_path))):
        pass
    assert len(caplog.records) == 1
    assert "what the workers print is not kept: this version of Ray does not bring it" in caplog.text


def test_a_store_that_is_away_hinders_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(worker_log, "_PART_BYTES", 400)
    monkeypatch.setattr(worker_log, "_WRITE_EVERY_S", 0.01)
    (tmp_path / "logs").write_text("in the way")
    run = Storage(str(tmp_path))
    with log_of(run) as log:
        for number in range(50):
            log.take(told(f"line {number}"))
        wait_for(lambda: bool(caplog.records), "no warning")
        (tmp_path / "logs").unlink()
        log.take(told("afterwards"))
        wait_for((tmp_path / "logs").is_dir, "it is not tried again")
    text = kept(run)
    assert "line 0\n" in text
    assert "afterwards\n" in text
    assert "lines came faster than they could be written: they are lost" in text
    assert len(caplog.records) == 1
    assert "what the workers print is not written now" in caplog.text


@pytest.mark.skipif(not EVERY_FAULT, reason="40 s: make test-faults; an undisturbed run's log: test_ray_job.py")
def test_the_last_words_of_a_worker_that_crashes_are_kept(prepared: Path, tmp_path: Path) -> None:
    config = small_config(prepared, tmp_path, "r")
    words = [*options(config), "--model.factory", "tests.control.talking:talks", "--placement.num-workers", "2"]
    words += ["--tracking.uri", "http://127.0.0.1:9", "--tracking.wait-s", "0", "--placement.cpus-per-worker", "1"]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_") and k != "RANK"}
    environment |= {"PYTHONPATH": str(ROOT), CRASHED: str(tmp_path / "crashed"), "RAY_USAGE_STATS_ENABLED": "0"}
    command = [sys.executable, "jobs/imagenet.py", "resnet18", *words]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "words of rank" not in done.stdout + done.stderr  # the terminal is the run's
    text = kept(Storage(str(tmp_path / "r")))
    line = r"(?m)^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z  rank %d  \S+ [\d.]+ \| %s"
    for rank in (0, 1):
        begun = line % (rank, rf"worker of rank {rank} of 2, process \d+ on \S+: cpu, 1 CPU\(s\)")
        assert len(re.findall(begun, text)) == 2, text
        assert re.search(line % (rank, f"words of rank {rank} at https://\\*\\*\\*@host/x"), text), text
        assert re.search(line % (rank, r"INFO orchestrator.control.supervisor: done"), text), text
    assert text.count("supervisor: done") == text.count("done\n") == 2
    assert re.search(line % (1, r"Fatal Python error: Segmentation fault"), text), text
    assert text.count("ERROR orchestrator.control.supervisor: this worker ends") == 1  # the other one
    assert "autoscaler" not in text
    assert "talking.py" in text
    assert "hidden" not in text
