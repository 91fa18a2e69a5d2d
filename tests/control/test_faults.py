"""Faults on real Ray clusters: after each the run ends as if nothing had happened."""

from __future__ import annotations

import json
import math
import os
import signal
import sqlite3
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from cluster.raylets import LocalCluster
from jobs.rehearse import NAMES
from orchestrator.config import BatchConfig, TrackingConfig, TrainConfig
from orchestrator.control.driven_run import options
from orchestrator.control.faults import ORDERS_VARIABLE, Orders, is_alive, network
from orchestrator.models import build_own
from tests.training.group import history, last_snapshot, run_to_end, small_config, weights_digest

ROOT = Path(__file__).parents[2]
EVERY_CLASS = "FAULT_SEEDS" in os.environ
NUM_SEEDS = int(os.environ.get("FAULT_SEEDS", "1"))
# What others contain (a damaged checkpoint: a killed driver; Ray's damaged files: a killed worker) needs no turn here.
# MLflow that is down: test_tracking_outage.py; a full disk: training/test_failing_store.py.
IN_SHORT = "clock-back mlflow-down store-failing worker-stop node-drained checkpoint-flipped"
SAID_BY = {
    "ctrl-c": "interrupted: the same command goes on from the newest checkpoint",
    "exception": "rehearsed: an exception in the user's code",
    "worker-stop": "no progress for",
    "nan": "not finite",
    "node-drained": "is going away",
    "checkpoint-flipped": "is not usable",
}


# -- the network that obeys orders ----------------------------------------------------------------------------------


def test_without_orders_it_is_a_plain_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ORDERS_VARIABLE, raising=False)
    model = build_own("orchestrator.control.faults:network", num_classes=3, image_size=32)
    assert model(torch.randn(2, 3, 32, 32)).isfinite().all()


def test_each_order_is_obeyed_once_by_one_worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ORDERS_VARIABLE, str(tmp_path))
    models = []
    for rank in (0, 1):
        monkeypatch.setenv("RANK", str(rank))
        models.append(network(num_classes=3, image_size=32))
    images, orders = torch.randn(4, 3, 32, 32), Orders(str(tmp_path))
    assert [(w.rank, w.pid) for w in orders.workers()] == [(0, os.getpid()), (1, os.getpid())]

    orders.give("nan")
    # Neither zeros (no step) nor an evaluation take an order.
    assert models[0](torch.zeros_like(images)).isfinite().all()
    assert models[0].eval()(images).isfinite().all()
    assert models[1](images).isnan().all()
    assert models[0].train()(images).isfinite().all()
    assert models[1](images).isfinite().all()

    orders.give("exception")
    with pytest.raises(RuntimeError, match="rehearsed: an exception"):
        models[0](images)
    assert models[0](images).isfinite().all()
    assert models[1](images).isfinite().all()


def test_a_clock_jumps_back(tmp_path: Path) -> None:
    orders = Orders(str(tmp_path))
    orders.give("clock", seconds=3600)
    code = (
        "import time, torch; from orchestrator.control.faults import network\n"
        "model, before = network(num_classes=3, image_size=32), (time.time(), time.time_ns())\n"
        "model(torch.randn(2, 3, 32, 32)); print(time.time() - before[0], (time.time_ns() - before[1]) / 1e9)"
    )
    environment = os.environ | {ORDERS_VARIABLE: str(tmp_path), "RANK": "0"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all(-3600 <= float(word) < -3300 for word in done.stdout.split())


@pytest.mark.skipif(not EVERY_CLASS, reason="half a minute: make test-faults")
@pytest.mark.ray_cluster
def test_a_worker_of_another_machine_is_signalled_there(prepared: Path, tmp_path: Path) -> None:
    """By a task on its node: here as where nothing of it is seen, for its host's name is not ours."""
    victim = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    with LocalCluster() as cluster:
        cluster.add(1)
        node = cluster.add(1)
        code = (
            "import signal, sys; from orchestrator.control.faults import Worker, signal_worker\n"
            "worker = Worker(1, int(sys.argv[1]), 'elsewhere', sys.argv[2])\n"
            "signal_worker(worker, signal.SIGKILL, sys.argv[3])\n"
            "try: signal_worker(worker, signal.SIGKILL, sys.argv[3])\n"
            "except OSError as error: print('gone:', error)"
        )
        words = [sys.executable, "-c", code, str(victim.pid), node.node_id, cluster.address]
        done = subprocess.Popen(
            words,
            cwd=ROOT,
            env=os.environ | cluster.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert victim.wait(60) == -signal.SIGKILL
        out, err = done.communicate(timeout=60)
        assert done.returncode == 0, err
        assert "gone: worker 1 on elsewhere cannot be signalled" in out

        # More workers than the cluster has CPUs: refused after looking at it, before anything is written.
        config = small_config(prepared, tmp_path / "runs", "too_many", batch=BatchConfig(8 * 1024, 8))
        words = [*options(config), "--placement.ray-address", cluster.address, "--placement.num-workers", "1024"]
        refused = subprocess.run(
            [
                sys.executable,
                "jobs/imagenet.py",
                "resnet50",
                *words,
                "--tracking.uri",
                f"sqlite:///{tmp_path}/mlflow.db",
            ],
            cwd=ROOT,
            env=os.environ | cluster.environment,
            capture_output=True,
            text=True,
        )
        assert refused.returncode == 2, refused.stdout + refused.stderr
        assert "1024 workers need more CPUs than the cluster's 2" in refused.stderr
        assert not (tmp_path / "runs" / "too_many").exists()
    assert not is_alive(victim.pid)


# -- the fault suite ------------------------------------------------------------------------------------------------


def config_of(run: Path) -> TrainConfig:
    """The config that a run has recorded, with the place where it lies."""
    plain = TrainConfig().to_json()

    def merge(into: dict[str, Any], new: dict[str, Any]) -> None:
        for key, value in new.items():
            if isinstance(value, dict):
                merge(into[key], value)
            else:
                into[key] = value

    identity = json.loads((run / "config.json").read_text())["identity"]
    del identity["data_sha256"]
    merge(plain, identity)
    return replace(TrainConfig.from_json(plain), data=str(run.parent / "data"), storage=str(run.parent))


def rehearse(*words: str) -> tuple[int, str]:
    """The command to its end: exit code, output."""
    command = [sys.executable, "jobs/rehearse.py", *words]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        text, _ = process.communicate()
    finally:  # a test that is out of time leaves nothing running
        if process.poll() is None:
            process.terminate()
            process.wait(120)
    return process.returncode, text


@pytest.mark.ray_cluster
@pytest.mark.timeout(3600 if EVERY_CLASS else 1200)
@pytest.mark.parametrize("seed", range(NUM_SEEDS))
def test_no_fault_changes_what_a_run_ends_with(seed: int, tmp_path: Path) -> None:
    names = list(NAMES) if EVERY_CLASS else IN_SHORT.split()
    out = tmp_path / "out"
    words = ["--storage", str(tmp_path / "runs"), "--out", str(out), "--seed", str(seed), "--faults", ",".join(names)]
    code, text = rehearse(*words)
    print(text)  # seconds to recover, class by class
    said = (out / "disturbed.log").read_text()
    assert code == 0, text + said[-5000:]
    report = json.loads((out / "rehearsal.json").read_text())
    away = {row["fault"] for row in report["rows"] if not row["injected"]}
    assert away <= {"disk-full"}  # a small disk is not for everybody to mount
    assert sorted(row["fault"] for row in report["rows"] if row["survived"]) == sorted(set(names) - away)

    # The rehearsal's word is not taken for it: a plain process group ends with the same weights and the same journal.
    [folder] = (tmp_path / "runs").iterdir()
    disturbed = folder / "disturbed"
    config = config_of(disturbed)
    plain = run_to_end(replace(config, name="plain"), 2)
    assert weights_digest(disturbed) == weights_digest(plain)
    journals = [history(last_snapshot(run).journal) for run in (disturbed, plain)]
    assert journals[0] == journals[1]
    steps = config.schedule.max_steps
    assert [e["step"] for e in journals[0] if e["kind"] == "train"] == list(range(1, steps + 1))

    # One MLflow run across all starts; no step twice; delivered whole.
    with sqlite3.connect(out / "mlflow.db") as store:
        [(run_id,)] = store.execute("select run_uuid from runs where name = 'disturbed'").fetchall()
        twice = (
            "select key, step, count(*) c from metrics where run_uuid = ? and key not like 'system%' group by key, step"
        )
        assert [row for row in store.execute(twice, (run_id,)).fetchall() if row[2] > 1] == []
        losses = "select step, value from metrics where run_uuid = ? and key = 'train_loss' order by step"
        told = {e["step"]: e["metrics"]["train_loss"] for e in journals[1] if e["kind"] == "train"}
        stored = dict(store.execute(losses, (run_id,)).fetchall())
        assert stored.keys() == told.keys()
        assert all(math.isclose(stored[step], told[step], rel_tol=1e-5) for step in told)  # it shows six digits
        keys = {key for (key,) in store.execute("select distinct key from metrics where run_uuid = ?", (run_id,))}
        assert {"train_loss", "validation_top1_error", "learning_rate", "images_per_s", "data_wait_share"} <= keys
        assert store.execute("select count(*) from inputs where destination_id = ?", (run_id,)).fetchone() == (1,)
        tags = dict(store.execute("select key, value from tags where run_uuid = ?", (run_id,)).fetchall())
        assert tags["recipe"] == "resnet50"
        assert 3 <= int(tags["starts"]) <= len(list((disturbed / "attempts").glob("*.json")))
        assert tags["mlflow.note.content"].startswith("**Result:** best validation top-1 error ")
        assert tags["best_checkpoint"].startswith(str(disturbed))
    assert (disturbed / "figures" / "errors.png").stat().st_size > 10_000

    # Every message names what happened; nothing else is on a user's screen.
    for name in SAID_BY.keys() & set(names):
        assert SAID_BY[name] in said, said
    assert not any(word in said for word in ("Traceback", "(pid=")), said
    log = "".join(path.read_text() for path in sorted((disturbed / "logs").iterdir()))
    assert all(f"| worker of rank {rank} of 2, process " in log for rank in (0, 1))
    assert not (disturbed / "ray").exists()  # nor is there what a killed driver has left
    check_a_finished_run(config, out, disturbed)


@pytest.mark.skipif(not EVERY_CLASS, reason="four minutes: make test-faults")
@pytest.mark.ray_cluster
@pytest.mark.timeout(1200)
def test_a_soak_keeps_every_image_and_tells_its_goodput(tmp_path: Path) -> None:
    words = ["--storage", str(tmp_path / "runs"), "--out", str(tmp_path / "out"), "--soak-s", "240"]
    code, text = rehearse(*words, "--mean-time-between-faults-s", "45")
    report = json.loads((tmp_path / "out" / "rehearsal.json").read_text())
    assert code == 0, text
    assert len(report["rows"]) >= 2
    assert all(row["survived"] for row in report["rows"])
    assert 0 < report["goodput_percent"] < 100
    assert report["wrong_images"] == 0


def check_a_finished_run(config: TrainConfig, out: Path, run: Path) -> None:
    """Once more the same command: nothing is trained, nothing is started, and the data is not looked at."""
    starts = sorted((run / "attempts").glob("*.json"))
    tracking = TrackingConfig(uri=f"sqlite:///{out}/mlflow.db", experiment="rehearsal")
    words = options(replace(config, data="/nowhere", name=run.name, tracking=tracking))
    again = subprocess.run(
        [sys.executable, "jobs/imagenet.py", "resnet50", *words], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert again.returncode == 0, again.stdout + again.stderr
    assert json.loads((run / "finished.json").read_text())["weights_sha256"] in again.stdout
    assert sorted((run / "attempts").glob("*.json")) == starts
