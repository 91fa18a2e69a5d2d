"""What a campaign's folder remembers: which campaign it is, and one journal with one writer."""

from __future__ import annotations

import os
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from orchestrator.campaign import status as campaign_status
from orchestrator.campaign.decisions import Kind
from orchestrator.campaign.journal import Journal, check_identity, fix_identity, read_about
from orchestrator.campaign.member import progress_of
from orchestrator.config import TrackingConfig
from orchestrator.storage import Storage
from orchestrator.training.ownership import Process, SupersededError, claim
from tests.campaign.test_campaign import plan_of


@pytest.fixture
def folder(tmp_path: Path) -> Storage:
    return Storage(str(tmp_path / "c"))


def test_the_folder_tells_what_the_campaign_is(folder: Storage) -> None:
    plan = plan_of(18, 34, seed=3, recipe="ours")
    fix_identity(folder, plan, "d1")
    fix_identity(folder, plan, "d1")
    about = read_about(folder)
    assert about.members == plan.campaign.run_configs()
    assert about.steps == {"a": 100, "b": 100}
    assert (about.recipe, about.data_sha256) == ("ours", "d1")


def test_no_address_of_mlflow_is_kept(folder: Storage) -> None:
    plan = plan_of(18, tracking=TrackingConfig(uri="http://somebody:secret@mlflow"))
    fix_identity(folder, plan, "d1")
    assert b"secret" not in folder.read("campaign.json")
    assert read_about(folder).members["a"].evaluation == plan.campaign.config.evaluation


def test_parts_of_a_test_are_progress_and_a_score_file_more(folder: Storage) -> None:
    moments = [progress_of(folder)]
    for name in ("checkpoints/000010-1.json", "model/10-last-bn0.json", "scores/val-a.parts-1/000000"):
        folder.publish(name, b"{}")
        moments.append(progress_of(folder))
    folder.publish("scores/val-a.parts-1/000001", b"")
    moments.append(progress_of(folder))
    folder.publish("scores/val-a.json", b"{}")
    folder.delete("scores/val-a.parts-1")
    moments.append(progress_of(folder))
    assert moments == sorted(set(moments))


def test_a_member_of_another_machine_does_not_outlive_its_driver(folder: Storage) -> None:
    fix_identity(folder, plan_of(18), "d1")
    elsewhere = replace(Process.of(os.getpid()), host="elsewhere")
    with claim(folder, lease_s=5, take_over=False, tell=print, what="campaign") as owner:
        Journal(folder, owner.number).add(Kind.STARTED, "a", process=asdict(elsewhere), workers=1)
        assert campaign_status.read(folder).rows[0].is_running
    assert not campaign_status.read(folder).rows[0].is_running


def test_time_that_is_left_does_not_count_a_pause_as_work() -> None:
    times_s = [0, 10, 20, 30, 30 + 100_000, 40 + 100_000]  # ten steps in ten seconds each
    events = [{"step": 10 * (i + 1), "time_ms": 1000 * time_s} for i, time_s in enumerate(times_s)]
    assert campaign_status._left_s(events, 100) == 40
    assert campaign_status._left_s(events[:1], 100) is None


def test_another_campaign_of_the_same_name_is_refused_with_the_differences(folder: Storage) -> None:
    plan = plan_of(18, 34)
    fix_identity(folder, plan, "d1")
    check_identity(folder, replace(plan.campaign, config=replace(plan.campaign.config, least_members=1)), None)
    with pytest.raises(ValueError, match=r'data_sha256: "d1" → "d2"'):
        fix_identity(folder, plan, "d2")
    with pytest.raises(ValueError, match=r"members\.b\.model\.depth: 34 → 50"):
        fix_identity(folder, plan_of(18, 50), "d1")
    with pytest.raises(ValueError, match=r"members\.a\.seed: 0 → 1000"):
        check_identity(folder, plan_of(18, 34, seed=1).campaign, None)


def test_a_torn_identity_is_written_again_unless_the_campaign_has_begun(folder: Storage) -> None:
    plan = plan_of(18)
    folder.publish("campaign.json", b'{"sha256": "')
    fix_identity(folder, plan, "d1")
    assert read_about(folder).data_sha256 == "d1"
    Journal(folder, 1).add(Kind.OPENED, least=1)
    folder.publish("campaign.json", b'{"sha256": "')
    with pytest.raises(ValueError, match=r"campaign\.json is damaged: restore it"):
        fix_identity(folder, plan, "d1")
    with pytest.raises(ValueError, match="there is no campaign in"):
        read_about(folder.sub("other"))


def test_events_come_back_in_their_order(folder: Storage) -> None:
    journal = Journal(folder, 1)
    for member in ("a", "b"):
        journal.add(Kind.GAVE_UP, member, why=f"{member} broke")
    read = Journal(folder)
    assert [(e.number, e.kind, e.driver, e.member, e.detail) for e in read.entries] == [
        (1, Kind.GAVE_UP, 1, "a", {"why": "a broke"}),
        (2, Kind.GAVE_UP, 1, "b", {"why": "b broke"}),
    ]
    assert journal.entries == read.entries


def test_an_event_that_a_kill_has_torn_does_not_count_and_keeps_its_number(folder: Storage) -> None:
    folder.publish("journal/000001.json", b'{"entry": {"kind')
    folder.publish("journal/000002.json", b'{"entry": {}, "sha256": "0"}')
    journal = Journal(folder, 1)
    assert journal.entries == []
    assert journal.add(Kind.DONE).number == 3


def test_of_two_drivers_the_newer_writes(folder: Storage) -> None:
    old, new = Journal(folder, 1), Journal(folder, 2)
    old.add(Kind.OPENED, least=1)
    assert new.add(Kind.OPENED, least=1).number == 2  # the older's event came in between
    with pytest.raises(SupersededError, match="was claimed by another driver"):
        old.add(Kind.DONE)
    assert [(e.kind, e.driver) for e in Journal(folder).entries] == [(Kind.OPENED, 1), (Kind.OPENED, 2)]
