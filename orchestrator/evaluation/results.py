"""What a run is to be tested with, which of it is done, and what came of it: told from the run's folder alone."""

from __future__ import annotations

import functools
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from orchestrator.config import Protocol, TrainConfig
from orchestrator.data.shards import UNLABELLED
from orchestrator.evaluation import scores
from orchestrator.evaluation.evaluate import score_name
from orchestrator.evaluation.ranking import errors
from orchestrator.storage import Storage
from orchestrator.training.finished_model import ModelRecord, find_model
from orchestrator.training.notices import Event
from orchestrator.training.run import run_storage

RESULT = "scores"  # the kind of the event that tells of a score file


@dataclass(frozen=True)
class Test:
    """One split, tested by one protocol."""

    __test__ = False  # no class of tests for pytest

    split: str
    protocol: Protocol

    def __str__(self) -> str:
        return f"{self.split} by {self.protocol.value}"


def all_tests(config: TrainConfig) -> list[Test]:
    """What ``config`` asks for, in the order in which it is done."""
    e = config.evaluation
    return [Test(split, protocol) for split in e.splits for protocol in e.protocols]


def is_more_than_training(config: TrainConfig) -> bool:
    """Whether ``config`` asks for a finished model, and so perhaps for tests."""
    return bool(config.evaluation.protocols or config.evaluation.precise_bn_images)


def missing_tests(config: TrainConfig, record: ModelRecord, data_sha256: str) -> list[Test]:
    """Those whose scores are not there yet: one listing."""
    there = set(run_storage(config).files(scores.FOLDER))

    def is_there(test: Test) -> bool:
        name = score_name(record.weights_sha256, config, data_sha256, test.split, test.protocol)
        return {name, name.removesuffix(".arrow") + ".json"} <= there

    return [test for test in all_tests(config) if not is_there(test)]


def is_tested(config: TrainConfig, data_sha256: str | None = None) -> bool:
    """Whether all that ``config`` asks for after training is there; ``data_sha256`` None: of the run's own data set."""
    if not is_more_than_training(config):
        return True
    record = find_model(config)
    return record is not None and not missing_tests(config, record, data_sha256 or record.data_sha256)


# -- results --------------------------------------------------------------------------------------------------------


def result_events(run: Storage) -> list[Event]:
    """What the tests of the run came to, one event a score file, by step; what cannot be read is passed over.

    As a worker tells it at the end of a test: kind, step, time_ms (when the file was made, where the store tells that),
    split, protocol, file, images, undecodable; top1_error and top5_error in percent where the images are labelled;
    other_data: name of the data set, if that is not the run's.
    """
    found, times_ms = [], _times_ms(run)
    for name in run.files(scores.FOLDER):
        with suppress(ValueError, KeyError, FileNotFoundError):
            record = scores.read_record(run, name.removesuffix(".json") + ".arrow") if name.endswith(".json") else None
            if record is not None and "step" in record.info.model:
                found.append(_event_of(run, record, times_ms))
    return sorted(found, key=lambda event: (event["step"], event["time_ms"], event["file"]))


def results_of(config: TrainConfig, data_sha256: str | None = None) -> list[Event]:
    """The same of the tests that ``config`` asks for, in its order, as far as they are done."""
    record = find_model(config)
    if record is None:
        return []
    by_file = {event["file"]: event for event in result_events(run_storage(config))}
    sha256 = data_sha256 or record.data_sha256
    names = [score_name(record.weights_sha256, config, sha256, t.split, t.protocol) for t in all_tests(config)]
    return [by_file[name] for name in names if name in by_file]


def result_event(run: Storage, told: Event, record: ModelRecord) -> Event:
    """The same of what ``evaluate`` has told of a file that it made: its split, protocol, file and errors."""
    scored = scores.read_record(run, told["file"])
    other = {} if scored is None else _other_data(scored)
    return told | {"step": record.step, "time_ms": _times_ms(run).get(told["file"], _now_ms())} | other


def _event_of(run: Storage, record: scores.ScoreRecord, times_ms: dict[str, int]) -> Event:
    info = record.info
    event: Event = {"kind": RESULT, "step": info.model["step"], "time_ms": times_ms.get(record.name, _now_ms())}
    event |= {"split": info.split, "protocol": str(info.protocol["kind"]), "file": record.name}
    return event | _found(f"{run.url}/{record.name}", record.sha256) | _other_data(record)


@functools.cache
def _found(url: str, sha256: str) -> Event:
    """What is in a score file: it may be large, and is looked at once."""
    loaded = scores.load(url)
    found: Event = {"images": len(loaded), "undecodable": int((~loaded.decoded).sum())}
    if (loaded.labels != UNLABELLED).any():
        of_all = errors(loaded)
        found |= {"top1_error": of_all.top1_error, "top5_error": of_all.top5_error}
    return found


def _other_data(record: scores.ScoreRecord) -> dict[str, Any]:
    info = record.info
    return {} if info.data["sha256"] == info.model.get("data_sha256") else {"other_data": info.data["name"]}


def _times_ms(run: Storage) -> dict[str, int]:
    with suppress(OSError, ValueError):
        listing = run.sub(scores.FOLDER).listing()
        return {
            f"{scores.FOLDER}/{n}": stat.modified_ns // 1_000_000 for n, stat in listing.items() if stat.modified_ns
        }
    return {}


def _now_ms() -> int:
    return time.time_ns() // 1_000_000
