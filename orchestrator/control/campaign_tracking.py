"""A campaign in MLflow: a parent run, its members as children, the ensemble as one more, and the registered models.

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

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from orchestrator.config import TrainConfig
from orchestrator.control.comparison import DataNote
from orchestrator.control.entries import RunStatus
from orchestrator.storage import Storage
from orchestrator.training.finished_model import ModelRecord

__all__ = ["CampaignDelivery", "CampaignNote", "CampaignTracker", "EnsembleNote", "MemberNote"]


@dataclass(frozen=True, kw_only=True)
class MemberNote:
    """How a member stands.

    ``config``: what it trains, with absolute URLs (``supervisor.resolve``); ``name`` is its name in the campaign.
    ``recipe``: the config without what a person has changed (tag ``changes``). ``state``: a word or two for the table
    ("waiting", "training", "finished", "failed: disk full"). ``end``: how it ended, once no process of it is at work
    and none will be: FINISHED or FAILED; from then on what its own processes could not deliver is delivered here.
    ``errors``: percent, by metric as the member's own run shows it (``val_ten_crop_top1_error``); top-1 errors become
    columns of the table. ``model``: its finished model, once there is one; a version in the registry.
    """

    name: str
    config: TrainConfig
    recipe: TrainConfig
    state: str
    end: RunStatus | None = None
    errors: Mapping[str, float] = field(default_factory=dict)
    model: ModelRecord | None = None


@dataclass(frozen=True, kw_only=True)
class EnsembleNote:
    """An ensemble that was built. ``manifest`` is its identity: another one is another ensemble, and the new champion.

    ``url``: of the file in storage that holds ``manifest``: plain JSON without times, with what makes the ensemble
    (URLs and digests of score files and finished models, weights, protocol, errors). ``weights``: by name of member.
    ``errors``: percent, by metric, as ``MemberNote.errors``. ``figures``: URLs of PNG files in storage, to be shown.
    """

    url: str
    manifest: Mapping[str, Any]
    weights: Mapping[str, float]
    errors: Mapping[str, float]
    figures: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class CampaignNote:
    """How a campaign stands: its members in the order of the recipe, and what came of them.

    ``submission``: URL of the file for the competition, once it was written.
    """

    members: tuple[MemberNote, ...]
    ensemble: EnsembleNote | None = None
    submission: str = ""


@dataclass(frozen=True)
class CampaignDelivery:
    """What became of the last state: ``error`` is None where MLflow shows all of it; else the next start brings it.

    ``where`` says how to look at the campaign.
    """

    error: str | None
    run_id: str | None
    where: str


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
        raise NotImplementedError

    def tell(self, note: CampaignNote) -> None:
        """How the campaign stands now. Returns at once; an equal state costs nothing."""
        raise NotImplementedError

    def close(self, timeout_s: float, status: RunStatus, reason: str = "") -> CampaignDelivery:
        """Draw the last figure, deliver the last state and set the run's status, all within about ``timeout_s``.

        ``status`` RUNNING: another driver goes on with the campaign. ``reason``: why it failed.
        """
        raise NotImplementedError
