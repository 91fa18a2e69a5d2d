"""What a group of seeds came to: tests that were made alike, of one split, and what has to be said of them. Pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from orchestrator.config import Protocol
from orchestrator.report.findings import Run
from orchestrator.report.matching import Group, told
from orchestrator.report.tested import Procedure, Test


@dataclass(frozen=True)
class Alike:
    """Tests of a group's runs, by folder of the run: of one split, by one protocol and procedure."""

    procedure: Procedure
    tests: Mapping[str, Test]

    @property
    def any(self) -> Test:
        return next(iter(self.tests.values()))

    def top1(self, run: Run) -> float | None:
        return self.tests[run.url].top1 if run.url in self.tests else None

    def top5(self, run: Run) -> float | None:
        return self.tests[run.url].top5 if run.url in self.tests else None


def alike(group: Group, split: str, protocol: str) -> list[Alike]:
    """The group's tests, those together that were made alike: first those as in the paper, then those of most seeds."""
    found: dict[Procedure, dict[str, Test]] = {}
    for run in group.counted:
        for how in {test.procedure for test in run.tests}:
            if (test := run.tested(split, protocol, how)) is not None:
                found.setdefault(how, {})[run.url] = test

    def rank(each: Alike) -> tuple[int, int, int, str]:
        newest_ms = max(test.time_ms for test in each.tests.values())
        return len(each.procedure.departures), -len(each.tests), -newest_ms, str(each.procedure)

    return sorted((Alike(how, tests) for how, tests in found.items()), key=rank)


def in_words(group: Group, of: Callable[[Run], float | None], procedure: Procedure | None = None) -> str:
    """``8.75 ± 0.10 (2 seeds); 1 more unfinished``, and how it was tested, where that has to be said; "" of nothing."""
    values = group.values(of)
    if not values:
        return ""
    lacking = len(group.counted) - len(values)
    said = told(values) + unfinished(group) + (f"; {lacking} more not tested so" if lacking and procedure else "")
    if procedure is not None and procedure.departures:
        return f"{said}; not as in the paper: {procedure}"
    return f"{said}; {procedure}" if procedure is not None and str(procedure) else said


def unfinished(group: Group) -> str:
    lacking = len(group.by_seed) - len(group.finished)
    if not lacking:
        return ""
    if group.finished:
        return f"; {lacking} more unfinished"
    run = max(group.by_seed, key=lambda each: each.step)
    return f", unfinished: step {run.step:,}" + (f" of {run.steps:,}" if run.steps is not None else "")


@dataclass(frozen=True)
class TestSetError:
    """What stands in for the error on a test set: of one split for all seeds. tests: None of validation in training."""

    __test__ = False  # no class of tests for pytest

    text: str
    tests: Alike | None


def error_on_test_set(group: Group) -> TestSetError:
    """A test of the split ``test`` as in the paper; else validation in training, where the test set stands in for it;
    else a test otherwise than in the paper; else validation on images that were held out. The text names which."""
    tests = alike(group, "test", Protocol.ONE_CROP.value)
    is_test = group.first.data.validation_is_test
    as_papers = [each for each in tests if not each.procedure.departures]
    is_of_all = bool(as_papers) and len(as_papers[0].tests) == len(group.counted)
    if is_test and not is_of_all and group.values(lambda run: run.last_top1):
        tests = []
    if tests:
        said = in_words(group, tests[0].top1, tests[0].procedure)
        return TestSetError(f"{said}; test set" if said else "", tests[0] if said else None)
    said = in_words(group, lambda run: run.last_top1)
    where = "test set" if is_test else "validation, not the test set"
    return TestSetError(f"{said}; {where}" if said else "", None)
