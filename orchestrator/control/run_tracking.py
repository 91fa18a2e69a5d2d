"""The tracker of one training run, told what the run's folder remembers, and the figure that it draws."""

from __future__ import annotations

import contextlib
import functools
import socket
import tempfile
from pathlib import Path

from orchestrator.code_version import code_version
from orchestrator.config import TrainConfig
from orchestrator.control.description import data_note, network, run_description
from orchestrator.control.tracking import Tracker
from orchestrator.evaluation.results import result_events
from orchestrator.plain import differences
from orchestrator.storage import Storage
from orchestrator.training.checkpoint import Checkpoints, checkpoint_event, newest_journal
from orchestrator.training.notices import Event
from orchestrator.training.ownership import newest_attempt
from orchestrator.training.run import data_digest

FIGURE = "figures/errors.png"


def open_tracker(
    config: TrainConfig,
    recipe: TrainConfig | None,
    *,
    uri: str,
    run: Storage,
    command: str,
    system_metrics: bool = True,
) -> Tracker:
    """MLflow's side of the run in ``run``; ``command`` goes on with it after an interruption.

    ``recipe``: the config without what a person has changed; None: whoever trained the run has told what it is.
    ``system_metrics``: of this node, which trains the run. Raises OSError and ValueError for a folder that cannot be
    read or has no run.
    """
    data = data_note(config.data, data_digest(run))
    tags: dict[str, str] = {}
    if recipe is not None:
        changes = sorted(differences(recipe.identity(), config.identity()), key=lambda line: line.startswith("rhythm."))
        tags = {
            "recipe": config.recipe,
            "changes": "; ".join(changes).replace('"', "") or "none",
            "network": network(config.model),
            "starts": str(newest_attempt(run)),
            "code_version": code_version(),
            "host": socket.gethostname(),
        }
    tracker = Tracker(
        uri=uri,
        experiment=config.tracking.experiment,
        name=config.name,
        run_key=run.url,
        params=config.identity(),
        tags=tags,
        description=run_description(
            model=config.model,
            batch=config.batch,
            schedule=config.schedule,
            data=data,
            crop_px=config.input.crop_px,
            seed=config.seed,
            run_url=run.url,
            command=command,
        ),
        data=data,
        figure_dir=figure_path(run).parent,
        system_metrics=system_metrics,
    )
    tracker.replay(journal_of(run))
    best = Checkpoints(run, attempt=0, keep_last=1, notice=lambda text: None).best()
    if best is not None:
        tracker.replay([checkpoint_event(run, best, is_best=True)])
    return tracker


def journal_of(run: Storage) -> list[Event]:
    """All that MLflow is to show: the run's journal, and what its tests came to, which are after its end."""
    return [*newest_journal(run), *result_events(run)]


def figure_path(folder: Storage) -> Path:
    """Inside ``folder`` where that is on a local disk; else in one that this process takes along."""
    return folder.local_path(FIGURE) or Path(_temporary(folder.url).name) / "errors.png"


def keep_figure(folder: Storage) -> None:
    """Bring the figure to a remote ``folder``: it is drawn on this machine. Never raises."""
    path = figure_path(folder)
    if not folder.is_local and path.exists():
        with contextlib.suppress(OSError, ValueError):  # MLflow has it too
            folder.publish(FIGURE, path.read_bytes())


@functools.cache
def _temporary(url: str) -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="figures-")
