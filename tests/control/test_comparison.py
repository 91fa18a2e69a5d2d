"""Runs side by side in a real MLflow store: what is written on the experiment and on every run."""

from __future__ import annotations

import json
import sqlite3
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from orchestrator.config import BatchConfig, Family, ModelConfig, PolicyKind, ScheduleConfig, Shortcut
from orchestrator.control.comparison import NOTE_TAG, DataNote, experiment_tags, run_note, with_result
from orchestrator.control.description import data_note, network, run_description
from orchestrator.control.entries import Account
from orchestrator.control.tracking import MAX_METRIC_KEYS, Delivery, RunStatus, Tracker, default_uri

Event = dict[str, Any]
DATA = DataNote(
    "flowers", "0123456789abcdef" * 4, "s3://key:hidden@bucket/flowers", {"train images": 640, "classes": 5}
)
START: Event = {"kind": "start", "step": 0, "steps": 20, "images": 640, "workers": 3}


def journal(batch_size: int, *, drops: bool) -> list[Event]:
    """Two epochs of 640 images."""
    events: list[Event] = []
    for step in range(1, 2 * 640 // batch_size + 1):
        common = {"step": step, "epoch": step * batch_size / 640, "time_ms": 1000 * step}
        errors = {"train_top1_error": 90.0 / step, "train_loss": 2.0 / step, "learning_rate": 0.1}
        events.append({"kind": "train", **common, "metrics": errors})
        if step * batch_size % 640 == 0:
            errors = {"validation_top1_error": 80.0 / step, "validation_top5_error": 40.0 / step}
            events.append({"kind": "validation", **common, "metrics": errors})
            if drops:
                rates = {"learning_rate_before": 0.1, "learning_rate": 0.01}
                decision = {"action": "drop", "error_percent": 80.0 / step, **rates}
                events.append({"kind": "decision", **common, "decision": decision})
            events.append({"kind": "checkpoint", **common, "url": f"s3://bucket/{step}", "best": True})
    return events


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of one store for all tests, since it takes seconds to make; each has an experiment of its own."""
    return tmp_path_factory.mktemp("store")


def uri_of(folder: Path) -> str:
    return default_uri(f"sqlite:///{folder}/mlflow.db", folder)


def deliver(
    folder: Path,
    name: str,
    events: list[Event],
    *,
    experiment: str = "flowers",
    status: RunStatus = RunStatus.FINISHED,
    recipe: str = "plain18",
) -> Delivery:
    tracker = Tracker(
        uri=uri_of(folder),
        experiment=experiment,
        name=name,
        run_key=f"/runs/{name}",
        params={"model": {"family": recipe}},
        tags={"recipe": recipe},
        figure_dir=folder / "figures" / name,
        description="What it is: https://me:hidden@host/code",
        data=DATA,
        system_metrics=False,
    )
    tracker.replay(events)
    tracker.put(START)
    delivery = tracker.close(60, status)
    assert (delivery.error, delivery.pending) == (None, 0)
    return delivery


def everything(folder: Path, experiment_name: str = "flowers") -> dict[str, Any]:
    """All that the store holds of an experiment, but for its number and the time at which it was made."""
    client = MlflowClient(uri_of(folder))
    experiment = client.get_experiment_by_name(experiment_name)
    held: dict[str, Any] = {"experiment": experiment.tags}
    for run in client.search_runs([experiment.experiment_id]):
        history = {
            key: [(m.step, m.timestamp, m.value) for m in client.get_metric_history(run.info.run_id, key)]
            for key in run.data.metrics
        }
        inputs = [one.to_dictionary() for one in run.inputs.dataset_inputs]
        times = (run.info.status, run.info.start_time, run.info.end_time)
        held[run.info.run_name] = [times, history, run.data.tags, run.data.params, inputs]
    text = json.dumps(held, sort_keys=True)
    text = text.replace(f"#/experiments/{experiment.experiment_id}/", "#/experiments/N/")
    return dict(json.loads(text.replace(str(experiment.creation_time), "0")))


def test_runs_of_two_recipes_are_comparable_and_a_restart_changes_nothing(folder: Path) -> None:
    small, large = journal(32, drops=False), journal(64, drops=True)
    deliver(folder, "small", small[: len(small) // 2], status=RunStatus.KILLED)
    held = everything(folder)
    assert held["small"][2][NOTE_TAG].startswith("**Result until it was interrupted:** best validation")
    deliver(folder, "small", small)
    deliver(folder, "large", large, recipe="plain34")
    held = everything(folder)

    # The same names, and few of them; epochs in common where steps are not.
    _, small_history, tags, params, inputs = held["small"]
    _, large_history, large_tags, _, _ = held["large"]
    assert small_history.keys() == large_history.keys()
    assert len(small_history) <= MAX_METRIC_KEYS
    assert [epoch for step, _, epoch in small_history["epoch"]] == [step / 20 for step in range(1, 41)]
    assert [epoch for step, _, epoch in large_history["epoch"]] == [step / 10 for step in range(1, 21)]
    assert [step for step, _, _ in small_history["best_validation_top1_error"]] == [20, 40]

    # What a run is.
    assert (tags["recipe"], large_tags["recipe"], tags["workers"]) == ("plain18", "plain34", "3")
    assert large_tags["last_decision"] == "drop at step 20, learning rate 0.1 → 0.01, error 4.00 %"
    assert params == {"model.family": "plain18"}
    [data] = inputs
    assert (data["dataset"]["name"], data["dataset"]["digest"]) == ("flowers", "0123456789abcdef")
    assert json.loads(data["dataset"]["source"]) == {"uri": "s3://***@bucket/flowers", "manifest_sha256": DATA.sha256}
    assert json.loads(data["dataset"]["profile"]) == {"train images": 640, "classes": 5}
    result, description, link = tags[NOTE_TAG].split("\n\n")
    assert result == (
        "**Result:** best validation top-1 error 2.00 % (epoch 2, step 40);"
        " the last 2.00 %, top-5 1.00 % (epoch 2, step 40)"
    )
    assert description == "What it is: https://***@host/code"
    assert "viewStateShareKey=side-by-side" in link
    assert "hidden" not in json.dumps(held)

    # The same again, and all of it anew: nothing is different, nothing is there twice.
    deliver(folder, "small", small)
    assert everything(folder) == held
    deliver(folder, "small", small, experiment="again")
    deliver(folder, "large", large, experiment="again", recipe="plain34")
    assert everything(folder, "again") == held


def test_what_a_person_wrote_stays(folder: Path) -> None:
    client = MlflowClient(uri_of(folder))
    experiment_id = client.create_experiment("described", artifact_location=folder.as_uri())
    client.set_experiment_tag(experiment_id, NOTE_TAG, "ours")
    half, whole = journal(64, drops=False)[:12], journal(64, drops=False)
    run_ids = [deliver(folder, name, half, experiment="described").run_id for name in ("added", "own")]
    assert client.get_experiment(experiment_id).tags[NOTE_TAG] == "ours"

    # Where the line of results still stands it is kept up to date, amid whatever else a person writes.
    note = client.get_run(run_ids[0]).data.tags[NOTE_TAG]
    client.set_tag(run_ids[0], NOTE_TAG, f"Mind the typo.\n\n{note}\n\nSee figure.")
    client.set_tag(run_ids[1], NOTE_TAG, "own words")
    for name in ("added", "own"):
        deliver(folder, name, whole, experiment="described")
    added, own = (client.get_run(run_id).data.tags[NOTE_TAG] for run_id in run_ids)
    assert added.startswith("Mind the typo.\n\n**Result:** best validation top-1 error 4.00 % (epoch 2, step 20)")
    assert added.endswith("\n\nSee figure.")
    assert own == "own words"


def test_numbers_arrive_where_the_experiment_may_not_be_described(folder: Path) -> None:
    deliver(folder, "first", [])  # makes the store
    with sqlite3.connect(folder / "mlflow.db") as database:
        refuse = "BEGIN SELECT RAISE(ABORT, 'not yours'); END"
        database.execute(f"CREATE TRIGGER refuse BEFORE INSERT ON experiment_tags {refuse}")
    try:
        deliver(folder, "a", journal(64, drops=False), experiment="guarded")
    finally:
        database.execute("DROP TRIGGER refuse")
        database.close()
    held = everything(folder, "guarded")
    assert held["experiment"] == {}
    assert held["a"][0][0] == "FINISHED"
    assert len(held["a"][1]["epoch"]) == 20


def test_the_saved_view_is_as_mlflow_reads_it() -> None:
    tags = experiment_tags("7", 1234)
    [(key, value)] = [(k, v) for k, v in tags.items() if k != NOTE_TAG]
    view = json.loads(value)
    assert f"viewStateShareKey={key.rpartition('.')[2]}" in tags[NOTE_TAG]
    assert (view["name"], view["createdAt"]) == ("Side by side", 1234)
    assert len(value) <= 5000  # what databases of older servers hold
    state = json.loads(view["state"])
    sections = {section["uuid"] for section in state["compareRunSections"]}
    assert {chart["metricSectionId"] for chart in state["compareRunCharts"]} < sections
    assert {chart["selectedXAxisMetricKey"] for chart in state["compareRunCharts"]} == {"epoch"}


def test_a_description_says_what_the_run_is() -> None:
    schedule = ScheduleConfig(max_epochs=2.5, lr=0.1, policy=PolicyKind.COSINE)
    facts: dict[str, Any] = {
        "model": ModelConfig(family=Family.PLAIN, depth=34),
        "batch": BatchConfig(global_batch_size=64, bn_group_size=32),
        "schedule": schedule,
        "crop_px": 96,
        "seed": 3,
        "run_url": "/runs/a",
        "command": "python jobs/imagenet.py plain34 --name a",
    }
    text = run_description(data=DATA, **facts)
    assert text.startswith(
        "**plain-34** on flowers (640 train images, 5 classes) at 96 pixels. Batch 64 in groups of 32,"
        " 25 steps (2.5 epochs), learning rate 0.1 (cosine), seed 3.\n\n"
    )
    assert "`/runs/a`" in text
    assert "`python jobs/imagenet.py plain34 --name a`" in text
    gone = replace(DATA, counts={})
    assert "at most 2.5 epochs" in run_description(data=gone, **facts)
    unlimited = run_description(data=gone, **facts | {"schedule": replace(schedule, max_epochs=0.0, max_steps=9)})
    assert "at most 9 steps" in unlimited
    assert len(run_note(run_description(data=DATA, **facts | {"command": "x" * 9000}), "1", "**Result**")) < 5000
    assert network(ModelConfig(depth=50)) == "ResNet-50"
    assert network(ModelConfig(depth=18, shortcut=Shortcut.A)) == "ResNet-18 A"


def test_a_data_set_that_is_gone_has_the_name_of_its_folder(tmp_path: Path) -> None:
    assert data_note(str(tmp_path / "flowers"), "00") == DataNote("flowers", "00", str(tmp_path / "flowers"))
    assert data_note("", "00").name == "unknown"
    assert data_note("nosuch://key:hidden@bucket", "00").name == "***@bucket"


def test_a_result_without_a_validation() -> None:
    assert with_result("a\n**Result**\nb", Account().result(RunStatus.FAILED)) == (
        "a\n**Result until it failed:** no validation\nb"
    )
