"""Many runs, one submission: what to do next is a pure function of the plan, the journal, storage and the cluster.

A campaign trains its members, each a run of its own under ``supervisor.run_job``, averages their scores, and writes the
submission. ``decide`` says what comes next, ``driver`` does it. What is done is read from storage; the journal
remembers only what storage cannot tell: who was started, what failed, and on how many workers each member computes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any

from orchestrator.campaign.plan import Campaign, Packing, Plan, pack, pack_fewer
from orchestrator.control.guard import Ending, Refusal
from orchestrator.ray_session import Cluster

EXIT_USER_ERROR = 2
_REFUSALS = 2  # ends with EXIT_USER_ERROR in a row, without progress, after which trying again is no use

# -- what has happened ----------------------------------------------------------------------------------------------


class Kind(Enum):
    """What an entry of the journal tells."""

    OPENED = "opened"  # a driver has taken the campaign: least, max_failures
    PACKED = "packed"  # workers of each member from now on: packing, asked
    STARTED = "started"  # a member's process: process
    ENDED = "ended"  # it has ended: code, asked, done, progress, said
    SCORED = "scored"  # a member is done: errors, percent, by name (val_ten_crop_top1_error)
    GAVE_UP = "gave_up"  # a member has failed for good: why
    STOPPED = "stopped"  # too few are left: why
    ENSEMBLE = "ensemble"  # published: members
    SUBMITTED = "submitted"  # published: members
    DONE = "done"


@dataclass(frozen=True)
class Entry:
    """One event of the journal, ``number`` from 1 on; ``driver``: number of the start that wrote it."""

    number: int
    kind: Kind
    driver: int
    member: str = ""
    detail: Mapping[str, Any] = field(default_factory=dict)
    time_s: int = 0  # since 1970, for people


@dataclass
class Account:
    """What the journal comes to."""

    packing: Packing | None = None
    wanted: Packing | None = None  # the first one for what was asked: a cluster may have become smaller since
    asked: Mapping[str, Any] | None = None  # what the command line said of placement when that was decided
    failures: dict[str, int] = field(default_factory=dict)  # of each member, since it last made progress
    refusals: dict[str, int] = field(default_factory=dict)  # the same, of those in a row with EXIT_USER_ERROR
    fatal: dict[str, str] = field(default_factory=dict)  # members whose process said that trying again is no use
    given_up: dict[str, str] = field(default_factory=dict)
    progress: dict[str, int] = field(default_factory=dict)
    said: dict[str, str] = field(default_factory=dict)  # the last words of each member's failed process
    starts: dict[str, int] = field(default_factory=dict)
    errors: dict[str, dict[str, float]] = field(default_factory=dict)
    newest: dict[str, Entry] = field(default_factory=dict)  # the last STARTED or ENDED of each member
    is_stopped: bool = False
    last: Entry | None = None


def account_of(members: Sequence[str], entries: Iterable[Entry]) -> Account:
    """Add the journal up. What a superseded driver wrote late does not count.

    A start that needs more members than are left tries those that were given up once more: whoever gives the command
    again has mended something, or wants it tried.
    """
    account, driver = Account(), 0
    for entry in entries:
        if entry.driver < driver:
            continue
        driver, name, detail = entry.driver, entry.member, entry.detail
        account.last = entry
        match entry.kind:
            case Kind.OPENED:
                account.is_stopped = False
                # A driver that was killed may not have come to write down all that it gave up.
                lost = account.given_up.keys() | account.fatal.keys()
                lost |= {n for n, failures in account.failures.items() if failures > detail["max_failures"]}
                if len(members) - len(lost) < detail["least"]:
                    account.failures, account.refusals, account.fatal, account.given_up = {}, {}, {}, {}
            case Kind.PACKED:
                account.packing = Packing(**detail["packing"])
                if detail["asked"] != account.asked:
                    account.wanted, account.asked = account.packing, detail["asked"]
            case Kind.STARTED:
                account.starts[name] = account.starts.get(name, 0) + 1
                account.newest[name] = entry
            case Kind.ENDED:
                account.newest[name] = entry
                _add_end(account, name, detail)
            case Kind.SCORED:
                account.errors[name] = detail["errors"]
            case Kind.GAVE_UP:
                account.given_up[name] = detail["why"]
            case Kind.STOPPED:
                account.is_stopped = True
    return account


def _add_end(account: Account, name: str, detail: Mapping[str, Any]) -> None:
    before = account.progress.get(name, 0)
    account.progress[name] = max(before, detail["progress"])
    if account.progress[name] > before or detail["done"]:
        for since in (account.failures, account.refusals, account.fatal):
            since.pop(name, None)
    if detail["done"] or detail["asked"]:
        return
    account.said[name] = detail["said"]
    # Once is not enough: what storage or a machine does at one moment may look like a setting that is wrong.
    account.refusals[name] = account.refusals.get(name, 0) + 1 if detail["code"] == EXIT_USER_ERROR else 0
    if account.refusals[name] >= _REFUSALS:
        account.fatal[name] = detail["said"]
    account.failures[name] = account.failures.get(name, 0) + 1


@dataclass(frozen=True)
class Facts:
    """What storage, processes and the clock show. ensemble, submission: of which members one is there; empty: none is.

    short_s: seconds for which the cluster has been too small to go on; infinite: nothing can make it larger.
    """

    done: frozenset[str] = frozenset()  # members all of whose scores are there
    alive: frozenset[str] = frozenset()  # members whose process lives, whoever started it
    resting: frozenset[str] = frozenset()  # members that have failed a moment ago
    ensemble: frozenset[str] = frozenset()
    submission: frozenset[str] = frozenset()
    short_s: float = 0.0


# -- what comes next ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Look:
    """Look at the cluster: members are to be started."""


@dataclass(frozen=True)
class Pack:
    """Record how many workers each member has from now on."""

    packing: Packing


@dataclass(frozen=True)
class Start:
    """Start the process of a member."""

    member: str
    workers: int
    packing: Packing


@dataclass(frozen=True)
class GiveUp:
    """A member has failed for good."""

    member: str
    why: str


@dataclass(frozen=True)
class End:
    """End the process of a member, whose work is of no use now."""

    member: str


@dataclass(frozen=True)
class Stop:
    """Too few members are left: the campaign ends without a submission."""

    refusal: Refusal


@dataclass(frozen=True)
class Wait:
    """For a process to end, for a cluster to have room, or for a moment after a failure.

    is_short: nothing runs and the cluster is too small: how long that lasts is the ``short_s`` of the next facts.
    """

    why: str
    is_short: bool = False


@dataclass(frozen=True)
class BuildEnsemble:
    """Average the scores of these members."""

    members: tuple[str, ...]


@dataclass(frozen=True)
class WriteSubmission:
    """Write and validate the submission of these members."""

    members: tuple[str, ...]


@dataclass(frozen=True)
class Done:
    """All is published."""


Action = Look | Pack | Start | GiveUp | End | Stop | Wait | BuildEnsemble | WriteSubmission | Done


def decide(plan: Plan, journal: Sequence[Entry], facts: Facts, cluster: Cluster | None) -> list[Action]:
    """What to do next, in this order; never empty. ``cluster``: as last looked at, None: not yet.

    After Wait the caller looks again when something may have changed; after Done and Stop there is nothing to do.
    """
    campaign, names = plan.campaign, [m.name for m in plan.campaign.members]
    account = account_of(names, journal)
    lost = dict(account.given_up)
    actions: list[Action] = []
    for name in names:
        if name not in facts.done | facts.alive | lost.keys() and (why := _reason_to_give_up(campaign, account, name)):
            lost[name] = why
            actions.append(GiveUp(name, why))
    usable = [n for n in names if n in facts.done or n not in lost]
    if len(usable) < campaign.least:
        if facts.alive:
            return actions + [End(name) for name in sorted(facts.alive)] + [Wait("processes to end")]
        return [*actions, Stop(_refusal(campaign, facts, account, lost))]
    missing = [n for n in plan.by_weight() if n in usable and n not in facts.done]
    if not missing and not facts.alive:
        return actions + _publish(campaign, tuple(usable), facts)
    waiting = [n for n in missing if n not in facts.alive]
    if not waiting:
        return [*actions, Wait("processes to end")]
    return actions + _start(plan, account, waiting, facts, cluster)


def _reason_to_give_up(campaign: Campaign, account: Account, name: str) -> str:
    if name in account.fatal:
        return account.fatal[name]
    failures = account.failures.get(name, 0)
    if failures > campaign.config.max_failures:
        return f"{failures} ends without progress (max_failures), the last: {account.said[name]}"
    return ""


def _refusal(campaign: Campaign, facts: Facts, account: Account, lost: Mapping[str, str]) -> Refusal:
    """Why the campaign stops, what is kept, and what to do."""
    failed = [f"{name}: {why}" for name, why in lost.items() if name not in facts.done]
    left = len(campaign.members) - len(failed)
    text = (
        f"campaign {campaign.config.name!r} stopped: {campaign.least} members are needed and {left} can be had; failed "
        f"for good: {'; '.join(failed)}. All checkpoints and scores are kept ({len(facts.done)} members are done). "
        "When the cause is mended the same command tries them again"
        + (f"; --least-members {left} goes on without them" if left else "")
    )
    return Refusal(Ending.USER if account.fatal.keys() & lost.keys() else Ending.FAILED, text)


def _publish(campaign: Campaign, members: tuple[str, ...], facts: Facts) -> list[Action]:
    if facts.ensemble != set(members):
        return [BuildEnsemble(members)]
    if campaign.submitted is not None and facts.submission != set(members):
        return [WriteSubmission(members)]
    return [Done()]


def _start(plan: Plan, account: Account, waiting: Sequence[str], facts: Facts, cluster: Cluster | None) -> list[Action]:
    """Those of ``waiting`` for which there is room."""
    if cluster is None:
        return [Look()]
    campaign, packing, wanted = plan.campaign, account.packing, account.wanted
    is_short_for_good = facts.short_s > campaign.config.guard.wait_for_workers_s
    if packing is None or wanted is None or account.asked != campaign.asked:
        if facts.alive:
            return [Wait("processes to end")]  # of a driver before, which was asked for other workers
        packing = pack(plan, cluster)
        if packing.slots:
            return [Pack(packing)]
        wanted = packing
    num = packing.slots_on(cluster)
    if not num:
        if is_short_for_good and not facts.alive:
            return [Stop(_no_room(campaign, packing, facts, cluster))]
        return [Wait("a machine for a worker", is_short=not facts.alive)]
    if not facts.alive:
        fewer, now = pack_fewer(plan, wanted, num), packing.workers
        grown = {name: max(workers, fewer.workers[name]) for name, workers in now.items()}
        if any(grown[name] > now[name] for name in waiting):
            return [Pack(replace(packing, workers=grown, slots=num))]
        if is_short_for_good and any(now[name] > num for name in waiting):
            return [Pack(fewer)]
    free = num - sum(packing.workers[name] for name in facts.alive)
    room = (campaign.config.max_at_once or len(plan.steps)) - len(facts.alive)
    starts: list[Action] = []
    for name in waiting:
        needed = packing.workers[name]
        if name not in facts.resting and needed <= free and room > 0:
            starts.append(Start(name, needed, packing))
            free, room = free - needed, room - 1
    if starts:
        return starts
    if not facts.alive and all(packing.workers[name] > num for name in waiting):
        return [Wait(f"a larger cluster ({num} worker(s) fit)", is_short=True)]
    return [Wait("room on the cluster" if facts.alive else "a moment after a failure")]


def _no_room(campaign: Campaign, packing: Packing, facts: Facts, cluster: Cluster) -> Refusal:
    """Why the campaign stops where no worker can be placed."""
    each = f"{packing.cpus_per_worker} CPU(s)" + (" and a GPU" if packing.use_gpu else "")
    is_fixed = math.isinf(facts.short_s)
    waited = "" if is_fixed else f" for {facts.short_s:.0f} s (guard.wait_for_workers_s)"
    text = (
        f"no worker of campaign {campaign.config.name!r} has fitted on the cluster{waited}: it needs {each} on one "
        f"machine, of {cluster.cpus} CPUs and {cluster.gpus} GPUs in all. All checkpoints and scores are kept: go on "
        "with the same command on a larger cluster, or with another --placement.use-gpu or --placement.cpus-per-worker"
    )
    return Refusal(Ending.USER if is_fixed else Ending.FAILED, text)
