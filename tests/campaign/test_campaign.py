"""What a campaign does next: every sequence of ends, kills and clusters that come and go leads to an end."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.campaign.decisions import (
    BuildEnsemble,
    Done,
    End,
    Entry,
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
from orchestrator.campaign.plan import Campaign, CampaignConfig, Member, Packing, Plan, pack
from orchestrator.config import (
    BatchConfig,
    EvaluationConfig,
    InputConfig,
    ModelConfig,
    PlacementConfig,
    Protocol,
    TrainConfig,
)
from orchestrator.control.guard import Ending
from orchestrator.ray_session import Cluster, Node

EVALUATION = EvaluationConfig(protocols=(Protocol.TEN_CROP, Protocol.MULTI_SCALE), splits=("val", "test"))
TWO_CPUS = Cluster((Node(2, 0),))


def plan_of(*depths: int, steps: int = 100, **fields: Any) -> Plan:
    """Members a, b, … of these depths, whose batches have 4 groups."""
    members = tuple(
        Member(
            "abcdefgh"[i],
            TrainConfig(model=ModelConfig(depth=depth), batch=BatchConfig(32, 8), input=InputConfig(crop_px=64)),
        )
        for i, depth in enumerate(depths)
    )
    config = replace(CampaignConfig(data="/d", storage="/s", name="c", evaluation=EVALUATION), **fields)
    return Plan(Campaign(members, config), {m.name: steps for m in members})


def entries(*rows: tuple[Kind, str, dict[str, Any]], driver: int = 1) -> list[Entry]:
    return [Entry(i + 1, kind, driver, member, detail) for i, (kind, member, detail) in enumerate(rows)]


def ended(member: str, code: int | None, *, progress: int = 0, asked: bool = False) -> tuple[Kind, str, dict[str, Any]]:
    detail = {"code": code, "asked": asked, "done": False, "progress": progress, "said": f"error: {member} failed"}
    return Kind.ENDED, member, detail


def opening(least: int = 3, max_failures: int = 3) -> tuple[Kind, str, dict[str, Any]]:
    return Kind.OPENED, "", {"least": least, "max_failures": max_failures}


def packed(each: int, *, asked: int = 0, use_gpu: bool = False) -> tuple[Kind, str, dict[str, Any]]:
    """Of a, b, c, each with so many workers; ``asked`` on the command line."""
    packing = Packing(dict.fromkeys("abc", each), 1, use_gpu, max(2, each))
    return Kind.PACKED, "", {"packing": asdict(packing), "asked": plan_of(18, workers_per_member=asked).campaign.asked}


OPENED = opening()
PACKED = packed(1)

# -- plan -----------------------------------------------------------------------------------------------------------


def test_members_share_what_the_campaign_sets() -> None:
    plan = plan_of(18, 34, 18, seed=7)
    configs = plan.campaign.run_configs()
    assert [c.seed for c in configs.values()] == [7000, 7001, 7002]
    assert {c.storage for c in configs.values()} == {"/s/c/members"}
    assert [c.name for c in configs.values()] == ["a", "b", "c"]
    assert all(c.evaluation == EVALUATION for c in configs.values())


def test_members_share_a_gpu() -> None:
    """Of four small networks on one GPU all train at once, one worker each, where they would take turns."""
    one_gpu, four = Cluster((Node(8, 1),)), plan_of(18, 18, 18, 18, placement=PlacementConfig(runs_per_gpu=4))
    packing = pack(four, one_gpu)
    assert packing == Packing(dict.fromkeys("abcd", 1), 2, True, 4, 4)
    asked = four.campaign.asked
    journal = entries(opening(4), (Kind.PACKED, "", {"packing": asdict(packing), "asked": asked}))
    starts = decide(four, journal, Facts(), one_gpu)
    assert [action.member for action in starts if isinstance(action, Start)] == list("abcd")
    assert pack(plan_of(18, 18, 18, 18), one_gpu).slots == 1
    # Two workers of a run cannot share one, however many places there are.
    two = plan_of(18, 18, placement=PlacementConfig(runs_per_gpu=4))
    assert pack(two, Cluster((Node(8, 2),))).workers == {"a": 1, "b": 1}
    assert pack(plan_of(18, 18), Cluster((Node(8, 8),))).workers == {"a": 4, "b": 4}


def test_what_the_test_split_is_scored_for_can_be_said() -> None:
    assert plan_of(18).campaign.submitted is Protocol.MULTI_SCALE
    assert plan_of(18, submit=False).campaign.submitted is None
    assert plan_of(18, submit=False).campaign.identity()["submission"] is None


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"least_members": 4}, r"least_members must be in \[0, 3\], not 4"),
        ({"evaluation": EvaluationConfig()}, "evaluation.protocols is empty"),
        ({"submission": Protocol.ONE_CROP}, "submission one_crop is not among evaluation.protocols"),
        ({"seed": 2**62}, "seed must be in"),
        ({"name": "../x"}, "must be a plain folder name"),
        ({"workers_per_member": -1}, "must not be negative"),
        ({"placement": PlacementConfig(autoscaling=True)}, r"asks no autoscaler .* start them first"),
        ({"placement": PlacementConfig(runs_per_gpu=2), "workers_per_member": 2}, "have one worker each"),
    ],
)
def test_a_campaign_that_contradicts_itself_is_refused(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        plan_of(18, 18, 18, **fields)


def test_members_need_names_of_their_own() -> None:
    plan = plan_of(18)
    with pytest.raises(ValueError, match="names of their own"):
        replace(plan.campaign, members=plan.campaign.members * 2)
    with pytest.raises(ValueError, match="at least one member"):
        replace(plan.campaign, members=())


def test_what_is_submitted() -> None:
    assert plan_of(18).campaign.submitted is Protocol.MULTI_SCALE
    assert plan_of(18, submission=Protocol.TEN_CROP).campaign.submitted is Protocol.TEN_CROP
    assert plan_of(18, evaluation=replace(EVALUATION, splits=("val",))).campaign.submitted is None


def test_the_identity_is_members_and_tests_and_not_the_machines() -> None:
    plan = plan_of(18, 34)
    same = replace(plan.campaign.config, storage="/other", name="d", least_members=1, max_at_once=1)
    assert replace(plan.campaign, config=same).identity() == plan.campaign.identity()
    less_memory = replace(plan.campaign.config, evaluation=replace(EVALUATION, batch_megapixels=0.5))
    assert replace(plan.campaign, config=less_memory).identity() == plan.campaign.identity()
    other = replace(plan.campaign.config, seed=1)
    assert replace(plan.campaign, config=other).identity() != plan.campaign.identity()


# -- packing --------------------------------------------------------------------------------------------------------


def test_members_that_take_longest_come_first() -> None:
    assert plan_of(18, 50, 34).by_weight() == ["b", "c", "a"]


@pytest.mark.parametrize(
    ("depths", "nodes", "fields", "workers"),
    [
        ((18, 18), (Node(2, 0),), {}, [1, 1]),  # side by side
        ((18, 18, 18), (Node(2, 0),), {}, [2, 2, 2]),  # three times half the time beat two whole ones
        ((18, 18, 18), (Node(2, 0),), {"workers_per_member": 1}, [1, 1, 1]),
        ((18,), (Node(64, 0),), {}, [32]),  # a group shared by eight
        ((18,), (Node(64, 64),), {}, [4]),  # GPUs that share a group are slower
        ((18,), (Node(64, 64),), {"workers_per_member": 64}, [32]),
        ((18, 18), (Node(16, 16),), {}, [4, 4]),
        ((18,), (Node(7, 0),), {}, [4]),  # 7 cannot share 4 groups
        ((152, 18), (Node(8, 2), Node(8, 2)), {}, [4, 4]),  # GPUs: the long one alone, then the short one
        ((18, 18, 18, 18), (Node(8, 4),), {}, [1, 1, 1, 1]),
        ((18, 18, 18, 18), (Node(8, 4),), {"max_at_once": 1}, [4, 4, 4, 4]),
    ],
)
def test_workers_are_those_with_which_all_are_done_soonest(
    depths: tuple[int, ...], nodes: tuple[Node, ...], fields: dict[str, Any], workers: list[int]
) -> None:
    packing = pack(plan_of(*depths, **fields), Cluster(nodes))
    assert list(packing.workers.values()) == workers
    assert packing.use_gpu == (nodes[0].gpus > 0)
    if packing.use_gpu:
        assert packing.cpus_per_worker == min(node.cpus // node.gpus for node in nodes)


# -- decisions ------------------------------------------------------------------------------------------------------


def test_a_new_campaign_looks_packs_and_starts() -> None:
    plan = plan_of(18, 50, 18, workers_per_member=1)
    assert decide(plan, [], Facts(), None) == [Look()]
    (first,) = decide(plan, [], Facts(), TWO_CPUS)
    assert isinstance(first, Pack)
    packing = Packing({"a": 1, "b": 1, "c": 1}, 1, False, 2)
    assert first.packing == packing
    journal = entries(OPENED, packed(1, asked=1))
    assert decide(plan, journal, Facts(), TWO_CPUS) == [Start("b", 1, packing), Start("a", 1, packing)]
    resting = Facts(resting=frozenset("b"))
    assert decide(plan, journal, resting, TWO_CPUS) == [Start("a", 1, packing), Start("c", 1, packing)]
    one = plan_of(18, 50, 18, workers_per_member=1, max_at_once=1)
    assert decide(one, journal, Facts(), TWO_CPUS) == [Start("b", 1, packing)]
    alive = Facts(alive=frozenset("ab"))
    assert decide(plan, journal, alive, TWO_CPUS) == [Wait("room on the cluster")]


def test_a_finished_campaign_needs_no_cluster() -> None:
    plan, everyone = plan_of(18, 18, 18), frozenset("abc")
    facts = Facts(done=everyone)
    assert decide(plan, [], facts, None) == [BuildEnsemble(("a", "b", "c"))]
    facts = replace(facts, ensemble=everyone)
    assert decide(plan, [], facts, None) == [WriteSubmission(("a", "b", "c"))]
    assert decide(plan, [], replace(facts, submission=everyone), None) == [Done()]
    # A process that has published its scores may still tell MLflow; an ensemble of others is none of these.
    assert decide(plan, [], replace(facts, alive=frozenset("a")), None) == [Wait("processes to end")]
    assert decide(plan, [], replace(facts, ensemble=frozenset("ab")), None) == [BuildEnsemble(("a", "b", "c"))]
    only_val = plan_of(18, 18, 18, evaluation=replace(EVALUATION, splits=("val",)))
    assert decide(only_val, [], facts, None) == [Done()]


def test_a_member_that_the_user_must_mend_stops_a_campaign_that_needs_all() -> None:
    plan, journal = plan_of(18, 18, 18), entries(OPENED, PACKED, ended("a", 2), ended("a", 2))
    actions = decide(plan, journal, Facts(alive=frozenset("b")), TWO_CPUS)
    assert actions == [GiveUp("a", "error: a failed"), End("b"), Wait("processes to end")]
    given_up, stop = decide(plan, journal, Facts(done=frozenset("c")), TWO_CPUS)
    assert given_up == GiveUp("a", "error: a failed")
    assert isinstance(stop, Stop)
    assert stop.refusal.ending is Ending.USER
    assert "3 members are needed and 2 can be had" in stop.refusal.text
    assert "a: error: a failed" in stop.refusal.text
    assert "(1 members are done)" in stop.refusal.text
    assert "--least-members 2 goes on" in stop.refusal.text


def test_a_campaign_goes_on_with_k_of_n() -> None:
    plan = plan_of(18, 18, 18, least_members=2)
    journal = entries(opening(2), PACKED, ended("a", 2), (Kind.GAVE_UP, "a", {"why": "x"}))
    starts = decide(plan, journal, Facts(), TWO_CPUS)
    assert [a.member for a in starts if isinstance(a, Start)] == ["b", "c"]
    assert decide(plan, journal, Facts(done=frozenset("bc")), None) == [BuildEnsemble(("b", "c"))]
    # Scores count, whatever the journal says.
    assert decide(plan, journal, Facts(done=frozenset("abc")), None) == [BuildEnsemble(("a", "b", "c"))]


def test_failures_are_put_up_with_as_long_as_there_is_progress() -> None:
    plan = plan_of(18, 18, 18, max_failures=2, workers_per_member=1)
    slow = [ended("a", 1, progress=p) for p in range(1, 9)]
    assert not any(isinstance(a, GiveUp) for a in decide(plan, entries(OPENED, PACKED, *slow), Facts(), TWO_CPUS))
    stuck = entries(OPENED, PACKED, *slow, ended("a", -9, progress=8), ended("a", 0, progress=8))
    (give_up, *_) = decide(plan, stuck, Facts(), TWO_CPUS)
    assert give_up == GiveUp("a", "3 ends without progress (max_failures), the last: error: a failed")
    # What the driver itself has ended is no failure.
    asked = [ended("a", 130, asked=True)] * 5
    assert not any(isinstance(a, GiveUp) for a in decide(plan, entries(OPENED, PACKED, *asked), Facts(), TWO_CPUS))


def test_a_start_that_needs_more_members_tries_them_again() -> None:
    rows = entries(opening(2), PACKED, ended("a", 2), ended("a", 2), (Kind.GAVE_UP, "a", {"why": "x"}))
    again = Entry(9, Kind.OPENED, 2, "", opening(2)[2])
    assert account_of("abc", [*rows, again]).given_up == {"a": "x"}
    assert account_of("abc", [*rows, replace(again, detail=opening(3)[2])]).given_up == {}


@pytest.mark.parametrize("end", [ended("a", 2), ended("a", 1)])
def test_so_does_one_after_a_kill_between_an_end_and_what_follows_from_it(
    end: tuple[Kind, str, dict[str, Any]],
) -> None:
    plan, rows = plan_of(18, 18, 18, max_failures=1), entries(opening(3, 1), PACKED, end, end)
    assert isinstance(decide(plan, rows, Facts(), TWO_CPUS)[0], GiveUp)
    again = Entry(9, Kind.OPENED, 2, "", opening(3, 1)[2])
    assert all(isinstance(a, Start) for a in decide(plan, [*rows, again], Facts(), TWO_CPUS))
    # Without it there are enough: it stays given up.
    plan = plan_of(18, 18, 18, max_failures=1, least_members=2)
    again = replace(again, detail=opening(2, 1)[2])
    assert isinstance(decide(plan, [*rows, again], Facts(), TWO_CPUS)[0], GiveUp)


def test_one_refusal_may_be_of_the_moment() -> None:
    plan = plan_of(18, 18, 18)

    def is_given_up(*ends: tuple[Kind, str, dict[str, Any]]) -> bool:
        return any(isinstance(a, GiveUp) for a in decide(plan, entries(OPENED, PACKED, *ends), Facts(), TWO_CPUS))

    assert not is_given_up(ended("a", 2))
    assert is_given_up(ended("a", 2), ended("a", 2))
    assert not is_given_up(ended("a", 2), ended("a", 1), ended("a", 2))
    assert not is_given_up(ended("a", 2), ended("a", 2, progress=5))
    assert is_given_up(ended("a", 2), ended("a", 2, progress=5), ended("a", 2, progress=5))


def test_what_a_superseded_driver_writes_late_does_not_count() -> None:
    rows = entries(OPENED, PACKED)
    newer = Entry(3, Kind.OPENED, 2, "", OPENED[2])
    late = Entry(4, Kind.GAVE_UP, 1, "a", {"why": "late"})
    account = account_of("abc", [*rows, newer, late])
    assert account.given_up == {}
    assert account.last == newer


def test_a_smaller_cluster_is_waited_for_before_members_have_fewer_workers() -> None:
    plan, journal = plan_of(18, 18, 18, workers_per_member=4), entries(OPENED, packed(4, asked=4))
    assert decide(plan, journal, Facts(alive=frozenset("a"), short_s=math.inf), TWO_CPUS) == [
        Wait("room on the cluster")
    ]
    (action,) = decide(plan, journal, Facts(short_s=599), TWO_CPUS)  # guard.wait_for_workers_s is 600
    assert isinstance(action, Wait)
    assert action.is_short
    fewer = Packing(dict.fromkeys("abc", 2), 1, False, 2)
    assert decide(plan, journal, Facts(short_s=601), TWO_CPUS) == [Pack(fewer)]
    assert decide(plan, journal, Facts(), Cluster(())) == [Wait("a machine for a worker", is_short=True)]


def test_a_cluster_that_has_grown_again_is_used_once_nothing_runs() -> None:
    plan, rows = plan_of(18, 18, 18, workers_per_member=4), [OPENED, packed(4, asked=4), packed(1, asked=4)]
    four = Cluster((Node(4, 0),))
    assert decide(plan, entries(*rows), Facts(), four) == [Pack(Packing(dict.fromkeys("abc", 4), 1, False, 4))]
    assert decide(plan, entries(*rows), Facts(), TWO_CPUS) == [Pack(Packing(dict.fromkeys("abc", 2), 1, False, 2))]
    starts = decide(plan, entries(*rows), Facts(alive=frozenset("a")), four)
    assert [a.workers for a in starts if isinstance(a, Start)] == [1, 1]
    # Not beyond what was decided first.
    starts = decide(plan, entries(*rows[:2]), Facts(), Cluster((Node(64, 0),)))
    assert [a.workers for a in starts if isinstance(a, Start)] == [4, 4, 4]


def test_other_workers_that_are_asked_for_are_given() -> None:
    plan, journal = plan_of(18, 18, 18, workers_per_member=2), entries(OPENED, packed(1))
    assert decide(plan, journal, Facts(), TWO_CPUS) == [Pack(Packing(dict.fromkeys("abc", 2), 1, False, 2))]
    assert decide(plan, journal, Facts(alive=frozenset("a")), TWO_CPUS) == [Wait("processes to end")]


@pytest.mark.parametrize(
    "placement", [PlacementConfig(use_gpu=True), PlacementConfig(cpus_per_worker=8)], ids=["no GPU", "too many CPUs"]
)
def test_what_can_never_fit_stops_the_campaign(placement: PlacementConfig) -> None:
    plan = plan_of(18, 18, 18, placement=placement)
    (stop,) = decide(plan, entries(OPENED), Facts(short_s=math.inf), TWO_CPUS)  # a cluster of the driver's own
    assert isinstance(stop, Stop)
    assert stop.refusal.ending is Ending.USER
    assert "no worker of campaign 'c' has fitted on the cluster: it needs" in stop.refusal.text
    (stop,) = decide(plan, entries(OPENED), Facts(short_s=601), TWO_CPUS)
    assert isinstance(stop, Stop)
    assert stop.refusal.ending is Ending.FAILED
    assert decide(plan, entries(OPENED), Facts(), TWO_CPUS) == [Wait("a machine for a worker", is_short=True)]


def test_a_campaign_on_gpus_does_not_fall_back_to_cpus() -> None:
    journal = entries(OPENED, packed(1, use_gpu=True))
    wait = Wait("a machine for a worker", is_short=True)
    assert decide(plan_of(18, 18, 18), journal, Facts(), TWO_CPUS) == [wait]


# -- every course of events -----------------------------------------------------------------------------------------


@dataclass
class World:
    """Processes, storage and a journal, moved by draws: what a driver meets."""

    plan: Plan
    draw: random.Random
    journal: list[Entry] = field(default_factory=list)
    progress: dict[str, int] = field(default_factory=dict)
    done: set[str] = field(default_factory=set)
    alive: dict[str, int] = field(default_factory=dict)  # workers
    orphans: set[str] = field(default_factory=set)  # alive, of a driver that was killed
    ensemble: frozenset[str] = frozenset()
    submission: frozenset[str] = frozenset()
    driver: int = 0
    kills: int = 3
    num_slots: int = 2

    def write(self, kind: Kind, member: str = "", **detail: Any) -> None:
        self.journal.append(Entry(len(self.journal) + 1, kind, self.driver, member, detail))

    def open(self) -> None:
        self.driver += 1
        self.orphans = set(self.alive)
        self.write(Kind.OPENED, least=self.plan.campaign.least, max_failures=self.plan.campaign.config.max_failures)

    def facts(self) -> Facts:
        short_s = self.draw.choice([0.0, 0.0, 700.0])
        return Facts(frozenset(self.done), frozenset(self.alive), frozenset(), self.ensemble, self.submission, short_s)

    @property
    def cluster(self) -> Cluster:
        return Cluster((Node(self.num_slots, 0),) if self.num_slots else ())

    def end_one(self) -> None:
        """A process makes some progress, and ends somehow."""
        name = self.draw.choice(sorted(self.alive))
        code = self.draw.choice([0, 0, 0, 0, 1, 1, 2, -9, 130])
        before = self.progress.get(name, 0)
        self.progress[name] = min(5, before + self.draw.randint(0, 3))
        if code == 0 and self.draw.random() < 0.9:  # else it has ended well and left no scores
            self.done.add(name)
            self.progress[name] = 6
        del self.alive[name]
        if name in self.orphans:  # nobody knows its exit code
            self.orphans.discard(name)
            asked, known = True, None
        else:
            asked, known = False, code
        self.write(
            Kind.ENDED,
            name,
            code=known,
            asked=asked,
            done=name in self.done,
            progress=self.progress[name],
            said=f"{name} {code}",
        )


@settings(max_examples=300, deadline=None)
@given(
    st.integers(0, 2**32),
    st.integers(1, 5),
    st.integers(0, 5),
    st.integers(0, 3),
    st.sampled_from([0, 1, 2, 3]),
    st.sampled_from([0, 1, 2]),
)
def test_every_course_of_events_ends(
    seed: int, num: int, least: int, each: int, max_failures: int, at_once: int
) -> None:
    plan = plan_of(
        *[18, 50, 34, 18, 101][:num],
        least_members=min(least, num),
        workers_per_member=each,
        max_failures=max_failures,
        max_at_once=at_once,
    )
    draw = random.Random(seed)
    world = World(plan, draw)
    world.open()
    for _ in range(2000):
        if world.kills and draw.random() < 0.05:
            world.kills -= 1
            world.open()
        if draw.random() < 0.1:
            world.num_slots = draw.randint(0, 6)
        actions = decide(plan, world.journal, world.facts(), world.cluster if draw.random() < 0.7 else None)
        assert actions
        if _act(world, actions, at_once):
            break
    else:
        pytest.fail("no end in sight")
    names = [m.name for m in plan.campaign.members]
    if isinstance(actions[-1], Done):
        assert world.ensemble == world.submission
        assert world.ensemble <= world.done
        assert len(world.ensemble) >= plan.campaign.least
        lost = account_of(names, world.journal).given_up.keys()
        assert world.ensemble >= set(names) - lost
    else:
        assert not world.alive


def _act(world: World, actions: Sequence[object], at_once: int) -> bool:
    """Do what was decided; whether that was the end."""
    for action in actions:
        match action:
            case Look():
                pass
            case Pack(packing):
                world.write(Kind.PACKED, packing=packing.__dict__, asked=world.plan.campaign.asked)
            case Start(name, workers, _):
                assert name not in world.done
                assert name not in world.alive
                assert workers >= 1
                assert sum(world.alive.values()) + workers <= world.num_slots
                world.alive[name] = workers
                assert len(world.alive) <= (at_once or 99)
                world.write(Kind.STARTED, name)
            case GiveUp(name, why):
                assert name not in world.done
                world.write(Kind.GAVE_UP, name, why=why)
            case End(name):
                assert name in world.alive
                del world.alive[name]
                world.orphans.discard(name)
                world.write(Kind.ENDED, name, code=130, asked=True, done=False, progress=0, said="")
            case BuildEnsemble(members):
                world.ensemble = frozenset(members)
            case WriteSubmission(members):
                assert world.ensemble == set(members)
                world.submission = frozenset(members)
            case Wait():
                if world.alive:
                    world.end_one()
                else:  # a machine comes at last
                    world.num_slots = 2
            case Stop(refusal):
                world.write(Kind.STOPPED, why=refusal.text)
                return True
            case Done():
                return True
    return False
