"""What of a campaign is registered as a model: a version for each finished member, and one for each ensemble."""

from __future__ import annotations

import json
from collections.abc import Mapping

from orchestrator.campaign import note as words
from orchestrator.campaign.mlflow_campaign import CHAMPION, Version, alias_of
from orchestrator.campaign.note import CampaignNote, EnsembleNote, MemberNote
from orchestrator.control.entries import RunStatus
from orchestrator.masking import masked
from orchestrator.plain import digest
from orchestrator.training.finished_model import ModelRecord


def versions(
    note: CampaignNote, run_ids: Mapping[str, str], ensemble_id: str | None, links: Mapping[str, str]
) -> list[Version]:
    """What is done, and has a run. ``run_ids``: by member; ``links``: Markdown, by member ("" for the ensemble)."""
    found = []
    for member in note.members:
        run_id = run_ids.get(member.name)
        if member.end is RunStatus.FINISHED and member.model is not None and run_id is not None:
            found.append(_of_member(member, member.model, run_id, links[member.name]))
    if note.ensemble is not None and ensemble_id is not None:
        found.append(_of_ensemble(note, note.ensemble, ensemble_id, links[""]))
    return found


def model_description(campaign: str, folder_url: str) -> str:
    """Of the registered model; ``campaign``: Markdown that leads to it."""
    return (
        f"What the campaign {campaign} has made. Each member that is done is a version with its name for an alias;"
        f" `{CHAMPION}` is the newest ensemble. Versions are notes: the weights are where the tag `url` says, with the"
        f" SHA-256 in `sha256`. Folder: `{masked(folder_url)}`"
    )


def ensemble_digest(ensemble: EnsembleNote) -> str:
    """What makes two ensembles one."""
    return digest(dict(ensemble.manifest))


def manifest_text(ensemble: EnsembleNote) -> str:
    """The manifest as people and programs read it."""
    return masked(json.dumps(ensemble.manifest, indent=1, sort_keys=True))


def _of_member(member: MemberNote, model: ModelRecord, run_id: str, link: str) -> Version:
    tags = {"kind": "member", "url": words.model_url(model), "sha256": model.sha256}  # MLflow's list shows them all
    return Version(
        key=f"{member.name} {model.sha256}",
        alias=alias_of(member.name),
        url=words.model_url(model),
        run_id=run_id,
        artifact="model.json",
        content=masked(json.dumps(model.to_json(), indent=1, sort_keys=True)),
        tags=tags | _shown(member.errors),
        description=words.member_version(member, link),
    )


def _of_ensemble(note: CampaignNote, ensemble: EnsembleNote, run_id: str, link: str) -> Version:
    tags = {"kind": "ensemble", "url": masked(ensemble.url)}
    if note.submission:
        tags["submission"] = masked(note.submission)
    return Version(
        key=f"ensemble {ensemble_digest(ensemble)}",
        alias=CHAMPION,
        url=masked(ensemble.url),
        run_id=run_id,
        artifact="ensemble.json",
        content=manifest_text(ensemble),
        tags=tags | _shown(ensemble.errors),
        description=words.ensemble_version(note, link),
    )


def _shown(errors: Mapping[str, float]) -> dict[str, str]:
    return {key: f"{value:g}" for key, value in words.shown(errors).items()}
