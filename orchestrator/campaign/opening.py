"""A campaign on its data: what can be known before anything is taken or written, and what storage shows of it."""

from __future__ import annotations

from dataclasses import dataclass, replace

from orchestrator.campaign import products
from orchestrator.campaign.decisions import Facts
from orchestrator.campaign.journal import check_identity
from orchestrator.campaign.member import is_done
from orchestrator.campaign.plan import Campaign, Plan
from orchestrator.control import checks
from orchestrator.control.checks import reading_storage
from orchestrator.data.shards import DataSet
from orchestrator.storage import Storage
from orchestrator.training.optimization import total_steps


@dataclass(frozen=True)
class Opened:
    """A campaign on its data, checked: its folder, and what is to be done."""

    folder: Storage
    plan: Plan
    data: DataSet

    @property
    def data_sha256(self) -> str:
        """Its digest."""
        return self.data.digest


def resolve(campaign: Campaign) -> Campaign:
    """``campaign`` with absolute URLs. Raises ValueError for an unusable one."""
    c = campaign.config
    data = Storage(c.data).url if c.data else ""
    return replace(campaign, config=replace(c, data=data, storage=Storage(c.storage).url if c.storage else ""))


def check(campaign: Campaign) -> Opened:
    """Everything that can be known before anything is taken or written. Raises ValueError, saying what to do."""
    configs = campaign.run_configs()
    if not campaign.config.name:
        raise ValueError("the campaign has no name: give it one with --name")
    folder = Storage(campaign.config.storage).sub(campaign.config.name) if campaign.config.storage else None
    if folder is not None:
        with reading_storage(campaign.config.storage):
            check_identity(folder, campaign, None)
    data: DataSet | None = None
    free: int | None = None
    needed = 0
    for name, config in configs.items():
        start = checks.Start(config)
        try:
            checks.look_at_data(start)
            assert start.data is not None
            data = start.data
            with reading_storage(config.storage):
                if config.storage and is_done(config, data.digest):
                    continue  # needs no room
            for each in checks.BEFORE_PLACEMENT:
                each.look(start)
        except ValueError as error:
            raise ValueError(f"member {name}: {error}") from None
        assert start.storage is not None
        free, needed = start.storage.free_bytes(), needed + checks.space_of(start).needed_bytes
    if free is not None and free < needed:
        raise ValueError(
            f"storage {campaign.config.storage!r} has {free / 1e9:.2f} GB free where the checkpoints of all members "
            f"that are not done need {needed / 1e9:.2f} GB: make room, give another --storage, or lower them with "
            "--change rhythm.keep_last=1"
        )
    assert data is not None
    if campaign.submitted is not None:
        products.check_classes(data)
    images = data.manifest.splits["train"].count
    steps = {n: total_steps(c.schedule, images, c.batch.global_batch_size) for n, c in configs.items()}
    assert folder is not None
    return Opened(folder, Plan(campaign, steps), data)


def facts_of(opened: Opened) -> Facts:
    """What storage shows; of processes nothing. Raises ValueError where it is damaged."""
    campaign = opened.plan.campaign
    configs = campaign.run_configs()
    done = {n: config for n, config in configs.items() if is_done(config, opened.data_sha256)}
    protocols = campaign.config.evaluation.protocols
    made = products.ensemble_members(opened.folder, protocols, done, opened.data_sha256)
    protocol = campaign.submitted
    submission = made if made and protocol and products.has_submission(opened.folder, protocol) else frozenset[str]()
    return Facts(done=frozenset(done), ensemble=made, submission=submission)
