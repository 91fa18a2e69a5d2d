"""A campaign in the tracking store: one run with children, and the models that came of it; beside ``mlflow_store``.

One registered model a campaign: its page then lists all that the campaign has made, members and ensembles as numbered
versions with an alias each, and "champion" means the best answer to one question. A model a network would part the
members of an ensemble, and mix those of campaigns on other data. A version is a note: where the finished model lies in
storage, and its digests; nothing is copied.

Nothing here is patient: a call that fails raises, and ``tracking`` tries again. Everything is looked up before
it is made, so that whatever was done and not answered is not done twice.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from orchestrator.control.comparison import NOTE_TAG, page, with_result, with_table
from orchestrator.control.mlflow_store import MlflowRun, like, open_store, runs_of

CHAMPION = "champion"
_PARENT_TAG = "mlflow.parentRunId"
_KEY_TAG, _ALIAS_TAG = "key", "alias"
_MAX_DESCRIPTION_LENGTH = 4900  # MLflow takes 5000 characters


@dataclass(frozen=True)
class Version:
    """A version of the campaign's model, as it is to be.

    ``key``: what makes two versions one. ``url``: where it is in storage. ``artifact``: a small file of the run
    ``run_id`` that holds ``content``, which says the same: servers refuse the name of a file on a disk, which could be
    one of their own.
    ``tags`` are kept up to date; ``description``, and ``alias``, which whoever came last has, are set once.
    """

    key: str
    alias: str
    url: str
    run_id: str
    artifact: str
    content: str
    tags: Mapping[str, str]
    description: str


class MlflowCampaign:
    """The runs and the registered model of the campaign whose run is ``parent``; for one thread.

    After a method has raised, ``connect`` must be called before any other.
    """

    def __init__(self, parent: MlflowRun) -> None:
        self.parent = parent
        self.experiment_id = ""
        self._client: Any = None
        self._model_name = ""

    def connect(self, start_time_ms: int) -> dict[str, set[int]]:
        """Find the campaign's run or create it as of ``start_time_ms``; return the steps it holds, by metric."""
        held = self.parent.connect(start_time_ms)
        self._client, self.experiment_id = open_store(self.parent.uri, self.parent.experiment)
        return held

    # -- runs ---------------------------------------------------------------------------------------------------

    def run(self, run_key: str) -> Any:
        """MLflow's run of this run key in the campaign's experiment, or None; of several the one with most metrics."""
        found = runs_of(self._client, self.experiment_id, run_key)
        return min(found, key=lambda run: (-len(run.data.metrics), run.info.start_time), default=None)

    def latest(self) -> dict[str, float]:
        """The newest value of each metric of the campaign's run."""
        return dict(self._client.get_run(self.parent.run_id).data.metrics)

    def child_tags(self) -> dict[str, str]:
        """What makes a run a child of the campaign's; ``campaign`` is for people who search."""
        assert self.parent.run_id is not None
        return {_PARENT_TAG: self.parent.run_id, "campaign": self.parent.name}

    def adopt(self, run: Any) -> None:
        """Make ``run`` a child."""
        for key, value in self.child_tags().items():
            if run.data.tags.get(key) != value:
                self._client.set_tag(run.info.run_id, key, value)

    def tell(self, run_id: str, result: str, table: str) -> None:
        """Bring a description's line of results and table up to date; a person may have changed the rest, or all."""
        note = self._client.get_run(run_id).data.tags.get(NOTE_TAG, "")
        new = with_table(with_result(note, result), table)
        if new != note:
            self._client.set_tag(run_id, NOTE_TAG, new)

    def put_text(self, run_id: str, name: str, text: str) -> None:
        """Store a small file of a run."""
        self._client.log_text(run_id, text, name)

    def link(self, run_id: str, text: str = "run") -> str:
        """Markdown that leads to a run."""
        return f"[{text}]({page(self.experiment_id, f'runs/{run_id}')})"

    # -- the registered model -----------------------------------------------------------------------------------

    def register(self, versions: Sequence[Version], description: str) -> None:
        """Bring the campaign's model to ``versions``, in this order; ``description`` is that of a new model."""
        if not versions:
            return
        model = self._found_model() or self._created_model(description)
        self._model_name = model.name
        stored: dict[str, list[Any]] = {}
        for found in self._client.search_model_versions(f"name LIKE '{like(model.name)}'"):
            if found.name == model.name:
                stored.setdefault(found.tags.get(_KEY_TAG, ""), []).append(found)
        for version in versions:
            first, *twins = sorted(stored.get(version.key, []), key=lambda one: int(one.version)) or [None]
            for twin in twins:  # of a creation that was stored late
                if _ALIAS_TAG not in twin.tags:
                    self._client.delete_model_version(model.name, twin.version)
            self._bring(first or self._created_version(version), version)

    def _bring(self, found: Any, version: Version) -> None:
        for key, value in version.tags.items():
            if found.tags.get(key) != value:
                self._client.set_model_version_tag(self._model_name, found.version, key, value)
        if _ALIAS_TAG not in found.tags:  # where it is, a person may have moved the alias since
            self._client.set_registered_model_alias(self._model_name, version.alias, found.version)
            self._client.set_model_version_tag(self._model_name, found.version, _ALIAS_TAG, version.alias)

    def _created_version(self, version: Version) -> Any:
        from mlflow.exceptions import MlflowException

        def create(source: str) -> Any:
            return self._client.create_model_version(
                self._model_name,
                source=source,
                run_id=version.run_id,
                tags={_KEY_TAG: version.key, **version.tags},
                description=version.description[:_MAX_DESCRIPTION_LENGTH],
                await_creation_for=None,
            )

        self.put_text(version.run_id, version.artifact, version.content)
        try:
            return create(version.url)
        except MlflowException as error:
            if error.error_code != "INVALID_PARAMETER_VALUE":
                raise
            return create(f"runs:/{version.run_id}/{version.artifact}")

    def _found_model(self) -> Any:
        run_key = self.parent.run_key
        similar = self._client.search_registered_models(f"tags.run_key LIKE '{like(run_key)}'")
        return next((model for model in similar if model.tags.get("run_key") == run_key), None)

    def _created_model(self, description: str) -> Any:
        from mlflow.exceptions import MlflowException

        run_key = self.parent.run_key
        name = re.sub(r"[/:\"'`]", "_", self.parent.name).strip() or "campaign"
        for each in (name, f"{name} {hashlib.sha256(run_key.encode()).hexdigest()[:8]}"):
            try:
                return self._client.create_registered_model(
                    each,
                    tags={"run_key": run_key, "campaign": self.parent.name},
                    description=description[:_MAX_DESCRIPTION_LENGTH],
                )
            except MlflowException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS" or each != name:
                    raise
        raise AssertionError("unreachable")


def alias_of(member: str) -> str:
    """The alias of a member: its name, where MLflow takes that for one."""
    cleaned = re.sub(r"[^\w-]", "_", member, flags=re.ASCII)[:200]
    if cleaned != member:  # another member's name may become the same
        cleaned += f"-{hashlib.sha256(member.encode()).hexdigest()[:6]}"
    is_reserved = cleaned.lower() in ("latest", CHAMPION) or re.fullmatch(r"[vV]\d+", cleaned)
    return f"member-{cleaned}" if is_reserved else cleaned
