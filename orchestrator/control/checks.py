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
from orchestrator.remote import StoreUnreachableError
from orchestrator.storage import Storage
from orchestrator.training.assembly import build_model, views_of
from orchestrator.training.run import Outcome, check_identity, finished
from orchestrator.world import share_of

SPLITS = ("train", "val")
_HOW = "a data set is made by python -m data_prep.ilsvrc or python -m data_prep.image_folder"


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
    one = weights + momentum
    to_come = max(1, start.config.rhythm.keep_last + 2 - len(start.run.folders("checkpoints")))
    return Space(one, one * to_come, start.storage.free_bytes())


# -- the checks -----------------------------------------------------------------------------------------------------


def _look_at_data(start: Start) -> tuple[Verdict, str]:
    url = _given("--data", start.config.data, "IMAGENET_DATA", _HOW)
    with _reading(url):
        start.data = DataSet(Storage(url))
    return Verdict.OK, f"manifest of {start.data.storage.url}"


def _look_at_storage(start: Start) -> tuple[Verdict, str]:
    url = _given("--storage", start.config.storage, "IMAGENET_STORAGE")
    storage = Storage(url)
    if not start.config.name:
        raise ValueError("--name is missing: give the run a name")
    run = storage.sub(start.config.name)
    with reading_storage(url):
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


# What is quickly known comes first. The places to compute on follow when they are taken, see supervisor.place.
BEFORE_PLACEMENT = (
    Check("data", _look_at_data),
    Check("storage", _look_at_storage),
    Check("identity", _look_at_identity, needs=("storage",)),
    Check("groups", _look_at_groups),
    Check("network", _look_at_model, needs=("data",)),
    Check("space", _look_at_space, needs=("storage", "network")),
    Check("shards", _look_at_shards, needs=("data",)),
    Check("views", _look_at_views, needs=("data",)),
)


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
