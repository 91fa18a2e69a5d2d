"""How a campaign stands, as whoever runs it says, and the same in words: a line, tables, descriptions, in Markdown."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from orchestrator.campaign.spread import Spread, spreads
from orchestrator.config import TrainConfig
from orchestrator.control.comparison import TABLE_BEGINS
from orchestrator.control.description import network
from orchestrator.control.entries import UNTIL, RunStatus
from orchestrator.control.mlflow_store import first_line
from orchestrator.masking import masked
from orchestrator.training.finished_model import ModelRecord
from orchestrator.training.run import run_storage

_TOP1 = "_top1_error"
_MAX_STATE_LENGTH = 80
_MAX_TABLE_LENGTH = 6000  # MLflow takes 8000 characters of description


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


# -- numbers ----------------------------------------------------------------------------------------------------


def tests_of(note: CampaignNote) -> list[str]:
    """Metrics that are top-1 errors of members or of the ensemble, in the order in which they come."""
    errors = [member.errors for member in note.members] + ([note.ensemble.errors] if note.ensemble else [])
    return list(dict.fromkeys(key for each in errors for key in each if key.endswith(_TOP1)))


def best_member(members: Sequence[MemberNote], test: str) -> MemberNote | None:
    """The member with the lowest error in ``test``; of equals the first."""
    tested = [member for member in members if math.isfinite(member.errors.get(test, math.nan))]
    return min(tested, key=lambda member: member.errors[test], default=None)


def spreads_of(note: CampaignNote) -> list[Spread]:
    """Mean and deviation of members that differ in their seed alone."""
    configs = {member.name: member.config for member in note.members}
    return spreads(configs, {member.name: member.errors for member in note.members}, tests_of(note))


def shown(errors: Mapping[str, float]) -> dict[str, float]:
    """As MLflow is to show them: six digits, and no number that it could not hold."""
    return {key: float(f"{value:.6g}") for key, value in errors.items() if math.isfinite(value)}


# -- words ------------------------------------------------------------------------------------------------------


def result(note: CampaignNote, status: RunStatus) -> str:
    """The line of results; it begins as ``comparison.with_result`` looks for it."""
    done = sum(member.end is RunStatus.FINISHED for member in note.members)
    lost = [member.name for member in note.members if member.end not in (None, RunStatus.FINISHED)]
    parts = [f"{done} of {len(note.members)} members done" + (f" ({', '.join(lost)} failed)" if lost else "")]
    over_seeds = spreads_of(note)
    for test in tests_of(note):
        best = best_member(note.members, test)
        of_best = f"best member {_percent(best.errors[test])} ({best.name})" if best else ""
        if note.ensemble and test in note.ensemble.errors:
            of_all = f"ensemble of {len(note.ensemble.weights)}: {_percent(note.ensemble.errors[test])}"
            parts.append(f"{_words(test)}: {of_all}" + (f", {of_best}" if of_best else ""))
        elif of_best:
            parts.append(f"{_words(test)}: {of_best}")
        parts += [f"{each.what}: {each} over {len(each.members)} seeds" for each in over_seeds if each.test == test]
    if note.submission:
        parts.append(f"submission `{masked(note.submission)}`")
    return f"**Result{UNTIL[status]}:** {'; '.join(parts)}".replace("\n", " ")


def members_table(note: CampaignNote, links: Mapping[str, str]) -> str:
    """A row a member and one of the ensemble; ``links``: Markdown, by member ("" for the ensemble)."""
    tests = tests_of(note)
    head = ["Member", "State", "Network", "Seed", *(_words(test) for test in tests), "MLflow"]
    rows = [
        [
            _cell(member.name),
            _cell(first_line(member.state))[:_MAX_STATE_LENGTH],
            _cell(network(member.config.model)),
            str(member.config.seed),
            *(_percent(member.errors.get(test)) for test in tests),
            links.get(member.name, ""),
        ]
        for member in note.members
    ]
    if note.ensemble:
        errors = [f"**{_percent(note.ensemble.errors[t])}**" if t in note.ensemble.errors else "" for t in tests]
        rows.append(["**ensemble**", f"of {len(note.ensemble.weights)}", "", "", *errors, links.get("", "")])
    return _table(head, rows)


def ensemble_table(note: CampaignNote, links: Mapping[str, str]) -> str:
    """What the ensemble is made of."""
    assert note.ensemble
    tests = tests_of(note)
    by_name = {member.name: member for member in note.members}
    rows = []
    for name, weight in note.ensemble.weights.items():
        errors = by_name[name].errors if name in by_name else {}
        rows.append([_cell(name), f"{weight:.4g}", *(_percent(errors.get(t)) for t in tests), links.get(name, "")])
    return _table(["Member", "Weight", *(_words(test) for test in tests), "MLflow"], rows)


def ensemble_result(note: CampaignNote) -> str:
    """The ensemble's line of results."""
    assert note.ensemble
    errors = note.ensemble.errors
    parts = [f"{_words(test)} {_percent(errors[test])} top-1 error" for test in tests_of(note) if test in errors]
    if note.submission:
        parts.append(f"submission `{masked(note.submission)}`")
    return f"**Result:** {'; '.join(parts) or 'no test'}"


def member_version(member: MemberNote, link: str) -> str:
    """What a member's version is."""
    assert member.model
    m = member.model
    bn = f", batch norm's statistics over {m.precise_bn_images} images" if m.precise_bn_images else ""
    return (
        f"{network(member.config.model)}, seed {member.config.seed}: member {member.name} at step {m.step}{bn}.\n\n"
        f"- In MLflow: {link}\n"
        f"- Model: `{model_url(m)}`, SHA-256 `{m.sha256}`\n"
        f"- Of checkpoint: `{masked(m.checkpoint)}`, SHA-256 `{m.checkpoint_sha256}`\n"
        f"- Data set: SHA-256 `{m.data_sha256}`; code {m.code_version}"
    )


def ensemble_version(note: CampaignNote, link: str) -> str:
    """What an ensemble's version is."""
    assert note.ensemble
    models = {member.name: member.model for member in note.members}
    lines = [f"Ensemble of {len(note.ensemble.weights)}: {', '.join(note.ensemble.weights)}.", ""]
    lines += [f"- In MLflow: {link}", f"- Manifest: `{masked(note.ensemble.url)}`"]
    for name, weight in note.ensemble.weights.items():
        model = models.get(name)
        what = f": `{model_url(model)}`, SHA-256 `{model.sha256}`" if model else ""
        lines.append(f"- {weight:.4g} × `{name}`{what}")
    return "\n".join(lines)


def model_url(model: ModelRecord) -> str:
    """Where the file is."""
    return masked(f"{model.run}/{model.file}")


def run_key(member: MemberNote) -> str:
    """By which the member's run is found in MLflow: the URL of its folder."""
    return run_storage(member.config).url


def _percent(error: float | None) -> str:
    return "" if error is None else f"{error:.2f} %"


def _words(test: str) -> str:
    return test.removesuffix(_TOP1).replace("_", " ")


def _cell(text: str) -> str:
    return text.replace("\n", " ").replace("|", "\\|")


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Begins as ``comparison.with_table`` looks for it; what would be too long is cut at the end, and says so."""
    lines = [f"| {' | '.join(head)} |", f"|{' --- |' * len(head)}"]
    assert lines[0].startswith(TABLE_BEGINS)
    for number, row in enumerate(rows):
        line = f"| {' | '.join(row)} |"
        if sum(len(each) + 1 for each in lines) + len(line) > _MAX_TABLE_LENGTH:
            lines.append(f"| … and {len(rows) - number} more |{' |' * (len(head) - 1)}")
            break
        lines.append(line)
    return "\n".join(lines)
