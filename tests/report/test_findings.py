"""What is read of folders that training has really left."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from orchestrator.report import findings
from orchestrator.report.findings import Findings, Run
from orchestrator.storage import Storage
from orchestrator.training.checkpoint import newest_journal
from orchestrator.training.run import finished

pytestmark = pytest.mark.timeout(600)  # the first test waits for the runs of all


def run_of(found: Findings, name: str) -> Run:
    (run,) = [run for run in found.runs if run.name == name]
    return run


def test_all_is_found_once(storage: Path, found: Findings) -> None:
    names = [run.name for run in found.runs]
    assert sorted(names) == ["odd", "p20", "r20-a", "r20-b", "r20-c", "r34-a", "r34-b"]
    assert [each.url.rpartition("/")[2] for each in found.damaged] == ["broken"]
    assert "config.json is damaged" in found.damaged[0].error
    # The manifest of an ensemble without its scores is a copy of one.
    assert [each.url.removeprefix(f"{storage}/") for each in found.ensembles] == ["runs/six/ensemble/ten_crop"]
    twice = findings.read([Storage(str(storage)), Storage(f"{storage}/runs"), Storage(f"{storage}/runs/r20-a")])
    assert [run.url for run in twice.runs] == [run.url for run in found.runs]


def test_numbers_are_those_of_the_files(storage: Path, found: Findings) -> None:
    run, folder = run_of(found, "r20-a"), Storage(f"{storage}/runs/r20-a")
    outcome, journal = finished(folder), newest_journal(folder)
    assert outcome is not None
    assert (run.is_finished, run.step, run.steps) == (True, 4, 4)
    assert run.last_top1 == outcome.validation_top1_error
    assert run.last_top5 == outcome.validation_top5_error
    assert run.best_top1 == outcome.best_validation_top1_error
    assert run.curve.validation[4] == outcome.validation_top1_error
    assert run.seconds == pytest.approx(sum(s for e in journal for s in e.get("seconds", {}).values()))
    assert (run.data.name, run.data.train_images, run.data.classes) == ("cifar10", 40, 10)
    assert run.problems == ()
    # Of the highest step.
    assert len(run.layers) == 19
    file = json.loads((storage / "runs/r20-a/layers/000000004-40.json").read_text())  # over most images
    assert [layer.response_std for layer in run.layers] == [x["response_std"] for x in file["measured"]["layers"]]


def test_an_unfinished_run_is_one(found: Findings) -> None:
    run = run_of(found, "r20-c")
    assert (run.is_finished, run.step, run.steps) == (False, 3, 4)
    assert run.last_top1 == run.curve.validation[max(run.curve.validation)]


def test_scores_and_campaign(found: Findings) -> None:
    run = run_of(found, "r34-a")
    assert run.campaign == "six"
    test = run.tested("val", "ten_crop")
    assert test is not None
    assert (test.images, test.step) == (30, 4)
    assert run.tested("val", "multi_scale") is None
    (made,) = found.ensembles
    assert made.members == ("r34-a", "r34-b")
    assert made.runs == tuple(run_of(found, name).url for name in made.members)
    assert [model.depth for model in made.models if model] == [34, 34]
    assert made.classes == 6
    (campaign,) = found.campaigns
    assert campaign.name == "six"
    assert ("r50", "waiting") in campaign.members


def test_of_a_data_set_that_is_gone(storage: Path, found: Findings, tmp_path: Path) -> None:
    """What the run itself has left must do."""
    for name in ("r20-a", "six/members/r34-a"):
        content = json.loads((storage / "runs" / name / "config.json").read_text())
        shutil.copytree(storage / "runs" / name, tmp_path / name)
        (tmp_path / name / "config.json").write_text(json.dumps(content | {"data": str(tmp_path / "gone")}))
    there = findings.read([Storage(str(tmp_path))])
    data = run_of(there, "r20-a").data
    assert (data.name, data.train_images, data.classes) == ("", 40, None)
    data = run_of(there, "r34-a").data
    assert (data.name, data.train_images, data.classes) == ("ilsvrc2012", 96, 6)


def test_damage_is_named_and_the_rest_is_read(storage: Path, tmp_path: Path) -> None:
    source = storage / "runs/six/members/r34-a"
    shutil.copytree(source, tmp_path / "r")
    (scored,) = (tmp_path / "r/scores").glob("*.arrow")
    data = bytearray(scored.read_bytes())
    data[-1] ^= 1
    scored.write_bytes(data)
    (tmp_path / "r/layers").mkdir()
    (tmp_path / "r/layers/000000004-10.json").write_text('{"layers": [{"name": "conv"}]}')
    (run,) = findings.read([Storage(str(tmp_path))]).runs
    assert run.is_finished
    assert run.tests == ()
    assert len(run.problems) == 2
    assert "is damaged (its SHA-256 is not the recorded one)" in run.problems[0]
    assert "layers/000000004-10.json cannot be read" in run.problems[1]
    for journal in (tmp_path / "r/checkpoints").rglob("journal.jsonl"):
        journal.write_text("{")
    (run,) = findings.read([Storage(str(tmp_path))]).runs
    assert any("has a journal that can be read" in problem for problem in run.problems)
    assert run.last_top1 is not None  # finished.json tells


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is nothing at"):
        findings.read([Storage(str(tmp_path / "none"))])
    (tmp_path / "photos").mkdir()
    with pytest.raises(ValueError, match="no run, campaign or ensemble is in"):
        findings.read([Storage(str(tmp_path))])
