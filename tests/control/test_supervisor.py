"""The job on Ray: placed, killed, started again, finished; the same weights as in a plain process group."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from orchestrator.config import BatchConfig, PlacementConfig, TrainConfig
from orchestrator.control.supervisor import place
from orchestrator.ray_session import Cluster, Node
from tests.training.group import run_to_end, small_config, weights_digest

ROOT = Path(__file__).parents[2]
EIGHT_GPUS = Cluster((Node(cpus=64, gpus=4), Node(cpus=48, gpus=4)))
TWO_CPUS = Cluster((Node(cpus=2, gpus=0),))


def placed(placement: PlacementConfig, cluster: Cluster, batch: BatchConfig | None = None) -> tuple[int, int, bool]:
    config = TrainConfig(placement=placement, batch=batch or BatchConfig(256, 32))
    p = place(config, cluster)
    return p.num_workers, p.cpus_per_worker, p.use_gpu


def test_workers_are_placed_one_a_gpu_or_cpu() -> None:
    assert placed(PlacementConfig(), EIGHT_GPUS) == (8, 12, True)
    assert placed(PlacementConfig(num_workers=3), EIGHT_GPUS) == (3, 12, True)
    assert placed(PlacementConfig(), TWO_CPUS) == (2, 1, False)
    assert placed(PlacementConfig(num_workers=1), TWO_CPUS) == (1, 2, False)
    assert placed(PlacementConfig(use_gpu=False), EIGHT_GPUS) == (64, 1, False)
    # node by node: three CPUs cannot hold two workers of two
    assert placed(PlacementConfig(num_workers=3), Cluster((Node(8, 0), Node(8, 0))))[:2] == (3, 4)
    # 12 GPUs cannot share 8 groups: 8 of them are taken
    assert placed(PlacementConfig(), Cluster((Node(64, 12),)))[0] == 8


def test_a_cluster_that_is_too_small_is_refused() -> None:
    for placement, cluster, saying in (
        (PlacementConfig(num_workers=9), EIGHT_GPUS, "9 workers need more GPUs than the cluster's 8"),
        (PlacementConfig(num_workers=3), TWO_CPUS, "3 workers need more CPUs"),
        (PlacementConfig(num_workers=2, cpus_per_worker=2), TWO_CPUS, "2 workers need more CPUs"),
        (
            PlacementConfig(num_workers=3, cpus_per_worker=2),
            Cluster((Node(3, 0), Node(3, 0))),
            "3 workers need more CPUs",
        ),
        (PlacementConfig(num_workers=8, cpus_per_worker=16), EIGHT_GPUS, "8 workers need more"),
        (PlacementConfig(use_gpu=True), TWO_CPUS, "no GPUs for a worker"),
        (PlacementConfig(num_workers=9), Cluster((Node(64, 64),)), "cannot share 8 batch-norm groups"),
    ):
        with pytest.raises(ValueError, match=saying):
            placed(placement, cluster)


def command(config: TrainConfig, database: Path, *more: str) -> list[str]:
    """The command line whose config is ``config`` (of ``small_config``), on two workers."""
    plain = config.to_json()
    arguments = []
    for part in ("model", "input", "batch", "schedule", "rhythm"):
        for key, value in plain[part].items():
            if value is not None and value != []:
                arguments += [f"--{part}.{key.replace('_', '-')}", str(value)]
    places = ["--data", config.data, "--storage", config.storage, "--name", config.name]
    arguments += ["--placement.num-workers", "2", "--placement.cpus-per-worker", "1"]
    return [
        *(sys.executable, "jobs/imagenet.py", "resnet50", *places, *arguments),
        *("--tracking.uri", f"sqlite:///{database}", *more),
    ]


def start(arguments: list[str], log: Path) -> subprocess.Popen[bytes]:
    with log.open("wb") as stream:
        environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
        return subprocess.Popen(arguments, cwd=ROOT, stdout=stream, stderr=subprocess.STDOUT, env=environment)


def wait_until(condition: Callable[[], bool], driver: subprocess.Popen[bytes], log: Path, timeout_s: float) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert driver.poll() is None, log.read_text()
        assert time.monotonic() < deadline_s, log.read_text()
        time.sleep(0.05)


def committed(run: Path) -> list[str]:
    return sorted(p.stem for p in (run / "checkpoints").glob("*.json")) if run.exists() else []


def workers_of(driver: subprocess.Popen[bytes]) -> list[psutil.Process]:
    found = []
    for process in psutil.Process(driver.pid).children(recursive=True):
        try:
            if "RayTrainWorker" in " ".join(process.cmdline()):
                found.append(process)
        except psutil.Error:
            continue
    return found


@pytest.mark.ray_cluster
@pytest.mark.timeout(600)
def test_killed_workers_and_a_killed_driver_change_nothing(prepared: Path, tmp_path: Path) -> None:
    config = small_config(prepared, tmp_path / "runs", "job")
    schedule = replace(config.schedule, max_steps=40)
    config = replace(config, schedule=schedule, rhythm=replace(config.rhythm, validate_every_epochs=2.5))
    run, database = tmp_path / "runs" / "job", tmp_path / "mlflow.db"

    # A worker is killed: Ray restarts the group, which goes on from the newest checkpoint. Then Ctrl-C.
    log = tmp_path / "first.log"
    driver = start(command(config, database), log)
    wait_until(lambda: len(committed(run)) >= 1, driver, log, 120)
    victims = workers_of(driver)
    assert len(victims) == 2, [p.cmdline() for p in psutil.Process(driver.pid).children(recursive=True)]
    before = committed(run)[-1]
    victims[1].kill()
    wait_until(lambda: committed(run)[-1] > before, driver, log, 120)
    assert log.read_text().count("going on from the checkpoint of step") == 1, log.read_text()
    driver.send_signal(signal.SIGINT)
    assert driver.wait(60) == 130, log.read_text()
    assert "interrupted: the same command goes on from the newest checkpoint" in log.read_text()

    # The same command goes on; its driver is killed.
    log, before = tmp_path / "killed.log", committed(run)[-1]
    driver = start(command(config, database), log)
    wait_until(lambda: committed(run)[-1] > before, driver, log, 120)
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    assert not (run / "finished.json").exists()

    # The same command ends it.
    log = tmp_path / "second.log"
    assert start(command(config, database), log).wait(240) == 0, log.read_text()
    text = log.read_text()
    assert "going on from the checkpoint of step" in text
    assert "start number 3 of this run" in text
    assert "validation error" in text
    assert not any(word in text for word in ("Traceback", "WARNING", "INFO", "(pid=")), text
    plain = run_to_end(replace(config, name="plain"), 2)
    assert weights_digest(run) == weights_digest(plain)

    # Once more: nothing is trained, nothing is started.
    log = tmp_path / "third.log"
    began_s = time.monotonic()
    assert start(command(config, database), log).wait(120) == 0, log.read_text()
    assert json.loads((run / "finished.json").read_text())["weights_sha256"] in log.read_text()
    assert not list((run / "attempts").glob("000004*"))
    assert time.monotonic() - began_s < 100

    # The identity is checked without a look at the data, so a finished run is known to be finished without it.
    assert start(command(replace(config, data="/nowhere"), database), log).wait(120) == 0, log.read_text()

    # One MLflow run across all starts; no step twice; delivered whole.
    with sqlite3.connect(database) as store:
        assert store.execute("select count(*) from runs").fetchone() == (1,)
        twice = "select key, step, count(*) c from metrics where key not like 'system%' group by key, step having c > 1"
        assert store.execute(twice).fetchall() == []
        keys = {k for (k,) in store.execute("select distinct key from metrics")}
        assert {"train_loss", "validation_top1_error", "learning_rate", "images_per_s", "data_wait_share"} <= keys
        steps = store.execute("select count(*) from metrics where key = 'train_loss'").fetchone()
        assert steps == (40,)
        tags = dict(store.execute("select key, value from tags").fetchall())
        assert tags["recipe"] == "resnet50"
        assert tags["network"] == "ResNet-18"
        assert tags["mlflow.note.content"].startswith("**Result:** best validation top-1 error ")
        assert store.execute("select count(*) from inputs").fetchone() == (1,)
        assert tags["best_checkpoint"].startswith(str(run))
    assert (run / "figures" / "errors.png").stat().st_size > 10_000

    # More workers than the machine has CPUs: refused after looking at the cluster, before anything is written.
    too_many = replace(config, name="too_many", batch=BatchConfig(global_batch_size=8 * 1024, bn_group_size=8))
    log = tmp_path / "fourth.log"
    arguments = command(too_many, database, "--placement.num-workers", "1024")
    assert start(arguments, log).wait(120) == 2
    assert "1024 workers need more CPUs" in log.read_text()
    assert not (tmp_path / "runs" / "too_many").exists()
