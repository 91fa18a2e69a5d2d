"""Members that differ in their seed alone, and what is said of them."""

from __future__ import annotations

import math
import statistics
from dataclasses import replace

import pytest

from jobs import campaign_recipes, cifar10
from orchestrator.campaign.note import CampaignNote, MemberNote, result, spreads_of
from orchestrator.campaign.spread import seeds_of, spreads
from orchestrator.campaign.status import Row, State, Status, over_seeds
from orchestrator.config import TrainConfig
from orchestrator.control.entries import RunStatus

TEST = "test_one_crop_top1_error"


def configs() -> dict[str, TrainConfig]:
    twenty, plain = replace(cifar10.resnet20(), recipe="resnet20"), replace(cifar10.plain20(), recipe="plain20")
    return {
        "a": replace(twenty, seed=0, name="a", storage="/x"),
        "p": replace(plain, seed=1),
        "b": replace(twenty, seed=2, name="b", storage="/y"),
        "other": replace(twenty, seed=3, schedule=replace(twenty.schedule, lr=0.2)),
        "c": replace(twenty, seed=4),
        "q": replace(plain, seed=5),
    }


ERRORS = {"a": {TEST: 8.7}, "b": {TEST: 9.1}, "c": {TEST: 8.6}, "p": {TEST: 11.0}, "other": {TEST: 5.0}, "q": {}}


def test_seeds_are_told_from_other_differences() -> None:
    assert seeds_of(configs()) == [("a", "b", "c"), ("p", "q"), ("other",)]


def test_mean_and_deviation_are_those_of_the_sample() -> None:
    (found,) = spreads(configs(), ERRORS, [TEST])  # one of the plain networks has no error yet
    assert (found.what, found.members) == ("resnet20 as a", ("a", "b", "c"))
    assert found.mean == pytest.approx(statistics.mean([8.7, 9.1, 8.6]))
    assert found.deviation == pytest.approx(statistics.stdev([8.7, 9.1, 8.6]))
    assert str(found) == "8.80 ± 0.26 %"
    assert spreads(configs(), ERRORS | {"b": {TEST: math.nan}, "c": {}}, [TEST]) == []


def test_a_campaigns_result_says_so() -> None:
    members = tuple(
        MemberNote(name=name, config=config, recipe=config, state="done", end=RunStatus.FINISHED, errors=ERRORS[name])
        for name, config in configs().items()
    )
    note = CampaignNote(members=members)
    assert [each.what for each in spreads_of(note)] == ["resnet20 as a"]
    assert "resnet20 as a: 8.80 ± 0.26 % over 3 seeds" in result(note, RunStatus.FINISHED)


def test_the_recipes_of_seeds_are_seeds() -> None:
    runs = campaign_recipes.cifar10_degradation().run_configs()
    assert seeds_of(runs) == [tuple(f"{net}56-{letter}" for letter in "abc") for net in ("resnet", "plain")]
    assert len({config.seed for config in runs.values()}) == 6
    assert list(campaign_recipes.cifar10_table6().run_configs())[:2] == ["resnet20", "resnet32"]


def test_the_table_tells_of_members_that_are_done() -> None:
    rows = [
        Row(
            name=name,
            config=config,
            state=State.TRAINING if name == "b" else State.DONE,
            step=1,
            steps=1,
            workers=1,
            where="",
            starts=1,
            errors=ERRORS[name] | {"validation_top1_error": 50.0},
        )
        for name, config in configs().items()
    ]
    said = over_seeds(Status(name="x", rows=tuple(rows), last=None))
    assert said == ["resnet20 as a, 2 seeds: test one-crop 8.65 ± 0.07 % top-1 error"]
