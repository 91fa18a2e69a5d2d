"""What MLflow is told of a campaign: how its folder stands, as ``tracking`` wants it."""

from __future__ import annotations

from collections.abc import Mapping

from orchestrator.campaign.note import CampaignNote, EnsembleNote, MemberNote
from orchestrator.campaign.plan import Campaign
from orchestrator.campaign.products import ensemble_folder, read_ensemble, submission_url
from orchestrator.campaign.status import Row, State, Status
from orchestrator.config import TrainConfig
from orchestrator.control.entries import RunStatus
from orchestrator.evaluation import ensemble
from orchestrator.storage import Storage
from orchestrator.training.finished_model import find_model


def note_of(folder: Storage, campaign: Campaign, recipes: Mapping[str, TrainConfig], status: Status) -> CampaignNote:
    """``recipes``: each member's config without what a person has changed. Raises OSError where storage fails."""
    configs = campaign.run_configs()
    return CampaignNote(
        members=tuple(_member(row, configs[row.name], recipes[row.name]) for row in status.rows),
        ensemble=_ensemble(folder, campaign),
        submission=submission_url(folder) or "",
    )


def _member(row: Row, config: TrainConfig, recipe: TrainConfig) -> MemberNote:
    end = {State.DONE: RunStatus.FINISHED, State.FAILED: RunStatus.FAILED}.get(row.state)
    return MemberNote(
        name=row.name,
        config=config,
        recipe=recipe,
        state=f"failed: {row.said}" if row.state is State.FAILED else row.state.value,
        end=None if row.is_running else end,
        errors={key: value for key, value in row.errors.items() if key != "validation_top1_error"},
        model=find_model(config) if row.state is State.DONE else None,
    )


def _ensemble(folder: Storage, campaign: Campaign) -> EnsembleNote | None:
    """The one that is submitted, with the errors of all; None before all are there."""
    made = {protocol: read_ensemble(folder, protocol) for protocol in campaign.config.evaluation.protocols}
    champion = campaign.submitted or campaign.config.evaluation.protocols[-1]
    best = made[champion]
    errors, figures = dict[str, float](), list[str]()
    for protocol, each in made.items():
        if each is None:
            return None
        for split, found in each.errors.items():
            errors[f"{split}_{protocol.value}_top1_error"] = found.top1_error
            errors[f"{split}_{protocol.value}_top5_error"] = found.top5_error
        figures += [f"{ensemble_folder(folder, protocol).url}/{n}" for n in each.files if n.endswith(".png")]
    assert best is not None
    return EnsembleNote(
        url=f"{ensemble_folder(folder, champion).url}/{ensemble.MANIFEST}",
        manifest=best.to_json(),
        weights=best.weights,
        errors=errors,
        figures=tuple(figures),
    )
