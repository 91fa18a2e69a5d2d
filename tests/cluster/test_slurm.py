"""A real SLURM of two nodes: a run is warned, queued again, loses a node, is stopped, and ends as if left alone."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from cluster.launch import Array, Job, Where
from cluster.settings import SlurmSettings
from cluster.slurm import Slurm
from orchestrator.config import ModelConfig, ScheduleConfig, TrainConfig
from orchestrator.control.faults import NETWORK, ORDERS_VARIABLE, Orders
from tests.cluster.slurm_cluster import SlurmCluster, missing, wait_for
from tests.jobs.tiny_campaign import make_plainly, submission, words
from tests.training.group import check_equal, options, run_to_end, small_config, weights_digest

ROOT = Path(__file__).parents[2]

pytestmark = [
    pytest.mark.skipif("TEST_CLUSTER" not in os.environ, reason="ten minutes, and Debian packages: make test-cluster"),
    pytest.mark.ray_cluster,
    pytest.mark.timeout(1200),
]


@pytest.fixture(scope="module")
def slurm() -> Iterator[SlurmCluster]:
    assert not missing(), f"install {', '.join(missing())}: apt-get install slurm-wlm munge"
    with SlurmCluster() as cluster:
        yield cluster


@pytest.fixture(scope="module")
def plain(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run in a plain process group."""
    return run_to_end(config_of(prepared, tmp_path_factory.mktemp("plain")), 2)


def config_of(data: Path, storage: Path) -> TrainConfig:
    config = small_config(data, storage, "r")
    config = replace(config, schedule=replace(config.schedule, max_steps=24))
    return replace(config, rhythm=replace(config.rhythm, checkpoint_every_steps=1000, validate_every_epochs=100.0))


class Launched:
    """A job called ``r``, and what one may ask about it."""

    def __init__(self, slurm: SlurmCluster, folder: Path, *words: str) -> None:
        self.slurm, self.folder = slurm, folder
        self._environment = os.environ | slurm.environment | {"PYTHONPATH": str(ROOT), "COLUMNS": "200"}
        self.words = [sys.executable, *words, "--on", "slurm", "--launch-name", "r"]
        self.words += ["--launches", str(folder / "launches"), "--slurm.mem-gb", "4"]
        self.submit()

    def submit(self) -> str:
        done = subprocess.run(self.words, cwd=ROOT, env=self._environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def ask(self, *words: str) -> str:
        command = [sys.executable, "-m", "cluster", words[0], "r", *words[1:], "--launches", f"{self.folder}/launches"]
        done = subprocess.run(command, cwd=ROOT, env=self._environment, capture_output=True, text=True, check=False)
        return done.stdout + done.stderr

    @property
    def job_id(self) -> str:
        return self.slurm.run("squeue", "-h", "-o", "%i").split()[0]

    @property
    def launched(self) -> Path:
        """The folder of the first launch."""
        return self.folder / "launches" / "r" / "000001"

    def wait_for_log(self, text: str, times: int = 1, member: str = "") -> None:
        log = self.launched / (f"members/{member}/log.txt" if member else "log.txt")
        wait_for(lambda: log.exists() and log.read_text().count(text) >= times, lambda: self._trouble(text), 300)

    def wait_for_status(self, text: str) -> None:
        wait_for(lambda: text in self.ask("status"), lambda: self._trouble(text), 300)

    def begin_now(self) -> None:
        """A job that is queued again waits for two minutes by SLURM's own rule."""
        self.wait_for_status("waiting on slurm")
        self.slurm.run("scontrol", "update", f"jobid={self.job_id}", "StartTime=now")

    def _trouble(self, text: str) -> str:
        told = [f"{p}:\n{p.read_text()[-2000:]}" for p in sorted(self.launched.glob("slurm*/*.out"))]
        return "\n".join([f"{text!r} is awaited", self.ask("status"), self.ask("log"), *told])


def launched(slurm: SlurmCluster, config: TrainConfig, folder: Path, *more: str) -> Launched:
    """A run of two workers, each on a node of its own."""
    words = ["jobs/imagenet.py", "resnet18", *options(config), "--placement.num-workers", "2"]
    words += ["--placement.cpus-per-worker", "1", "--tracking.uri", f"sqlite:///{folder}/mlflow.db"]
    words += ["--guard.lease-s", "10", "--guard.wait-for-workers-s", "60"]
    words += ["--slurm.nodes", "2", "--slurm.time-min", "5", "--slurm.warning-s", "60"]
    return Launched(slurm, folder, *words, *more)


def test_warned_and_stopped_it_goes_on_and_ends_with_the_same_weights(
    slurm: SlurmCluster, prepared: Path, plain: Path, tmp_path: Path
) -> None:
    config = config_of(prepared, tmp_path / "runs")
    job = launched(slurm, config, tmp_path)
    assert "launched already: r on slurm" in job.submit()
    # What SLURM sends before the time limit, or before it gives the nodes to somebody else.
    job.wait_for_log("r  step 4/24")
    slurm.run("scancel", "--signal=USR2", job.job_id)
    job.wait_for_log("SLURM takes the nodes away in 60 s: a checkpoint, then the queue")
    job.wait_for_log("left: run 'r' left its place at step")
    job.begin_now()
    job.wait_for_log("going on from the checkpoint of step")
    job.wait_for_log("start number 2 of this run")

    # Asked to end: a checkpoint, and it is not queued again. The same command goes on.
    job.ask("stop")
    job.wait_for_status("stopped on slurm")
    assert slurm.run("squeue", "-h") == ""
    assert not list(tmp_path.rglob("token"))
    job.submit()
    job.wait_for_status("finished on slurm")
    check_equal(tmp_path / "runs" / "r", plain)
    assert "r: 24 steps done" in job.ask("log")


def test_a_node_that_dies_takes_the_start_down_and_the_next_one_goes_on(
    slurm: SlurmCluster, prepared: Path, plain: Path, tmp_path: Path
) -> None:
    config = config_of(prepared, tmp_path / "runs")
    config = replace(config, rhythm=replace(config.rhythm, checkpoint_every_steps=3))
    job = launched(slurm, config, tmp_path)
    job.wait_for_log("r  step 5/24")
    slurm.kill_node("n2")
    slurm.start_node("n2")
    job.begin_now()
    job.wait_for_status("finished on slurm")
    job.wait_for_log("start number 2 of this run")
    assert weights_digest(tmp_path / "runs" / "r") == weights_digest(plain)


def test_a_time_limit_and_a_requeue_by_hand_change_nothing(
    slurm: SlurmCluster, prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(config_of(prepared, tmp_path / "runs"), model=ModelConfig(factory=NETWORK))
    orders = Orders(str(tmp_path / "orders"))
    orders.pace(6.0)  # seconds a step: it is not done within three minutes, but begun on a busy machine
    monkeypatch.setenv(ORDERS_VARIABLE, orders.url)
    job = launched(slurm, config, tmp_path, "--slurm.time-min", "3")
    job.wait_for_log("SLURM takes the nodes away in 60 s: a checkpoint, then the queue")
    job.wait_for_log("left: run 'r' left its place at step")
    job.begin_now()
    job.wait_for_log("going on from the checkpoint of step")
    assert job.slurm.run("scontrol", "requeue", job.job_id) == ""
    job.begin_now()
    job.wait_for_log("going on from the checkpoint of step", times=2)
    orders.pace(0.0)
    job.wait_for_status("finished on slurm")
    job.wait_for_log("start number 3 of this run")
    monkeypatch.delenv(ORDERS_VARIABLE)
    check_equal(tmp_path / "runs" / "r", run_to_end(replace(config, storage=str(tmp_path / "plain")), 2))


def test_two_jobs_share_a_node_and_the_status_of_each_is_told(
    slurm: SlurmCluster, prepared: Path, tmp_path: Path
) -> None:
    config = replace(config_of(prepared, tmp_path / "runs"), schedule=ScheduleConfig(max_steps=200, lr=0.003))
    one = ("--slurm.nodes", "1", "--slurm.cpus-per-node", "2", "--slurm.extra", "nodelist=n1")
    first = launched(slurm, config, tmp_path / "first", *one)
    config = replace(config, storage=str(tmp_path / "others"), schedule=ScheduleConfig(max_steps=6, lr=0.003))
    second = launched(slurm, config, tmp_path / "second", *one)
    third = launched(slurm, config, tmp_path / "third", *one, "--slurm.cpus-per-node", "4")
    assert "r: waiting on slurm (Resources)" in third.ask("status") or "(Priority)" in third.ask("status")
    third.ask("stop")
    third.wait_for_status("r: stopped on slurm")
    for job in (first, second):
        job.wait_for_log("r  step 1/")
    assert "r: running on slurm (on n1)" in first.ask("status")
    second.wait_for_status("finished on slurm")
    # The end of the second has left the first alone.
    assert "r: running on slurm (on n1)" in first.ask("status")
    log = first.ask("log")
    first.ask("stop")
    first.wait_for_status("stopped on slurm")
    assert "left: run 'r' left its place at step" in first.ask("log"), log
    # Another config under the name of a run that is begun: the job itself fails, and says so.
    config = replace(config, storage=str(tmp_path / "runs"), seed=7)
    fourth = launched(slurm, config, tmp_path / "fourth", *one)
    fourth.wait_for_status("r: failed on slurm (exit code 2")


def test_cancelled_by_hand_it_says_so(slurm: SlurmCluster, prepared: Path, tmp_path: Path) -> None:
    job = launched(slurm, config_of(prepared, tmp_path / "runs"), tmp_path)
    job.wait_for_log("r  step 1/24")
    slurm.run("scancel", job.job_id)
    job.wait_for_status("the same command goes on")
    assert "r: stopped on slurm (" in job.ask("status")
    assert json.loads((job.launched / "ended.json").read_text())["said"].startswith("ended by SLURM")
    assert "queued again" not in job.ask("log")
    # Without that, SLURM forgets it, and nobody can tell any more.
    (job.launched / "ended.json").unlink()
    job.wait_for_status("lost on slurm (SLURM does not know it any more")


def test_a_refused_job_leaves_no_array_behind(
    slurm: SlurmCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_CONF", slurm.environment["SLURM_CONF"])
    array = Array({"a": ("jobs/none.py",), "b": ("jobs/none.py",)}, 0)
    job = Job("r", 1, Where.SLURM, ("jobs/none.py",), str(ROOT), "", {}, array=array)
    launcher = Slurm(SlurmSettings(time_min=10, extra=("begin=now+60",)))
    try:
        first = launcher.submit(job, tmp_path)["job_id/a"]
        # As if whoever launched it had been killed between the two.
        slurm.run("scancel", next((tmp_path / "slurm").glob("*_submission.sh")).name.partition("_")[0])
        shutil.rmtree(tmp_path / "slurm")
        slurm.run("scontrol", "update", "partition=main", "state=DRAIN")
        with pytest.raises(ValueError, match="SLURM does not take the job"):
            launcher.submit(job, tmp_path)
        assert slurm.run("squeue", "-h", "--states", "PENDING,RUNNING") == ""
    finally:
        slurm.run("scontrol", "update", "partition=main", "state=UP")
    second = launcher.submit(job, tmp_path)["job_id/a"]
    assert second.partition("_")[0] != first.partition("_")[0]
    assert slurm.run("squeue", "-h", "-j", second, "-o", "%T").strip() == "PENDING"
    slurm.run("scancel", "--state=PENDING", "--user=root")


def test_the_members_of_a_campaign_as_a_job_array(
    slurm: SlurmCluster, prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = ("--change", f"r34:model.factory={NETWORK}")
    arguments = words(prepared, tmp_path / "runs", "c", *slow)
    orders = Orders(str(tmp_path / "orders"))
    orders.pace(3.0)  # seconds a step
    monkeypatch.setenv(ORDERS_VARIABLE, orders.url)
    job = Launched(slurm, tmp_path, "jobs/campaign.py", *arguments, "--slurm.array", "--slurm.cpus-per-node", "2")
    assert "launched already: r on slurm" in job.submit()
    record = json.loads((job.launched / "job.json").read_text())["handle"]
    job.wait_for_log("r34  step 2/6", member="r34")
    assert "r34 running (on n" in job.ask("status")
    # One loses its Ray: it alone is queued again, and the last job waits for it.
    slurm.kill_ray(record["job_id/r34"])
    wait_for(lambda: "r34: waiting on slurm" in job.ask("status", "--member", "r34"), lambda: job.ask("status"), 300)
    for member in ("r18-a", "r18-b"):
        wait_for(
            lambda member=member: "finished on slurm" in job.ask("status", "--member", member),
            lambda: job.ask("log"),
            300,
        )
    assert "r: waiting on slurm (r18-a finished; r18-b finished; r34 waiting" in job.ask("status")
    assert slurm.run("squeue", "-h", "-j", record["job_id"], "-o", "%T %r").strip() == "PENDING Dependency"
    orders.pace(0.0)
    slurm.run("scontrol", "update", f"jobid={record['job_id/r34']}", "StartTime=now")
    job.wait_for_log("going on from the checkpoint of step", member="r34")
    job.wait_for_status("r: finished on slurm")
    starts = {name: len(list(job.launched.glob(f"members/{name}/ray-*"))) for name in ("r18-a", "r18-b", "r34")}
    assert starts == {"r18-a": 1, "r18-b": 1, "r34": 2}
    assert "starts with" not in (job.launched / "log.txt").read_text()  # the last job has trained none
    assert "3 of 3 members done; all is published" in job.ask("log")
    monkeypatch.delenv(ORDERS_VARIABLE)
    alone = words(prepared, tmp_path / "alone", "c", *slow)
    make_plainly(alone)
    assert submission(tmp_path / "runs" / "c") == submission(tmp_path / "alone" / "c")


def test_an_array_is_stopped_and_goes_on_and_the_last_job_trains_what_is_missing(
    slurm: SlurmCluster, prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = ("--change", f"model.factory={NETWORK}")
    orders = Orders(str(tmp_path / "orders"))
    orders.pace(3.0)
    monkeypatch.setenv(ORDERS_VARIABLE, orders.url)
    arguments = words(prepared, tmp_path / "runs", "c", *slow)
    one = ("--slurm.array", "--slurm.cpus-per-node", "2", "--max-at-once", "2")
    job = Launched(slurm, tmp_path, "jobs/campaign.py", *arguments, *one)
    for member in ("r18-a", "r18-b"):
        job.wait_for_log(f"{member}  step 1/6", member=member)
    assert "r34 waiting (JobArrayTaskLimit)" in job.ask("status")
    job.ask("stop")
    job.wait_for_status("r: stopped on slurm")
    assert slurm.run("squeue", "-h") == ""
    assert list((tmp_path / "runs" / "c" / "members" / "r18-a" / "checkpoints").iterdir())
    assert not (tmp_path / "runs" / "c" / "journal").exists()
    job.submit()
    second = tmp_path / "launches" / "r" / "000002"
    wait_for((second / "members" / "r18-b" / "log.txt").exists, lambda: job.ask("log"), 300)
    # A member's job that somebody has cancelled is made up for by the last one.
    slurm.run("scancel", json.loads((second / "job.json").read_text())["handle"]["job_id/r34"])
    orders.pace(0.0)
    job.wait_for_status("r: finished on slurm")
    log = (second / "log.txt").read_text()
    assert "r34 starts with" in log
    assert "r18-a starts with" not in log
