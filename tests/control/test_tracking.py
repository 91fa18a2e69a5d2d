"""Tracking against real MLflow with SQLite stores; servers and their outages are in test_tracking_outage."""

from __future__ import annotations

import logging
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from orchestrator.control import mlflow_store
from orchestrator.control.mlflow_store import few_system_metrics
from orchestrator.control.tracking import MAX_METRIC_KEYS, RunStatus, Tracker, check, default_uri
from orchestrator.masking import masked
from tests.control.tracked import (
    assert_complete,
    decision,
    expected,
    journal,
    put_all,
    rows,
    runs,
    tracked,
    train,
    validation,
    wait_until,
)
from tests.mlflow_server import free_port

# -- one run across restarts --------------------------------------------------------------------------------------


def test_restarts_share_one_run_and_no_step_appears_twice(
    tmp_path: Path, tracker: Callable[..., Tracker], caplog: pytest.LogCaptureFixture
) -> None:
    uri = default_uri(None, tmp_path)
    run_key = 'it\'s "odd" \\ %_;'
    first_params = {"model": {"depth": 34, "long": "x" * 900, "pool": None}, "epochs": 30.0, "steps": []}
    first = tracker(uri, run_key=run_key, params=first_params, tags={"team": "vision"})
    events = journal(1, 40)
    first.replay([])
    put_all(first, events)
    first.put({"kind": "train"})  # malformed: left out
    delivery = first.close(60, RunStatus.FAILED)
    assert_complete(delivery, tracked(events))
    [run] = runs(uri)
    assert run.info.status == "FAILED"
    assert run.data.params["model.depth"] == "34"
    assert len(run.data.params["model.long"]) == 500
    assert run.data.params["epochs"] == "30"
    assert not {"model.pool", "steps"} & set(run.data.params)
    assert (run.info.start_time, run.info.end_time) == (1000, 40_000)

    # The second starts from an earlier checkpoint: the journal, with other times, and steps 31–40 once more.
    second = tracker(uri, run_key=run_key, params={"model": {"depth": 50, "option": "B"}}, tags={"team": "robots"})
    second.replay(journal(1, 40, delay_ms=7))
    wait_until(lambda: runs(uri)[0].info.status == "RUNNING")
    put_all(second, journal(31, 60, delay_ms=9))
    again = second.close(60, RunStatus.FINISHED)
    assert again.run_id == delivery.run_id
    assert_complete(again, tracked(events) + tracked(journal(31, 60)))

    held = rows(tmp_path / "mlflow.db", str(again.run_id))
    assert held == expected(journal(1, 40) + journal(41, 60, delay_ms=9))
    assert len(held) <= MAX_METRIC_KEYS
    [run] = runs(uri)
    assert run.info.status == "FINISHED"
    assert run.data.params["model.depth"] == "34"
    assert run.data.params["model.option"] == "B"
    assert "model.depth" in caplog.text
    assert run.data.tags["team"] == "robots"
    assert run.data.tags["best_checkpoint"] == "s3://***@bucket/step-60"
    assert run.data.tags["last_decision"] == "drop at step 60, learning rate 0.025 → 0.0125, error 61.50 %"
    assert run.data.tags["mlflow.note.content"].startswith("**Result:** best validation top-1 error 1.50 % (epoch 6, ")
    assert run.data.tags["mlflow.source.name"]
    artifacts = tmp_path / "mlartifacts" / str(again.run_id) / "artifacts" / "errors.png"
    assert artifacts.read_bytes() == (tmp_path / "figures" / "errors.png").read_bytes()

    # What LIKE would take for the same key is another run.
    other = tracker(uri, run_key=run_key.replace("_", "x"))
    assert other.close(60, RunStatus.FINISHED).run_id != again.run_id
    assert len(runs(uri)) == 2


def test_a_lost_store_is_rebuilt_from_the_journal(tmp_path: Path, tracker: Callable[..., Tracker]) -> None:
    events = journal(1, 2000)
    one = tracker(default_uri(None, tmp_path))
    one.replay(events)
    delivery = one.close(60, RunStatus.FINISHED)
    assert_complete(delivery, tracked(events))
    assert rows(tmp_path / "mlflow.db", str(delivery.run_id)) == expected(events)
    command, _, page = delivery.where.partition(", then ")
    assert f"/runs/{delivery.run_id}?" in page
    assert shlex.split(command) == ["mlflow", "server", "--backend-store-uri", default_uri(None, tmp_path)]


def test_a_deleted_run_is_followed_by_a_new_one(tmp_path: Path, tracker: Callable[..., Tracker]) -> None:
    from mlflow import MlflowClient

    uri = default_uri(None, tmp_path)
    one = tracker(uri)
    one.put(train(1))
    wait_until(lambda: bool(one._num_delivered))
    [run] = runs(uri)
    MlflowClient(uri).delete_run(run.info.run_id)
    put_all(one, journal(2, 30))
    delivery = one.close(30, RunStatus.FINISHED)
    assert (delivery.pending, delivery.error) == (0, None)
    assert delivery.run_id != run.info.run_id
    assert rows(tmp_path / "mlflow.db", str(delivery.run_id)) == expected([train(1), *journal(2, 30)])
    assert "**Result:** best validation" in runs(uri)[0].data.tags["mlflow.note.content"]


def test_processes_that_start_together_share_one_empty_database(tmp_path: Path) -> None:
    uri = default_uri(None, tmp_path)
    code = (
        "import sys; from pathlib import Path; from orchestrator.control.tracking import Tracker, RunStatus\n"
        "t = Tracker(uri=sys.argv[1], experiment='e', name='n', run_key=sys.argv[2], params={}, tags={},"
        " figure_dir=Path(sys.argv[3]), system_metrics=False)\n"
        "t.put({'kind': 'train', 'step': 1, 'time_ms': 1, 'metrics': {'train_loss': float('inf')}})\n"
        "d = t.close(100, RunStatus.FINISHED); print(d); sys.exit(d.error is not None or d.delivered != 1)"
    )
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code, uri, f"key-{i}", str(tmp_path / f"{i}")],
            cwd=Path(__file__).parents[2],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    for process in processes:
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, out + err
        assert err == ""  # MLflow's and alembic's chatter is silenced, and nothing failed at first
    assert len(runs(uri, "e")) == 2


# -- few keys ------------------------------------------------------------------------------------------------------


def test_keys_stay_few_with_system_metrics_that_go_on_after_a_restart(
    tmp_path: Path, tracker: Callable[..., Tracker], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("psutil", reason="MLflow's system metrics read it")
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.2")
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLES_BEFORE_LOGGING", "1")
    uri = default_uri(None, tmp_path)
    last_step = -1
    for attempt in range(2):
        one = tracker(uri, system_metrics=True)
        many = {f"metric_{i}": float(i) for i in range(50)} | {"bad key!": 1.0, "text": "no number"}
        one.put(train(attempt + 1) | {"metrics": many})
        one.put(decision(attempt + 1))
        wait_until(lambda: one._run._monitor is not None and one._run._monitor._logging_step > last_step + 2)  # noqa: B023
        delivery = one.close(30, RunStatus.FINISHED)
        assert_complete(delivery, 2)
        held = rows(tmp_path / "mlflow.db", str(delivery.run_id))
        assert "epoch" in held
        assert len(held) <= MAX_METRIC_KEYS
        steps = [step for step, _, _ in held["system/cpu_utilization_percentage"]]
        assert steps == list(range(len(steps)))
        assert steps[-1] > last_step
        last_step = steps[-1]


def test_system_keys_are_nine_at_any_number_of_gpus() -> None:
    names = ("memory_usage_percentage", "memory_usage_megabytes", "utilization_percentage", "power_usage_watts")
    metrics = {f"gpu_{gpu}_{name}": 10.0 * gpu for gpu in range(8) for name in names} | {
        "cpu_utilization_percentage": 1.0,
        "system_memory_usage_percentage": 2.0,
        "disk_usage_percentage": 3.0,
        "network_receive_megabytes": 4.0,
        "network_transmit_megabytes": 5.0,
    }
    few = few_system_metrics(metrics)
    assert len(few) == 9
    assert few["gpu_utilization_percentage_min"] == 0.0
    assert few["gpu_utilization_percentage_mean"] == 35.0
    assert few["gpu_memory_usage_percentage_max"] == 70.0
    assert few["gpu_power_usage_watts_total"] == 280.0


# -- unusable ------------------------------------------------------------------------------------------------------


def test_without_mlflow_training_goes_on_and_the_queue_stays_bounded(
    tmp_path: Path, tracker: Callable[..., Tracker], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    uri = f"http://user:hidden@127.0.0.1:{free_port()}"
    events = [train(step) for step in range(1, 101)]
    one = tracker(uri, queue_limit=20)
    put_all(one, [*events, validation(100), *[train(step) for step in range(101, 111)]])
    wait_until(lambda: one._error is not None)
    delivery = one.close(0.3, RunStatus.KILLED)
    one.put(train(500))  # after the end: ignored
    assert delivery.delivered == 0
    assert delivery.pending + delivery.dropped == 111
    assert delivery.pending >= 20
    assert delivery.error is not None
    assert delivery.run_id is None
    assert "oldest train events dropped" in caplog.text
    assert (tmp_path / "figures" / "errors.png").exists()
    assert "hidden" not in caplog.text + str(delivery)


@pytest.mark.parametrize("uri", ["sqlit:///x", "sqlite:////no/such/folder/mlflow.db", "", "http://"])
def test_an_unusable_uri_does_not_raise_in_the_tracker(uri: str, tracker: Callable[..., Tracker]) -> None:
    one = tracker(uri)
    one.put(train(1))
    wait_until(lambda: one._error is not None)
    delivery = one.close(0.1, RunStatus.FAILED)
    assert (delivery.delivered, delivery.pending) == (0, 1)


# -- where to track ------------------------------------------------------------------------------------------------


def test_the_store_is_the_field_then_the_environment_then_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    assert default_uri(None, Path("runs")) == f"sqlite:///{tmp_path}/runs/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://host:5000")
    assert default_uri(None, tmp_path) == "http://host:5000"
    assert default_uri("sqlite:///my.db", tmp_path / "other") == f"sqlite:///{tmp_path}/my.db"


def test_check_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "text.db").write_text("this is no database at all")
    for uri, message in {
        "sqlit:///x": "unknown scheme 'sqlit'",
        "sqlite://": "keeps nothing",
        "sqlite:///:memory:": "keeps nothing",
        f"sqlite:///{tmp_path}/missing/mlflow.db": "does not exist: create it",
        f"sqlite:///{tmp_path}/text.db/mlflow.db": "does not exist",
        f"sqlite:///{tmp_path}/text.db": "not an SQLite database",
        f"sqlite:///{tmp_path}": "not a file",
        str(tmp_path): "old file store",
        f"file://{tmp_path}": "old file store",
        "http://": "no host",
        "postgresql+nosuchdriver://user:hidden@host/db": "cannot be used",
    }.items():
        with pytest.raises(ValueError, match=message) as caught:
            check(uri)
        assert "hidden" not in str(caught.value)
    assert check(f"sqlite:///{tmp_path}/mlflow.db") is None


def test_check_does_not_wait_for_a_silent_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mlflow_store, "_CHECK_TIMEOUT_S", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        start_s = time.perf_counter()
        warning = check(f"http://user:hidden@127.0.0.1:{silent.getsockname()[1]}")
        assert time.perf_counter() - start_s < 2
    assert "training goes on" in str(warning)
    assert "hidden" not in str(warning)


def test_credentials_are_masked() -> None:
    assert masked("at http://user:p@ss@host:5000/x, mail a@b") == "at http://***@host:5000/x, mail a@b"
    assert masked("postgresql://host/db?user=me&password=p&sslmode=on") == (
        "postgresql://host/db?user=me&password=***&sslmode=on"
    )
    # All that a storage's URL is refused for.
    for url in (
        "https://host/x?api_key=hush",
        "https://host/x?a=1&sig=hush",
        "https://host/x?access_key=hush",
        "https://host/x?aws.credential=hush",
        "s3://AKIDEXAMPLE:wJalr/K7MDENG/hush@bucket/x",
    ):
        assert "hush" not in masked(f"at {url} and on")
    mlflow = "http://host:5000/#/experiments/1?searchFilter=&orderByKey=attributes.start_time"
    for shown in ("http://host:5000/#/x", "s3://bucket/a b@c", "http://host/x?sort=key&page=3", mlflow):
        assert masked(shown) == shown
