"""How a campaign stands, read from its folder by whoever asks: a table of its members."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from itertools import pairwise
from statistics import median
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from orchestrator.campaign.decisions import Account, Kind, account_of
from orchestrator.campaign.journal import About, Journal, read_about
from orchestrator.campaign.member import is_done, process_from
from orchestrator.campaign.spread import spreads
from orchestrator.config import TrainConfig
from orchestrator.control.description import network
from orchestrator.control.terminal import duration
from orchestrator.storage import Storage
from orchestrator.training.checkpoint import newest_journal
from orchestrator.training.finished_model import find_model
from orchestrator.training.ownership import driver_at_work
from orchestrator.training.run import finished, run_storage

_RATE_EVENTS = 20  # measurements of training over which the speed is taken


class State(Enum):
    """What becomes of a member."""

    WAITING = "waiting"
    TRAINING = "training"
    FINISHING = "finishing"
    SCORING = "scoring"
    DONE = "done"
    FAILED = "failed"


_STYLES = {State.DONE: "green", State.FAILED: "bold red", State.WAITING: "dim"}


@dataclass(frozen=True)
class Row:
    """One member. step: of its newest checkpoint; errors: percent, by name; left_s: None where it is not known.

    is_running: whether a process of it lives, as far as that is known from here; where: its machine; workers: 0 where
    the campaign has not started it; starts: how many there were; said: what the last failure said.
    """

    name: str
    config: TrainConfig
    state: State
    step: int
    steps: int
    workers: int
    where: str
    starts: int
    is_running: bool = False
    left_s: float | None = None
    errors: Mapping[str, float] = field(default_factory=dict)
    said: str = ""


@dataclass(frozen=True)
class Status:
    """A campaign: its members in the order of the recipe, and its last event."""

    name: str
    rows: tuple[Row, ...]
    last: Kind | None
    why: str = ""


def read(folder: Storage) -> Status:
    """Raises ValueError where there is no campaign in ``folder``, OSError where it cannot be read."""
    about, entries = read_about(folder), Journal(folder).entries
    account = account_of(list(about.members), entries)
    last = account.last
    return Status(
        folder.url.rpartition("/")[2],
        tuple(_row(folder, name, about, account) for name in about.members),
        last.kind if last else None,
        last.detail["why"] if last and last.kind is Kind.STOPPED else "",
    )


def _row(folder: Storage, name: str, about: About, account: Account) -> Row:
    config = replace(about.members[name], storage=f"{folder.url}/members")  # it may be seen by another path here
    run, entry = run_storage(config), account.newest.get(name)
    journal = newest_journal(run)
    steps, outcome = about.steps[name], finished(run)
    train = [event for event in journal if event["kind"] == "train"]
    step = outcome.steps if outcome else max((int(event["step"]) for event in journal), default=0)
    is_running, where, workers = False, "", account.packing.workers.get(name, 0) if account.packing else 0
    if entry is not None and entry.kind is Kind.STARTED:
        process = process_from(entry.detail["process"])
        lives = process.lives()
        # Of another machine's nothing is known from here, but that no member outlives the campaign's driver.
        is_running = driver_at_work(folder) is not None if lives is None else lives
        where, workers = process.host, int(entry.detail["workers"])
    done = is_done(config, about.data_sha256)
    if not is_running and not done and (driver := driver_at_work(run)) is not None:
        is_running, where, workers = True, driver.host, 0  # one that the campaign has not started
    if done:
        state = State.DONE
    elif name in account.given_up:
        state = State.FAILED
    elif not is_running:
        state = State.WAITING
    elif outcome is None:
        state = State.TRAINING
    else:
        state = State.SCORING if find_model(config) is not None else State.FINISHING
    errors = dict(account.errors.get(name, {}))
    if validations := [event["metrics"] for event in journal if event["kind"] == "validation"]:
        errors["validation_top1_error"] = validations[-1]["validation_top1_error"]
    return Row(
        name=name,
        config=config,
        state=state,
        step=step,
        steps=outcome.steps if outcome else steps,
        workers=workers,
        where=where,
        starts=max(account.starts.get(name, 0), is_running),
        is_running=is_running,
        left_s=_left_s(train, steps) if state is State.TRAINING else None,
        errors=errors,
        said=account.given_up.get(name) or ("" if state is State.DONE else account.said.get(name, "")),
    )


def _left_s(train: Sequence[Mapping[str, Any]], steps: int) -> float | None:
    """Seconds of training that are left, by the newest measurements."""
    # The median: a pause between two starts is no work.
    steps_s = [
        (after["time_ms"] - before["time_ms"]) / 1000 / (after["step"] - before["step"])
        for before, after in pairwise(train[-_RATE_EVENTS:])
        if after["step"] > before["step"]
    ]
    return max(0.0, median(steps_s)) * (steps - train[-1]["step"]) if steps_s else None


# -- shown ----------------------------------------------------------------------------------------------------------


def table(status: Status) -> RenderableType:
    """For rich to print."""
    shown = Table(title=None, box=None, pad_edge=False, header_style="bold cyan")
    tests = list(dict.fromkeys(_test(key) for row in status.rows for key in row.errors if _test(key)))
    for column in ("member", "network", "state", "step", "left", "val", *map(_words, tests), "where", "starts"):
        shown.add_column(column, no_wrap=True)
    shown.add_column("last error", overflow="fold")
    for row in status.rows:
        errors = [
            f"{row.errors[f'{test}_top1_error']:.1f}/{row.errors[f'{test}_top5_error']:.1f}"
            if f"{test}_top1_error" in row.errors
            else ""
            for test in tests
        ]
        validation = row.errors.get("validation_top1_error")
        shown.add_row(
            row.name,
            network(row.config.model),
            Text(row.state.value, _STYLES.get(row.state, "")),
            f"{row.step}/{row.steps}",
            duration(row.left_s) if row.left_s is not None else "",
            f"{validation:.2f}" if validation is not None else "",
            *errors,
            (f"{row.where} ({row.workers})" if row.workers else row.where) if row.is_running else "",
            str(row.starts),
            Text(row.said, "red"),
        )
    return Group(shown, *map(Text, over_seeds(status)), Text(_line(status), "bold"))


def over_seeds(status: Status) -> list[str]:
    """Lines that tell mean and deviation of members that are done and differ in their seed alone."""
    done = [row for row in status.rows if row.state is State.DONE]
    tests = list(dict.fromkeys(f"{_test(key)}_top1_error" for row in done for key in row.errors if _test(key)))
    configs = {row.name: row.config for row in done}
    return [
        f"{each.what}, {len(each.members)} seeds: {_words(each.test.removesuffix('_top1_error'))} {each} top-1 error"
        for each in spreads(configs, {row.name: row.errors for row in done}, tests)
    ]


def _words(test: str) -> str:
    """``val ten-crop``."""
    return test.replace("_", " ", 1).replace("_", "-")


def line(row: Row) -> str:
    """A member in a line, for a log."""
    parts = [f"{row.name}  {row.state.value}", f"step {row.step}/{row.steps}"]
    if "validation_top1_error" in row.errors:
        parts.append(f"val {row.errors['validation_top1_error']:.1f} %")
    if row.left_s is not None:
        parts.append(f"{duration(row.left_s)} left")
    return " · ".join(parts)


def _line(status: Status) -> str:
    done = sum(row.state is State.DONE for row in status.rows)
    text = f"campaign {status.name}: {done} of {len(status.rows)} members done"
    match status.last:
        case Kind.DONE:
            return f"{text}; all is published"
        case Kind.STOPPED:
            return f"{text}; {status.why}"
    return text + _UNLESS_RUNNING * (not any(row.is_running for row in status.rows) and done < len(status.rows))


_UNLESS_RUNNING = "; no member is at work: the command that started it goes on"


def _test(key: str) -> str:
    """``val_ten_crop`` of the name of an error; "" for the validation of training."""
    test = key.removesuffix("_top1_error").removesuffix("_top5_error")
    return "" if test == "validation" else test
