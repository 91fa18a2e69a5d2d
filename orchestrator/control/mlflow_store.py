"""Where and how MLflow is reached; the only door to MLflow.

``check`` tells at the start what can never work; ``MlflowRun`` is one run in the store, found again by its key. Nothing
here is patient: a call that fails raises, and ``tracking`` tries again.
"""

from __future__ import annotations

import fcntl
import importlib
import json
import logging
import os
import re
import shlex
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from orchestrator.control.comparison import NOTE_TAG, DataNote, experiment_tags, page, run_note, with_result
from orchestrator.masking import masked

_log = logging.getLogger(__name__)

_FAILURE_TAG = "failure"
_MAX_PARAMS_PER_CALL = 100
_MAX_EXPERIMENTS_PER_CALL = 100
_MONITOR_RETRY_S = 60.0
_CHECK_TIMEOUT_S = 4.0


# -- where to track ---------------------------------------------------------------------------------------------


def default_uri(explicit: str | None, folder: Path) -> str:
    """The tracking URI: ``explicit``, else the environment's MLFLOW_TRACKING_URI, else SQLite in ``folder``.

    SQLite paths become absolute, because workers have other working directories than the driver.
    """
    uri = explicit or os.environ.get("MLFLOW_TRACKING_URI")
    if not uri:
        return f"sqlite:///{folder.absolute() / 'mlflow.db'}"
    path = _sqlite_path(uri)
    _, question_mark, query = uri.partition("?")
    return f"sqlite:///{path}{question_mark}{query}" if path else uri


def check(uri: str) -> str | None:
    """Raise ValueError, saying what to do, if ``uri`` can never work; takes about 5 s at most.

    A server that does not answer now is no error, since training goes on without it: the returned string warns.
    """
    scheme = urlsplit(uri).scheme.lower()
    match scheme.partition("+")[0]:
        case "sqlite":
            _check_sqlite(uri)
        case "postgresql" | "mysql" | "mssql":
            try:
                importlib.import_module("sqlalchemy").create_engine(uri)  # loads the driver; connects later
            except Exception as error:
                raise ValueError(
                    f"tracking URI {masked(uri)} cannot be used ({one_line(error)}): mend it, or install its driver"
                ) from None
        case "http" | "https":
            if not urlsplit(uri).hostname:
                raise ValueError(f"tracking URI {masked(uri)} names no host: write http://host:port")
            return _server_warning(uri)
        case "" | "file":
            # Its metrics are lines appended to a file: what is sent again after a time-out would appear twice.
            raise ValueError(
                f"tracking URI {masked(uri)} is a folder, MLflow's old file store: write sqlite:////absolute/mlflow.db"
            )
        case _:
            raise ValueError(
                f"tracking URI {masked(uri)} has the unknown scheme {scheme!r}: write sqlite:////absolute/mlflow.db,"
                " http(s)://host:port, or a postgresql, mysql or mssql URI"
            )
    return None


def one_line(error: Exception) -> str:
    """Kind and first line of an error, without credentials."""
    text = first_line(str(error))[:300]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def first_line(text: str) -> str:
    """The first line that says something, at most 500 characters, without credentials."""
    return masked(text).strip().partition("\n")[0][:500]


def _check_sqlite(uri: str) -> None:
    path = _sqlite_path(uri)
    if path is None:
        raise ValueError(f"tracking URI {uri} keeps nothing: write sqlite:////absolute/mlflow.db")
    if not path.parent.is_dir():
        raise ValueError(f"tracking URI {uri}: the folder {path.parent} does not exist: create it or name another")
    can_write = os.access(path.parent, os.W_OK | os.X_OK) and (not path.exists() or os.access(path, os.R_OK | os.W_OK))
    if path.is_dir() or not can_write:
        raise ValueError(f"tracking URI {uri}: {path} is not a file that can be written: name another")
    if path.exists():
        with path.open("rb") as file:
            if file.read(16) not in (b"", b"SQLite format 3\0"):
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
    host = parts.netloc.rpartition("@")[2]  # the health page asks for no password
    page = urlunsplit((parts.scheme, host, f"{parts.path.rstrip('/')}/health", "", ""))
    try:
        urllib.request.urlopen(page, timeout=_CHECK_TIMEOUT_S).close()
        return None
    except urllib.error.HTTPError as error:
        error.close()
        if error.code < 500:  # it lives; a proxy may hide the page
            return None
        answer = f"answers {error.code} {error.reason}"
    except Exception as error:
        answer = f"does not answer ({one_line(error)})"
    return f"the tracking server {masked(uri)} {answer}: training goes on, and events are delivered once it takes them"


# -- one run ----------------------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class MlflowRun:
    """The run in ``experiment`` whose tag ``run_key`` is ``run_key``; for one thread.

    ``params`` are logged once: a value that differs from the stored one is skipped with a warning. After a method has
    raised, ``connect`` must be called before any other.
    """

    uri: str
    experiment: str
    name: str
    run_key: str
    params: Mapping[str, str]
    tags: Mapping[str, str]
    description: str = ""
    data: DataNote | None = None
    run_id: str | None = None
    _client: Any = None
    _experiment_id: str = ""
    _num_creations: int = 0
    _is_dressed: bool = False
    _monitor: Any = None
    _next_monitor_s: float = 0.0

    def connect(self, start_time_ms: int | None) -> dict[str, set[int]]:
        """Find the run or create it as of ``start_time_ms`` (default: now); return the steps it holds, by metric."""
        self._client, self._experiment_id = open_store(self.uri, self.experiment)
        run = self._found_run() or self._created_run(start_time_ms)
        if run.info.run_id != self.run_id:
            self._describe(run)
            if self.run_id is not None:
                _log.warning(
                    "tracking of %s: the MLflow run %s was deleted, or its store was lost: a new one takes its place",
                    self.name,
                    self.run_id,
                )
            self.run_id, self._is_dressed = run.info.run_id, False
        if run.info.status != "RUNNING":
            self._client.update_run(self.run_id, status="RUNNING")
        if _FAILURE_TAG in run.data.tags:
            self._client.delete_tag(self.run_id, _FAILURE_TAG)
        if not self._is_dressed:
            self._dress(run)
        # A call that timed out may still be stored after this reading. What is then sent again has the same key, step,
        # time and value, which MLflow stores once.
        return {
            key: {metric.step for metric in self._client.get_metric_history(self.run_id, key)}
            for key in run.data.metrics
            if not key.startswith("system/")
        }

    def log(self, metrics: Iterable[tuple[str, float, int, int]], tags: Mapping[str, str]) -> None:
        """Store metrics, (key, value, time in ms, step), and tags: at most 1000 together."""
        from mlflow.entities import Metric, RunTag

        self._client.log_batch(
            self.run_id,
            metrics=[Metric(*metric) for metric in metrics],
            tags=[RunTag(key, value) for key, value in tags.items()],
        )

    def tell_result(self, result: str) -> None:
        """Bring the description's line of results up to date; a person may have changed the rest meanwhile."""
        note = self._client.get_run(self.run_id).data.tags.get(NOTE_TAG, "")
        if with_result(note, result) != note:
            self._client.set_tag(self.run_id, NOTE_TAG, with_result(note, result))

    def upload(self, path: Path) -> None:
        """Store a file at the top, where MLflow's comparison of runs finds it."""
        self._client.log_artifact(self.run_id, str(path))

    def finish(self, status: str, end_time_ms: int | None, failure: str = "") -> None:
        """Set the run's status, as of ``end_time_ms`` (default: now), and why it failed; RUNNING leaves it open."""
        if self._monitor is not None:
            self._monitor.finish()
            self._monitor = None
        if self._num_creations > 1:
            self._found_run()  # deletes the twin of a creation that was stored late
        if failure:
            self._client.set_tag(self.run_id, _FAILURE_TAG, failure)
        if status != "RUNNING":
            self._client.set_terminated(self.run_id, status=status, end_time=end_time_ms)

    def watch_system(self) -> None:
        """Keep MLflow's monitor of this node going, which ends itself at the first failed call. Never raises."""
        now_s = time.monotonic()
        if now_s < self._next_monitor_s or (self._monitor is not None and not self._monitor.has_ended):
            return
        self._next_monitor_s = now_s + _MONITOR_RETRY_S
        try:
            self._monitor = _started_monitor(self.uri, self.run_id)
        except Exception as error:
            _log.info("tracking of %s: no system metrics (%s)", self.name, one_line(error))

    def where(self) -> str:
        """How to look at the run: the page's address, and the command that serves it if no server does."""
        is_server = self.uri.startswith(("http://", "https://"))
        address = masked(self.uri).rstrip("/") if is_server else "http://127.0.0.1:5000"
        if self.run_id is not None:
            address += f"/{page(self._experiment_id, f'runs/{self.run_id}')}"
        if is_server:
            return address
        return f"mlflow server --backend-store-uri {shlex.quote(masked(self.uri))}, then {address}"

    def _found_run(self) -> Any:
        """The run of this run key, or None. Empty twins, left by a creation whose answer was lost, are deleted."""
        found = runs_of(self._client, self._experiment_id, self.run_key)
        found.sort(key=lambda run: (run.info.run_id != self.run_id, -len(run.data.metrics), run.info.start_time))
        for twin in found[1:]:
            if not twin.data.metrics:
                self._client.delete_run(twin.info.run_id)
        return found[0] if found else None

    def _created_run(self, start_time_ms: int | None) -> Any:
        from mlflow.tracking.context.registry import resolve_tags

        # ``tell_result`` fills in the line of results.
        note = run_note(self.description, self._experiment_id, "**Result**")
        tags = resolve_tags() | {"run_key": self.run_key, NOTE_TAG: note}
        self._num_creations += 1
        return self._client.create_run(self._experiment_id, run_name=self.name, start_time=start_time_ms, tags=tags)

    def _describe(self, run: Any) -> None:
        """Log tags, and the parameters that the run lacks."""
        from mlflow.entities import Param, RunTag

        stored = run.data.params
        different = sorted(key for key, value in self.params.items() if stored.get(key, value) != value)
        if different:
            _log.warning(
                "tracking of %s: parameters %s differ from those in MLflow, which keeps the first",
                self.name,
                ", ".join(different),
            )
        params = [Param(key, value) for key, value in self.params.items() if key not in stored]
        self._client.log_batch(run.info.run_id, tags=[RunTag(key, value) for key, value in self.tags.items()])
        for start in range(0, len(params), _MAX_PARAMS_PER_CALL):
            self._client.log_batch(run.info.run_id, params=params[start : start + _MAX_PARAMS_PER_CALL])

    def _dress(self, run: Any) -> None:
        """What makes runs easy to compare; never raises, since numbers must not wait for a store that refuses this.

        What a person has changed (or emptied) stays.
        """
        from mlflow.entities import Dataset, DatasetInput, InputTag

        try:
            experiment = self._client.get_experiment(self._experiment_id)
            for key, value in experiment_tags(self._experiment_id, experiment.creation_time or 0).items():
                if key not in experiment.tags:
                    self._client.set_experiment_tag(self._experiment_id, key, value)
            if self.data is not None and not (run.inputs and run.inputs.dataset_inputs):
                url = masked(self.data.url)
                dataset = Dataset(
                    name=self.data.name,
                    digest=self.data.digest,
                    source_type=urlsplit(url).scheme or "local",
                    source=json.dumps({"uri": url, "manifest_sha256": self.data.sha256}),
                    profile=json.dumps(dict(self.data.counts)),
                )
                inputs = [DatasetInput(dataset, [InputTag("mlflow.data.context", "training")])]
                self._client.log_inputs(run.info.run_id, inputs)
            self._is_dressed = True
        except Exception as error:
            _log.info("tracking of %s: no description or data set in MLflow (%s)", self.name, one_line(error))


def runs_of(client: Any, experiment_id: str, run_key: str) -> list[Any]:
    """The experiment's runs whose tag ``run_key`` is ``run_key``: one, or none; more where a creation came twice."""
    similar = client.search_runs([experiment_id], filter_string=f"tags.run_key LIKE '{like(run_key)}'")
    return [run for run in similar if run.data.tags.get("run_key") == run_key]


def like(text: str) -> str:
    """A pattern for ``text``, and for a little more: equality is the caller's to check.

    MLflow's filter language cannot escape a quote; ``_`` matches any one character.
    """
    return re.sub(r"[^A-Za-z0-9./:@+=, -]", "_", text)


def run_pages(uri: str) -> dict[str, str]:
    """Addresses of the pages of all runs on the server at ``uri``, by run key, without credentials. Only reads.

    {} for a database, which has no pages. Raises what MLflow raises where the server does not answer.
    """
    if not uri.lower().startswith(("http://", "https://")):
        return {}
    _set_up()
    from mlflow import MlflowClient

    parts = urlsplit(uri)
    server = urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path.rstrip("/"), "", ""))
    client, found = MlflowClient(uri), dict[str, tuple[int, str]]()
    experiments = [each.experiment_id for each in _all_pages(client.search_experiments)]
    for start in range(0, len(experiments), _MAX_EXPERIMENTS_PER_CALL):
        some = experiments[start : start + _MAX_EXPERIMENTS_PER_CALL]
        for run in _all_pages(lambda **token: client.search_runs(some, "tags.run_key LIKE '%'", **token)):  # noqa: B023
            key, num_metrics = run.data.tags["run_key"], len(run.data.metrics)
            if num_metrics >= found.get(key, (0, ""))[0]:  # an empty twin of a creation that came twice is no page
                rest = page(run.info.experiment_id, f"runs/{run.info.run_id}")
                found[key] = num_metrics, f"{server}/{rest}"
    return {key: address for key, (_, address) in found.items()}


def _all_pages(search: Callable[..., Any]) -> Iterator[Any]:
    token = None
    while True:
        found = search(page_token=token)
        yield from found
        if not (token := found.token):
            return


def open_store(uri: str, experiment: str) -> tuple[Any, str]:
    """A client of the store at ``uri`` and the experiment's identity; both are created if they are missing."""
    if not uri:
        raise ValueError("no tracking URI")  # MLflow would make a database in the working directory
    _set_up()
    from mlflow import MlflowClient

    path = _sqlite_path(uri)
    if path is None:
        client = MlflowClient(uri)
        return client, _experiment_id(client, experiment, None)
    importlib.import_module("mlflow.store.tracking.sqlalchemy_store")  # seconds that others need not wait for
    with path.with_name(f"{path.name}.lock").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # processes that migrate one empty database at once break it
        client = MlflowClient(uri)
        # MLflow's own default is ./mlartifacts of whatever process comes first.
        return client, _experiment_id(client, experiment, (path.parent / "mlartifacts").as_uri())


def _set_up() -> None:
    """MLflow's import, with one short try a call and without its chatter."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")  # the job prints it
    # One short try: the tracker's own backoff does the rest and hears of close() meanwhile.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    importlib.import_module("mlflow")

    # MLflow sets its levels when it is imported. What matters of its chatter is said by these modules.
    levels = {"mlflow": logging.ERROR, "mlflow.system_metrics": logging.CRITICAL, "alembic": logging.WARNING}
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)


def _experiment_id(client: Any, name: str, artifacts: str | None) -> str:
    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        return str(client.create_experiment(name, artifact_location=artifacts))
    identity = str(experiment.experiment_id)
    if experiment.lifecycle_stage != "active":
        raise RuntimeError(f"the MLflow experiment {name!r} is deleted: `mlflow experiments restore -x {identity}`")
    return identity


# -- metrics of the node ----------------------------------------------------------------------------------------


def _started_monitor(uri: str, run_id: str | None) -> Any:
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
            super().publish_metrics(few_system_metrics(metrics))

    monitor = Monitor(run_id, sampling_interval=10, samples_before_logging=6, resume_logging=True, tracking_uri=uri)
    monitor.start()
    return monitor


def few_system_metrics(metrics: Mapping[str, float]) -> dict[str, float]:
    """At most nine keys, at any number of GPUs: MLflow's monitor has 8 and 5 more per GPU.

    Of the GPUs the idlest and the mean, the fullest memory (percent) and the power of all (watts) remain.
    """
    node = ("cpu_utilization_percentage", "system_memory_usage_percentage", "disk_usage_percentage")
    network = ("network_receive_megabytes", "network_transmit_megabytes")
    few = {key: metrics[key] for key in node + network if key in metrics}

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
