"""Two hosts with networks of their own: a run trains across them, and a cut between them changes no weight."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from orchestrator.config import ModelConfig, TrainConfig
from orchestrator.control.faults import NETWORK, ORDERS_VARIABLE, Orders
from tests.cluster.hosts import Hosts, missing
from tests.cluster.slurm_cluster import wait_for
from tests.training.group import check_equal, options, run_to_end, small_config

pytestmark = [
    pytest.mark.skipif("TEST_CLUSTER" not in os.environ, reason="minutes, root, network namespaces: make test-cluster"),
    pytest.mark.ray_cluster,
    pytest.mark.timeout(1200),
]

_STEPS = 40


@pytest.fixture
def orders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Orders:
    found = Orders(str(tmp_path / "orders"))
    monkeypatch.setenv(ORDERS_VARIABLE, found.url)
    return found


@pytest.fixture
def hosts(orders: Orders) -> Iterator[Hosts]:
    assert not missing(), missing()
    with Hosts() as found:
        yield found


class Run:
    """A run of two workers, one a host; its driver on the head's."""

    def __init__(self, hosts: Hosts, config: TrainConfig, folder: Path, *more: str) -> None:
        self._hosts, self._log = hosts, folder / "run.log"
        words = [sys.executable, "jobs/imagenet.py", "resnet18", *options(config), "--placement.num-workers", "2"]
        words += ["--placement.cpus-per-worker", "1", "--placement.ray-address", hosts.address]
        words += ["--tracking.uri", f"sqlite:///{folder}/mlflow.db", "--guard.lease-s", "10", *more]
        self._words = words
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        self._process = self._hosts.run(1, self._words, self._log)

    def wait_for(self, text: str, times: int = 1, timeout_s: float = 300) -> None:
        wait_for(lambda: self.log.count(text) >= times, lambda: f"{text!r} is awaited\n{self.log[-3000:]}", timeout_s)

    def end(self, timeout_s: float = 300) -> int:
        assert self._process is not None
        return self._process.wait(timeout_s)

    @property
    def log(self) -> str:
        return self._log.read_text(errors="replace") if self._log.exists() else ""


def config_of(data: Path, storage: Path) -> TrainConfig:
    config = replace(small_config(data, storage, "r"), model=ModelConfig(factory=NETWORK))
    config = replace(config, schedule=replace(config.schedule, max_steps=_STEPS))
    return replace(config, rhythm=replace(config.rhythm, checkpoint_every_steps=5, validate_every_epochs=100.0))


def check(config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a plain process group that nothing has disturbed. What the workers of both hosts printed is kept."""
    log = "".join(path.read_text() for path in (Path(config.storage) / "r" / "logs").iterdir())
    begun = re.findall(r"rank \d  \S+ ([\d.]+) \| worker of rank \d of 2", log)
    assert set(begun) == {"10.77.0.11", "10.77.0.12"}, log
    monkeypatch.delenv(ORDERS_VARIABLE)
    check_equal(Path(config.storage) / "r", run_to_end(replace(config, storage=str(tmp_path / "plain")), 2))


def test_a_cut_of_a_minute_ends_in_the_same_weights(
    hosts: Hosts, orders: Orders, prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(prepared, tmp_path / "runs")
    orders.pace(0.5)
    run = Run(hosts, config, tmp_path)
    run.start()
    run.wait_for(f"r  step 7/{_STEPS}")
    assert "2 worker(s)" in run.log
    hosts.cut()
    run.wait_for("all workers start again")
    hosts.mend()
    orders.pace(0.0)
    assert run.end() == 0, run.log[-3000:]
    assert "going on from the checkpoint of step" in run.log
    check(config, tmp_path, monkeypatch)


def test_a_cut_beyond_the_limit_is_a_clear_error_and_the_same_command_goes_on(
    hosts: Hosts, orders: Orders, prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(prepared, tmp_path / "runs")
    orders.pace(0.5)
    run = Run(hosts, config, tmp_path, "--guard.wait-for-workers-s", "45")
    run.start()
    run.wait_for(f"r  step 7/{_STEPS}")
    hosts.cut()
    assert run.end() == 1, run.log[-3000:]
    assert "no worker could be started for" in run.log
    assert "the same command goes on" in run.log
    hosts.mend()
    wait_for(lambda: hosts.nodes() == 2, "host 2 does not come back", 120)
    orders.pace(0.0)
    run.start()
    assert run.end() == 0, run.log[-3000:]
    check(config, tmp_path, monkeypatch)
