"""Tests of a run as its score files tell, and in what they depart from the paper's. Reads, and writes nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import PurePosixPath
from typing import Any

from orchestrator.config import Average, EvaluationConfig, Protocol, Tested, TrainConfig
from orchestrator.evaluation import scores
from orchestrator.evaluation.protocols import procedure_of
from orchestrator.evaluation.results import result_events
from orchestrator.remote import StoreRefusedError, StoreUnreachableError
from orchestrator.storage import Storage

# What is wrong with one file, and no reason to give up the others.
DAMAGE = (ValueError, LookupError, TypeError, AttributeError, OSError, StopIteration)


def said(error: BaseException) -> str:
    """What is damaged, in words."""
    return str(error) if isinstance(error, ValueError | OSError) and str(error) else repr(error)


@dataclass(frozen=True)
class Procedure:
    """How a network was tested. departures: in what otherwise than in the paper, in words; precise_bn_images: training
    images over which batch norm was averaged before (0: as trained)."""

    departures: tuple[str, ...] = ()
    precise_bn_images: int = 0

    def __str__(self) -> str:
        """What has to be said of it; "" of a test as in the paper with batch norm as trained."""
        bn = (f"batch norm over {self.precise_bn_images:,} images",) if self.precise_bn_images else ()
        return ", ".join((*self.departures, *bn))


@dataclass(frozen=True)
class Test:
    """What a score file of the run's own data set came to: errors in percent on ``images`` labelled images."""

    __test__ = False  # no class of tests for pytest

    split: str
    protocol: str
    step: int
    top1: float
    top5: float
    images: int
    time_ms: int
    procedure: Procedure = Procedure()


def procedure(
    protocol: Mapping[str, Any], model: Mapping[str, Any], config: TrainConfig | None, last_step: int = 0
) -> Procedure:
    """protocol, model: of a score file's record; config: of the run (None: not known), to whose input the paper's
    scales are in proportion; last_step: of a run that has finished."""
    found: list[str] = []
    with suppress(*DAMAGE):
        own = replace(config or TrainConfig(), evaluation=EvaluationConfig())
        papers = procedure_of(Protocol(protocol["kind"]), own).to_json()
        sides, papers_sides = ([*each.get("shorter_sides_px", ())] for each in (protocol, papers))
        if config is not None and sides and sides != papers_sides:
            found.append(f"{_px(sides)} instead of {_px(papers_sides)}")
        if protocol.get("average", papers["average"]) != papers["average"]:
            found.append("averaged logits" if protocol["average"] == Average.LOGITS.value else str(protocol["average"]))
    if f"-{Tested.BEST.value}-" in PurePosixPath(str(model.get("file", ""))).name:
        found.append("best checkpoint instead of the last")
    elif isinstance(step := model.get("step"), int) and step < last_step:
        found.append(f"checkpoint of step {step:,} of {last_step:,}")
    bn_images = model.get("precise_bn_images")
    return Procedure(tuple(found), bn_images if isinstance(bn_images, int) else 0)


def _px(sides: list[int]) -> str:
    return f"{', '.join(map(str, sides))} px"


def tests_of(run: Storage, config: TrainConfig, last_step: int, problem: Callable[[str], None]) -> Iterator[Test]:
    """last_step: as of ``procedure``; problem: is told of what cannot be read, and the next file comes."""
    told = set()
    for event in result_events(run):
        told.add(event["file"])
        if "top1_error" in event and "other_data" not in event and (record := scores.read_record(run, event["file"])):
            what = (event["split"], event["protocol"], event["step"], event["top1_error"], event["top5_error"])
            how = procedure(record.info.protocol, record.info.model, config, last_step)
            yield Test(*what, event["images"], event["time_ms"], how)
    for name in run.files(scores.FOLDER):
        if name.endswith(".json") and (file := f"{name[:-5]}.arrow") not in told:
            try:
                scores.load(f"{run.url}/{file}")
            except (StoreRefusedError, StoreUnreachableError):
                raise
            except DAMAGE as error:
                problem(said(error))
