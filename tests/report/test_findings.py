"""What is read of folders that training has really left."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from orchestrator.config import InputConfig, Protocol, TrainConfig
from orchestrator.data.shards import DataSet
from orchestrator.evaluation import ensemble, scores
from orchestrator.evaluation.ensemble import Choice
from orchestrator.evaluation.protocols import procedure_of
from orchestrator.plain import digest
from orchestrator.report import findings
from orchestrator.report.findings import Findings, Run
from orchestrator.report.tested import Procedure, procedure
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
    (test,) = run.tests
    assert (test.split, test.protocol, test.images, test.step) == ("val", "ten_crop", 30, 4)
    assert run.tested("val", "ten_crop", test.procedure) == test
    assert run.tested("val", "multi_scale", test.procedure) is None
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


def test_finished_json_of_other_types(storage: Path, tmp_path: Path) -> None:
    for name, change in (("r20-a", {"best_validation_top1_error": "low"}), ("r20-b", {"steps": None})):
        shutil.copytree(storage / "runs" / name, tmp_path / name)
        path = tmp_path / name / "finished.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
    shutil.copytree(storage / "runs/p20", tmp_path / "p20")
    (tmp_path / "p20/finished.json").write_text("{")
    found = findings.read([Storage(str(tmp_path))])
    assert [(run.name, run.is_finished) for run in found.runs] == [("p20", False), ("r20-a", False), ("r20-b", False)]
    assert all("finished.json" in " ".join(run.problems) for run in found.runs)


def test_an_ensemble_without_scores_is_named(storage: Path, tmp_path: Path) -> None:
    folder = tmp_path / "e"
    shutil.copytree(storage / "runs/six/ensemble/ten_crop", folder)
    manifest = json.loads((folder / "ensemble.json").read_text())
    (folder / "ensemble.json").write_text(json.dumps(manifest | {"scores": {}}))
    shutil.copytree(storage / "runs/p20", tmp_path / "p20")
    found = findings.read([Storage(str(tmp_path))])
    assert [run.name for run in found.runs] == ["p20"]
    assert "names no score file" in found.damaged[0].error


def test_a_folder_that_may_not_be_read_is_named(storage: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(storage / "runs/p20", tmp_path / "p20")
    (tmp_path / "locked").mkdir()
    files = Storage.files

    def refusing(self: Storage, name: str = "") -> list[str]:
        if self.url.endswith("/locked"):
            raise PermissionError(13, "Permission denied", self.url)
        return files(self, name)

    monkeypatch.setattr(Storage, "files", refusing)
    found = findings.read([Storage(str(tmp_path))])
    assert [run.name for run in found.runs] == ["p20"]
    assert [(each.url, "Permission denied" in each.error) for each in found.damaged] == [(f"{tmp_path}/locked", True)]
    with pytest.raises(PermissionError):
        findings.read([Storage(f"{tmp_path}/locked")])


def test_a_storage_in_another_is_looked_at_as_deep_as_any(storage: Path, tmp_path: Path) -> None:
    shutil.copytree(storage / "runs/p20", tmp_path / "1/2/3/4/p20")
    inner = Storage(f"{tmp_path}/1/2/3")
    (tmp_path / "here").mkdir()
    shutil.copytree(storage / "runs/r20-a", tmp_path / "here/r20-a")
    for storages in ([Storage(str(tmp_path)), inner], [inner, Storage(str(tmp_path))]):
        assert sorted(run.name for run in findings.read(storages).runs) == ["p20", "r20-a"]


def test_any_name_is_one_of_a_run(storage: Path, tmp_path: Path) -> None:
    names = ["checkpoints", "logs", "model", "scores"]
    for name in names:
        shutil.copytree(storage / "runs/p20", tmp_path / name)
    assert [run.name for run in findings.read([Storage(str(tmp_path))]).runs] == names


def test_how_a_test_departs_from_the_papers() -> None:
    config = TrainConfig(input=InputConfig(crop_px=112, test_shorter_side_px=128))
    papers = procedure_of(Protocol.MULTI_SCALE, config).to_json()
    last, best = ({"file": f"model/000000004-{kind}-bn0.safetensors", "step": 4} for kind in ("last", "best"))
    assert papers["shorter_sides_px"] == [112, 128, 192, 240, 320]
    assert procedure(papers, last | {"precise_bn_images": 640}, config, 4) == Procedure((), 640)
    assert str(procedure(papers, last | {"precise_bn_images": 640}, config)) == "batch norm over 640 images"
    for protocol, model, says in (
        (papers | {"shorter_sides_px": [112, 128]}, last, "112, 128 px instead of 112, 128, 192, 240, 320 px"),
        (papers | {"average": "logits"}, last, "averaged logits"),
        (papers, best, "best checkpoint instead of the last"),
        (papers, last | {"step": 3}, "checkpoint of step 3 of 4"),
    ):
        assert procedure(protocol, model, config, 4).departures == (says,)


def test_a_test_says_how_it_was_made(storage: Path, tmp_path: Path) -> None:
    """As its score file's record tells."""
    run = shutil.copytree(storage / "runs/six/members/r34-a", tmp_path / "r")
    (name,) = (run / "scores").glob("*.arrow")
    scored = scores.load(str(name))
    model = dict(scored.info.model) | {"file": "model/000000004-best-bn0.safetensors"}
    info = replace(scored.info, model=model, protocol=dict(scored.info.protocol) | {"average": "logits"})
    columns = {each: getattr(scored, each) for each in ("names", "labels", "decoded", "width", "height")}
    scores.publish(Storage(str(run)), "scores/val-ten_crop-0123456789ab.arrow", info, **columns, scores=scored.scores)
    (found,) = findings.read([Storage(str(tmp_path))]).runs
    says = {test.procedure.departures for test in found.tests}
    assert says == {(), ("averaged logits", "best checkpoint instead of the last")}


def test_an_ensemble_that_was_chosen_shows_the_held_out_error(storage: Path, tmp_path: Path) -> None:
    files = [scores.load(str(path)) for path in sorted((storage / "runs/six/members").rglob("*.arrow"))]
    made = ensemble.build(files, Storage(f"{tmp_path}/e"), choice=Choice.GREEDY, code_version="abc")
    (found,) = findings.read([Storage(str(tmp_path))]).ensembles
    assert (found.choice, found.held_out) == (Choice.GREEDY, ("val",))
    assert found.errors["val"][0] == made.held_out["val"].top1_error


def test_whether_the_test_set_validates(storage: Path, tmp_path: Path) -> None:
    data = DataSet(Storage(f"{storage}/cifar"))
    config = json.loads((storage / "runs/p20/config.json").read_text())
    for name, splits in (("apart", {}), ("same", {"test": data.manifest.splits["val"]})):
        shutil.copytree(storage / "cifar", tmp_path / name)
        manifest = replace(data.manifest, splits={**data.manifest.splits, **splits})
        (tmp_path / name / "manifest.json").write_bytes(manifest.to_bytes())
        run = shutil.copytree(storage / "runs/p20", tmp_path / f"run-{name}")
        identity = config["identity"] | {"data_sha256": DataSet(Storage(f"{tmp_path}/{name}")).digest}
        content = {"identity": identity, "sha256": digest(identity), "data": f"{tmp_path}/{name}"}
        (run / "config.json").write_text(json.dumps(config | content))
    found = findings.read([Storage(str(tmp_path))])
    assert [run.data.validation_is_test for run in found.runs] == [False, True]


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is nothing at"):
        findings.read([Storage(str(tmp_path / "none"))])
    (tmp_path / "photos").mkdir()
    with pytest.raises(ValueError, match="no run, campaign or ensemble is in"):
        findings.read([Storage(str(tmp_path))])
