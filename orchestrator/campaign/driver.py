"""Doing what ``campaign.decide`` says: one driver at a time, which may be killed at any line and started again.

Each member is a process of its own on the cluster that the driver has joined, or started. None outlives its driver.
"""

from __future__ import annotations

import math
import os
import signal
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, replace
from pathlib import Path
from tempfile import mkdtemp

from orchestrator.campaign import products
from orchestrator.campaign.decisions import (
    BuildEnsemble,
    Done,
    End,
    Facts,
    GiveUp,
    Kind,
    Look,
    Pack,
    Start,
    Stop,
    Wait,
    WriteSubmission,
    account_of,
    decide,
)
from orchestrator.campaign.journal import Journal, fix_identity
from orchestrator.campaign.member import (
    MemberProcess,
    errors_of,
    is_done,
    plain_process,
    process_from,
    progress_of,
)
from orchestrator.campaign.opening import Opened, facts_of
from orchestrator.campaign.plan import Packing
from orchestrator.config import TrainConfig
from orchestrator.control.guard import ENDING_VARIABLE, Ending, Refusal
from orchestrator.control.supervisor import RunFailedError
from orchestrator.ray_session import Cluster, ray_session
from orchestrator.remote import stop_waiting
from orchestrator.training.ownership import Claim, Process, SupersededError, claim
from orchestrator.training.run import run_storage

_POLL_S = 0.2
_LOOK_EVERY_S = 20.0  # at the cluster, while a member waits for room
_FIRST_REST_S, _LONGEST_REST_S = 2.0, 60.0  # after a failure
_ENDING_S = 90.0  # for a member that was interrupted, where nobody gives more or less

Tell = Callable[[str], None]


def _name_of(number: int) -> str:
    """A signal's name; those between SIGRTMIN and SIGRTMAX have none."""
    with suppress(ValueError):
        return signal.Signals(number).name
    return f"signal {number}"


def _ending_s() -> float:
    """For the checkpoints of members that are asked to end."""
    with suppress(KeyError, ValueError):
        return float(os.environ[ENDING_VARIABLE])
    return _ENDING_S


def _as_error(refusal: Refusal) -> Exception:
    return ValueError(refusal.text) if refusal.ending is Ending.USER else RunFailedError(refusal.text)


class Driver:
    """One driver of a campaign: ``run`` returns when all is published.

    ``command`` starts a member's process (jobs/member.py); ``argv``: the command that goes on with the campaign;
    ``recipes``: each member's config without what a person has changed; ``tell`` takes lines for the user; ``taken`` is
    called when the campaign is this driver's; ``changed`` when something has changed.
    """

    def __init__(
        self,
        opened: Opened,
        *,
        command: Sequence[str],
        argv: Sequence[str],
        recipes: dict[str, TrainConfig],
        tell: Tell,
        taken: Callable[[], None] = lambda: None,
        changed: Callable[[], None] = lambda: None,
    ) -> None:
        self._opened, self._folder, self._plan = opened, opened.folder, opened.plan
        self._campaign, self._data_sha256 = opened.plan.campaign, opened.data_sha256
        self._configs = self._campaign.run_configs()
        self._command, self._argv, self._recipes = command, argv, recipes
        self._tell, self._taken, self._changed = tell, taken, changed
        self._children: dict[str, MemberProcess] = {}
        self._orphans: dict[str, Process] = {}  # of a driver that was killed
        self._rests_until_s: dict[str, float] = {}
        self._facts = Facts()
        self._cluster: Cluster | None = None
        self._looked_s = 0.0
        self._short_since_s: float | None = None  # the cluster is too small
        self._address = ""
        self._is_local = False  # a cluster of this driver's own
        self._session = ExitStack()
        self._logs: Path | None = None
        self._said_wait = ""

    def run(self) -> None:
        """Until all is published. Raises RunFailedError or ValueError where too few members are left, ValueError for
        what the user must mend, SupersededError, KeyboardInterrupt.
        """
        self._folder.check_writable()
        fix_identity(self._folder, self._plan, self._data_sha256)
        guard = self._campaign.config.guard
        owner = claim(self._folder, lease_s=guard.lease_s, take_over=guard.take_over, tell=self._tell, what="campaign")
        with owner, self._session:
            self._taken()
            self._journal = Journal(self._folder, owner.number)
            self._meet_orphans()
            self._journal.add(Kind.OPENED, least=self._campaign.least, max_failures=self._campaign.config.max_failures)
            try:
                self._go_on(owner)
            finally:
                self._end_children()

    # -- the loop -----------------------------------------------------------------------------------------------

    def _go_on(self, owner: Claim) -> None:
        self._facts = facts_of(self._opened)
        self._record_scores()
        while True:
            if owner.lost:
                raise SupersededError(
                    f"campaign {self._folder.url} was claimed by another driver: this one stops here, and the newer "
                    "one goes on"
                )
            self._see_ends()
            alive = frozenset(self._children) | frozenset(self._orphans)
            now_s = time.monotonic()
            resting = frozenset(name for name, until_s in self._rests_until_s.items() if until_s > now_s)
            facts = replace(self._facts, alive=alive, resting=resting, short_s=self._short_s())
            for action in decide(self._plan, self._journal.entries, facts, self._cluster):
                match action:
                    case Done():
                        self._journal.add(Kind.DONE)
                        return
                    case Stop(refusal):
                        self._journal.add(Kind.STOPPED, why=refusal.text)
                        self._changed()
                        raise _as_error(refusal)
                    case Wait(why, is_short):
                        self._short_since_s = (self._short_since_s or time.monotonic()) if is_short else None
                        self._wait(why)
                    case Look():
                        self._look()
                    case Pack(packing):
                        self._pack(packing)
                    case Start(name, workers, packing):
                        self._start(name, workers, packing)
                    case GiveUp(name, why):
                        self._journal.add(Kind.GAVE_UP, name, why=why)
                        self._tell(f"{name} has failed for good: {why}")
                    case End(name):
                        if name in self._children:
                            self._end(name)
                    case BuildEnsemble(members):
                        self._publish_ensemble(members)
                    case WriteSubmission(members):
                        self._publish_submission(members)
                if not isinstance(action, Wait):
                    self._changed()

    def _wait(self, why: str) -> None:
        if not self._children and why != self._said_wait:
            self._tell(f"waiting for {why}" if not self._orphans else "waiting for members of a killed driver to end")
        self._said_wait = why
        before = self._ended()
        until_s = time.monotonic() + 1.0
        while time.monotonic() < until_s and self._ended() == before:
            time.sleep(_POLL_S)
        waits = len(self._children) < len(self._campaign.members)
        if waits and self._address and time.monotonic() - self._looked_s > _LOOK_EVERY_S:
            self._cluster = None  # it may have grown, or come back

    def _short_s(self) -> float:
        """How long nothing could be started for want of machines."""
        if self._is_local:
            return math.inf
        return time.monotonic() - self._short_since_s if self._short_since_s is not None else 0.0

    def _ended(self) -> set[str]:
        return {name for name, child in self._children.items() if child.exit_code() is not None} | {
            name for name, process in self._orphans.items() if process.lives() is not True
        }

    # -- the cluster --------------------------------------------------------------------------------------------

    def _look(self) -> None:
        given = self._campaign.config.placement.ray_address or os.environ.get("RAY_ADDRESS", "")
        if not given:  # started here, and kept: members join it
            import ray

            self._cluster = self._session.enter_context(ray_session())
            self._address = ray.get_runtime_context().gcs_address
            self._looked_s, self._is_local = math.inf, True  # it does not change
        else:
            # Nothing is kept open: the campaign outlives a head that is started again.
            try:
                with ray_session(given) as cluster:
                    self._cluster, self._address = cluster, given
            except ValueError as error:
                if not self._address:
                    raise
                if self._short_since_s is None:
                    self._tell(str(error))
                    self._short_since_s = time.monotonic()
                if self._short_s() > self._campaign.config.guard.wait_for_workers_s and not self._children:
                    raise RunFailedError(
                        f"the cluster of campaign {self._campaign.config.name!r} has been away for "
                        f"{self._short_s():.0f} s (guard.wait_for_workers_s): {error}. All checkpoints and scores are "
                        "kept: the same command goes on"
                    ) from None
                self._wait("the cluster")
            self._looked_s = time.monotonic()

    def _pack(self, packing: Packing) -> None:
        account, asked = account_of(list(self._configs), self._journal.entries), self._campaign.asked
        before = account.packing
        self._journal.add(Kind.PACKED, packing=asdict(packing), asked=asked)
        kind = "GPU" if packing.use_gpu else "CPU"
        words = ", ".join(f"{name} {workers}" for name, workers in packing.workers.items())
        if before is None:
            self._tell(f"{packing.slots} {kind} worker(s) fit on the cluster; workers of each member: {words}")
            return
        if account.asked != asked:
            why = "other workers are asked for than before"
        else:
            is_less = sum(packing.workers.values()) < sum(before.workers.values())
            why = f"the cluster has become {'smaller' if is_less else 'larger'}"
        self._tell(
            f"{why} ({packing.slots} {kind} worker(s) fit): members go on with other numbers of workers, so that "
            f"weights are no longer the same to the last bit: {words}"
        )

    # -- members ------------------------------------------------------------------------------------------------

    def _meet_orphans(self) -> None:
        """Processes that a killed driver has left: they end by themselves, and nothing is started beside them."""
        for name, entry in account_of(list(self._configs), self._journal.entries).newest.items():
            if entry.kind is Kind.STARTED:
                self._orphans[name] = process_from(entry.detail["process"])

    def _start(self, name: str, workers: int, packing: Packing) -> None:
        environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
        log = self._log_path(name)
        child = MemberProcess(self._command, log, environment | {"PYTHONUNBUFFERED": "1", "COLUMNS": "160"})
        self._children[name] = child
        # It has not been told yet what to do: if this driver dies here nothing has begun.
        self._journal.add(Kind.STARTED, name, process=plain_process(child.process), workers=workers)
        config = self._configs[name]
        placement = replace(
            config.placement,
            num_workers=workers,
            cpus_per_worker=packing.cpus_per_worker,
            use_gpu=packing.use_gpu,
            ray_address=self._address,
        )
        child.begin(replace(config, placement=placement), self._recipes[name], self._argv)
        self._tell(f"{name} starts with {workers} worker(s); log {log}")

    def _see_ends(self) -> None:
        for name, process in list(self._orphans.items()):
            if process.lives() is not True:  # unknown: on another machine, whose lease its own start waits for
                del self._orphans[name]
                self._record_end(name, None, asked=True, said="")
        for name, child in list(self._children.items()):
            if (code := child.exit_code()) is not None:
                self._forget(name, child)
                self._record_end(name, code, asked=False, said=child.said())

    def _record_end(self, name: str, code: int | None, *, asked: bool, said: str) -> None:
        config = self._configs[name]
        run = run_storage(config)
        done = is_done(config, self._data_sha256)
        if done:
            said = ""
        elif code == 0:
            said = f"the run has ended, and not all of its scores are there ({run.url}/scores)"
        elif code is not None and code < 0:
            said = f"killed by {_name_of(-code)}" + (f": {said}" if said else "")
        progress = progress_of(run)
        self._journal.add(Kind.ENDED, name, code=code, asked=asked, done=done, progress=progress, said=said)
        if done:
            self._facts = replace(self._facts, done=self._facts.done | {name})
            self._tell(f"{name} is done")
            self._record_scores()
        elif not asked:
            failures = account_of(list(self._configs), self._journal.entries).failures.get(name, 0)
            rest_s = min(_LONGEST_REST_S, _FIRST_REST_S * 2 ** (failures - 1))
            self._rests_until_s[name] = time.monotonic() + rest_s
            if not self._is_local:
                self._cluster = None  # it may be why: nothing is started before it answers
            self._tell(f"{name} ended with {code}: {said} (log {self._log_path(name)})")
        self._changed()

    def _record_scores(self) -> None:
        """The errors of members that are done, for those who ask how the campaign stands."""
        known = account_of(list(self._configs), self._journal.entries).errors
        for name in sorted(self._facts.done - known.keys()):
            config = self._configs[name]
            self._journal.add(Kind.SCORED, name, errors=errors_of(config, self._data_sha256))

    def _log_path(self, name: str) -> Path:
        """In the campaign's folder where that is on a local disk; else here, and brought there when it ends."""
        path = self._folder.local_path(f"logs/{name}.log")
        if path is None:
            self._logs = self._logs or Path(mkdtemp(prefix="campaign-"))
            path = self._logs / f"{name}.log"
        return path

    def _forget(self, name: str, child: MemberProcess) -> None:
        child.close()
        del self._children[name]
        path = self._log_path(name)
        if not self._folder.is_local and path.exists():
            with suppress(OSError, ValueError):
                self._folder.publish(f"logs/{name}.log", path.read_bytes())

    def _end(self, name: str) -> None:
        child = self._children[name]
        child.interrupt()
        until_s = time.monotonic() + _ending_s()
        while child.exit_code() is None and time.monotonic() < until_s:
            time.sleep(_POLL_S)
        child.kill()
        self._forget(name, child)
        self._record_end(name, child.exit_code(), asked=True, said="")

    def _end_children(self) -> None:
        """All of them, side by side; a second Ctrl-C does not wait."""
        if not self._children:
            return
        self._tell(f"ending {', '.join(self._children)}")
        try:
            for child in self._children.values():
                child.interrupt()
            until_s = time.monotonic() + _ending_s()
            while any(c.exit_code() is None for c in self._children.values()) and time.monotonic() < until_s:
                time.sleep(_POLL_S)
        finally:
            stop_waiting()
            for name, child in list(self._children.items()):
                child.kill()
                self._forget(name, child)
                with suppress(OSError, ValueError, SupersededError):
                    self._record_end(name, child.exit_code(), asked=True, said="")

    # -- what comes of it ---------------------------------------------------------------------------------------

    def _publish_ensemble(self, members: Sequence[str]) -> None:
        if lost := [name for name in self._configs if name not in members]:
            self._tell(
                f"the ensemble is made without {', '.join(lost)} (least_members {self._campaign.least}); a start with "
                f"--least-members {len(self._configs)} tries them again"
            )
        products.build_ensembles(self._folder, self._campaign, members, self._data_sha256)
        self._journal.add(Kind.ENSEMBLE, members=list(members))
        self._facts = replace(self._facts, ensemble=frozenset(members))

    def _publish_submission(self, members: Sequence[str]) -> None:
        assert self._campaign.submitted is not None
        written = products.write_submission(self._folder, self._campaign.submitted, self._opened.data)
        for text in written.notes:
            self._tell(f"submission: {text}")
        self._journal.add(Kind.SUBMITTED, members=list(members), sha256=written.sha256)
        self._facts = replace(self._facts, submission=frozenset(members))
