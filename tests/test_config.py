"""Strict, canonical, and every field read by some code."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import replace
from pathlib import Path

import pytest

from jobs.imagenet import RECIPES
from orchestrator.config import InputConfig, RhythmConfig, ScheduleConfig, TrainConfig
from orchestrator.plain import differences, digest

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_survives_json(name: str) -> None:
    config = RECIPES[name]()
    text = json.dumps(config.to_json())
    assert TrainConfig.from_json(json.loads(text)) == config


def test_wrong_json_is_refused() -> None:
    plain = TrainConfig().to_json()
    for change in (
        {"unknown": 1},
        {"seed": "0"},
        {"seed": True},
        {"model": 3},
        {"schedule": {**plain["schedule"], "policy": "polynomial"}},
        {"schedule": {**plain["schedule"], "lr": "0.1"}},
        {"schedule": {k: v for k, v in plain["schedule"].items() if k != "lr"}},
    ):
        with pytest.raises(ValueError):  # noqa: PT011 - the messages differ
            TrainConfig.from_json({**plain, **change})


def test_the_identity_leaves_placement_and_tracking_out() -> None:
    one = TrainConfig()
    moved = replace(one, storage="s3://b", placement=replace(one.placement, num_workers=8))
    assert digest(one.identity()) == digest(moved.identity())
    kept = replace(one, rhythm=RhythmConfig(keep_last=9), recipe="other", input=InputConfig(max_undecodable=0))
    assert digest(one.identity()) == digest(kept.identity())
    whole = replace(one, schedule=ScheduleConfig(max_epochs=30))  # an int where a float is meant
    assert digest(whole.identity()) == digest(replace(one, schedule=ScheduleConfig(max_epochs=30.0)).identity())
    other = replace(one, rhythm=RhythmConfig(log_every_steps=7))
    assert digest(one.identity()) != digest(other.identity())
    assert differences(one.identity(), other.identity()) == ["rhythm.log_every_steps: 100 → 7"]


def test_every_field_is_read() -> None:
    """A field that no code reads is a lie on the command line."""
    code = ""
    for folder in ("orchestrator", "jobs"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            if path.name != "config.py":
                code += path.read_text()
    for part in dataclasses.fields(TrainConfig):
        value = getattr(TrainConfig(), part.name)
        if not dataclasses.is_dataclass(value):
            assert f".{part.name}" in code, part.name
            continue
        for field in dataclasses.fields(value):
            as_keyword = part.name == "optimizer" and f"{field.name}:" in code  # SGD(**asdict(optimizer))
            assert f".{field.name}" in code or as_keyword, f"{part.name}.{field.name}"
