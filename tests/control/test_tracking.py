"""Tracking against real MLflow: SQLite stores, and a server that is down, stopped, killed and started again."""

from __future__ import annotations

import logging
import os
import shlex
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from orchestrator.control import mlflow_store, tracking
from orchestrator.control.mlflow_store import few_system_metrics, masked
from orchestrator.control.tracking import MAX_METRIC_KEYS, Delivery, RunStatus, Tracker, check, default_uri

MAX_PUT_S = 0.05
Event = dict[str, Any]


def train(step: int, *, time_ms: int = 0) -> Event:
    metrics = {
        "train_loss": 7.0 / step,
        "train_top1_error": 100.0 / step,
        "train_top5_error": 50.0 / step,
        "learning_rate": 0.1,
        "images_per_s": 1000.0,
        "data_wait_share": 0.01,
    }
    return {"kind": "train", "step": step, "epoch": step / 10, "time_ms": time_ms or step * 1000, "metrics": metrics}


def validation(step: int, *, time_ms: int = 0) -> Event:
    metrics = {"validation_loss": 7.0 / step, "validation_top1_error": 90 / step, "validation_top5_error": 40 / step}
    return {
        "kind": "validation",
        "step": step,
        "epoch": step / 10,
        "time_ms": time_ms or step * 1000,
        "metrics": metrics,
    }


def decision(step: int, action: str = "drop", *, drops: int = 1, time_ms: int = 0) -> Event:
    before = {"drops": drops - 1, "best_error_percent": 60.0, "stale_validations": 2, "stop": False}
    inputs = {
        "action": action,
        "step": step,
        "error_percent": 61.5,
        "before": before,
        "after": before | ({"drops": drops, "stale_validations": 0} if action == "drop" else {"stop": True}),
        "learning_rate_before": 0.1 * 0.5 ** (drops - 1),
        "learning_rate": 0.1 * 0.5 ** (drops if action == "drop" else drops - 1),
    }
    return {
        "kind": "decision",
        "step": step,
        "epoch": step / 10,
        "time_ms": time_ms or step * 1000,
        "decision": inputs,
    }


def checkpoint(step: int, *, best: bool = True, time_ms: int = 0) -> Event:
    return {
        "kind": "checkpoint",
        "step": step,
        "epoch": step / 10,
        "time_ms": time_ms or step * 1000,
        "url": f"s3://key:hidden@bucket/step-{step}",
        "validation_top1_error": 90 / step,
        "best": best,
    }


def journal(first: int, last: int, *, delay_ms: int = 0) -> list[Event]:
    """Steps ``first``..``last``; every tenth validates, every twentieth drops the rate and is the best so far."""
    events: list[Event] = []
    for step in range(first, last + 1):
        time_ms = step * 1000 + delay_ms
        events.append(train(step, time_ms=time_ms))
        if step % 10 == 0:
            events.append(validation(step, time_ms=time_ms))
            events.append(decision(step, "drop" if step % 20 == 0 else "stop", drops=step // 20, time_ms=time_ms))
            events.append(checkpoint(step, best=step % 20 == 0, time_ms=time_ms))
            events.append({"kind": "restart", "step": step, "epoch": 0.0, "time_ms": time_ms})
    return events


@pytest.fixture
def tracker(tmp_path: Path) -> Iterator[Callable[..., Tracker]]:
    """Makes trackers with everything but what the test is about filled in."""
    made: list[Tracker] = []

    def make(uri: str, **changes: Any) -> Tracker:
        fields: dict[str, Any] = {
            "experiment": "imagenet",
            "name": "resnet-34",
            "run_key": "resnet-34/0",
            "params": {"depth": 34},
            "tags": {},
            "figure_dir": tmp_path / "figures",
            "system_metrics": False,
        }
        made.append(Tracker(uri=uri, **(fields | changes)))
        return made[-1]

    yield make
    for one in made:
        one.close(0, RunStatus.KILLED)


def runs(uri: str, experiment: str = "imagenet") -> list[Any]:
    from mlflow import MlflowClient

    client = MlflowClient(uri)
    return list(client.search_runs([client.get_experiment_by_name(experiment).experiment_id]))


def rows(database: Path, run_id: str) -> dict[str, list[tuple[int, int, float]]]:
    """By metric key the (step, time in ms, value) in the order of arrival."""
    with sqlite3.connect(database) as connection:
        found = connection.execute(
            "SELECT key, step, timestamp, value FROM metrics WHERE run_uuid = ? ORDER BY rowid", (run_id,)
        ).fetchall()
    connection.close()
    by_key: dict[str, list[tuple[int, int, float]]] = {}
    for key, step, time_ms, value in found:
        by_key.setdefault(key, []).append((step, time_ms, value))
    return by_key


def expected(events: list[Event]) -> dict[str, list[tuple[int, int, float]]]:
    by_key: dict[str, list[tuple[int, int, float]]] = {}
    epochs: set[int] = set()
    for event in events:
        metrics = dict(event.get("metrics", {}))
        if metrics and event["step"] not in epochs:
            epochs.add(event["step"])
            metrics["epoch"] = event["epoch"]
        if event["kind"] == "validation":  # these only fall
            metrics["best_validation_top1_error"] = metrics["validation_top1_error"]
        for key, value in metrics.items():
            shown = float(f"{value:.6g}")  # six digits
            by_key.setdefault(key, []).append((event["step"], event["time_ms"], shown))
    return by_key


def put_all(tracker: Tracker, events: list[Event]) -> float:
    """Longest time of one put, seconds."""
    longest_s = 0.0
    for event in events:
        start_s = time.perf_counter()
        tracker.put(event)
        longest_s = max(longest_s, time.perf_counter() - start_s)
    return longest_s


def wait_until(condition: Callable[[], bool], timeout_s: float = 30.0) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, "waited in vain"
        time.sleep(0.05)


def assert_complete(delivery: Delivery, num_events: int) -> None:
    assert (delivery.error, delivery.pending, delivery.dropped) == (None, 0, 0)
    assert delivery.delivered == num_events


def tracked(events: list[Event]) -> int:
    return sum(event["kind"] != "restart" for event in events)


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
    assert rows(tmp_path / "mlflow.db", str(delivery.run_id)) == expected(journal(2, 30))
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


# -- outages -------------------------------------------------------------------------------------------------------


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Server:
    """A real MLflow server on loopback, in a process group of its own so that all of it can be signalled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port = free_port()
        self.uri = f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port)]
        command += ["--backend-store-uri", f"sqlite:///{self.folder}/server.db", "--workers", "1"]
        command += ["--artifacts-destination", str(self.folder / "artifacts")]
        environment = os.environ | {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        with (self.folder / "server.log").open("ab") as log:
            self.process = subprocess.Popen(
                command, stdout=log, stderr=log, env=environment, cwd=self.folder, start_new_session=True
            )

    def wait_ready(self) -> None:
        def is_ready() -> bool:
            try:
                urllib.request.urlopen(f"{self.uri}/health", timeout=1).close()
            except OSError:
                return False
            return True

        wait_until(is_ready, timeout_s=90)

    def signal(self, number: signal.Signals) -> None:
        assert self.process is not None
        os.killpg(self.process.pid, number)

    def stop(self) -> None:
        if self.process is not None:
            self.signal(signal.SIGKILL)
            self.process.wait(timeout=30)
            self.process = None


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    server = Server(tmp_path)
    yield server
    server.stop()


def test_a_server_that_is_down_stopped_and_killed_loses_nothing(
    tmp_path: Path, server: Server, tracker: Callable[..., Tracker], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "2")
    monkeypatch.setattr(tracking, "_MAX_BACKOFF_S", 0.5)
    assert "does not answer" in str(check(server.uri))
    one = tracker(server.uri)
    longest_s = [put_all(one, journal(1, 50))]  # down from the start
    wait_until(lambda: one._error is not None)
    server.start()
    server.wait_ready()
    assert check(server.uri) is None
    wait_until(lambda: one._num_delivered == tracked(journal(1, 50)))

    # Stopped: the kernel takes the call, nobody answers, and it is stored after all when the server goes on.
    server.signal(signal.SIGSTOP)
    longest_s.append(put_all(one, journal(51, 100)))
    wait_until(lambda: one._error is not None)
    assert "timeout" in str(one._error).lower() or "timed out" in str(one._error).lower()
    longest_s.append(put_all(one, journal(101, 120)))
    server.signal(signal.SIGCONT)
    wait_until(lambda: one._num_delivered == tracked(journal(1, 120)))

    server.stop()
    longest_s.append(put_all(one, journal(121, 150)))
    wait_until(lambda: one._error is not None)
    assert threading.active_count() < 20
    server.start()
    longest_s.append(put_all(one, journal(151, 160)))
    delivery = one.close(90, RunStatus.FINISHED)

    assert max(longest_s) < MAX_PUT_S
    assert_complete(delivery, tracked(journal(1, 160)))
    assert delivery.where.startswith(f"{server.uri}/#/experiments/")
    assert rows(tmp_path / "server.db", str(delivery.run_id)) == expected(journal(1, 160))
    [run] = runs(server.uri)
    assert run.info.status == "FINISHED"
    assert list((tmp_path / "artifacts").rglob("errors.png"))


def test_without_mlflow_training_goes_on_and_the_queue_stays_bounded(
    tmp_path: Path, tracker: Callable[..., Tracker], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    uri = f"http://user:hidden@127.0.0.1:{free_port()}"
    events = [train(step) for step in range(1, 101)]
    start_s = time.perf_counter()
    one = tracker(uri, queue_limit=20)
    longest_s = put_all(one, [*events, validation(100), *[train(step) for step in range(101, 111)]])
    assert time.perf_counter() - start_s < 1
    assert longest_s < MAX_PUT_S
    wait_until(lambda: one._error is not None)
    start_s = time.perf_counter()
    delivery = one.close(0.3, RunStatus.KILLED)
    assert time.perf_counter() - start_s < 3
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
