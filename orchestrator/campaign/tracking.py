"""A campaign in MLflow: a parent run, its members as children, the ensemble as one more, and the registered model.

::

    tracker = CampaignTracker(uri=default_uri(config.tracking.uri or None, Path.cwd()), …)
    tracker.tell(CampaignNote(members=(MemberNote(…), …)))     # whenever something has changed, or every few seconds
    delivery = tracker.close(60.0, RunStatus.FINISHED)

Whoever runs a campaign says how it stands, from storage and from the beginning; a daemon thread brings MLflow to that
state, tries again when MLflow is down, slow or refusing, and looks up what MLflow already holds, so that nothing
appears twice. Only the newest state counts: a campaign never waits here and loses nothing when it is killed. A store
that was lost is filled again, the runs of members that are over included, from what the members' folders hold.

A member needs to know nothing of this: its run in MLflow is found by its run key, the URL of its folder, and is made
the campaign's child when it appears. It must be in the campaign's experiment.
"""

from __future__ import annotations

import logging
import re
import tempfile
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from orchestrator.campaign import note as words
from orchestrator.campaign.figure import CampaignFigure, History
from orchestrator.campaign.mlflow_campaign import MlflowCampaign
from orchestrator.campaign.note import CampaignNote, EnsembleNote, MemberNote
from orchestrator.campaign.registry import ensemble_digest, manifest_text, model_description, versions
from orchestrator.control.comparison import DataNote
from orchestrator.control.entries import RunStatus, flattened
from orchestrator.control.mlflow_store import MlflowRun, first_line, one_line
from orchestrator.control.run_tracking import open_tracker
from orchestrator.masking import masked
from orchestrator.storage import Storage
from orchestrator.training.run import run_storage

__all__ = ["CampaignDelivery", "CampaignNote", "CampaignTracker", "EnsembleNote", "MemberNote"]

_log = logging.getLogger(__name__)

_LINGER_S = 0.5
_MIN_INTERVAL_S = 10.0  # between two looks at MLflow, whatever is told meanwhile
_MAX_INTERVAL_S = 30.0  # what is lost, or appears late (a member's run), is seen after this
_MAX_BACKOFF_S = 60.0
_MEMBER_PATIENCE_S = 30.0
_DIGEST_TAG = "ensemble"


@dataclass(frozen=True)
class CampaignDelivery:
    """What became of the last state: ``error`` is None where MLflow shows all of it; else the next start brings it.

    ``where`` says how to look at the campaign.
    """

    error: str | None
    run_id: str | None
    where: str


class _IncompleteError(Exception):
    """MLflow has taken most of it; the text says what it lacks."""


class CampaignTracker:
    """One MLflow run that follows one campaign across all its restarts.

    The MLflow run is the one in ``experiment`` whose tag ``run_key`` is the URL of ``folder``, the campaign's folder in
    storage; it is created when there is none. ``params`` (nested mappings become dotted keys) are logged once.
    ``description``: Markdown, written once beside a line of results and a table of members, which are kept up to date.
    ``command`` goes on with the campaign. The figure of all members' curves is ``figures/errors.png`` in ``folder``.
    The constructor starts a daemon thread and returns; neither it nor any method raises, whatever MLflow does.
    """

    def __init__(
        self,
        *,
        uri: str,
        experiment: str,
        name: str,
        folder: Storage,
        params: Mapping[str, object],
        description: str,
        command: str,
        data: DataNote | None = None,
    ) -> None:
        self._name, self._folder, self._command = name, folder, command
        self._uri, self._experiment = uri, experiment
        self._closing = threading.Event()  # nothing more is told: show it and end
        self._abandoned = threading.Event()  # end now

        # Shared between threads, under `_lock`.
        self._lock = threading.Lock()
        self._note: CampaignNote | None = None
        self._told_ms = 0
        self._status, self._reason = RunStatus.RUNNING, ""
        self._error: str | None = "not delivered yet"

        self._figure = CampaignFigure(name, folder)

        # The thread's own.
        about = "\n\n".join(
            text
            for text in (
                "| Member |\n| --- |",
                masked(description),
                f"- The campaign's folder: `{masked(folder.url)}`\n"
                f"- After an interruption the same command goes on: `{masked(command)}`\n"
                "- The error curves of all members as a figure: Artifacts, `errors.png`",
            )
            if text
        )
        self._parent = MlflowRun(
            uri=uri,
            experiment=experiment,
            name=name,
            run_key=folder.url,
            params=dict(flattened(params)),
            tags={"kind": "campaign", "network": "campaign"},
            description=about,
            data=data,
        )
        self._store = MlflowCampaign(self._parent)
        self._shown: CampaignNote | None = None  # the last state that MLflow has taken whole
        self._held: dict[str, set[int]] = {}
        self._num_uploaded_figures = 0
        self._problems: list[str] = []

        self._thread = threading.Thread(target=self._work, name=f"tracking-{name}", daemon=True)
        self._thread.start()

    # -- any thread ---------------------------------------------------------------------------------------------

    def tell(self, note: CampaignNote) -> None:
        """How the campaign stands now. Returns at once; an equal state costs nothing."""
        with self._lock:
            if note == self._note:
                return
            self._told_ms = time.time_ns() // 1_000_000
            self._note = note

    def close(self, timeout_s: float, status: RunStatus, reason: str = "") -> CampaignDelivery:
        """Draw the last figure, deliver the last state and set the run's status, all within about ``timeout_s``.

        ``status`` RUNNING: another driver goes on with the campaign. ``reason``: why it failed.
        """
        deadline_s = time.monotonic() + timeout_s
        with self._lock:
            if not self._closing.is_set():
                self._status, self._reason = status, reason
        # Not by the tracking thread: there is a last figure even when that sits in a call that does not return.
        if (note := self._note) is not None:
            drawing = threading.Thread(target=lambda: self._figure.draw(note, is_last=True), daemon=True)
            drawing.start()
            drawing.join(timeout_s / 2)
        self._closing.set()
        self._thread.join(max(0.0, deadline_s - time.monotonic()))
        self._abandoned.set()
        with self._lock:
            error = self._error
            if error is None and self._thread.is_alive():
                error = f"not everything was delivered within {timeout_s:g} s"
        if error is not None:
            _log.warning(
                "tracking of campaign %s: MLflow does not show all of it (%s): the same command delivers it",
                self._name,
                error,
            )
        return CampaignDelivery(error, self._parent.run_id, self._parent.where())

    # -- the thread ---------------------------------------------------------------------------------------------

    def _work(self) -> None:
        num_failures = 0
        not_before_s = not_after_s = 0.0
        while not self._abandoned.is_set():
            self._closing.wait(_LINGER_S)
            is_last = self._closing.is_set()
            with self._lock:
                note, told_ms = self._note, self._told_ms
            now_s = time.monotonic()
            is_due = now_s >= not_before_s and (note != self._shown or now_s >= not_after_s)
            if note is None:
                if is_last:
                    with self._lock:
                        self._error = None
                    return
                continue
            if not (is_due or is_last):
                continue
            self._figure.draw(note)
            self._problems = []
            try:
                self._show(note, told_ms, is_last)
                if self._problems:
                    raise _IncompleteError("; ".join(self._problems))
                if num_failures:
                    _log.info("tracking of campaign %s: MLflow shows it again", self._name)
                num_failures, self._shown = 0, note
                with self._lock:
                    self._error = None
                if is_last:
                    return
                pause_s = _MIN_INTERVAL_S
            except Exception as error:  # promise: tracking never hurts a campaign
                num_failures += 1
                text = str(error) if isinstance(error, _IncompleteError) else one_line(error)
                with self._lock:
                    self._error = text
                if num_failures & (num_failures - 1) == 0:
                    _log.warning(
                        "tracking of campaign %s: MLflow at %s does not take all of it (%s); the campaign goes on",
                        self._name,
                        masked(self._uri),
                        text,
                    )
                pause_s = _LINGER_S if is_last else min(_MAX_BACKOFF_S, 2.0 ** min(num_failures - 1, 10))
                if is_last:
                    self._abandoned.wait(pause_s)
            not_before_s = time.monotonic() + pause_s
            not_after_s = not_before_s + (0.0 if num_failures else _MAX_INTERVAL_S)

    def _show(self, note: CampaignNote, told_ms: int, is_last: bool) -> None:
        """Bring MLflow to ``note``. Raises whatever MLflow raises; what one part alone lacks is added to the problems.

        Runs before words, words before the registry: whoever may not register models still sees the runs.
        """
        histories = {member.name: self._figure.history(member) for member in note.members}
        known_id = self._parent.run_id
        begun_ms = min((one.first_ms for one in histories.values() if one.first_ms), default=told_ms)
        self._held = self._store.connect(begun_ms)
        if self._parent.run_id != known_id:
            self._num_uploaded_figures = 0
        run_ids: dict[str, str] = {}
        for member in note.members:
            if self._abandoned.is_set():
                raise _IncompleteError("closed before all of it was there")
            run_id = self._show_member(member)
            if run_id is not None:
                run_ids[member.name] = run_id
        links = {name: self._store.link(run_id) for name, run_id in run_ids.items()}
        self._log_numbers(note, histories, told_ms)
        ensemble_id = self._show_ensemble(note, links) if note.ensemble else None
        if ensemble_id is not None:
            links[""] = self._store.link(ensemble_id)
        with self._lock:
            status, reason = self._status, self._reason
        assert self._parent.run_id is not None
        result = words.result(note, status if is_last else RunStatus.RUNNING)
        self._store.tell(self._parent.run_id, result, words.members_table(note, links))
        try:
            about = model_description(self._store.link(self._parent.run_id, self._name), self._folder.url)
            self._store.register(versions(note, run_ids, ensemble_id, links), about)
        except Exception as error:
            self._problems.append(f"registered models: {one_line(error)}")
        try:
            if (num_drawn := self._figure.num_drawn) != self._num_uploaded_figures:
                self._parent.upload(self._figure.path)
                self._num_uploaded_figures = num_drawn
        except Exception as error:
            self._problems.append(f"figure: {one_line(error)}")
        if is_last and not self._problems:
            written_ms = [_written_ms(url) for url in (note.submission, note.ensemble.url if note.ensemble else "")]
            known_ms = [each for each in (*written_ms, *(one.last_ms for one in histories.values())) if each]
            # When it was done, not when it was looked at again.
            ended_ms = max(known_ms, default=None) if status is RunStatus.FINISHED else None
            self._parent.finish(status.value, ended_ms, first_line(reason))

    # -- members ------------------------------------------------------------------------------------------------

    def _show_member(self, member: MemberNote) -> str | None:
        """The identity of the member's run, which is now a child; None where there is none yet."""
        run = self._store.run(words.run_key(member))
        if member.end is not None and (run is None or run.info.status != member.end.value):
            try:
                self._deliver(member)
            except Exception as error:
                self._problems.append(f"member {member.name}: {one_line(error)}")
            run = self._store.run(words.run_key(member))
        if run is None:
            return None
        self._store.adopt(run)
        return str(run.info.run_id)

    def _deliver(self, member: MemberNote) -> None:
        """What the member's own processes could not deliver, or MLflow has lost."""
        run = run_storage(member.config)
        if not run.exists("config.json"):  # it has never begun
            return
        tracker = open_tracker(
            member.config, member.recipe, uri=self._uri, run=run, command=self._command, system_metrics=False
        )
        assert member.end is not None
        reason = "" if member.end is RunStatus.FINISHED else member.state
        delivery = tracker.close(_MEMBER_PATIENCE_S, member.end, reason)
        if delivery.error is not None:
            self._problems.append(f"member {member.name}: {delivery.error}")

    def _ensemble_ms(self, note: CampaignNote) -> int:
        """When the ensemble was made; where storage does not tell, when it was told of."""
        return (_written_ms(note.ensemble.url) if note.ensemble else None) or self._told_ms

    def _log_numbers(self, note: CampaignNote, histories: Mapping[str, History], told_ms: int) -> None:
        """Members done over time, the best of them by then, their spread over seeds, and the ensemble's errors."""
        done = [member for member in note.members if member.end is RunStatus.FINISHED]
        when_ms = {member.name: histories[member.name].last_ms or told_ms for member in done}
        done.sort(key=lambda member: when_ms[member.name])
        metrics: list[tuple[str, float, int, int]] = []
        for number, member in enumerate(done, start=1):
            values = {"members_done": float(number)}
            for test in words.tests_of(note):
                if best := words.best_member(done[:number], test):
                    values |= words.shown({f"best_member_{test}": best.errors[test]})
            metrics += [
                (key, value, when_ms[member.name], number)
                for key, value in values.items()
                if number not in self._held.get(key, ())
            ]
        latest = self._store.latest()
        for each in words.spreads_of(note):
            name = f"{re.sub(r'[^A-Za-z0-9_]+', '_', each.what)}_{each.test}"
            for key, value in words.shown({f"{name}_mean": each.mean, f"{name}_std": each.deviation}).items():
                if latest.get(key) != value:
                    metrics.append(
                        (key, value, max(when_ms.get(member, told_ms) for member in each.members), len(done))
                    )
        if note.ensemble:
            errors = words.shown(note.ensemble.errors)
            for key, value in ((f"ensemble_{test}", errors[test]) for test in words.tests_of(note) if test in errors):
                if latest.get(key) != value:
                    metrics.append((key, value, self._ensemble_ms(note), len(done)))
        if metrics:
            self._parent.log(metrics, {})

    # -- the ensemble -------------------------------------------------------------------------------------------

    def _show_ensemble(self, note: CampaignNote, links: Mapping[str, str]) -> str:
        """The identity of the ensemble's run, which shows this ensemble."""
        assert note.ensemble
        run_key, identity = f"{self._folder.url}#ensemble", ensemble_digest(note.ensemble)
        table = words.ensemble_table(note, links)
        found = self._store.run(run_key)
        if found is None or found.info.status != "FINISHED" or found.data.tags.get(_DIGEST_TAG) != identity:
            run = MlflowRun(
                uri=self._uri,
                experiment=self._experiment,
                name=f"{self._name} ensemble",
                run_key=run_key,
                params={},
                tags=self._store.child_tags()
                | {"kind": "ensemble", "members": ", ".join(note.ensemble.weights)[:500], "network": "ensemble"},
                description=f"| Member |\n| --- |\n\n- Manifest: Artifacts, `ensemble.json`, and"
                f" `{masked(note.ensemble.url)}`\n- Campaign: {self._store.link(str(self._parent.run_id), self._name)}",
                data=self._parent.data,
            )
            made_ms = self._ensemble_ms(note)
            run.connect(made_ms)
            assert run.run_id is not None
            latest = found.data.metrics if found else {}
            errors = {k: v for k, v in words.shown(note.ensemble.errors).items() if latest.get(k) != v}
            step = sum(member.end is RunStatus.FINISHED for member in note.members)
            run.log([(key, value, made_ms, step) for key, value in errors.items()], {})
            self._store.put_text(run.run_id, "ensemble.json", manifest_text(note.ensemble))
            self._upload_figures(run, note.ensemble)
            run.log([], {_DIGEST_TAG: identity})  # last: all of it is there
            run.finish("FINISHED", made_ms)
            run_id = run.run_id
        else:
            self._store.adopt(found)
            run_id = str(found.info.run_id)
        self._store.tell(run_id, words.ensemble_result(note), table)
        return run_id

    def _upload_figures(self, run: MlflowRun, ensemble: EnsembleNote) -> None:
        with tempfile.TemporaryDirectory(prefix="figures-") as temporary:
            for url in ensemble.figures:
                folder, _, name = url.rpartition("/")
                # Those of two protocols have one name.
                path = Path(temporary) / url.removeprefix(f"{self._folder.url}/").replace("/", "-")
                path.write_bytes(Storage(folder).read(name))
                run.upload(path)


def _written_ms(url: str) -> int | None:
    """When the file at ``url`` was written, ms since 1970; None where that is not known."""
    folder, _, name = url.rpartition("/")
    with suppress(OSError, ValueError):
        found = Storage(folder).listing().get(name)
        return found.modified_ns // 1_000_000 if found and found.modified_ns else None
    return None
