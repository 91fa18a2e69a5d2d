"""MLflow behind a queue; the only door to MLflow.

A training run hands over the events of its journal and never waits: one daemon thread per run talks to MLflow, tries
again when MLflow is down, slow or refusing, and looks up what MLflow already holds so that no (metric, step) appears
twice. The journal in storage is the truth; what is shown in MLflow can be rebuilt from it with ``Tracker.replay``.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib
import logging
import math
import os
import re
import threading
import time
import urllib.error
import urllib.request
from base64 import b64encode
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum, StrEnum
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit, urlunsplit

from orchestrator.control.curves import Curve, EventKind, draw_curves

_log = logging.getLogger(__name__)

# MLflow's charts are slow past about 30 keys a run: 21 of ours and the 9 of `_few_system_metrics`.
MAX_METRIC_KEYS = 30
_MAX_OWN_KEYS = 21
_DROPS_KEY = "learning_rate_drops"
_BEST_KEY = "best_validation_top1_error"
_SYSTEM_PREFIX = "system/"

_MAX_METRICS_PER_CALL = 800  # MLflow takes 1000 metrics, parameters and tags together, in 1 MB
_MAX_PARAMS_PER_CALL = 100
_MAX_VALUE_LENGTH = 500
_LINGER_S = 0.5  # events of a busy moment share a call
_MAX_BACKOFF_S = 60.0
_MIN_FIGURE_INTERVAL_S = 20.0
_MONITOR_RETRY_S = 60.0
_SCHEMA_LOCK_TIMEOUT_S = 120.0
_CHECK_TIMEOUT_S = 4.0

_FORBIDDEN_IN_KEY = re.compile(r"[^\w.\- /:]")
_KINDS = frozenset(kind.value for kind in EventKind)
_DATABASES = ("postgresql", "mysql", "mssql")


class RunStatus(StrEnum):
    """How a training run ended, in MLflow's words."""

    FINISHED = "FINISHED"
    FAILED = "FAILED"
    KILLED = "KILLED"


@dataclass(frozen=True)
class Delivery:
    """What became of the events when a tracker was closed.

    ``delivered`` counts events that MLflow holds (also those it held before), ``pending`` those it does not: a
    replay of the journal brings them. ``dropped`` counts train events given up because the queue was full (the
    journal has them). ``error`` is the last unresolved failure, ``where`` a place to look at the run.
    """

    delivered: int
    pending: int
    dropped: int
    error: str | None
    run_id: str | None
    where: str


@dataclass(frozen=True, slots=True)
class _Entry:
    """An event, checked and copied."""

    kind: EventKind
    step: int
    time_ms: int
    metrics: tuple[tuple[str, float], ...]
    decision: str = ""
    is_drop: bool = False
    best_url: str = ""


class Tracker:
    """One MLflow run that follows one training run across all its restarts.

    The MLflow run is the one in ``experiment`` whose tag ``run_key`` is ``run_key``; it is created when there is none.
    ``params`` (nested mappings become dotted keys; values are cut at 500 characters) are logged once: a value that
    differs from the stored one is skipped with a warning. The constructor starts a daemon thread and returns; an
    MLflow that is down, slow or refusing never raises here nor in any method.

    Of a step that was trained twice (resumed from an earlier checkpoint) MLflow keeps the values that came first.
    Infinite values are shown as NaN, since MLflow would store them as ±1.8e308.
    """

    def __init__(
        self,
        *,
        uri: str,
        experiment: str,
        name: str,
        run_key: str,
        params: Mapping[str, object],
        tags: Mapping[str, str],
        figure_dir: Path,
        queue_limit: int = 100_000,
        system_metrics: bool = True,
    ) -> None:
        _set_environment_defaults()
        self._uri = uri
        self._experiment = experiment
        self._name = name
        self._run_key = run_key
        self._params = dict(params)
        self._tags = dict(tags)
        self._figure_path = figure_dir / "errors.png"
        self._queue_limit = max(1, queue_limit)
        self._wants_system_metrics = system_metrics

        # Shared between threads, under `_wake`.
        self._wake = threading.Condition()
        self._replayed: deque[_Entry] = deque()
        self._train: deque[tuple[int, _Entry]] = deque()  # (arrival, event); apart, because these may be dropped
        self._others: deque[tuple[int, _Entry]] = deque()
        self._batch: list[_Entry] = []  # taken from the above and not yet known to be stored
        self._num_arrived = self._num_delivered = self._num_dropped = self._num_malformed = 0
        self._curve = Curve()
        self._num_curve_events = self._num_validations = 0
        self._status: RunStatus | None = None  # set by close()
        self._is_abandoned = False
        self._error: str | None = None
        self._figure_error: str | None = None

        self._draw_lock = threading.Lock()
        self._num_drawn_events = self._num_drawn_validations = 0
        self._next_draw_s = 0.0
        self._num_uploaded_events = 0

        # The thread's own.
        self._client: Any = None
        self._is_connected = False
        self._experiment_id: str | None = None
        self._run_id: str | None = None
        self._num_creations = 0
        self._held: dict[str, set[int]] = {}  # steps that MLflow holds, by metric key
        self._in_doubt: set[str] = set()  # keys of a call whose outcome is unknown
        self._drop_steps: set[int] = set()
        self._newest_step = {EventKind.DECISION: -1, EventKind.CHECKPOINT: -1}
        self._refused_keys: set[str] = set()
        self._monitor: Any = None
        self._next_monitor_s = 0.0

        self._thread = threading.Thread(target=self._work, name=f"tracking-{name}", daemon=True)
        self._thread.start()

    # -- any thread ---------------------------------------------------------------------------------------------

    def put(self, event: dict[str, Any]) -> None:
        """Queue one journal event. Never blocks and never raises; a malformed event is logged and left out.

        Beyond ``queue_limit`` waiting events the oldest *train* events are dropped and counted.
        """
        self._accept(event, is_replay=False)

    def replay(self, events: Iterable[dict[str, Any]]) -> None:
        """Deliver the journal as found at a (re)start; what MLflow holds already is not sent again.

        Takes about 10 µs an event here. ``queue_limit`` does not count these: they lie in memory anyway.
        Raises only what iterating ``events`` raises.
        """
        for event in events:
            self._accept(event, is_replay=True)

    def close(self, timeout_s: float, status: RunStatus) -> Delivery:
        """Draw the last figure, deliver what is queued and set the run's status, all within about ``timeout_s``.

        Events put after this are ignored. What is still pending then is given up; the journal has it.
        """
        deadline_s = time.monotonic() + timeout_s
        with self._wake:
            self._status = self._status or status
            self._wake.notify_all()
        # Here, so that there is a last figure even when the thread sits in a call that does not return.
        self._draw(is_last=True)
        self._thread.join(max(0.0, deadline_s - time.monotonic()))
        with self._wake:
            self._is_abandoned = True
            self._wake.notify_all()
            pending = self._num_pending()
            error = self._error or self._figure_error
            if error is None and (pending or self._thread.is_alive()):
                error = f"not everything was delivered within {timeout_s:g} s"
            if pending:
                _log.warning(
                    "tracking of %s: %d events were not delivered (%s); they are in the journal and are delivered"
                    " when the run is started again",
                    self._name,
                    pending,
                    error,
                )
            return Delivery(
                delivered=self._num_delivered,
                pending=pending,
                dropped=self._num_dropped,
                error=error,
                run_id=self._run_id,
                where=self._where(),
            )

    def _accept(self, event: dict[str, Any], *, is_replay: bool) -> None:
        try:
            entry = _checked(event)
            if entry is None:
                return
            with self._wake:
                if self._status is not None:
                    return
                self._curve.add(event)
                self._num_curve_events += 1
                self._num_validations += entry.kind is EventKind.VALIDATION
                if is_replay:
                    self._replayed.append(entry)
                else:
                    self._enqueue(entry)
                self._wake.notify_all()
        except Exception as error:  # whatever a caller passes must not hurt training
            self._num_malformed += 1
            if _is_power_of_two(self._num_malformed):
                _log.warning(
                    "tracking of %s: %d malformed events left out (%s)",
                    self._name,
                    self._num_malformed,
                    _first_line(error),
                )

    def _enqueue(self, entry: _Entry) -> None:
        queue = self._train if entry.kind is EventKind.TRAIN else self._others
        queue.append((self._num_arrived, entry))
        self._num_arrived += 1
        if len(self._train) + len(self._others) > self._queue_limit:
            (self._train or self._others).popleft()
            self._num_dropped += 1
            if _is_power_of_two(self._num_dropped):
                _log.warning(
                    "tracking of %s: %d of the oldest train events dropped from the full queue (%d); the journal has"
                    " them and they are delivered when the run is started again",
                    self._name,
                    self._num_dropped,
                    self._queue_limit,
                )

    def _num_pending(self) -> int:
        return len(self._replayed) + len(self._train) + len(self._others) + len(self._batch)

    # -- the thread ---------------------------------------------------------------------------------------------

    def _work(self) -> None:
        num_failures = 0
        is_finished = False
        while not (is_finished or self._is_abandoned):
            try:
                self._connect()
                while self._deliver_batch():
                    self._draw()
                with self._wake:
                    is_last = self._status is not None and self._num_pending() == 0
                if is_last:
                    self._finish()
                is_finished = is_last
                if num_failures:
                    _log.info("tracking of %s: MLflow takes events again", self._name)
                num_failures = 0
                self._error = None
            except Exception as error:  # promise: tracking never hurts training
                self._is_connected = False
                num_failures += 1
                self._error = _first_line(error)
                if _is_power_of_two(num_failures):
                    _log.warning(
                        "tracking of %s: %d events wait for MLflow at %s (%s); training goes on",
                        self._name,
                        self._num_pending(),
                        masked(self._uri),
                        self._error,
                    )
            self._draw(is_last=is_finished)
            if self._is_connected:
                self._upload_figure()
                if not is_finished:
                    self._watch_system()
            if not is_finished:
                self._pause(num_failures)

    def _pause(self, num_failures: int) -> None:
        """Wait out the backoff, or for something to do. close() ends either."""
        with self._wake:
            was_closing = self._status is not None
            if num_failures:
                limit_s = 0.5 if was_closing else _MAX_BACKOFF_S
                deadline_s = time.monotonic() + min(limit_s, 2.0 ** min(num_failures - 1, 10))
            else:
                deadline_s = time.monotonic() + (0.0 if was_closing else _LINGER_S)
            while (left_s := deadline_s - time.monotonic()) > 0 and not self._is_abandoned:
                if self._status is not None and not was_closing:
                    return
                self._wake.wait(left_s)
            while not (num_failures or self._num_pending() or self._status or self._is_abandoned):
                has_figure_due = self._num_validations != self._num_drawn_validations
                figure_s = self._next_draw_s - time.monotonic() if has_figure_due else math.inf
                monitor_s = self._next_monitor_s - time.monotonic() if self._wants_system_metrics else math.inf
                wait_s = min(figure_s, monitor_s)
                if wait_s <= 0:
                    return
                self._wake.wait(None if wait_s == math.inf else wait_s)

    def _deliver_batch(self) -> bool:
        """Send the next events, in order; False when there are none. Raises whatever MLflow raises."""
        with self._wake:
            if not self._batch:
                self._batch = self._take()
            batch = self._batch
        if not batch or self._is_abandoned:
            return False
        metrics, tags = self._render(batch)
        if metrics or tags:
            from mlflow.entities import Metric, RunTag

            self._in_doubt = {key for key, _, _, _ in metrics}
            self._client.log_batch(
                self._run_id,
                metrics=[Metric(key, value, time_ms, step) for key, value, time_ms, step in metrics],
                tags=[RunTag(key, value) for key, value in tags.items()],
            )
            for key, _, _, step in metrics:
                self._held[key].add(step)
            self._in_doubt = set()
        with self._wake:
            self._num_delivered += len(batch)
            self._batch = []
        return True

    def _take(self) -> list[_Entry]:
        batch: list[_Entry] = []
        num_metrics = 0
        while num_metrics < _MAX_METRICS_PER_CALL:
            if self._replayed:
                entry = self._replayed.popleft()
            elif queue := min((q for q in (self._train, self._others) if q), key=lambda q: q[0][0], default=None):
                entry = queue.popleft()[1]
            else:
                break
            batch.append(entry)
            num_metrics += len(entry.metrics) + 1
        return batch

    def _render(self, batch: list[_Entry]) -> tuple[list[tuple[str, float, int, int]], dict[str, str]]:
        """(key, value, time in ms, step) of what MLflow lacks, and tags."""
        metrics: list[tuple[str, float, int, int]] = []
        tags: dict[str, str] = {}
        chosen: set[tuple[str, int]] = set()
        for entry in batch:
            pairs = list(entry.metrics)
            if entry.is_drop:
                self._drop_steps.add(entry.step)
                pairs.append((_DROPS_KEY, float(sum(step <= entry.step for step in self._drop_steps))))
            for key, value in pairs:
                if (key, entry.step) in chosen or not self._is_admitted(key) or entry.step in self._held[key]:
                    continue
                chosen.add((key, entry.step))
                metrics.append((key, value, entry.time_ms, entry.step))
            # Tags have no steps: a replay must not turn them back.
            if (entry.decision or entry.best_url) and entry.step >= self._newest_step[entry.kind]:
                self._newest_step[entry.kind] = entry.step
                if entry.decision:
                    tags["last_decision"] = entry.decision
                if entry.best_url:
                    tags["best_checkpoint"] = entry.best_url
        return metrics, tags

    def _is_admitted(self, key: str) -> bool:
        if key not in self._held:
            if len(self._held) >= _MAX_OWN_KEYS:
                if key not in self._refused_keys:
                    self._refused_keys.add(key)
                    if _is_power_of_two(len(self._refused_keys)):
                        _log.warning(
                            "tracking of %s: more than %d metrics: %s is only in the journal",
                            self._name,
                            _MAX_OWN_KEYS,
                            ", ".join(sorted(self._refused_keys)),
                        )
                return False
            self._held[key] = set()
        return True

    # -- the MLflow run -----------------------------------------------------------------------------------------

    def _connect(self) -> None:
        """Make sure of client, experiment and run, and of what the run holds. Raises whatever MLflow raises."""
        if self._is_connected:
            return
        if self._client is None:
            self._client = _open(self._uri)
        client = self._client
        self._experiment_id = _experiment_id(client, self._experiment, self._uri)
        run = self._known_run() or self._found_run() or self._created_run()
        if run.info.run_id != self._run_id:
            self._run_id = run.info.run_id
            self._held = {_DROPS_KEY: set(), _BEST_KEY: set()}
            self._in_doubt = {key for key in run.data.metrics if not key.startswith(_SYSTEM_PREFIX)}
            self._describe(run)
        # A call that timed out may still be stored after this reading. What is then sent again has the same key, step,
        # time and value, which MLflow stores once.
        for key in sorted(self._in_doubt):
            self._held[key] = {metric.step for metric in client.get_metric_history(self._run_id, key)}
        self._in_doubt = set()
        self._drop_steps |= self._held[_DROPS_KEY]
        if run.info.status != "RUNNING":
            client.update_run(self._run_id, status="RUNNING")
        self._is_connected = True

    def _known_run(self) -> Any:
        """The run used before the connection was lost, or None if someone has deleted it since."""
        from mlflow.exceptions import MlflowException

        if self._run_id is None:
            return None
        try:
            run = self._client.get_run(self._run_id)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            run = None
        if run is not None and run.info.lifecycle_stage == "active":
            return run
        _log.warning(
            "tracking of %s: the MLflow run %s was deleted; a new one has what comes from now on, and the whole journal"
            " when the training run is started again",
            self._name,
            self._run_id,
        )
        return None

    def _found_run(self) -> Any:
        """The run of this run key, or None. Empty twins, left by a creation whose answer was lost, are deleted."""
        # MLflow's filter language cannot escape a quote: `_` matches any one character, and equality is checked here.
        pattern = re.sub(r"[^A-Za-z0-9./:@+=, -]", "_", self._run_key)
        found: list[Any] = []
        token: str | None = None
        while True:
            page = self._client.search_runs(
                [self._experiment_id], filter_string=f"tags.run_key LIKE '{pattern}'", page_token=token
            )
            found += [run for run in page if run.data.tags.get("run_key") == self._run_key]
            token = page.token
            if not token:
                break
        found.sort(
            key=lambda run: (
                run.info.run_id != self._run_id,
                -len(run.data.metrics),
                run.info.start_time,
                run.info.run_id,
            )
        )
        for twin in found[1:]:
            if not twin.data.metrics:
                self._client.delete_run(twin.info.run_id)
        return found[0] if found else None

    def _created_run(self) -> Any:
        note = f"Training run `{masked(self._name)}`. A copy of the run's journal, which is the record."
        self._num_creations += 1
        return self._client.create_run(
            self._experiment_id, run_name=self._name, tags={"run_key": self._run_key, "mlflow.note.content": note}
        )

    def _describe(self, run: Any) -> None:
        """Parameters that the run lacks, and tags. What MLflow finds invalid is left out; an outage raises."""
        from mlflow.entities import Param, RunTag
        from mlflow.exceptions import MlflowException

        wanted = dict(_flattened(self._params))
        stored: Mapping[str, str] = run.data.params
        different = sorted(key for key, value in wanted.items() if stored.get(key, value) != value)
        if different:
            _log.warning(
                "tracking of %s: parameters %s differ from those in MLflow, which keeps the first",
                self._name,
                ", ".join(different),
            )
        params = [Param(key, value) for key, value in wanted.items() if key not in stored]
        tags = [RunTag(_key(key), masked(str(value))) for key, value in self._tags.items()]
        calls: list[dict[str, list[Any]]] = [
            {"params": params[start : start + _MAX_PARAMS_PER_CALL]}
            for start in range(0, len(params), _MAX_PARAMS_PER_CALL)
        ] + [
            {"tags": tags[start : start + _MAX_PARAMS_PER_CALL]} for start in range(0, len(tags), _MAX_PARAMS_PER_CALL)
        ]
        for call in calls:
            try:
                self._client.log_batch(self._run_id, **call)
            except MlflowException as error:
                if error.error_code != "INVALID_PARAMETER_VALUE":
                    self._run_id = None  # comes here again
                    raise
                _log.warning("tracking of %s: MLflow leaves out some of %s", self._name, _first_line(error))

    def _finish(self) -> None:
        if self._monitor is not None:
            self._monitor.finish()
            self._monitor = None
        if self._num_creations > 1:
            self._found_run()
        assert self._status is not None
        self._client.set_terminated(self._run_id, status=self._status.value)

    def _watch_system(self) -> None:
        """Keep MLflow's system monitor going: it ends itself at the first failed call. Fails quietly."""
        now_s = time.monotonic()
        if not self._wants_system_metrics or now_s < self._next_monitor_s:
            return
        self._next_monitor_s = now_s + _MONITOR_RETRY_S
        if self._monitor is not None and not self._monitor.has_ended:
            return
        try:
            if self._monitor is not None:
                self._monitor.finish()
            self._monitor = _start_system_monitor(self._uri, self._run_id)
        except Exception as error:
            self._monitor = None
            self._wants_system_metrics = not isinstance(error, ImportError)  # what is not installed stays so
            _log.info("tracking of %s: no system metrics (%s)", self._name, _first_line(error))

    def _where(self) -> str:
        if not self._uri.startswith(("http://", "https://")):
            return f"mlflow server --backend-store-uri {masked(self._uri)}"
        page = f"/#/experiments/{self._experiment_id}/runs/{self._run_id}" if self._run_id else ""
        return masked(self._uri).rstrip("/") + page

    # -- the figure ---------------------------------------------------------------------------------------------

    def _draw(self, *, is_last: bool = False) -> None:
        """Draw the curves if there is something new; never raises."""
        with self._draw_lock:
            with self._wake:
                is_due = self._num_validations != self._num_drawn_validations and time.monotonic() >= self._next_draw_s
                is_new = self._num_curve_events != self._num_drawn_events
                if not (is_due or (is_last and is_new)):
                    return
                curve = self._curve.copy()
                self._num_drawn_validations = self._num_validations
                num_events = self._num_curve_events
            try:
                if not curve.is_empty():
                    draw_curves({self._name: curve}, self._figure_path, title=masked(self._name))
                    self._num_drawn_events = num_events
            except Exception as error:
                self._note_figure_error(error)
            self._next_draw_s = time.monotonic() + _MIN_FIGURE_INTERVAL_S

    def _upload_figure(self) -> None:
        """A failure waits for the next drawing: figures must not hold back numbers."""
        with self._draw_lock:
            num_events = self._num_drawn_events
            if num_events == self._num_uploaded_events:
                return
            self._num_uploaded_events = num_events
        try:
            self._client.log_artifact(self._run_id, str(self._figure_path), "figures")
            self._figure_error = None
        except Exception as error:
            self._note_figure_error(error)

    def _note_figure_error(self, error: Exception) -> None:
        if self._figure_error is None:
            _log.warning("tracking of %s: no figure (%s)", self._name, _first_line(error))
        self._figure_error = f"figure: {_first_line(error)}"


# -- where to track ---------------------------------------------------------------------------------------------


def default_uri(explicit: str | None, folder: Path) -> str:
    """The tracking URI: ``explicit``, else the environment's MLFLOW_TRACKING_URI, else SQLite in ``folder``.

    SQLite paths become absolute, because workers have other working directories than the driver.
    """
    uri = explicit or os.environ.get("MLFLOW_TRACKING_URI")
    if not uri:
        return f"sqlite:///{folder.absolute() / 'mlflow.db'}"
    path = _sqlite_path(uri)
    if path is None:
        return uri
    query = urlsplit(uri).query
    return f"sqlite:///{path}" + (f"?{query}" if query else "")


def check(uri: str) -> str | None:
    """Raise ValueError, saying what to do, if ``uri`` can never work; takes 5 s at most.

    A server that does not answer now is no error, since training goes on without it: the returned string warns.
    """
    scheme = urlsplit(uri).scheme.lower()
    dialect = scheme.partition("+")[0]
    if dialect == "sqlite":
        _check_sqlite(uri)
        return None
    if dialect in _DATABASES:
        try:
            importlib.import_module("sqlalchemy").create_engine(uri)  # loads the driver; connects later
        except Exception as error:
            raise ValueError(f"tracking URI {masked(uri)} cannot be used: {_first_line(error)}") from None
        return None
    if scheme in ("http", "https"):
        if not urlsplit(uri).hostname:
            raise ValueError(f"tracking URI {masked(uri)} names no host: write http://host:port")
        return _server_warning(uri)
    if scheme == "databricks" or uri == "databricks":
        return None
    if scheme in ("", "file"):
        # Its metrics are lines appended to a file: what is sent again after a time-out would appear twice.
        raise ValueError(
            f"tracking URI {masked(uri)} is a folder, MLflow's old file store: write sqlite:////absolute/path/mlflow.db"
        )
    raise ValueError(
        f"tracking URI {masked(uri)} has the unknown scheme {scheme!r}: write sqlite:////absolute/path/mlflow.db,"
        " http(s)://host:port, or a postgresql, mysql or mssql URI"
    )


def masked(text: str) -> str:
    """``text`` without the credentials of the URLs in it."""
    text = re.sub(r"://[^/\s]*@", "://***@", text)
    return re.sub(r"(?i)([?&](?:\w|-)*(?:password|passwd|pwd|token|secret|signature)=)[^&\s]+", r"\1***", text)


def _check_sqlite(uri: str) -> None:
    path = _sqlite_path(uri)
    if path is None:
        raise ValueError(f"tracking URI {uri} keeps nothing: write sqlite:////absolute/path/mlflow.db")
    if not path.parent.is_dir():
        raise ValueError(f"tracking URI {uri}: the folder {path.parent} does not exist: create it or name another")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise ValueError(f"tracking URI {uri}: the folder {path.parent} is not writable: name another")
    if path.is_dir() or (path.exists() and not os.access(path, os.R_OK | os.W_OK)):
        raise ValueError(f"tracking URI {uri}: {path} is not a file that can be written: name another")
    if path.exists():
        with path.open("rb") as file:
            start = file.read(16)
        if start and start != b"SQLite format 3\0":
            raise ValueError(f"tracking URI {uri}: {path} is not an SQLite database: name another file")


def _sqlite_path(uri: str) -> Path | None:
    """Absolute path of the database, or None for another kind of store or one in memory."""
    if not uri.lower().startswith("sqlite:///") or ":memory:" in uri:
        return None
    # As SQLAlchemy reads it: three slashes and a relative path, four for an absolute one, and nothing is unquoted.
    name = uri[len("sqlite:///") :].partition("?")[0]
    return Path(name).absolute() if name else None


def _server_warning(uri: str) -> str | None:
    parts = urlsplit(uri)
    host = parts.netloc.rpartition("@")[2]
    request = urllib.request.Request(urlunsplit((parts.scheme, host, f"{parts.path.rstrip('/')}/health", "", "")))
    if parts.username:
        credentials = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
        request.add_header("Authorization", f"Basic {b64encode(credentials.encode()).decode()}")
    answers: list[str | None] = []

    def ask() -> None:
        try:
            urllib.request.urlopen(request, timeout=_CHECK_TIMEOUT_S).close()
            answers.append(None)
        except urllib.error.HTTPError as error:
            error.close()
            # A proxy may hide /health; only these say that events will be refused.
            is_refusal = error.code in (401, 403) or error.code >= 500
            answers.append(f"answers {error.code} {error.reason}" if is_refusal else None)
        except Exception as error:
            answers.append(f"does not answer ({_first_line(error)})")

    # A thread, because looking up a host's name obeys no time-out.
    thread = threading.Thread(target=ask, name="tracking-check", daemon=True)
    thread.start()
    thread.join(_CHECK_TIMEOUT_S + 0.5)
    answer = answers[0] if answers else "does not answer"
    return answer and (
        f"the tracking server {masked(uri)} {answer}: training goes on, and events are delivered once it takes them"
    )


# -- talking to MLflow ------------------------------------------------------------------------------------------


def _set_environment_defaults() -> None:
    """What MLflow reads from the environment, unless the user has set it."""
    for key, value in {
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        # One short try: the tracker's own backoff does the rest and hears of close() meanwhile.
        "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    }.items():
        os.environ.setdefault(key, value)


def _open(uri: str) -> Any:
    """A client of the store at ``uri``, which is created if it is SQLite."""
    if not uri:
        raise ValueError("no tracking URI")  # MLflow would make a database in the working directory
    from mlflow import MlflowClient

    # MLflow sets its levels when it is imported. What matters of its chatter is said by this module.
    for name, level in {"mlflow": logging.ERROR, "mlflow.system_metrics": logging.CRITICAL}.items():
        logging.getLogger(name).setLevel(level)
    logging.getLogger("alembic").setLevel(logging.WARNING)

    path = _sqlite_path(uri)
    if path is None:
        return MlflowClient(uri)
    importlib.import_module("mlflow.store.tracking.sqlalchemy_store")  # seconds that others need not wait for
    with _locked(path.with_name(f"{path.name}.lock")):  # processes that migrate one empty database at once break it
        return MlflowClient(uri)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold the lock file ``path`` against other threads and processes; TimeoutError after two minutes."""
    deadline_s = time.monotonic() + _SCHEMA_LOCK_TIMEOUT_S
    with path.open("a") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline_s:
                    raise TimeoutError(f"{path} is held by another process") from None
                time.sleep(0.05)
        yield  # closing the file releases the lock


def _experiment_id(client: Any, name: str, uri: str) -> str:
    from mlflow.exceptions import MlflowException

    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        path = _sqlite_path(uri)
        # MLflow's own default is ./mlartifacts of whatever process comes first.
        location = (path.parent / "mlartifacts").as_uri() if path else None
        try:
            return str(client.create_experiment(name, artifact_location=location))
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
            experiment = client.get_experiment_by_name(name)  # another run of the campaign was faster
    if experiment.lifecycle_stage != "active":
        raise RuntimeError(
            f"the MLflow experiment {name!r} is deleted: `mlflow experiments restore -x {experiment.experiment_id}`"
        )
    return str(experiment.experiment_id)


def _start_system_monitor(uri: str, run_id: str | None) -> Any:
    """MLflow's monitor of this node: a sample every 10 s, the mean of six logged each minute."""
    from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

    class Monitor(SystemMetricsMonitor):
        has_ended = False

        def monitor(self) -> None:
            try:
                super().monitor()
            finally:
                self.has_ended = True

        def publish_metrics(self, metrics: dict[str, float]) -> None:
            few = _few_system_metrics(metrics)
            _log.debug("system metrics: %d of %d keys are logged", len(few), len(metrics))
            super().publish_metrics(few)

    monitor = Monitor(run_id, sampling_interval=10, samples_before_logging=6, resume_logging=True, tracking_uri=uri)
    monitor.start()
    return monitor


def _few_system_metrics(metrics: Mapping[str, float]) -> dict[str, float]:
    """At most nine keys, at any number of GPUs: MLflow's monitor has 8 and 5 more per GPU.

    Of the GPUs the idlest and the mean, the fullest memory (percent) and the power of all (watts) remain.
    """
    few = {
        key: metrics[key]
        for key in (
            "cpu_utilization_percentage",
            "system_memory_usage_percentage",
            "disk_usage_percentage",
            "network_receive_megabytes",
            "network_transmit_megabytes",
        )
        if key in metrics
    }

    def of_gpus(what: str) -> list[float]:
        return [value for key, value in metrics.items() if re.fullmatch(rf"gpu_\d+_{what}", key)]

    if utilization := of_gpus("utilization_percentage"):
        few["gpu_utilization_percentage_min"] = min(utilization)
        few["gpu_utilization_percentage_mean"] = sum(utilization) / len(utilization)
    if memory := of_gpus("memory_usage_percentage"):
        few["gpu_memory_usage_percentage_max"] = max(memory)
    if power := of_gpus("power_usage_watts"):
        few["gpu_power_usage_watts_total"] = sum(power)
    return few


# -- from events to what MLflow takes ---------------------------------------------------------------------------


def _checked(event: Mapping[str, Any]) -> _Entry | None:
    """The event as an entry that MLflow cannot find invalid; None for a kind that is not tracked."""
    kind_name = event["kind"]
    if kind_name not in _KINDS:
        return None
    kind, step, time_ms = EventKind(kind_name), event["step"], event["time_ms"]
    if not (isinstance(step, int) and 0 <= step < 2**63 and isinstance(time_ms, int) and 0 <= time_ms < 2**63):
        raise ValueError(f"step {step!r}, time_ms {time_ms!r}")
    metrics: list[tuple[str, float]] = []
    match kind:
        case EventKind.TRAIN | EventKind.VALIDATION:
            metrics = [
                (_key(key), _finite(value)) for key, value in event["metrics"].items() if isinstance(value, int | float)
            ]
            return _Entry(kind, step, time_ms, tuple(metrics))
        case EventKind.DECISION:
            decision = event["decision"]
            action = str(decision.get("action"))
            text = ", ".join(f"{key} {value}" for key, value in decision.items() if key != "action")
            text = masked(f"iteration {step}: {action} ({text})")[:_MAX_VALUE_LENGTH]
            return _Entry(kind, step, time_ms, (), decision=text, is_drop=action == "drop")
        case EventKind.CHECKPOINT:
            if not event.get("best"):
                return _Entry(kind, step, time_ms, ())
            error = event.get("validation_top1_error")
            if isinstance(error, int | float):
                metrics = [(_BEST_KEY, _finite(error))]
            return _Entry(kind, step, time_ms, tuple(metrics), best_url=masked(str(event["url"])))


def _finite(value: float) -> float:
    return float(value) if math.isfinite(value) else math.nan


def _key(text: str) -> str:
    return _FORBIDDEN_IN_KEY.sub("_", text)[:250]


def _flattened(params: Mapping[str, object], prefix: str = "") -> Iterator[tuple[str, str]]:
    for name, value in params.items():
        if isinstance(value, Mapping):
            yield from _flattened(value, f"{prefix}{name}.")
        else:
            text = masked(str(value.value if isinstance(value, Enum) else value))
            yield (
                _key(f"{prefix}{name}"),
                text if len(text) <= _MAX_VALUE_LENGTH else f"{text[: _MAX_VALUE_LENGTH - 1]}…",
            )


def _first_line(error: Exception) -> str:
    text = masked(str(error)).strip().partition("\n")[0][:300]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _is_power_of_two(count: int) -> bool:
    """Thins out repeated messages: a day's outage is some ten lines."""
    return count & (count - 1) == 0
