"""``python jobs/campaign.py``: three members to one submission, killed on the way; a member that fails for good."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path

import psutil
import pytest
from rich.console import Console

from jobs import campaign as job
from jobs.campaign_display import Display
from orchestrator.campaign import products as campaign_products
from orchestrator.campaign import status as campaign_status
from orchestrator.campaign.decisions import Entry, Kind
from orchestrator.campaign.journal import Journal, fix_identity
from orchestrator.campaign.member import MemberProcess
from orchestrator.campaign.plan import Packing
from orchestrator.campaign.status import State
from orchestrator.control import checks
from orchestrator.storage import Storage
from orchestrator.training.ownership import claim
from orchestrator.training.run import run_storage
from tests.jobs.conftest import Run
from tests.jobs.tiny_campaign import MEMBERS, make_plainly, opened, submission, words
from tests.training.group import EVERY_FAULT, fault_seeds

ROOT = Path(__file__).parents[2]
KILLS = 10 if EVERY_FAULT else 1


class Driven:
    """The command, as a process that is watched and killed."""

    def __init__(self, arguments: list[str], log: Path) -> None:
        environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_") and k != "RANK"}
        environment |= {"PYTHONPATH": str(ROOT), "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0", "RAY_USAGE_STATS_ENABLED": "0"}
        self.log = log
        with log.open("ab") as stream:
            self.process = subprocess.Popen(
                [sys.executable, "jobs/campaign.py", *arguments],
                cwd=ROOT,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=stream,
                start_new_session=True,
            )

    def end_when(self, reached: Callable[[], bool], number: signal.Signals, timeout_s: float = 900) -> int:
        """Send signal ``number`` once ``reached`` holds; the exit code."""
        until_s = time.monotonic() + timeout_s
        while not reached():
            assert self.process.poll() is None, f"it ended too soon:\n{self.text()}"
            assert time.monotonic() < until_s, self.text()
            time.sleep(0.01)
        tree = psutil.Process(self.process.pid).children(recursive=True)
        self.process.send_signal(number)
        code = self.process.wait(timeout_s)
        if number is signal.SIGKILL:
            # Ray's own end with their driver a little later; members must by themselves.
            for each in tree:
                if "member.py" not in " ".join(_command_of(each)):
                    _kill(each)
        return code

    def wait(self, timeout_s: float = 900) -> int:
        return self.process.wait(timeout_s)

    def text(self) -> str:
        return self.log.read_text()


def _command_of(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def _kill(process: psutil.Process) -> None:
    with suppress(psutil.Error):
        process.kill()


def alive_members(folder: Path) -> list[int]:
    """Processes of members that the journal knows and that live."""
    pids = [e.detail["process"]["pid"] for e in Journal(Storage(str(folder))).entries if e.kind is Kind.STARTED]
    return [pid for pid in pids if psutil.pid_exists(pid) and "member.py" in " ".join(_command_of(psutil.Process(pid)))]


def wait_for(reached: Callable[[], bool], otherwise: str, timeout_s: float = 300) -> None:
    until_s = time.monotonic() + timeout_s
    while not reached():
        assert time.monotonic() < until_s, otherwise
        time.sleep(0.1)


# -- moments --------------------------------------------------------------------------------------------------------


def moments(folder: Path) -> dict[str, Callable[[], bool]]:
    """What a campaign comes to, in about this order: by name, whether it has."""

    def there(pattern: str) -> Callable[[], bool]:
        return lambda: any(folder.glob(pattern))

    def told(kind: Kind, number: int = 1) -> Callable[[], bool]:
        def has_been() -> bool:
            texts = [path.read_text() for path in folder.glob("journal/*.json")]
            return sum(f'"kind": "{kind.value}"' in text for text in texts) >= number

        return has_been

    found: dict[str, Callable[[], bool]] = {
        "claimed": there("attempts/*.json"),
        "opened": told(Kind.OPENED),
        "packed": told(Kind.PACKED),
        "a member started": told(Kind.STARTED),
        "a member began": there("members/*/attempts/*.json"),
        "a checkpoint": there("members/*/checkpoints/*.json"),
        "a run ended": there("members/*/finished.json"),
        "a model": there("members/*/model/*.json"),
        "a score file": there("members/*/scores/*.json"),
        "a member ended": told(Kind.ENDED),
        "the third member began": there("members/r18-b/attempts/*.json"),
        "its checkpoint": there("members/r18-b/checkpoints/*.json"),
        "its scores": there("members/r18-b/scores/*.json"),
        "all ended": told(Kind.SCORED, 3),
        "an ensemble": there("ensemble/*/ensemble.json"),
        "a submission": there("submission/*"),
    }
    return found


# -- what a campaign comes to, undisturbed --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clean(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the same campaign, made without Ray and driver."""
    storage = tmp_path_factory.mktemp("clean")
    make_plainly(words(prepared, storage, "c"))
    return storage / "c"


# -- tests ----------------------------------------------------------------------------------------------------------


@pytest.mark.timeout(3000)
@pytest.mark.parametrize("seed", fault_seeds())
def test_killed_anywhere_a_campaign_ends_with_the_same_submission(
    seed: int, clean: Path, prepared: Path, tmp_path: Path, typed: Run
) -> None:
    arguments, folder = words(prepared, tmp_path, "c"), tmp_path / "c"
    names, draw = list(moments(folder)), random.Random(seed)
    for number in range(KILLS):  # one in each part of the way
        name = names[int((number + draw.random()) / KILLS * len(names))]
        driven = Driven(arguments, tmp_path / "log.txt")
        assert driven.end_when(moments(folder)[name], signal.SIGKILL) == -signal.SIGKILL, (name, driven.text())
        if number % 2 == 0:  # else the next driver meets them
            wait_for(lambda: not alive_members(folder), "members outlive their driver")
    driven = Driven(arguments, tmp_path / "log.txt")
    assert driven.wait() == 0, driven.text()
    assert not alive_members(folder)

    assert submission(folder) == submission(clean)
    check_journal(Journal(Storage(str(folder))).entries)
    for name in MEMBERS:
        ours, theirs = (json.loads((f / "members" / name / "finished.json").read_text()) for f in (folder, clean))
        assert ours["weights_sha256"] == theirs["weights_sha256"]

    status = campaign_status.read(Storage(str(folder)))
    assert [(row.name, row.state, row.step) for row in status.rows] == [(name, State.DONE, 6) for name in MEMBERS]
    assert all({"val_one_crop_top1_error", "val_ten_crop_top5_error"} <= row.errors.keys() for row in status.rows)
    code, page = typed("status", "--storage", str(tmp_path), "--name", "c", main=job.main)
    assert code == 0
    assert "3 of 3 members done; all is published" in " ".join(page.split())

    # What is done is not done again: no cluster, no process.
    before = sorted(folder.glob("members/*/*/*"))
    code, page = typed(*arguments, main=job.main)
    assert code == 0
    assert "starts with" not in page
    assert sorted(folder.glob("members/*/*/*")) == before

    code, page = typed("member", "r34", *arguments, main=job.main)
    assert code == 0
    assert "r34: 6 steps done" in page
    assert sorted(folder.glob("members/*/*/*")) == before

    code, page = typed(*arguments, "--seed", "3", main=job.main)
    assert code == 2
    assert "campaign 'c' exists as another (old → new): members.r18-a.seed: 0 → 3000" in page


def check_journal(entries: list[Entry]) -> None:
    """No member is started while it runs, or after it is done; nobody is given up."""
    running, done = set[str](), set[str]()
    for entry in entries:
        assert entry.kind not in (Kind.GAVE_UP, Kind.STOPPED)
        if entry.kind is Kind.STARTED:
            assert entry.member not in running | done
            running.add(entry.member)
        elif entry.kind is Kind.ENDED:
            running.discard(entry.member)
            done |= {entry.member} if entry.detail["done"] else set()
            assert entry.detail["asked"] or entry.detail["code"] == 0, entry
    assert not running
    assert entries[-1].kind is Kind.DONE


def test_a_member_that_is_trained_alone_is_seen(prepared: Path, tmp_path: Path) -> None:
    what = opened(words(prepared, tmp_path, "c"))
    fix_identity(what.folder, what.plan, what.data_sha256)
    config = what.plan.campaign.run_configs()["r34"]
    with claim(run_storage(config), lease_s=5, take_over=False, tell=print):
        rows = {row.name: row for row in campaign_status.read(what.folder).rows}
    assert {name: row.state for name, row in rows.items() if row.is_running} == {"r34": State.TRAINING}
    assert rows["r34"].where == socket.gethostname()
    assert not any(row.is_running for row in campaign_status.read(what.folder).rows)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("member",), "member needs the name of one first"),
        (("member", "--name", "c"), "member needs the name of one first"),
        (("member", "r43"), "there is no member 'r43' in this campaign: choose one of r18-a, r18-b, r34"),
        (("member", "r34", "--on", "slurm", "--slurm.array"), "--slurm.array is for a campaign"),
    ],
)
def test_wrong_members(arguments: tuple[str, ...], said: str, prepared: Path, tmp_path: Path, typed: Run) -> None:
    more = words(prepared, tmp_path, "c") if len(arguments) > 1 and arguments[1].startswith("r") else []
    code, text = typed(*arguments[:2], *more, *arguments[2:], main=job.main)
    assert code == 2
    assert said in text
    assert not (tmp_path / "c").exists()


@pytest.mark.skipif(not EVERY_FAULT, reason="two minutes: make test-faults; decisions: tests/campaign")
@pytest.mark.timeout(1500)
def test_a_member_that_fails_for_good(clean: Path, prepared: Path, tmp_path: Path) -> None:
    """Two members are done already; the third cannot be trained."""
    for name in ("r18-a", "r18-b"):
        shutil.copytree(clean / "members" / name, tmp_path / "c" / "members" / name)
    fails = ("--change", "r34:model.factory=tests.jobs.failing:fails_in_training")
    arguments = words(prepared, tmp_path, "c", *fails)
    # Asked to end, the driver ends the member first.
    driven = Driven(arguments, tmp_path / "log.txt")
    assert driven.end_when(moments(tmp_path / "c")["a member started"], signal.SIGTERM) == 143, driven.text()
    assert not alive_members(tmp_path / "c")
    driven = Driven(arguments, tmp_path / "log.txt")
    assert driven.wait() == 2, driven.text()
    said = " ".join(driven.text().split())
    assert "campaign 'c' stopped: 3 members are needed and 2 can be had; failed for good: r34: " in said
    assert "this network fails in its first step" in said
    assert "(2 members are done)" in said
    assert "--least-members 2 goes on without them" in said
    folder = Storage(str(tmp_path / "c"))
    status = campaign_status.read(folder)
    assert [row.state for row in status.rows] == [State.DONE, State.DONE, State.FAILED]
    assert "this network fails in its first step" in status.rows[2].said

    driven = Driven([*arguments, "--least-members", "2"], tmp_path / "log2.txt")
    assert driven.wait() == 0, driven.text()
    assert "the ensemble is made without r34 (least_members 2)" in driven.text()
    what = replace(opened(arguments), folder=folder)
    for protocol in what.plan.campaign.config.evaluation.protocols:
        made = campaign_products.read_ensemble(folder, protocol)
        assert made is not None
        assert [entry.model["name"] for entry in made.members] == ["r18-a", "r18-b"]
    kinds = [entry.kind for entry in Journal(folder).entries]
    assert kinds.count(Kind.STARTED) == 3  # before the driver was asked to end, and twice to its end
    assert kinds.count(Kind.GAVE_UP) == 1
    assert submission(tmp_path / "c") != submission(clean)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--change", "schedule.max_stepz=3"), "--change 'schedule.max_stepz=3' names no field of a run"),
        (("--change", "schedule.max_steps=many"), "cannot be: config.schedule.max_steps: 'many' is no int"),
        (("--change", "r43:schedule.max_steps=3"), "there is no member 'r43': choose one of r18-a, r18-b, r34"),
        (("--change", "seed=3"), "--change 'seed=3': the campaign sets this for all members: give --seed itself"),
        (("--placement.autoscaling", "True"), "a campaign asks no autoscaler for machines"),
        (("--placement.num-workers", "2"), "the workers of a campaign's members are set by workers_per_member"),
        (("--evaluation.splits", "val", "tset"), "tset"),
    ],
)
def test_wrong_input(more: tuple[str, ...], said: str, prepared: Path, tmp_path: Path, typed: Run) -> None:
    code, text = typed(*words(prepared, tmp_path, "c", *more), main=job.main)
    assert code == 2
    assert said in text
    assert not (tmp_path / "c").exists()


def test_a_dry_run_tells_members_and_takes_nothing(prepared: Path, tmp_path: Path, typed: Run) -> None:
    code, text = typed(*words(prepared, tmp_path, "c", "--dry-run"), main=job.main)
    assert code == 0, text
    lines = {line.split()[0]: " ".join(line.split()) for line in text.splitlines() if line}
    assert [name for name in lines if name in MEMBERS] == ["r34", "r18-a", "r18-b"]
    assert "seed 2 6 steps" in lines["r34"]
    assert "1 worker(s) to do" in lines["r34"]
    assert lines["submission"] == "submission of ten_crop"
    assert not (tmp_path / "c").exists()


def test_a_dry_run_takes_the_workers_of_the_journal_and_refuses_what_cannot_fit(
    prepared: Path, tmp_path: Path, typed: Run
) -> None:
    arguments = [*words(prepared, tmp_path, "c"), "--dry-run"]
    asked = opened(arguments).plan.campaign.asked
    packing = asdict(Packing(dict.fromkeys(MEMBERS, 3), 1, False, 3))
    Journal(Storage(str(tmp_path / "c")), 1).add(Kind.PACKED, packing=packing, asked=asked)
    code, text = typed(*arguments, main=job.main)
    assert code == 0, text
    assert text.count("3 worker(s)") == 3
    code, text = typed(*arguments, "--placement.use-gpu", "True", main=job.main)
    assert code == 2
    assert "no worker fits there" in text


def test_a_driver_that_is_refused_leaves_mlflow_to_the_one_at_work(prepared: Path, tmp_path: Path, typed: Run) -> None:
    folder = Storage(str(tmp_path / "c"))
    arguments = words(prepared, tmp_path, "c", "--tracking.uri", f"sqlite:///{tmp_path}/mlflow.db")
    with claim(folder, lease_s=5, take_over=False, tell=print, what="campaign"):
        code, text = typed(*arguments, main=job.main)
    assert code == 2
    assert f"error: campaign {folder.url} is at work: the driver on" in " ".join(text.split())
    assert not (tmp_path / "mlflow.db").exists()


def test_a_look_that_fails_ends_neither_the_table_nor_the_campaign(
    prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    what, seen = opened(words(prepared, tmp_path, "c")), list[int]()
    fix_identity(what.folder, what.plan, what.data_sha256)

    def fails(status: campaign_status.Status) -> None:
        seen.append(1)
        raise KeyError("surprise")

    with Display(Console(), what.folder, fails) as display:
        display.wake()
        wait_for(lambda: len(seen) >= 1, "nothing is looked at", timeout_s=30)
        display.wake()
        wait_for(lambda: len(seen) >= 2, "the display has ended", timeout_s=30)
        display.look()
    assert capsys.readouterr().out.count("the table cannot be shown (KeyError: 'surprise')") == 1


def test_all_members_need_room_together(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = words(prepared, tmp_path, "c")
    what = opened(arguments)
    start = checks.Start(what.plan.campaign.run_configs()["r34"])
    for each in checks.BEFORE_PLACEMENT:
        each.look(start)
    one = checks.space_of(start).needed_bytes
    monkeypatch.setattr(Storage, "free_bytes", lambda self: 3 * one)
    opened(arguments)
    monkeypatch.setattr(Storage, "free_bytes", lambda self: 3 * one - 1)
    with pytest.raises(ValueError, match="the checkpoints of all members that are not done need"):
        opened(arguments)


def test_a_member_is_ended_though_it_ignores_ctrl_c(tmp_path: Path) -> None:
    lines = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); print('ready', flush=True)"
    child = MemberProcess([sys.executable, "-c", f"{lines}; time.sleep(100)"], tmp_path / "log.txt", os.environ)
    try:
        wait_for(lambda: child.said() == "ready", "it does not start")
        child.interrupt()
        wait_for(lambda: child.exit_code() == -signal.SIGTERM, "it does not end", timeout_s=30)
    finally:
        child.kill()
        child.close()


def test_no_campaign(tmp_path: Path, typed: Run) -> None:
    code, text = typed("status", "--storage", str(tmp_path), "--name", "c", main=job.main)
    assert code == 2
    assert "there is no campaign in" in text
    code, text = typed("ilsvrc2016", main=job.main)
    assert code == 2
    assert "did you mean ilsvrc2015?" in text
