"""What of a training run is shown in MLflow, and when: a queue that training never waits for.

A training run hands over the events of its journal; one daemon thread per run delivers them, tries again when MLflow is
down, slow or refusing, and looks up what MLflow already holds so that no (metric, step) appears twice. The journal in
storage is the truth; what is shown in MLflow can be rebuilt from it with ``Tracker.replay``.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.control.comparison import DataNote
from orchestrator.control.curves import Curve, EventKind, draw_curves
from orchestrator.control.entries import RESERVED_KEYS, Account, Entry, RunStatus, flattened
from orchestrator.control.mlflow_store import MlflowRun, check, default_uri, first_line, one_line
from orchestrator.masking import masked

__all__ = ["Delivery", "RunStatus", "Tracker", "check", "default_uri"]

_log = logging.getLogger(__name__)

# MLflow's charts are slow past about 30 keys a run: 21 of ours and the 9 of `few_system_metrics`.
MAX_METRIC_KEYS = 30
_MAX_OWN_KEYS = 21

_MAX_METRICS_PER_CALL = 800  # MLflow takes 1000 metrics and tags together, in 1 MB
_LINGER_S = 0.5  # events of a busy moment share a call
_MAX_BACKOFF_S = 60.0
_MIN_FIGURE_INTERVAL_S = 20.0


@dataclass(frozen=True)
class Delivery:
    """What became of the events when a tracker was closed.

    ``delivered`` counts events that MLflow holds (also those it held before), ``pending`` those it does not: a
    replay of the journal brings them. ``dropped`` counts train events given up because the queue was full (the
    journal has them). ``error`` is the last unresolved failure, ``where`` says how to look at the run.
    """

    delivered: int
    pending: int
    dropped: int
    error: str | None
    run_id: str | None
    where: str


class Tracker:
    """One MLflow run that follows one training run across all its restarts.

    The MLflow run is the one in ``experiment`` whose tag ``run_key`` is ``run_key``; it is created when there is none.
    ``params`` (nested mappings become dotted keys; values are cut at 500 characters) are logged once: a value that
    differs from the stored one is skipped with a warning. ``description`` (Markdown) is written once, with a line of
    results that is kept up to date; ``data`` is what the run trains on. The constructor starts a daemon thread and
    returns; an MLflow that is down, slow or refusing never raises here nor in any method.

    Of a step that was trained twice (resumed from an earlier checkpoint) MLflow keeps the values that came first.
    Infinite values are shown as NaN, since MLflow would store them as ±1.8e308. The MLflow run begins and ends with
    the first and last event, so that one rebuilt from the journal has the duration of the original.

    What MLflow has taken and later lost (a deleted run, a store that was lost or restored from a copy) is sent again,
    as far as the newest ``queue_limit`` events go; a replay of the journal brings the rest.
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
        description: str = "",
        data: DataNote | None = None,
        queue_limit: int = 100_000,
        system_metrics: bool = True,
    ) -> None:
        self._uri = uri
        self._name = name
        self._figure_path = figure_dir / "errors.png"
        self._queue_limit = max(1, queue_limit)
        self._wants_system_metrics = system_metrics
        self._closing = threading.Event()  # nothing more comes: deliver and end
        self._abandoned = threading.Event()  # end now

        # Shared between threads, under `_lock`.
        self._lock = threading.Lock()
        self._queue: deque[Entry] = deque()
        self._batch: list[Entry] = []  # taken from the queue and not yet known to be stored
        self._num_delivered = self._num_dropped = self._num_malformed = self._num_validations = 0
        self._account = Account()
        self._oldest_ms: int | None = None
        self._newest_ms: int | None = None
        self._curve = Curve()
        self._status: RunStatus | None = None  # set by close(); from then on no event is taken
        self._reason = ""
        self._error: str | None = None

        self._draw_lock = threading.Lock()
        self._num_drawn_validations = self._num_figures = 0
        self._next_draw_s = 0.0
        self._figure_error: str | None = None

        # The thread's own.
        self._run = MlflowRun(
            uri=uri,
            experiment=experiment,
            name=name,
            run_key=run_key,
            params=dict(flattened(params)),
            tags=dict(flattened(tags)),
            description=masked(description),
            data=data,
        )
        self._held: dict[str, set[int]] = {}  # steps that MLflow holds, by metric key
        self._shown: deque[Entry] = deque(maxlen=self._queue_limit)  # delivered, the newest last
        self._refused_keys: set[str] = set()
        self._num_uploaded_figures = 0
        self._told_result = ""

        self._thread = threading.Thread(target=self._work, name=f"tracking-{name}", daemon=True)
        self._thread.start()

    # -- any thread ---------------------------------------------------------------------------------------------

    def put(self, event: dict[str, Any]) -> None:
        """Queue one journal event. Never blocks and never raises; a malformed event is logged and left out.

        Beyond ``queue_limit`` waiting events the oldest *train* events are dropped and counted.
        """
        self._accept(event, self._account, self._queue_limit)

    def replay(self, events: Iterable[dict[str, Any]]) -> None:
        """Deliver a journal, from its beginning; what MLflow holds is not sent again.

        Takes about 10 µs an event here and drops none. Raises only what iterating ``events`` raises.
        """
        account = Account()  # the best of an earlier event is not that of those put since
        for event in events:
            self._accept(event, account, None)
        with self._lock:
            if account.step >= self._account.step:
                self._account = account

    def close(self, timeout_s: float, status: RunStatus, reason: str = "") -> Delivery:
        """Draw the last figure, deliver what is queued and set the run's status, all within about ``timeout_s``.

        ``reason``: why the run failed; its first line is the tag ``failure``, without credentials, until the run goes
        on. Events put after this are ignored. What is still pending then is given up; the journal has it.
        """
        deadline_s = time.monotonic() + timeout_s
        with self._lock:
            is_first = self._status is None
            if is_first:
                self._status, self._reason = status, reason
        if is_first:
            # Here, so that there is a last figure even when the thread sits in a call that does not return.
            self._draw()
        self._closing.set()
        self._thread.join(max(0.0, deadline_s - time.monotonic()))
        self._abandoned.set()
        with self._lock:
            pending = self._num_pending()
            error = self._error or self._figure_error
            if error is None and (pending or self._thread.is_alive()):
                error = f"not everything was delivered within {timeout_s:g} s"
            if pending and is_first:
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
                run_id=self._run.run_id,
                where=self._run.where(),
            )

    def _accept(self, event: dict[str, Any], account: Account, limit: int | None) -> None:
        try:
            with self._lock:
                entry = None if self._status is not None else account.entry(event)
                if entry is None:
                    return
                self._queue.append(entry)
                if limit is not None and len(self._queue) > limit:
                    self._drop_oldest()
                if entry.time_ms is not None:
                    self._oldest_ms = min(entry.time_ms, self._oldest_ms or entry.time_ms)
                    self._newest_ms = max(entry.time_ms, self._newest_ms or 0)
                self._num_validations += entry.kind is EventKind.VALIDATION
                self._curve.add(event)
        except Exception as error:  # whatever a caller passes must not hurt training
            self._num_malformed += 1
            if _is_power_of_two(self._num_malformed):
                _log.warning(
                    "tracking of %s: %d malformed events left out (%s)",
                    self._name,
                    self._num_malformed,
                    one_line(error),
                )

    def _drop_oldest(self) -> None:
        del self._queue[next((i for i, entry in enumerate(self._queue) if entry.kind is EventKind.TRAIN), 0)]
        self._num_dropped += 1
        if _is_power_of_two(self._num_dropped):
            _log.warning(
                "tracking of %s: %d of the oldest train events dropped from the full queue (%d); the journal has them"
                " and they are delivered when the run is started again",
                self._name,
                self._num_dropped,
                self._queue_limit,
            )

    def _num_pending(self) -> int:
        return len(self._queue) + len(self._batch)

    # -- the thread ---------------------------------------------------------------------------------------------

    def _work(self) -> None:
        num_failures, is_connected = 0, False
        self._closing.wait(_LINGER_S)  # the journal's first event, which comes meanwhile, is the run's beginning
        while not self._abandoned.is_set():
            is_last = self._closing.is_set()
            try:
                if not is_connected:
                    self._connect()
                    is_connected = True
                while not self._abandoned.is_set() and self._deliver_batch():
                    self._draw_if_due()
                self._error = None
                if num_failures:
                    _log.info("tracking of %s: MLflow takes events again", self._name)
                num_failures = 0
                status = self._status if is_last else RunStatus.RUNNING
                assert status is not None
                self._tell_result(status)
                if is_last:
                    self._run.finish(status.value, self._newest_ms, first_line(self._reason))
                self._upload_figure()  # last: a store of files has patience of its own
                if is_last:
                    return
                if self._wants_system_metrics:
                    self._run.watch_system()
            except Exception as error:  # promise: tracking never hurts training
                is_connected = False
                num_failures += 1
                self._error = one_line(error)
                if _is_power_of_two(num_failures):
                    _log.warning(
                        "tracking of %s: %d events wait for MLflow at %s (%s); training goes on",
                        self._name,
                        self._num_pending(),
                        masked(self._uri),
                        self._error,
                    )
            self._draw_if_due()
            if self._closing.is_set():
                self._abandoned.wait(_LINGER_S if num_failures else 0.0)
            else:
                self._closing.wait(min(_MAX_BACKOFF_S, 2.0 ** min(num_failures - 1, 10)) if num_failures else _LINGER_S)

    def _connect(self) -> None:
        """Find out what MLflow holds; what it had taken and has no more goes to the front of the queue."""
        believed = self._held
        found = self._run.connect(self._oldest_ms)
        if any(
            key in believed and entry.step not in found.get(key, ()) for entry in self._shown for key in entry.metrics
        ):
            _log.warning("tracking of %s: MLflow has lost events that it had taken: they are sent again", self._name)
            with self._lock:
                self._num_delivered -= len(self._shown)
                self._queue.extendleft(reversed((*self._shown, *self._batch)))
                self._batch = []
            self._shown.clear()
        self._held = {key: set() for key in RESERVED_KEYS} | found
        self._num_uploaded_figures, self._told_result = 0, ""

    def _deliver_batch(self) -> bool:
        """Send the next events, in order; False when there are none. Raises whatever MLflow raises."""
        with self._lock:
            num_metrics = sum(len(entry.metrics) for entry in self._batch)
            while self._queue and num_metrics < _MAX_METRICS_PER_CALL:
                self._batch.append(self._queue.popleft())
                num_metrics += len(self._batch[-1].metrics)
        if not self._batch:
            return False
        metrics: list[tuple[str, float, int, int]] = []
        tags: dict[str, str] = {}
        for entry in self._batch:
            for key, value in entry.metrics.items():
                assert entry.time_ms is not None
                if self._is_admitted(key) and entry.step not in self._held[key]:
                    self._held[key].add(entry.step)  # looked up again if the call fails
                    metrics.append((key, value, entry.time_ms, entry.step))
            tags |= entry.tags
        if metrics or tags:
            self._run.log(metrics, tags)
        with self._lock:
            self._num_delivered += len(self._batch)
            self._shown += self._batch
            self._batch = []
        return True

    def _is_admitted(self, key: str) -> bool:
        if key not in self._held and len(self._held) < _MAX_OWN_KEYS:
            self._held[key] = set()
        if key not in self._held and key not in self._refused_keys:
            self._refused_keys.add(key)
            if _is_power_of_two(len(self._refused_keys)):
                text = "tracking of %s: more than %d metrics: %s is only in the journal"
                _log.warning(text, self._name, _MAX_OWN_KEYS, ", ".join(sorted(self._refused_keys)))
        return key in self._held

    def _tell_result(self, status: RunStatus) -> None:
        """Words must not hold back numbers or the end of the run: a failure waits for the next result."""
        with self._lock:
            result = self._account.result(status)
        if result != self._told_result:
            self._told_result = result
            try:
                self._run.tell_result(result)
            except Exception as error:
                _log.info("tracking of %s: no result in the description (%s)", self._name, one_line(error))

    # -- the figure ---------------------------------------------------------------------------------------------

    def _draw_if_due(self) -> None:
        if self._num_validations != self._num_drawn_validations and time.monotonic() >= self._next_draw_s:
            self._draw()

    def _draw(self) -> None:
        """Draw the curves; never raises."""
        with self._draw_lock:
            with self._lock:
                curve = self._curve.copy()
                self._num_drawn_validations = self._num_validations
            self._next_draw_s = time.monotonic() + _MIN_FIGURE_INTERVAL_S
            try:
                if not curve.is_empty():
                    draw_curves({self._name: curve}, self._figure_path, title=masked(self._name))
                    self._num_figures += 1
            except Exception as error:
                self._note_figure_error(error)

    def _upload_figure(self) -> None:
        """A failure waits for the next drawing: figures must not hold back numbers."""
        num_figures = self._num_figures
        if num_figures == self._num_uploaded_figures:
            return
        self._num_uploaded_figures = num_figures
        try:
            self._run.upload(self._figure_path)
            self._figure_error = None
        except Exception as error:
            self._note_figure_error(error)

    def _note_figure_error(self, error: Exception) -> None:
        if self._figure_error is None:
            _log.warning("tracking of %s: no figure (%s)", self._name, one_line(error))
        self._figure_error = f"figure: {one_line(error)}"


def _is_power_of_two(count: int) -> bool:
    """Thins out repeated messages: a day's outage is some ten lines."""
    return count & (count - 1) == 0
