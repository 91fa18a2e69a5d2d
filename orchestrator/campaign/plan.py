"""What a campaign is to do: members, what they share, and how they are put onto a cluster."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from orchestrator.config import (
    EvaluationConfig,
    GuardConfig,
    PlacementConfig,
    Protocol,
    TrackingConfig,
    TrainConfig,
)
from orchestrator.control.placement import slots_of
from orchestrator.plain import to_plain
from orchestrator.ray_session import Cluster
from orchestrator.world import largest_share

_SEEDS_A_CAMPAIGN = 1000
_SPEEDUP = 0.9  # n workers are taken to be n ** 0.9 times as fast: they wait for each other

# -- what is wanted -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Member:
    """One run of a campaign. Data, storage, seed, evaluation and placement of ``config`` are the campaign's."""

    name: str
    config: TrainConfig


@dataclass(frozen=True)
class CampaignConfig:
    """What all members share, and what is made of their scores. Field comments are the command line's help."""

    data: str = ""
    """URL of the prepared data set; empty: IMAGENET_DATA"""
    storage: str = ""
    """URL of the folder that holds all campaigns; empty: IMAGENET_STORAGE"""
    name: str = ""
    """name of the campaign, a folder inside storage; empty: the recipe's"""
    recipe: str = ""
    """name of the recipe this was derived from: a label"""
    seed: int = 0
    """of the campaign: member n (from 0 on) has the seed 1000 · seed + n"""
    least_members: int = 0
    """go on with so many members when others fail for good; 0: all are needed. May change at every start: members that
    failed for good are tried again by a start that needs more than are left"""
    submission: Protocol | None = None
    """protocol whose scores are submitted; None: multi_scale if it is tested, else the last one named"""
    submit: bool = True
    """write the competition's file, where the test split is scored"""
    workers_per_member: int = 0
    """worker processes of each member; 0: decided once from the cluster, so that all members are done soonest, at most
    one GPU for each batch-norm group. Another number than before decides again"""
    max_at_once: int = 0
    """members that train at a time; 0: as many as fit"""
    max_failures: int = 3
    """ends of a member's process without progress in between that are put up with (each run has its own guard); of
    those with exit code 2, a mistake, one"""
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    placement: PlacementConfig = field(default_factory=PlacementConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)


@dataclass(frozen=True)
class Campaign:
    """A campaign as a recipe gives it. Raises ValueError for what contradicts itself."""

    members: tuple[Member, ...]
    config: CampaignConfig

    def __post_init__(self) -> None:
        c, names = self.config, [m.name for m in self.members]
        protocols = c.evaluation.protocols
        wrong = []
        if not names:
            wrong.append("a campaign needs at least one member")
        if len(set(names)) < len(names):
            wrong.append(f"members need names of their own, not {', '.join(names)}")
        if not 0 <= c.least_members <= len(names):
            wrong.append(f"least_members must be in [0, {len(names)}], not {c.least_members}")
        if not 0 <= c.seed < 2**63 // _SEEDS_A_CAMPAIGN:
            wrong.append(f"the campaign's seed must be in [0, {2**63 // _SEEDS_A_CAMPAIGN}), not {c.seed}")
        if not protocols:
            wrong.append("evaluation.protocols is empty: name what the members are tested with, as ten_crop")
        elif c.submission is not None and c.submission not in protocols:
            wrong.append(f"submission {c.submission.value} is not among evaluation.protocols")
        if not c.evaluation.splits:
            wrong.append("evaluation.splits is empty: name what is scored: val, test")
        if c.placement.num_workers or c.placement.min_workers:
            wrong.append("the workers of a campaign's members are set by workers_per_member, not by placement")
        if c.placement.runs_per_gpu > 1 and c.workers_per_member > 1:
            wrong.append(
                "members that share a GPU (placement.runs_per_gpu) have one worker each: leave workers_per_member out"
            )
        if c.placement.autoscaling:
            wrong.append(
                "a campaign asks no autoscaler for machines (placement.autoscaling): its members' workers are decided "
                "from those that are there, so start them first (ray.autoscaler.sdk.request_resources keeps them)"
            )
        if min(c.workers_per_member, c.max_at_once, c.max_failures) < 0:
            wrong.append("workers_per_member, max_at_once and max_failures must not be negative")
        if c.name and (c.name.startswith(".") or "/" in c.name or "\\" in c.name):
            wrong.append(f"the campaign's name {c.name!r} must be a plain folder name")
        if wrong:
            raise ValueError("; ".join(wrong))

    @property
    def least(self) -> int:
        """Members without which there is no submission."""
        return self.config.least_members or len(self.members)

    @property
    def asked(self) -> dict[str, int | bool | None]:
        """What decides the workers of each member, beside the cluster: when it changes they are decided again."""
        c = self.config
        return {
            "workers_per_member": c.workers_per_member,
            "cpus_per_worker": c.placement.cpus_per_worker,
            "use_gpu": c.placement.use_gpu,
            "runs_per_gpu": c.placement.runs_per_gpu,
        }

    @property
    def submitted(self) -> Protocol | None:
        """The protocol whose scores are submitted; None where none is to be."""
        e = self.config.evaluation
        if "test" not in e.splits or not self.config.submit:
            return None
        default = Protocol.MULTI_SCALE if Protocol.MULTI_SCALE in e.protocols else e.protocols[-1]
        return self.config.submission or default

    def run_configs(self) -> dict[str, TrainConfig]:
        """The whole config of each member's run, by its name; the number of workers is the packing's."""
        c = self.config
        return {
            member.name: replace(
                member.config,
                data=c.data,
                storage=f"{c.storage.rstrip('/')}/{c.name}/members" if c.storage and c.name else "",
                name=member.name,
                seed=_SEEDS_A_CAMPAIGN * c.seed + number,
                evaluation=c.evaluation,
                placement=c.placement,
                guard=c.guard,
                tracking=replace(c.tracking, metrics_port=c.tracking.metrics_port and c.tracking.metrics_port + number),
            )
            for number, member in enumerate(self.members)
        }

    def identity(self) -> dict[str, Any]:
        """What makes two campaigns the same: members, how they are tested, what is submitted.

        Not how many members may fail: that may change when one has. Nor how many pixels go through a network at a
        time, which may have to change where memory runs out. The data set enters with its digest.
        """
        submitted, evaluation = self.submitted, to_plain(self.config.evaluation)
        del evaluation["batch_megapixels"]
        return {
            "members": {name: config.identity() for name, config in self.run_configs().items()},
            "evaluation": evaluation,
            "submission": submitted.value if submitted else None,
        }


# -- packing --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Packing:
    """How members are put onto a cluster: workers of each, what each worker takes, and how many workers fit."""

    workers: Mapping[str, int]
    cpus_per_worker: int
    use_gpu: bool
    slots: int
    runs_per_gpu: int = 1

    def slots_on(self, cluster: Cluster) -> int:
        """Workers that fit on ``cluster``."""
        return slots_of(cluster, self.use_gpu, self.cpus_per_worker, self.runs_per_gpu)


def weight(config: TrainConfig, steps: int) -> float:
    """What a run costs, next to others: layers × images × pixels."""
    return float(config.model.depth) * steps * config.batch.global_batch_size * config.input.crop_px**2


@dataclass(frozen=True)
class Plan:
    """A campaign on its data: ``steps`` of each member's run."""

    campaign: Campaign
    steps: Mapping[str, int]

    def by_weight(self) -> list[str]:
        """Members, those that need most time first."""
        configs = self.campaign.run_configs()
        return sorted(configs, key=lambda name: -weight(configs[name], self.steps[name]))


def pack(plan: Plan, cluster: Cluster) -> Packing:
    """Workers of each member, by the plan and the size of the cluster alone: those with which all are done soonest.

    Each number of workers for every member is tried, members that need most time first; of equals the fewest workers
    win. A member has no more GPUs than batch-norm groups: those that share one wait for each other in every layer, and
    what is fixed of a pass does not shrink, so that they are slower (benchmarks/RESULTS.md, "Scale on paper"). On CPUs
    nothing is fixed, and where workers_per_member asks for more it has more: as many as can share its groups.
    """
    c, configs, order = plan.campaign.config, plan.campaign.run_configs(), plan.by_weight()
    use_gpu = cluster.gpus > 0 if c.placement.use_gpu is None else c.placement.use_gpu
    cpus = c.placement.cpus_per_worker or 1
    sharing = c.placement.runs_per_gpu if use_gpu else 1
    if use_gpu and not c.placement.cpus_per_worker:
        cpus = max(1, min((node.cpus // (node.gpus * sharing) for node in cluster.nodes if node.gpus), default=1))
    num = slots_of(cluster, use_gpu, cpus, sharing)
    batches = {name: config.batch for name, config in configs.items()}
    groups = {name: batch.global_batch_size // batch.bn_group_size for name, batch in batches.items()}
    if sharing > 1:  # two workers of a run cannot share a GPU
        groups = dict.fromkeys(groups, 1)
    is_capped = use_gpu and not c.workers_per_member

    def workers(each: int) -> dict[str, int]:
        most = {name: min(each, num, groups[name] if is_capped else num) for name in configs}
        return {n: largest_share(most[n], b.global_batch_size, b.bn_group_size) for n, b in batches.items()}

    def time_of(each: int) -> float:
        dealt, busy, finished = workers(each), dict[str, float](), 0.0  # busy: when each running member ends
        now = 0.0
        for name in order:
            while sum(dealt[n] for n in busy) + dealt[name] > num or len(busy) >= (c.max_at_once or len(order)):
                first = min(busy, key=busy.__getitem__)
                now = busy.pop(first)
            busy[name] = now + weight(configs[name], plan.steps[name]) / dealt[name] ** _SPEEDUP
            finished = max(finished, busy[name])
        return finished

    if num < 1:
        return Packing({}, cpus, use_gpu, 0, sharing)
    numbers = range(1, min(num, max(groups.values()) if is_capped else num) + 1)
    each = c.workers_per_member or min(numbers, key=lambda n: (round(time_of(n) / time_of(1), 6), n))
    return Packing(workers(each), cpus, use_gpu, num, sharing)


def has_room(packing: Packing, cluster: Cluster) -> bool:
    """Whether a worker of ``packing`` fits anywhere."""
    return packing.slots_on(cluster) > 0


def pack_fewer(plan: Plan, packing: Packing, num_slots: int) -> Packing:
    """The same on a cluster that is too small for a member."""
    batches = {name: config.batch for name, config in plan.campaign.run_configs().items()}
    workers = {
        name: largest_share(min(old, num_slots), batches[name].global_batch_size, batches[name].bn_group_size)
        for name, old in packing.workers.items()
    }
    return replace(packing, workers=workers, slots=num_slots)
