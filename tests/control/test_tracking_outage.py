"""Tracking while a real MLflow server is down, stopped, refusing, slow, cut off or lost."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from orchestrator.control import tracking
from orchestrator.control.tracking import RunStatus, Tracker, check
from tests.control.tracked import (
    Event,
    assert_complete,
    expected,
    journal,
    put_all,
    rows,
    runs,
    tracked,
    wait_until,
)
from tests.mlflow_server import Fate, MlflowServer, Proxy

MakeTracker = Callable[..., Tracker]


@pytest.fixture(scope="module")
def _server_process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MlflowServer]:
    server = MlflowServer(tmp_path_factory.mktemp("server"))
    yield server
    server.stop()


@pytest.fixture
def server(_server_process: MlflowServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[MlflowServer]:
    """One that runs; retries of the trackers come quickly."""
    monkeypatch.setattr(tracking, "_MAX_BACKOFF_S", 0.3)
    if not _server_process.is_running():
        _server_process.start()
        _server_process.wait_ready()
    yield _server_process
    if _server_process.is_running():
        _server_process.signal(signal.SIGCONT)


@pytest.fixture
def proxy(server: MlflowServer) -> Iterator[Proxy]:
    proxy = Proxy(server.port)
    yield proxy
    proxy.close()


@pytest.fixture
def experiment(request: pytest.FixtureRequest) -> str:
    """One for each test: they share the server."""
    return str(request.node.name)


def assert_all_there(server: MlflowServer, experiment: str, events: list[Event], status: str = "FINISHED") -> None:
    """One run that shows each of ``events`` once and in order."""
    [run] = runs(server.uri, experiment)
    assert rows(server.database, run.info.run_id) == expected(events)
    assert run.info.status == status


def test_put_does_not_wait_for_a_call(
    server: MlflowServer, proxy: Proxy, experiment: str, tracker: MakeTracker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the thread sits in a call that nobody answers, it holds nothing that a put needs."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1000")
    one = tracker(proxy.uri, experiment=experiment)
    put_all(one, journal(1, 10))
    wait_until(lambda: one._num_delivered == tracked(journal(1, 10)))
    proxy.fate = lambda call: Fate.HOLD if call == "POST runs/log-batch" else Fate.PASS
    put_all(one, journal(11, 20))
    wait_until(lambda: proxy.held["POST runs/log-batch"] == 1)
    calls = proxy.calls.total()
    putting = threading.Thread(target=put_all, args=(one, journal(21, 500)), daemon=True)
    putting.start()
    putting.join(30)
    # The very same call is still out: nobody waited for it, and nothing was sent meanwhile.
    found = putting.is_alive(), proxy.held["POST runs/log-batch"], proxy.calls.total()
    proxy.fate = lambda call: Fate.PASS
    proxy.released.set()
    assert found == (False, 1, calls)
    assert_complete(one.close(60, RunStatus.FINISHED), tracked(journal(1, 500)))
    assert_all_there(server, experiment, journal(1, 500))


def test_a_server_that_is_down_stopped_and_killed_loses_nothing(
    server: MlflowServer, experiment: str, tracker: MakeTracker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    server.stop()
    assert "does not answer" in str(check(server.uri))
    one = tracker(server.uri, experiment=experiment)
    put_all(one, journal(1, 50))  # down from the start
    wait_until(lambda: one._error is not None)
    server.start()
    server.wait_ready()
    assert check(server.uri) is None
    wait_until(lambda: one._num_delivered == tracked(journal(1, 50)))

    # Stopped: the kernel takes the call, nobody answers, and it is stored after all when the server goes on.
    server.signal(signal.SIGSTOP)
    put_all(one, journal(51, 100))
    wait_until(lambda: one._error is not None)
    assert "timeout" in str(one._error).lower() or "timed out" in str(one._error).lower()
    put_all(one, journal(101, 120))
    server.signal(signal.SIGCONT)
    wait_until(lambda: one._num_delivered == tracked(journal(1, 120)))

    server.stop()
    put_all(one, journal(121, 150))
    wait_until(lambda: one._error is not None)
    server.start()
    put_all(one, journal(151, 160))
    delivery = one.close(90, RunStatus.FINISHED)
    assert_complete(delivery, tracked(journal(1, 160)))
    assert delivery.where.startswith(f"{server.uri}/#/experiments/")
    assert_all_there(server, experiment, journal(1, 160))
    assert list((server.folder / "artifacts").rglob(f"{delivery.run_id}/artifacts/errors.png"))


def test_refusals_lose_nothing(server: MlflowServer, proxy: Proxy, experiment: str, tracker: MakeTracker) -> None:
    statuses = (503, 401, 404, 429, 500)
    proxy.fate = lambda call: 403
    assert check(proxy.uri) is None  # whoever refuses the page of its health is not down
    one = tracker(proxy.uri, experiment=experiment)
    events = journal(1, 20)
    put_all(one, events)
    wait_until(lambda: one._error is not None)
    for number, status in enumerate(statuses, start=1):
        proxy.fate = lambda call: Fate.PASS
        wait_until(lambda: one._num_delivered == tracked(events) and one._error is None)  # noqa: B023
        proxy.fate = lambda call, status=status: status  # type: ignore[misc]
        more = journal(20 * number + 1, 20 * number + 20)
        put_all(one, more)
        events += more
        wait_until(lambda: one._error is not None)
        assert str(status) in str(one._error)
    proxy.fate = lambda call: Fate.PASS
    assert_complete(one.close(60, RunStatus.FINISHED), tracked(events))
    assert_all_there(server, experiment, events)


def test_lost_answers_make_nothing_twice(
    server: MlflowServer, proxy: Proxy, experiment: str, tracker: MakeTracker
) -> None:
    """Of each kind of call the first two answers are lost: it was done, and the tracker cannot know."""
    proxy.fate = lambda call: Fate.LOSE_ANSWER if proxy.calls[call] <= 2 else Fate.PASS
    one = tracker(proxy.uri, experiment=experiment)
    put_all(one, journal(1, 30))
    wait_until(lambda: one._num_delivered == tracked(journal(1, 30)))
    put_all(one, journal(31, 60))
    delivery = one.close(60, RunStatus.FAILED, "no space")
    assert (delivery.delivered, delivery.pending) == (tracked(journal(1, 60)), 0)
    assert (proxy.calls["POST experiments/create"], proxy.calls["POST runs/create"]) == (1, 1)  # found after that
    for call in ("POST runs/log-batch", "GET metrics/get-history", "POST runs/update", "POST runs/search"):
        assert proxy.calls[call] > 2, proxy.calls
    assert_all_there(server, experiment, journal(1, 60), "FAILED")


def test_a_call_that_is_stored_late_appears_once(
    server: MlflowServer, proxy: Proxy, experiment: str, tracker: MakeTracker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The call is given up, looked for in vain and made again; then the first one is done after all."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    creation, metrics = "POST runs/create", "POST runs/log-batch"
    proxy.fate = lambda call: Fate.HOLD if call == creation and proxy.calls[call] == 1 else Fate.PASS
    one = tracker(proxy.uri, experiment=experiment)
    put_all(one, journal(1, 30))
    wait_until(lambda: one._num_delivered == tracked(journal(1, 30)))
    assert proxy.held[creation] == 1
    before = proxy.calls[metrics]
    proxy.fate = lambda call: Fate.HOLD if call == metrics and proxy.calls[call] == before + 1 else Fate.PASS
    put_all(one, journal(31, 60))
    wait_until(lambda: one._num_delivered == tracked(journal(1, 60)))
    assert proxy.held[metrics] == 1
    proxy.released.set()
    wait_until(lambda: not proxy.held.total() and len(runs(server.uri, experiment)) == 2)
    assert_complete(one.close(60, RunStatus.FINISHED), tracked(journal(1, 60)))
    assert_all_there(server, experiment, journal(1, 60))


def test_the_next_start_brings_what_is_missing_and_nothing_twice(
    server: MlflowServer, proxy: Proxy, experiment: str, tracker: MakeTracker
) -> None:
    """The last call of the first driver was done and not answered; the second has a journal with other times."""
    one = tracker(proxy.uri, experiment=experiment)
    put_all(one, journal(1, 30))
    wait_until(lambda: one._num_delivered == tracked(journal(1, 30)))
    proxy.fate = lambda call: Fate.LOSE_ANSWER if call == "POST runs/log-batch" else 503
    put_all(one, journal(31, 60))
    wait_until(lambda: one._error is not None)
    proxy.fate = lambda call: 503
    put_all(one, journal(61, 80))
    delivery = one.close(0.1, RunStatus.FAILED, "no space")
    assert delivery.pending == tracked(journal(31, 80))

    proxy.fate = lambda call: Fate.PASS
    two = tracker(proxy.uri, experiment=experiment)
    two.replay(journal(1, 70, delay_ms=5))
    put_all(two, journal(71, 90, delay_ms=5))
    assert_complete(two.close(60, RunStatus.FINISHED), tracked(journal(1, 90)))
    assert_all_there(server, experiment, journal(1, 60) + journal(61, 90, delay_ms=5))


def test_a_lost_store_gets_everything_again(
    server: MlflowServer, experiment: str, tracker: MakeTracker, caplog: pytest.LogCaptureFixture
) -> None:
    """From a driver that lives, and from the journal of a run that had ended."""
    ended = tracker(server.uri, experiment=f"{experiment}_ended")
    put_all(ended, journal(1, 60))
    assert_complete(ended.close(60, RunStatus.FINISHED), tracked(journal(1, 60)))
    one = tracker(server.uri, experiment=experiment)
    one.replay(journal(1, 30))
    put_all(one, journal(31, 60))
    wait_until(lambda: one._num_delivered == tracked(journal(1, 60)))
    first_id = one._run.run_id
    server.lose()
    put_all(one, journal(61, 90))
    server.start()
    server.wait_ready()
    wait_until(lambda: one._num_delivered == tracked(journal(1, 90)))
    delivery = one.close(60, RunStatus.FINISHED)
    assert_complete(delivery, tracked(journal(1, 90)))
    assert delivery.run_id != first_id
    assert_all_there(server, experiment, journal(1, 90))
    [run] = runs(server.uri, experiment)
    assert run.info.start_time == 1000
    assert run.data.tags["last_decision"].startswith("stop at step 90")
    assert run.data.params == {"depth": "34"}
    assert "sent again" in caplog.text
    assert list((server.folder / "artifacts").rglob(f"{delivery.run_id}/artifacts/errors.png"))

    # A driver that has seen the end only is given the whole journal: as at the end of a run, and at a start.
    two = tracker(server.uri, experiment=f"{experiment}_ended")
    put_all(two, journal(51, 60))
    wait_until(lambda: two._num_delivered == tracked(journal(51, 60)))
    two.replay(journal(1, 60))
    two.close(60, RunStatus.FINISHED)
    [run] = runs(server.uri, f"{experiment}_ended")
    found = rows(server.database, run.info.run_id)
    assert {key: sorted(values) for key, values in found.items()} == expected(journal(1, 60))


def test_why_a_run_failed_is_a_tag_until_it_goes_on(
    server: MlflowServer, experiment: str, tracker: MakeTracker
) -> None:
    one = tracker(server.uri, experiment=experiment)
    put_all(one, journal(1, 10))
    reason = "run 'x' stopped (s3://key:hidden@bucket is full)\nTraceback"
    one.close(60, RunStatus.FAILED, reason)
    [run] = runs(server.uri, experiment)
    assert (run.info.status, run.data.tags["failure"]) == ("FAILED", "run 'x' stopped (s3://***@bucket is full)")
    two = tracker(server.uri, experiment=experiment)
    two.replay(journal(1, 10))
    wait_until(lambda: "failure" not in runs(server.uri, experiment)[0].data.tags)
    two.close(60, RunStatus.FINISHED)
    assert_all_there(server, experiment, journal(1, 10))


_DRIVER = """
import sys, time
from pathlib import Path
from orchestrator.control.tracking import RunStatus, Tracker
tracker = Tracker(uri=sys.argv[1], experiment=sys.argv[2], name="n", run_key="k", params={}, tags={},
                  figure_dir=Path(sys.argv[3]))
def put(step):
    tracker.put({"kind": "train", "step": step, "epoch": 1.0, "time_ms": step, "metrics": {"train_top1_error": 1.0}})
put(1)
while sys.argv[4] == "connected" and (tracker._num_delivered < 1 or tracker._run._monitor is None):
    time.sleep(0.05)
print("ready", flush=True)
sys.stdin.readline()
put(2)
sys.stdin.readline()
print(tracker.close(0.5, RunStatus.FAILED).pending, flush=True)
"""


@pytest.mark.parametrize("when", ["at_first", "connected"])
def test_a_driver_ends_though_no_call_does(
    when: str, server: MlflowServer, proxy: Proxy, experiment: str, tmp_path: Path
) -> None:
    """The process is gone before any of its calls, events and system metrics, is answered or given up."""
    pytest.importorskip("psutil", reason="MLflow's system metrics read it")
    environment = os.environ | {
        "MLFLOW_HTTP_REQUEST_TIMEOUT": "1000",
        "MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL": "0.1",
        "MLFLOW_SYSTEM_METRICS_SAMPLES_BEFORE_LOGGING": "1",
    }
    if when == "at_first":
        proxy.fate = lambda call: Fate.HOLD
    process = subprocess.Popen(
        [sys.executable, "-c", _DRIVER, proxy.uri, experiment, str(tmp_path), when],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
        cwd=Path(__file__).parents[2],
    )
    try:
        assert process.stdin
        assert process.stdout
        assert process.stdout.readline() == "ready\n"
        proxy.fate = lambda call: Fate.HOLD if when == "at_first" or call == "POST runs/log-batch" else Fate.PASS
        print("put", file=process.stdin, flush=True)
        wait_until(lambda: proxy.held.total() == (1 if when == "at_first" else 2))
        out, _ = process.communicate("close\n", timeout=60)
        assert (out, process.returncode) == ("2\n" if when == "at_first" else "1\n", 0)
    finally:
        process.kill()
        process.wait()
