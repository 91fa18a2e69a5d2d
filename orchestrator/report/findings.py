"""What lies in storages: runs, campaigns and ensembles, as numbers for a report. Reads, and writes nothing.

What is damaged is named with its error, and the rest is read on. Object stores that refuse or are away raise as
everywhere (StoreRefusedError, StoreUnreachableError).
"""

from __future__ import annotations

import json
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from typing import Any, TypeVar

from orchestrator.campaign import status
from orchestrator.config import ModelConfig, TrainConfig
from orchestrator.control.bottleneck import account_of
from orchestrator.control.curves import Curve
from orchestrator.data.shards import DataSet
from orchestrator.evaluation import ensemble, scores
from orchestrator.evaluation.ensemble import Choice
from orchestrator.evaluation.layer_record import LayerRecord, newest_record
from orchestrator.evaluation.layer_responses import LayerNumbers
from orchestrator.plain import from_plain
from orchestrator.remote import StoreRefusedError, StoreUnreachableError
from orchestrator.report.tested import DAMAGE, Procedure, Test, procedure, said, tests_of
from orchestrator.storage import Storage
from orchestrator.training.checkpoint import newest_journal
from orchestrator.training.finished_model import find_models
from orchestrator.training.notices import Event
from orchestrator.training.optimization import total_steps
from orchestrator.training.run import Outcome, config_of, data_digest, finished

_DEPTH = 3  # folders below a storage that are looked into for runs and campaigns
Found = TypeVar("Found")


@dataclass(frozen=True)
class DataFacts:
    """A run's data set; None, or "", where it cannot be read any more and nothing else tells.

    validation_is_test: whether the test set stands in for the validation split; False: images apart, or no test set.
    """

    sha256: str
    name: str = ""
    train_images: int | None = None
    validation_images: int | None = None
    classes: int | None = None
    validation_is_test: bool | None = None


@dataclass(frozen=True)
class Run:
    """A run as its folder tells. Errors in percent, None where none was measured.

    url: of its folder; campaign: name of the one it is a member of, or ""; step: of its newest measurement; steps: of
    the whole run, None where that is not known; seconds: that the journal accounts for; layers: of the newest file,
    as they lie, measured after layers_step; problems: what could not be read.
    """

    url: str
    name: str
    campaign: str
    config: TrainConfig
    data: DataFacts
    step: int
    steps: int | None
    is_finished: bool
    curve: Curve
    last_top1: float | None
    last_top5: float | None
    best_top1: float | None
    seconds: float
    bottleneck: str
    tests: tuple[Test, ...] = ()
    layers: tuple[LayerNumbers, ...] = ()
    layers_step: int = 0
    problems: tuple[str, ...] = ()

    def tested(self, split: str, protocol: str, procedure: Procedure) -> Test | None:
        """The newest such test of its farthest step."""
        wanted = (split, protocol, procedure)
        found = [test for test in self.tests if (test.split, test.protocol, test.procedure) == wanted]
        return max(found, key=lambda test: (test.step, test.time_ms), default=None)


@dataclass(frozen=True)
class Ensemble:
    """An average of members, whose networks are ``models`` (None where the record does not tell).

    runs: URLs of the members' folders when it was made, or ""; errors: by labelled split, (top-1, top-5, images), where
    members were chosen on the same images of folds that had no part in it: those splits are held_out; procedures: how
    members were tested, without what the paper does.
    """

    url: str
    protocol: str
    members: tuple[str, ...]
    runs: tuple[str, ...]
    models: tuple[ModelConfig | None, ...]
    data_name: str
    classes: int | None
    errors: Mapping[str, tuple[float, float, int]]
    choice: Choice = Choice.PLAIN
    held_out: tuple[str, ...] = ()
    procedures: tuple[str, ...] = ()


@dataclass(frozen=True)
class Campaign:
    """How a campaign stands: (member, its state) in its order."""

    url: str
    name: str
    members: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Damaged:
    """What could not be read at all, and why."""

    url: str
    error: str


@dataclass(frozen=True)
class Findings:
    """All that was found, in the order of the storages and names."""

    runs: tuple[Run, ...]
    ensembles: tuple[Ensemble, ...] = ()
    campaigns: tuple[Campaign, ...] = ()
    damaged: tuple[Damaged, ...] = ()


def read(storages: Sequence[Storage]) -> Findings:
    """Everything in ``storages``, each the folder of runs and campaigns, or above it, or itself one.

    Raises ValueError where one is not there or holds nothing of the kind, OSError where it cannot be listed.
    """
    reader = _Reader()
    for storage in storages:
        storage.files()  # what cannot be listed is refused, and is named as damaged only where it lies deeper
        reader.look(storage, "", _DEPTH)
        if not reader.has(storage):
            if not storage.files() and not storage.folders(""):
                raise ValueError(f"there is nothing at {storage.url}: give --storage as when the runs were started")
            raise ValueError(
                f"no run, campaign or ensemble is in {storage.url} (looked {_DEPTH} folders deep): give --storage as "
                "when the runs were started"
            )
    return Findings(tuple(reader.runs), tuple(reader.ensembles), tuple(reader.campaigns), tuple(reader.damaged))


class _Reader:
    def __init__(self) -> None:
        self.runs: list[Run] = []
        self.ensembles: list[Ensemble] = []
        self.campaigns: list[Campaign] = []
        self.damaged: list[Damaged] = []
        self._looked: dict[str, int] = {}  # folder → how deep
        self._taken: set[str] = set()

    def has(self, folder: Storage) -> bool:
        """Whether anything was found in ``folder``, or is what it is."""
        return any(f"{url}/".startswith(f"{folder.url.rstrip('/')}/") for url in self._taken)

    def look(self, folder: Storage, campaign: str, depth: int) -> None:
        """At ``folder``, and at what is in it, to ``depth`` folders below."""
        if self._looked.get(folder.url, -1) >= depth:  # one storage lies in another
            return
        self._looked[folder.url] = depth
        try:
            files, folders = set(folder.files()), folder.folders("")
        except StoreUnreachableError:
            raise
        except OSError as error:
            self._damaged(folder, error)
            return
        if "config.json" in files:
            self._take(folder, self.runs, lambda: read_run(folder, campaign))
        elif "campaign.json" in files:
            self._take(folder, self.campaigns, lambda: _campaign(folder))
            name = folder.url.rpartition("/")[2]
            for part in ("members", "ensemble"):
                if part in folders:
                    self._look_into(folder.sub(part), name, 1)
        elif ensemble.MANIFEST in files:
            if scores.FOLDER in folders:  # else a copy of the manifest, as MLflow keeps one
                self._take(folder, self.ensembles, lambda: _ensemble(folder))
        elif "manifest.json" not in files:  # a data set has many files and no runs
            self._look_into(folder, campaign, depth)

    def _look_into(self, folder: Storage, campaign: str, depth: int) -> None:
        if depth > 0:
            try:
                names = folder.folders("")
            except StoreUnreachableError:
                raise
            except OSError as error:
                self._damaged(folder, error)
                return
            for name in names:
                if not name.startswith("."):
                    self.look(folder.sub(name), campaign, depth - 1)

    def _take(self, folder: Storage, found: list[Found], look: Callable[[], Found]) -> None:
        if folder.url in self._taken:
            return
        self._taken.add(folder.url)
        try:
            found.append(look())
        except (StoreRefusedError, StoreUnreachableError):
            raise
        except DAMAGE as error:
            self.damaged.append(Damaged(folder.url, said(error)))

    def _damaged(self, folder: Storage, error: OSError) -> None:
        if folder.url not in self._taken:
            self._taken.add(folder.url)
            self.damaged.append(Damaged(folder.url, said(error)))


# -- a run ----------------------------------------------------------------------------------------------------------


def read_run(run: Storage, campaign: str = "") -> Run:
    """The run in ``run``. Raises ValueError where its identity cannot be read."""
    parent, _, name = run.url.rpartition("/")
    config = config_of(run, TrainConfig(storage=parent or "/", name=name if not name.startswith(".") else ""))
    problems: list[str] = []
    outcome = _outcome(run, problems.append)
    journal = newest_journal(run)
    if not journal and any(each.endswith(".json") for each in run.files("checkpoints")):
        problems.append(f"no checkpoint of {run.url} has a journal that can be read")
    events = [event for event in journal if isinstance(event, dict)]
    curve, times = Curve.of(events), account_of(events)
    data = _data_facts(run, config, events)
    validations = [event["metrics"] for event in events if event.get("kind") == "validation"]
    step = max((int(event["step"]) for event in events if "step" in event), default=0)
    if outcome is not None:
        step, steps = outcome.steps, outcome.steps
    elif data.train_images or not config.schedule.max_epochs:
        steps = total_steps(config.schedule, data.train_images or 1, config.batch.global_batch_size)
    else:
        steps = None
    tests = tuple(tests_of(run, config, outcome.steps if outcome else 0, problems.append))
    measured = _layers(run, problems.append)
    return Run(
        url=run.url,
        name=name,
        campaign=campaign,
        config=config,
        data=data,
        step=step,
        steps=steps,
        is_finished=outcome is not None,
        curve=curve,
        last_top1=outcome.validation_top1_error if outcome else _last(validations, "validation_top1_error"),
        last_top5=outcome.validation_top5_error if outcome else _last(validations, "validation_top5_error"),
        best_top1=outcome.best_validation_top1_error if outcome else min(curve.validation.values(), default=None),
        seconds=times.seconds,
        bottleneck=times.bottleneck(),
        tests=tests,
        layers=measured.layers if measured is not None else (),
        layers_step=measured.step if measured is not None else 0,
        problems=tuple(problems),
    )


def _outcome(run: Storage, problem: Callable[[str], None]) -> Outcome | None:
    try:
        outcome = finished(run)
        if outcome is not None:
            return typing.cast(Outcome, from_plain(Outcome, asdict(outcome), "finished.json"))
    except (StoreRefusedError, StoreUnreachableError):
        raise
    except (ValueError, OSError) as error:
        problem(f"{run.url}/finished.json cannot be read ({said(error)})")
        return None
    if run.exists("finished.json"):
        problem(f"{run.url}/finished.json is damaged: the run's own command makes it again")
    return None


def _layers(run: Storage, problem: Callable[[str], None]) -> LayerRecord | None:
    record = newest_record(run, problem)
    if record is not None and not all(layer.is_finite for layer in record.layers):
        problem(f"{run.url}/{record.name} has numbers that are not finite")
        return None
    return record


def _last(validations: Sequence[Mapping[str, float]], key: str) -> float | None:
    return validations[-1].get(key) if validations else None


def _data_facts(run: Storage, config: TrainConfig, events: Sequence[Event]) -> DataFacts:
    """From the data set itself, where it is still the one; else from what the run has left."""
    sha256 = data_digest(run)
    if config.data:
        with suppress(ValueError, OSError):
            data = DataSet(Storage(config.data))
            if data.digest == sha256:
                splits = data.manifest.splits
                train, val = (splits[name].count if name in splits else None for name in ("train", "val"))
                is_test = {"val", "test"} <= splits.keys() and splits["val"] == splits["test"]
                return DataFacts(sha256, data.manifest.name, train, val, data.num_classes, is_test)
    facts = DataFacts(sha256)
    for event in reversed(events):  # "epoch" is step · batch / images
        if isinstance(epoch := event.get("epoch"), int | float) and epoch > 0:
            images = round(event["step"] * config.batch.global_batch_size / epoch)
            facts = replace(facts, train_images=images)
            break
    if models := find_models(run):
        facts = replace(facts, classes=models[-1].num_classes)
    for record in _records(run):
        if record.info.data["sha256"] == sha256:
            return replace(facts, name=str(record.info.data["name"]), classes=len(record.info.classes))
    return facts


def _records(run: Storage) -> Iterator[scores.ScoreRecord]:
    for name in run.files(scores.FOLDER):
        with suppress(ValueError, KeyError):
            if name.endswith(".json") and (record := scores.read_record(run, f"{name[:-5]}.arrow")) is not None:
                yield record


# -- campaigns and ensembles ----------------------------------------------------------------------------------------


def _campaign(folder: Storage) -> Campaign:
    found = status.read(folder)
    members = tuple((row.name, f"{row.state.value}{f': {row.said}' if row.said else ''}") for row in found.rows)
    return Campaign(folder.url, found.name, members)


def _ensemble(folder: Storage) -> Ensemble:
    made = ensemble.Ensemble.from_json(json.loads(folder.read(ensemble.MANIFEST)))
    if not made.scores:
        raise ValueError(f"{folder.url}/{ensemble.MANIFEST} names no score file: make the ensemble again")
    record = scores.read_record(folder, next(iter(made.scores.values())))
    configs = [_config_of(member.model) for member in made.members]
    how = [procedure(made.protocol, member.model, config) for member, config in zip(made.members, configs, strict=True)]
    errors = dict(made.errors) | dict(made.held_out)
    return Ensemble(
        folder.url,
        str(made.protocol["kind"]),
        tuple(str(member.name) for member in made.members),
        tuple(str(member.model.get("run", "")) for member in made.members),
        tuple(config.model if config is not None else None for config in configs),
        str(made.data["name"]),
        len(record.info.classes) if record is not None else None,
        {split: (each.top1_error, each.top5_error, each.num_images) for split, each in errors.items()},
        made.choice,
        tuple(made.held_out),
        tuple(dict.fromkeys(filter(None, map(str, how)))),
    )


def _config_of(record: Mapping[str, Any]) -> TrainConfig | None:
    """Of a finished model's record: model and input alone are its own."""
    with suppress(ValueError, KeyError, TypeError):
        plain = TrainConfig().to_json()
        return TrainConfig.from_json(plain | {key: plain[key] | record["config"][key] for key in ("model", "input")})
    return None
