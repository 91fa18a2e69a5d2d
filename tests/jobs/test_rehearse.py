"""``python jobs/rehearse.py``: what it refuses, how it ends, what it reports (faults: control/test_faults.py)."""

from __future__ import annotations

import json
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from jobs import rehearsal_report, rehearse
from orchestrator.control.faults import is_alive
from tests.jobs.conftest import Run
from tests.training.group import EVERY_FAULT

ROOT = Path(__file__).parents[2]


def test_a_wrong_option_is_refused_before_anything_starts(
    typed: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jobs.rehearse.Rehearsal", None)
    storage = ["--storage", str(tmp_path / "runs")]
    for words, saying in (
        ([], "nowhere to rehearse: give --storage URL"),
        ([*storage, "--faults", "worker-kill,werker-stop"], "unknown fault werker-stop: choose of worker-kill, "),
        ([*storage, "--workers", "1"], "--workers is 1: a rehearsal needs at least 2"),
        ([*storage, "--soak-s", "-1"], "--soak-s must not be negative"),
        ([*storage, "--soak-s", "60", "--mean-time-between-faults-s", "0"], "must be positive"),
        ([*storage, "--fault", "nan"], "--fault"),
        ([*storage, "--seed", "often"], "often"),
    ):
        code, text = typed(*words, main=rehearse.main)
        assert code == 2, text
        assert saying in " ".join(text.split()), text
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not EVERY_FAULT, reason="a minute: make test-faults")
@pytest.mark.ray_cluster
@pytest.mark.timeout(400)
def test_ctrl_c_ends_all_that_was_started(tmp_path: Path) -> None:
    words = ["--storage", str(tmp_path / "runs"), "--out", str(tmp_path / "out"), "--faults", "worker-kill"]
    process = subprocess.Popen(
        [sys.executable, "jobs/rehearse.py", *words],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    log, deadline_s = tmp_path / "out" / "clean.log", time.monotonic() + 240
    while not (log.exists() and "worker(s)" in log.read_text()):
        assert process.poll() is None, process.stdout.read()  # type: ignore[union-attr]
        assert time.monotonic() < deadline_s
        time.sleep(0.1)
    tree = psutil.Process(process.pid).children(recursive=True)
    commands = " ".join(word for each in tree if is_alive(each.pid) for word in each.cmdline())
    assert all(part in commands for part in ("raylet", "mlflow", "jobs/imagenet.py")), commands
    process.send_signal(signal.SIGINT)
    text, _ = process.communicate(timeout=120)
    assert process.returncode == 130, text
    assert "interrupted: all that the rehearsal started has been ended" in text
    assert "Traceback" not in text
    deadline_s = time.monotonic() + 20
    while left := [each.pid for each in tree if is_alive(each.pid)]:
        assert time.monotonic() < deadline_s, left
        time.sleep(0.1)


# -- the report -----------------------------------------------------------------------------------------------------


def report(**changes: object) -> rehearsal_report.Report:
    row = rehearsal_report.Row(
        "nan", "a loss is not finite", "workers start again", True, 12, "worker 1", True, 17.25, 3
    )
    away = rehearsal_report.Row(
        "node-lost", "a node is lost", "workers start again", injected=False, note="not injected: why"
    )
    found = rehearsal_report.Report(7, [row, away], clean_sha256="a" * 64, sha256="a" * 64)
    for name, value in changes.items():
        setattr(found, name, value)
    return found


def test_the_report_says_what_was_kept_and_what_was_not(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rehearsal_report.show(report(), tmp_path)
    page, plain = (tmp_path / "rehearsal.md").read_text(), json.loads((tmp_path / "rehearsal.json").read_text())
    assert "| a loss is not finite | step 12: worker 1 | yes: workers start again | 17.2 | 3 |" in page
    assert "| a node is lost | not injected: why | – | – | – |" in page
    assert "- images lost or repeated: 0" in page
    assert "weights equal to the clean run's: yes" in page
    assert plain["as_promised"]
    assert plain["rows"][0]["steps_redone"] == 3
    assert "weights equal to the clean run's: yes" in capsys.readouterr().out

    broken = rehearsal_report.Row(
        "nan", "a loss is not finite", "workers start again", True, 12, note="no new step: | so"
    )
    for changes, saying in (
        ({"sha256": "b" * 64}, "weights equal to the clean run's: NO"),
        ({"wrong_images": 16}, "images lost or repeated: 16"),
        ({"tracking": "MLflow lacks the steps [3]"}, "every step once in MLflow: MLflow lacks the steps [3]"),
        ({"notes": ["left running: raylet"]}, "left running: raylet"),
        ({"rows": [broken]}, "| NO: no new step: / so |"),
    ):
        rehearsal_report.show(report(**changes), tmp_path)
        assert saying in (tmp_path / "rehearsal.md").read_text()
        assert not json.loads((tmp_path / "rehearsal.json").read_text())["as_promised"]
    rehearsal_report.show(report(goodput_percent=87.65, sha256=""), tmp_path)
    assert "goodput: 87.7 %" in (tmp_path / "rehearsal.md").read_text()


def test_steps_that_mlflow_lacks_or_has_twice_are_told(tmp_path: Path) -> None:
    database = tmp_path / "mlflow.db"
    with sqlite3.connect(database) as store:
        store.execute("create table tags (run_uuid text, key text, value text)")
        store.execute("create table metrics (run_uuid text, key text, step integer, timestamp integer)")
        rows = [
            ("1", "run_key", "/r/2/disturbed"),
            ("2", "run_key", "/r/1/disturbed"),
            ("2", "recipe", "/r/2/disturbed"),
        ]
        store.executemany("insert into tags values (?, ?, ?)", rows)
        steps = [("1", "train_loss", step, 10 * step) for step in (1, 2, 4, 5)]
        store.executemany(
            "insert into metrics values (?, ?, ?, ?)", [*steps, ("2", "train_loss", 3, 1), ("2", "train_loss", 5, 1)]
        )
    assert rehearsal_report.tracking_faults(database, "/r/2/disturbed", 5) == "MLflow lacks the steps [3]"
    with sqlite3.connect(database) as store:
        store.execute("insert into metrics values ('1', 'train_loss', 3, 30), ('1', 'train_loss', 5, 51)")
    assert rehearsal_report.tracking_faults(database, "/r/2/disturbed", 5) == "MLflow has the steps [5] more than once"
    assert rehearsal_report.tracking_faults(database, "/r/2/disturbed", 4) == "MLflow has the steps [5] more than once"
