"""A real SLURM of two nodes: a run is warned, queued again, loses a node, is stopped, and ends as if left alone."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from orchestrator.config import ModelConfig, ScheduleConfig, TrainConfig
from orchestrator.control.faults import NETWORK, ORDERS_VARIABLE, Orders
from tests.cluster.slurm_cluster import SlurmCluster, missing, wait_for
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
    """A run of two workers, each on a node of its own, and what one may ask about it."""

    def __init__(self, slurm: SlurmCluster, config: TrainConfig, folder: Path, *more: str) -> None:
        self.slurm, self.folder = slurm, folder
        self._environment = os.environ | slurm.environment | {"PYTHONPATH": str(ROOT), "COLUMNS": "200"}
        words = [sys.executable, "jobs/imagenet.py", "resnet18", *options(config), "--placement.num-workers", "2"]
        words += ["--placement.cpus-per-worker", "1", "--tracking.uri", f"sqlite:///{folder}/mlflow.db"]
        words += ["--guard.lease-s", "10", "--guard.wait-for-workers-s", "60"]
        words += ["--on", "slurm", "--launches", str(folder / "launches"), "--slurm.nodes", "2"]
        self.words = [*words, "--slurm.time-min", "5", "--slurm.warning-s", "60", "--slurm.mem-gb", "4", *more]
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

    def wait_for_log(self, text: str, times: int = 1) -> None:
        log = self.folder / "launches" / "r" / "000001" / "log.txt"
        wait_for(lambda: log.exists() and log.read_text().count(text) >= times, lambda: self._trouble(text), 300)

    def wait_for_status(self, text: str) -> None:
        wait_for(lambda: text in self.ask("status"), lambda: self._trouble(text), 300)

    def begin_now(self) -> None:
        """A job that is queued again waits for two minutes by SLURM's own rule."""
        self.wait_for_status("waiting on slurm")
        self.slurm.run("scontrol", "update", f"jobid={self.job_id}", "StartTime=now")

    def _trouble(self, text: str) -> str:
        told = [f"{p}:\n{p.read_text()[-2000:]}" for p in sorted(self.folder.rglob("slurm/*.out"))]
        return "\n".join([f"{text!r} is awaited", self.ask("status"), self.ask("log"), *told])


def test_warned_and_stopped_it_goes_on_and_ends_with_the_same_weights(
    slurm: SlurmCluster, prepared: Path, plain: Path, tmp_path: Path
) -> None:
    config = config_of(prepared, tmp_path / "runs")
    job = Launched(slurm, config, tmp_path)
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
    job = Launched(slurm, config, tmp_path)
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
    orders.pace(3.0)  # seconds a step: it is not done within two minutes
    monkeypatch.setenv(ORDERS_VARIABLE, orders.url)
    job = Launched(slurm, config, tmp_path, "--slurm.time-min", "2")
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
    first = Launched(slurm, config, tmp_path / "first", *one)
    config = replace(config, storage=str(tmp_path / "others"), schedule=ScheduleConfig(max_steps=6, lr=0.003))
    second = Launched(slurm, config, tmp_path / "second", *one)
    third = Launched(slurm, config, tmp_path / "third", *one, "--slurm.cpus-per-node", "4")
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
    fourth = Launched(slurm, config, tmp_path / "fourth", *one)
    fourth.wait_for_status("r: failed on slurm (exit code 2")


def test_cancelled_by_hand_it_says_so(slurm: SlurmCluster, prepared: Path, tmp_path: Path) -> None:
    job = Launched(slurm, config_of(prepared, tmp_path / "runs"), tmp_path)
    job.wait_for_log("r  step 1/24")
    slurm.run("scancel", job.job_id)
    job.wait_for_status("stopped on slurm (SLURM: CANCELLED; the same command goes on)")
