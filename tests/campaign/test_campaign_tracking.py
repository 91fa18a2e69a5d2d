"""Campaigns in a real MLflow: who is whose child, what is registered, what outages, losses and people do to it."""

from __future__ import annotations

import json
import re
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mlflow import MlflowClient

from orchestrator.campaign import note as words
from orchestrator.campaign import tracking as campaign_tracking
from orchestrator.campaign.mlflow_campaign import alias_of
from orchestrator.campaign.tracking import (
    CampaignDelivery,
    CampaignNote,
    CampaignTracker,
    EnsembleNote,
    MemberNote,
)
from orchestrator.config import ModelConfig, TrainConfig
from orchestrator.control import tracking
from orchestrator.control.comparison import NOTE_TAG
from orchestrator.control.run_tracking import open_tracker
from orchestrator.control.tracking import RunStatus, default_uri
from orchestrator.data.shards import ClassInfo, DataSet
from orchestrator.evaluation.scores import ScoresInfo, file_name, publish
from orchestrator.storage import Storage
from orchestrator.training.checkpoint import Checkpoints, Snapshot
from orchestrator.training.finished_model import ModelRecord
from orchestrator.training.run import fix_identity, run_storage
from tests.control.tracked import journal, wait_until
from tests.mlflow_server import Fate, MlflowServer, Proxy
from tests.training.group import small_config, take_number

CREATION = "POST model-versions/create"  # two calls each: a server refuses the first, which names a file on a disk
TEN_CROP = "val_ten_crop_top1_error"
FINISHED = RunStatus.FINISHED


class Members:
    """Folders of members in storage, as training leaves them, and the notes that say so."""

    def __init__(self, folder: Path, data: DataSet, data_path: Path) -> None:
        self.storage = Storage(str(folder))
        self._data, self._data_path = data, data_path

    def config(self, name: str, experiment: str = "contest") -> TrainConfig:
        number = int(name[-1])
        config = small_config(self._data_path, Path(self.storage.root) / "members", name, seed=number)
        config = replace(config, model=ModelConfig(depth=18 if number < 3 else 34), recipe="small")
        return replace(config, tracking=replace(config.tracking, experiment=experiment))

    def train(self, name: str, last: int, error: float | None = None) -> None:
        """What there is after step ``last``."""
        config = self.config(name)
        run = run_storage(config)
        fix_identity(run, config, self._data)
        events = journal(1, last, delay_ms=int(name[-1]))
        checkpoints = Checkpoints(run, attempt=take_number(run), keep_last=1, notice=lambda text: None)
        checkpoints.newest()
        checkpoints.save(Snapshot(last, {"model/w": torch.ones(2)}, {}, events, 90 / last))
        checkpoints.wait()
        checkpoints.close()
        if error is not None:
            self.test(name, error)

    def test(self, name: str, error: float) -> None:
        """The scores of a member that is wrong in ``error`` percent of 16 images."""
        model, classes = self.model(name), tuple(ClassInfo(i, f"n{i}") for i in range(5))
        labels, shown = np.zeros(16, np.int32), np.zeros((16, 5), np.float32)
        shown[np.arange(16), (np.arange(16) < round(error * 0.16)).astype(int)] = 1.0
        info = ScoresInfo("val", {"kind": "ten_crop"}, classes, model.to_json(), {"sha256": model.data_sha256}, "0")
        sizes = np.full(16, 64, np.int32)
        publish(
            Storage(model.run),
            file_name("val", "ten_crop", "0" * 12),
            info,
            names=[f"{i}.jpg" for i in range(16)],
            labels=labels,
            decoded=np.ones(16, bool),
            width=sizes,
            height=sizes,
            scores=shown,
        )

    def deliver(self, name: str, uri: str, experiment: str = "contest", status: RunStatus = FINISHED) -> None:
        """What the member's own process does."""
        config = self.config(name, experiment)
        run, recipe = run_storage(config), replace(config, seed=0)
        tracker = open_tracker(
            config, recipe, uri=uri, run=run, command="python jobs/campaign.py", system_metrics=False
        )
        delivery = tracker.close(60, status)
        assert (delivery.error, delivery.pending) == (None, 0)

    def model(self, name: str) -> ModelRecord:
        config = self.config(name)
        return ModelRecord(
            file="model/000000040-last-bn0.safetensors",
            nbytes=10,
            sha256=f"{name}-sha256",
            weights_sha256=f"{name}-weights",
            step=40,
            checkpoint=f"{run_storage(config).url}/checkpoints/000000040-a000001",
            checkpoint_sha256="c0ffee",
            validation_top1_error=2.25,
            precise_bn_images=0,
            run=run_storage(config).url,
            name=name,
            recipe="small",
            config=config.identity(),
            data_sha256=self._data.digest,
            num_classes=5,
            code_version="0",
        )

    def note(self, name: str, experiment: str = "contest", **changes: Any) -> MemberNote:
        config = self.config(name, experiment)
        fields: dict[str, Any] = {
            "name": name,
            "config": config,
            "recipe": replace(config, seed=0),
            "state": "training",
        }
        return MemberNote(**(fields | changes))

    def done(self, name: str, error: float, experiment: str = "contest") -> MemberNote:
        errors = {TEN_CROP: error, "val_ten_crop_top5_error": 0.0}
        return self.note(name, experiment, state="done", end=FINISHED, errors=errors, model=self.model(name))

    def ensemble(self, error: float, *names: str) -> EnsembleNote:
        weights = {name: 1 / len(names) for name in names}
        manifest = {"weights": weights, "error": error}
        self.storage.publish("ensemble/ensemble.json", json.dumps(manifest).encode())
        return EnsembleNote(
            url=f"{self.storage.url}/ensemble/ensemble.json",
            manifest=manifest,
            weights=weights,
            errors={TEN_CROP: error},
        )


@pytest.fixture
def members(tmp_path: Path, data: DataSet, prepared: Path) -> Members:
    return Members(tmp_path / "contest", data, prepared)


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(campaign_tracking, "_LINGER_S", 0.1)
    monkeypatch.setattr(campaign_tracking, "_MIN_INTERVAL_S", 0.1)
    monkeypatch.setattr(campaign_tracking, "_MAX_INTERVAL_S", 0.5)
    monkeypatch.setattr(campaign_tracking, "_MAX_BACKOFF_S", 0.3)
    monkeypatch.setattr(tracking, "_MAX_BACKOFF_S", 0.3)


@pytest.fixture
def open_campaign(members: Members) -> Iterator[Callable[..., CampaignTracker]]:
    made: list[CampaignTracker] = []

    def make(uri: str, experiment: str = "contest") -> CampaignTracker:
        made.append(
            CampaignTracker(
                uri=uri,
                experiment=experiment,
                name=experiment,
                folder=members.storage,
                params={"seed": 0},
                description="Three small networks.",
                command="python jobs/campaign.py small",
            )
        )
        return made[-1]

    yield make
    for one in made:
        one.close(0, RunStatus.KILLED)


def shows(tracker: CampaignTracker, note: CampaignNote) -> None:
    """Tell it, and wait until MLflow has it."""
    tracker.tell(note)
    wait_until(lambda: tracker._shown is note)


def closed(tracker: CampaignTracker, status: RunStatus = FINISHED, reason: str = "") -> CampaignDelivery:
    delivery = tracker.close(60, status, reason)
    assert delivery.error is None
    return delivery


def everything(uri: str, experiment: str = "contest") -> dict[str, Any]:
    """All that MLflow holds of a campaign: by run's name, and by number of version; runs by name, not identity."""
    client = MlflowClient(uri)
    found = client.search_runs([client.get_experiment_by_name(experiment).experiment_id])
    held: dict[str, Any] = {}
    for run in found:
        assert run.info.run_name not in held
        history = {
            key: [(m.step, m.timestamp, m.value) for m in client.get_metric_history(run.info.run_id, key)]
            for key in run.data.metrics
        }
        artifacts = sorted(one.path for one in client.list_artifacts(run.info.run_id))
        times = (run.info.status, run.info.start_time, run.info.end_time)
        code = ("mlflow.source.", "code_version")  # another's commit while a test runs
        tags = {key: value for key, value in run.data.tags.items() if not key.startswith(code)}
        held[run.info.run_name] = [times, history, tags, run.data.params, artifacts]
    for model in client.search_registered_models():
        if model.tags.get("campaign") == experiment:
            aliases = {alias: str(version) for alias, version in model.aliases.items()}
            held["model"] = [model.name, model.tags, model.description, aliases]
            for one in client.search_model_versions(f"name = '{model.name}'"):
                held[f"version {one.version}"] = [one.source, one.run_id, one.tags, one.description]
    text = json.dumps(held, sort_keys=True)
    for run in found:
        text = text.replace(run.info.run_id, f"<{run.info.run_name}>")
    return dict(json.loads(re.sub(r"#/experiments/\d+/", "#/experiments/N/", text)))


# -- one campaign from its beginning to its end -------------------------------------------------------------------


def test_a_campaign_from_beginning_to_end_and_again_and_after_a_loss(
    tmp_path: Path, members: Members, open_campaign: Callable[..., CampaignTracker]
) -> None:
    uri = default_uri(None, tmp_path)
    names = ("net-1", "net-2", "net-3")

    # Nothing has begun: a parent without children, whose table says so.
    one = open_campaign(uri)
    shows(one, CampaignNote(members=tuple(members.note(name, state="waiting") for name in names)))
    assert everything(uri)["contest"][0][0] == "RUNNING"

    # One member has ended, and MLflow has its run; one is at work; one has failed before it had a folder.
    members.train("net-1", 40, 18.75)
    members.deliver("net-1", uri)
    members.train("net-2", 20)
    members.deliver("net-2", uri, status=RunStatus.RUNNING)
    failed = members.note("net-3", state="failed: disk | full", end=RunStatus.FAILED)
    shows(one, CampaignNote(members=(members.done("net-1", 18.75), members.note("net-2"), failed)))
    held = everything(uri)
    assert held.keys() == {"contest", "net-1", "net-2", "model", "version 1"}
    assert [held[name][2]["mlflow.parentRunId"] for name in ("net-1", "net-2")] == ["<contest>"] * 2
    note = held["contest"][2][NOTE_TAG]
    assert note.startswith(
        "**Result so far:** 1 of 3 members done (net-3 failed); val ten crop: best member 18.75 % (net-1)\n\n"
        "| Member | State | Network | Seed | val ten crop | MLflow |\n"
    )
    assert "| net-2 | training | ResNet-18 | 2 |  | [run](#/experiments/N/runs/<net-2>?" in note
    assert "| net-3 | failed: disk \\| full | ResNet-34 | 3 |  |  |\n\nThree small networks.\n\n" in note
    assert held["model"][3] == {"net-1": "1"}

    # The rest is done, by a driver that was started again; what the member's process did not deliver arrives too.
    assert closed(one, RunStatus.KILLED).run_id
    members.train("net-2", 40, 6.25)
    members.train("net-3", 40, 12.5)
    done = (members.done("net-1", 18.75), members.done("net-2", 6.25), members.done("net-3", 12.5))
    final = CampaignNote(
        members=done, ensemble=members.ensemble(4.5, *names), submission=f"{members.storage.url}/submission/test.txt"
    )
    two = open_campaign(uri)
    two.tell(final)
    assert "/runs/" in closed(two).where
    held = everything(uri)
    assert held.keys() == {"contest", "contest ensemble", *names, "model", *(f"version {n}" for n in range(1, 5))}
    for name in (*names, "contest ensemble"):
        times, history, tags, _, artifacts = held[name]
        assert times[0] == "FINISHED"
        assert tags["mlflow.parentRunId"] == "<contest>"
        assert "failure" not in tags
        assert history[TEN_CROP][0][2] == {"net-1": 18.75, "net-2": 6.25, "net-3": 12.5}.get(name, 4.5)
        if name in names:
            assert [step for step, _, _ in history["validation_top1_error"]] == [10, 20, 30, 40]
            assert {"errors.png", "model.json"} <= set(artifacts)
            assert tags["changes"] == f"seed: 0 → {name[-1]}"

    # The parent's numbers: at each member that was done, by the time of its last event.
    (status, begun_ms, _), history, tags, params, artifacts = held["contest"]
    assert (status, begun_ms > 10**12, params) == ("FINISHED", True, {"seed": "0"})
    assert history["members_done"] == [[1, 40_001, 1.0], [2, 40_002, 2.0], [3, 40_003, 3.0]]
    of_best = [[step, value] for step, _, value in history[f"best_member_{TEN_CROP}"]]
    assert of_best == [[1, 18.75], [2, 6.25], [3, 6.25]]
    assert [[step, value] for step, _, value in history[f"ensemble_{TEN_CROP}"]] == [[3, 4.5]]
    over_seeds = {name: [v for *_, v in history[f"small_as_net_1_{TEN_CROP}_{name}"]] for name in ("mean", "std")}
    assert over_seeds == {"mean": [12.5], "std": [8.83883]}  # net-3 has more layers
    assert len(history) == 5
    assert artifacts == ["errors.png"]
    assert (tmp_path / "contest" / "figures" / "errors.png").stat().st_size > 20_000
    note = tags[NOTE_TAG]
    assert note.startswith(
        "**Result:** 3 of 3 members done; val ten crop: ensemble of 3: 4.50 %, best member 6.25 % (net-2); "
        "small as net-1: 12.50 ± 8.84 % over 2 seeds; submission `"
    )
    assert "| **ensemble** | of 3 |  |  | **4.50 %** | [run](#/experiments/N/runs/<contest ensemble>?" in note

    # The registry: what is where, and who is champion.
    assert held["model"][3] == {"net-1": "1", "net-2": "2", "net-3": "3", "champion": "4"}
    source, run_id, tags, about = held["version 2"]
    assert source == tags["url"] == f"{run_storage(members.config('net-2')).url}/model/000000040-last-bn0.safetensors"
    assert (run_id, tags["sha256"]) == ("<net-2>", "net-2-sha256")
    assert tags[TEN_CROP] == "6.25"
    assert "c0ffee" in about
    source, run_id, tags, about = held["version 4"]
    assert (source, run_id) == (f"{members.storage.url}/ensemble/ensemble.json", "<contest ensemble>")
    assert "- 0.3333 × `net-3`: `" in about
    assert "`net-3-sha256`" in about

    # The same again changes nothing.
    three = open_campaign(uri)
    three.tell(final)
    closed(three)
    assert everything(uri) == held

    # The store is lost: all is there again, from storage alone.
    (tmp_path / "new").mkdir()
    uri = f"sqlite:///{tmp_path}/new/mlflow.db"
    four = open_campaign(uri)
    four.tell(final)
    closed(four)
    again = everything(uri)
    held["contest"][0][1] = again["contest"][0][1]  # when it began: was told then, is the first event's now
    for name in names:  # at which start, by which command and until when a member was looked at
        for row in (held[name], again[name]):
            row[0][2] = 0
            row[2] |= {"starts": "", NOTE_TAG: re.sub("command goes on: .*", "", row[2][NOTE_TAG])}
    for name in held:
        assert again[name] == held[name]


def test_what_people_change_stays_and_a_new_ensemble_is_the_new_champion(
    tmp_path: Path, members: Members, open_campaign: Callable[..., CampaignTracker]
) -> None:
    uri = default_uri(None, tmp_path)
    for name in ("net-1", "net-2"):
        members.train(name, 10)
    done = (members.done("net-1", 6.0), members.done("net-2", 5.0))
    first = CampaignNote(members=done, ensemble=members.ensemble(5.5, "net-1"))
    client = MlflowClient(uri)
    client.create_registered_model("contest", description="ours")  # another's
    one = open_campaign(uri)
    one.tell(first)
    delivery = closed(one)
    held = everything(uri)
    model = held["model"][0]
    assert re.fullmatch(r"contest [0-9a-f]{8}", model)
    assert client.get_registered_model("contest").description == "ours"

    # Words around ours stay, and so do a description that is a person's own, a moved alias, and a new name.
    note = client.get_run(delivery.run_id).data.tags[NOTE_TAG]
    client.set_tag(delivery.run_id, NOTE_TAG, f"Mind this.\n\n{note}\n\nAnd that.")
    [ensemble] = [run for run in client.search_runs(["1"]) if run.info.run_name == "contest ensemble"]
    client.set_tag(ensemble.info.run_id, NOTE_TAG, "own words")
    client.rename_registered_model(model, "Our contest")
    client.set_registered_model_alias("Our contest", "champion", "2")
    client.delete_registered_model_alias("Our contest", "net-1")
    two = open_campaign(uri)
    two.tell(replace(first, submission="s3://key:hidden@bucket/test.txt"))
    closed(two)
    held = everything(uri)
    note = held["contest"][2][NOTE_TAG]
    assert note.startswith("Mind this.\n\n**Result:** 2 of 2 members done; val ten crop: ensemble of 1: 5.50 %, best")
    assert "submission `s3://***@bucket/test.txt`" in note
    assert note.endswith("\n\nAnd that.")
    assert held["contest ensemble"][2][NOTE_TAG] == "own words"
    assert (held["model"][0], held["model"][3]) == ("Our contest", {"net-2": "2", "champion": "2"})
    assert "version 4" not in held

    # Another ensemble of the same members is another version, and the champion.
    three = open_campaign(uri)
    three.tell(replace(first, ensemble=members.ensemble(4.75, "net-1", "net-2")))
    closed(three, RunStatus.FAILED, "no\nspace")
    held = everything(uri)
    assert held["model"][3] == {"net-2": "2", "champion": "4"}
    assert [value for _, _, value in held["contest ensemble"][1][TEN_CROP]] == [5.5, 4.75]
    assert [value for _, _, value in held["contest"][1][f"ensemble_{TEN_CROP}"]] == [5.5, 4.75]
    assert (held["contest"][0][0], held["contest"][2]["failure"]) == ("FAILED", "no")
    assert "hidden" not in json.dumps(held)


# -- a server in trouble ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MlflowServer]:
    server = MlflowServer(tmp_path_factory.mktemp("server"))
    server.start()
    server.wait_ready()
    yield server
    server.stop()


@pytest.fixture
def proxy(server: MlflowServer) -> Iterator[Proxy]:
    proxy = Proxy(server.port)
    yield proxy
    proxy.close()


def final_note(members: Members, experiment: str) -> CampaignNote:
    for name in ("net-1", "net-2"):
        members.train(name, 20, 12.5)
    done = (members.done("net-1", 12.5, experiment), members.done("net-2", 12.5, experiment))
    return CampaignNote(members=done, ensemble=members.ensemble(4.5, "net-1", "net-2"), submission="test.txt")


def assert_all_there(uri: str, experiment: str) -> None:
    held = everything(uri, experiment)
    assert held.keys() == {
        *(experiment, f"{experiment} ensemble", "net-1", "net-2", "model", "version 1", "version 2", "version 3")
    }
    assert held["model"][3] == {"net-1": "1", "net-2": "2", "champion": "3"}
    # A server does not take the path of a file: what it takes says where that is.
    assert [held[f"version {n}"][0] for n in (1, 3)] == [
        "runs:/<net-1>/model.json",
        f"runs:/<{experiment} ensemble>/ensemble.json",
    ]
    for name in ("net-1", "net-2", f"{experiment} ensemble"):
        assert held[name][2]["mlflow.parentRunId"] == f"<{experiment}>"
        assert len(held[name][1][TEN_CROP]) == 1
    assert [step for step, _, _ in held[experiment][1]["members_done"]] == [1, 2]
    assert held[experiment][0][0] == "FINISHED"


def test_a_campaign_does_not_wait_for_a_server_that_is_down_refuses_and_loses_answers(
    members: Members, open_campaign: Callable[..., CampaignTracker], proxy: Proxy, caplog: pytest.LogCaptureFixture
) -> None:
    note = final_note(members, "trouble")
    proxy.fate = lambda call: 503
    one = open_campaign(proxy.uri, "trouble")
    started_s = time.perf_counter()
    for number in range(1000):
        one.tell(replace(note, submission=f"{number}"))
    assert time.perf_counter() - started_s < 5  # no call is behind this: each would take longer than a tell
    wait_until(lambda: "503" in str(one._error))
    assert one._parent.run_id is None
    one.tell(note)
    proxy.calls.clear()
    # Of each kind of call the first is done, and nobody hears of it; of versions the first that the server does.
    losses = {CREATION: (2,)}
    proxy.fate = lambda call: (
        Fate.LOSE_ANSWER if call.startswith("POST") and proxy.calls[call] in losses.get(call, (1,)) else Fate.PASS
    )
    delivery = one.close(90, FINISHED)
    assert delivery.error is None
    proxy.fate = lambda call: Fate.PASS
    for call in ("runs/create", "registered-models/create", "model-versions/create"):
        assert proxy.calls[f"POST {call}"] >= 1
    assert_all_there(proxy.uri, "trouble")
    assert "the campaign goes on" in caplog.text


def num_created_versions(database: Path, model: str) -> int:
    """Those that were deleted again included."""
    with closing(sqlite3.connect(database)) as connection:
        found = connection.execute("SELECT count(*) FROM model_versions WHERE name = ?", (model,)).fetchone()
    return int(found[0])


def test_who_may_not_register_models_still_sees_the_runs_and_the_next_start_brings_the_rest(
    members: Members,
    open_campaign: Callable[..., CampaignTracker],
    proxy: Proxy,
    server: MlflowServer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    note = final_note(members, "guarded")
    proxy.fate = lambda call: 403 if "registered-models" in call else Fate.PASS
    one = open_campaign(proxy.uri, "guarded")
    one.tell(note)
    wait_until(lambda: "registered models" in str(one._error))
    delivery = one.close(2, FINISHED)
    assert "403" in str(delivery.error)
    assert delivery.run_id is not None
    one._thread.join(60)
    proxy.fate = lambda call: Fate.PASS
    held = everything(proxy.uri, "guarded")
    assert {"guarded", "guarded ensemble", "net-1", "net-2"} == held.keys()
    assert held["guarded"][2][NOTE_TAG].startswith("**Result:** 2 of 2 members done")

    # The first creation of a version is given up, looked for in vain and made again; then it is done after all.
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    proxy.calls.clear()
    proxy.fate = lambda call: Fate.HOLD if call == CREATION and proxy.calls[call] == 2 else Fate.PASS
    two = open_campaign(proxy.uri, "guarded")
    shows(two, note)
    assert proxy.held[CREATION] == 1
    proxy.released.set()
    wait_until(lambda: num_created_versions(server.database, "guarded") == 4)
    closed(two)
    assert_all_there(proxy.uri, "guarded")


def test_a_driver_ends_though_no_call_does(
    members: Members,
    open_campaign: Callable[..., CampaignTracker],
    proxy: Proxy,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1000")
    proxy.fate = lambda call: Fate.HOLD
    one = open_campaign(proxy.uri, "silent")
    one.tell(final_note(members, "silent"))
    wait_until(lambda: proxy.held.total() == 1)
    delivery = one.close(1.0, FINISHED)
    assert delivery.error is not None
    assert (tmp_path / "contest" / "figures" / "errors.png").exists()


# -- words --------------------------------------------------------------------------------------------------------


def test_aliases_are_such_as_mlflow_takes(tmp_path: Path) -> None:
    from mlflow.utils.validation import _validate_model_alias_name, _validate_model_alias_name_reserved

    names = ("resnet-152_a", "a b", "a.b", "v1", "Latest", "champion", "é", "x" * 900)
    aliases = [alias_of(name) for name in names]
    assert aliases[0] == names[0]
    assert len(set(aliases)) == len(names)
    assert "champion" not in aliases
    for alias in aliases:
        _validate_model_alias_name(alias)
        _validate_model_alias_name_reserved(alias)


def test_a_table_of_very_many_members_is_cut(tmp_path: Path) -> None:
    config = small_config(tmp_path, tmp_path, "m")
    many = tuple(MemberNote(name=f"m{n}", config=config, recipe=config, state="waiting") for n in range(500))
    table = words.members_table(CampaignNote(members=many), {f"m{n}": "x" * 100 for n in range(500)})
    assert len(table) < 7000
    assert re.search(r"\| … and 4\d\d more \|", table)
