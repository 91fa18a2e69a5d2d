"""What a start needs, one check each: the real start stops at the first that refuses, a dry run makes them all.

A check takes what earlier ones have found, says in words what it found, and raises ValueError, saying what to do, for
what would not go on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum

import torch
from torch import nn

from orchestrator import models
from orchestrator.config import TrainConfig
from orchestrator.data.pipeline import Mean
from orchestrator.data.shards import DataSet, Split
from orchestrator.data.views import ColourAxes, TestView, TrainView
from orchestrator.evaluation.protocols import check_protocols
from orchestrator.evaluation.results import all_tests, is_more_than_training
from orchestrator.remote import StoreUnreachableError
from orchestrator.storage import Storage
from orchestrator.training.assembly import build_model, views_of
from orchestrator.training.finished_model import ModelRecord, find_model, has_weights
from orchestrator.training.run import Outcome, check_identity, data_digest, finished
from orchestrator.world import share_of

SPLITS = ("train", "val")
_HOW = "a data set is made by python -m data_prep.ilsvrc, data_prep.image_folder or data_prep.cifar10"


class Verdict(Enum):
    """What a check comes to."""

    OK = "ok"
    WARNING = "warning"  # a start goes on; the user should know
    REFUSED = "refused"
    SKIPPED = "skipped"  # what it needs was refused


@dataclass(frozen=True)
class Finding:
    """A check that was made: its name, what it came to, and why, or what to do."""

    name: str
    verdict: Verdict
    text: str


@dataclass
class Start:
    """One start of ``config``: the parts that the checks have found so far (None, {}: not yet, or refused)."""

    config: TrainConfig
    data: DataSet | None = None
    splits: dict[str, Split] = field(default_factory=dict)
    views: tuple[TrainView, TestView, Mean, ColourAxes] | None = None
    model: nn.Module | None = None  # on the meta device: shapes without numbers
    flops: int = 0  # multiply-adds for one image
    storage: Storage | None = None
    run: Storage | None = None  # the run's folder inside storage
    outcome: Outcome | None = None  # of a run that is done


@dataclass(frozen=True)
class Check:
    """One check. ``needs`` names the checks without whose parts ``look`` cannot be made."""

    name: str
    look: Callable[[Start], tuple[Verdict, str]]
    needs: tuple[str, ...] = ()


def look_at_all(checks: Iterable[Check], start: Start, before: Iterable[Finding] = ()) -> tuple[Finding, ...]:
    """``before`` and what every check comes to, whatever the others came to; never raises."""
    findings = {finding.name: finding for finding in before}
    for check in checks:
        missing = [n for n in check.needs if findings[n].verdict in (Verdict.REFUSED, Verdict.SKIPPED)]
        if missing:
            verdict, text = Verdict.SKIPPED, f"not looked at, for want of {', '.join(missing)}"
        else:
            try:
                verdict, text = check.look(start)
            except ValueError as error:
                verdict, text = Verdict.REFUSED, str(error)
            except Exception as error:  # what storage and libraries raise must not hide the other findings
                verdict, text = Verdict.REFUSED, f"{type(error).__name__}: {error}"
        findings[check.name] = Finding(check.name, verdict, text)
    return tuple(findings.values())


# -- space ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Space:
    """Bytes that checkpoints take: one; all that are still to come; what is free (None: not known)."""

    checkpoint_bytes: int
    needed_bytes: int
    free_bytes: int | None


def space_of(start: Start) -> Space:
    """For every checkpoint that is kept and the one being written, less what is there."""
    assert start.model is not None
    assert start.storage is not None
    assert start.run is not None
    weights = sum(tensor.nbytes for tensor in start.model.state_dict().values())
    momentum = sum(parameter.nbytes for parameter in start.model.parameters())
    one = weights * (2 if start.config.regularization.average_decay else 1) + momentum
    to_come = max(1, start.config.rhythm.keep_last + 2 - len(start.run.folders("checkpoints")))
    if start.outcome is not None:
        to_come = 0
    return Space(one, one * to_come, start.storage.free_bytes())


# -- the checks -----------------------------------------------------------------------------------------------------


def look_at_data(start: Start) -> tuple[Verdict, str]:
    """That there is a data set: the start's."""
    url = _given("--data", start.config.data, "IMAGENET_DATA or CIFAR10_DATA", _HOW)
    with _reading(url):
        start.data = DataSet(Storage(url))
    return Verdict.OK, f"manifest of {start.data.storage.url}"


def _look_at_storage(start: Start) -> tuple[Verdict, str]:
    storage, run = places_of(start.config.storage, start.config.name)
    with reading_storage(storage.url):
        start.outcome = finished(run)
    start.storage, start.run = storage, run
    return Verdict.OK, f"the run's folder is {run.url}"


def _look_at_identity(start: Start) -> tuple[Verdict, str]:
    assert start.run is not None
    with reading_storage(start.config.storage):
        check_identity(start.run, start.config, start.data)
    return Verdict.OK, "no other config or data under this name"


def _look_at_groups(start: Start) -> tuple[Verdict, str]:
    batch, size = start.config.batch, start.config.placement.num_workers
    share_of(0, max(1, size), batch.global_batch_size, batch.bn_group_size)
    text = f"{size} workers can share the groups" if size else "the number of workers follows from the machines"
    return Verdict.OK, text


def _look_at_model(start: Start) -> tuple[Verdict, str]:
    assert start.data is not None
    with torch.device("meta"):
        start.model = build_model(start.config, start.data.num_classes)
    crop_px = start.config.input.crop_px
    try:
        start.flops = models.count_flops(start.model, crop_px)
    except RuntimeError as error:
        raise ValueError(f"the network cannot take images of {crop_px} pixels ({error}): raise input.crop_px") from None
    return Verdict.OK, f"takes {crop_px} × {crop_px} pixels"


def _look_at_space(start: Start) -> tuple[Verdict, str]:
    space = space_of(start)
    if space.free_bytes is None:
        return Verdict.OK, f"{space.needed_bytes / 1e9:.2f} GB needed; what is free is not known here"
    if space.free_bytes < space.needed_bytes:
        raise ValueError(
            f"storage {start.config.storage!r} has {space.free_bytes / 1e9:.2f} GB free where the checkpoints of this "
            f"run need {space.needed_bytes / 1e9:.2f} GB: make room, give another --storage, or lower "
            "--rhythm.keep-last"
        )
    return Verdict.OK, f"{space.needed_bytes / 1e9:.2f} GB needed, {space.free_bytes / 1e9:.2f} GB free"


def _look_at_shards(start: Start) -> tuple[Verdict, str]:
    assert start.data is not None
    with _reading(start.config.data):
        for name in SPLITS:
            start.data.check_shards(name)
            split = start.data.split(name)
            if not len(split):
                raise ValueError(f"the {name} split of {start.config.data!r} is empty: prepare the data set again")
            start.splits[name] = split
    return Verdict.OK, "all shards are there with their sizes, the indexes are as published"


def _look_at_views(start: Start) -> tuple[Verdict, str]:
    assert start.data is not None
    with _reading(start.config.data):
        start.views = views_of(start.config, start.data)
    return Verdict.OK, "the statistics are as published, the views fit together"


def _look_at_tests(start: Start) -> tuple[Verdict, str]:
    assert start.data is not None
    assert start.model is not None
    config, e = start.config, start.config.evaluation
    if not is_more_than_training(config):
        return Verdict.OK, "none are asked for"
    sizes = {}
    if e.protocols:
        with _reading(config.data):
            for name in e.splits:
                if name not in start.splits:
                    start.data.check_shards(name)
                sizes[name] = len(start.splits.get(name) or start.data.split(name))
            check_protocols(config, start.data, start.model)
    # Of the finished model; of all scores, and once more of the largest: its parts, until they are put together.
    needed = sum(tensor.nbytes for tensor in start.model.state_dict().values())
    needed += 4 * start.data.num_classes * (sum(sizes.values()) * len(e.protocols) + max(sizes.values(), default=0))
    free = start.storage.free_bytes() if start.storage else None
    if free is not None and free < needed:
        raise ValueError(
            f"storage {config.storage!r} has {free / 1e9:.2f} GB free where the finished model and its scores need "
            f"{needed / 1e9:.2f} GB: make room, or ask for fewer tests"
        )
    return Verdict.OK, ", ".join(map(str, all_tests(config))) or "a finished model, and no tests"


def _look_at_tested(start: Start) -> tuple[Verdict, str]:
    """Of a run that is only tested: that there is something, and that the data set fits it."""
    assert start.data is not None
    assert start.run is not None
    config, run, data = start.config, start.run, start.data
    with reading_storage(config.storage):
        trained_on = data_digest(run)
        check_identity(run, config, None)
        record = find_model(config)
        if record is None and data.digest != trained_on:
            raise ValueError(
                f"the model of run {run.url} is not finished yet, which takes the data set that it was trained on "
                f"(digest {trained_on[:12]}…): test it on that first, then on {data.storage.url!r}"
            )
        if record is None and not has_weights(config):
            raise ValueError(f"run {run.url} has no checkpoint yet that could be tested: train it first")
    if record is not None:
        _check_classes(record, data)
    return Verdict.OK, f"of {run.url}, {'finished' if record else 'to be finished'}"


def _check_classes(record: ModelRecord, data: DataSet) -> None:
    """Raises ValueError where the logits of the model are of other classes than the data set's."""
    theirs = [each.wnid for each in data.manifest.classes]
    if theirs == list(record.wnids):
        return
    known = f"{data.storage.url!r} has {len(theirs)} classes, the model was trained on {len(record.wnids)}"
    if missing := sorted(set(theirs) - set(record.wnids)):
        known += f"; the model does not know {', '.join(missing[:3])}{' …' if len(missing) > 3 else ''}"
    elif unknown := sorted(set(record.wnids) - set(theirs)):
        known += f"; {', '.join(unknown[:3])}{' …' if len(unknown) > 3 else ''} are not in the data set"
    else:
        label = next(i for i, (a, b) in enumerate(zip(record.wnids, theirs, strict=True)) if a != b)
        known += f"; label {label} is {record.wnids[label]} to the model and {theirs[label]} in the data set"
    raise ValueError(
        f"the model {record.name!r} cannot be tested on this data set ({known}): take one of the same classes, in the "
        "same order"
    )


# What is quickly known comes first. The places to compute on follow when they are taken, see supervisor.place.
BEFORE_PLACEMENT = (
    Check("data", look_at_data),
    Check("storage", _look_at_storage),
    Check("identity", _look_at_identity, needs=("storage",)),
    Check("groups", _look_at_groups),
    Check("network", _look_at_model, needs=("data",)),
    Check("space", _look_at_space, needs=("storage", "network")),
    Check("shards", _look_at_shards, needs=("data",)),
    Check("views", _look_at_views, needs=("data",)),
    Check("tests", _look_at_tests, needs=("data", "network", "storage")),
)
# Of a run that is not trained any further.
BEFORE_TESTS = (
    Check("data", look_at_data),
    Check("storage", _look_at_storage),
    Check("run", _look_at_tested, needs=("data", "storage")),
    Check("groups", _look_at_groups),
    Check("network", _look_at_model, needs=("data",)),
    Check("tests", _look_at_tests, needs=("data", "network", "storage")),
)


def places_of(storage: str, name: str) -> tuple[Storage, Storage]:
    """The folder that holds all runs, and the run's. Raises ValueError where either is not given."""
    found = Storage(_given("--storage", storage, "IMAGENET_STORAGE"))
    if not name:
        raise ValueError("--name is missing: give the run a name")
    return found, found.sub(name)


def _given(option: str, value: str, variable: str, hint: str = "") -> str:
    if not value:
        raise ValueError(f"{option} is missing: give {option} URL or set {variable}" + (f" ({hint})" if hint else ""))
    return value


@contextmanager
def reading_storage(url: str) -> Iterator[None]:
    """What only the user can mend is a ValueError inside; what may be mended by trying again stays an OSError."""
    try:
        yield
    except (PermissionError, NotADirectoryError) as error:
        raise ValueError(
            f"storage {url!r} cannot be read ({type(error).__name__}: {error}): check the URL, its permissions and, "
            "for an object store, its credentials"
        ) from None


@contextmanager
def _reading(url: str) -> Iterator[None]:
    try:
        yield
    except StoreUnreachableError:  # nothing to mend here
        raise
    except OSError as error:
        raise ValueError(
            f"data set {url!r} cannot be read ({type(error).__name__}: {error}): check the URL, its permissions and, "
            "for an object store, endpoint and credentials"
        ) from None
