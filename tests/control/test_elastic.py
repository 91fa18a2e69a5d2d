"""An elastic run on a real Ray cluster: a machine goes, others come, and its samples and losses stay the same."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from cluster.raylets import LocalCluster
from orchestrator.config import GuardConfig, ModelConfig, PlacementConfig, TrackingConfig
from orchestrator.control.driven_run import DrivenRun, wrong_images
from orchestrator.control.faults import NETWORK, ORDERS_VARIABLE, Orders
from orchestrator.storage import Storage
from tests.training.group import EVERY_FAULT, run_to_end, small_config
from tests.training.test_worlds import decisions, farthest_loss

_TOLERANCE = 1e-3  # as in test_worlds
_STEPS = 60


@pytest.mark.skipif(not EVERY_FAULT, reason="two minutes: make test-faults")
@pytest.mark.ray_cluster
@pytest.mark.timeout(900)
def test_a_run_goes_on_with_whatever_machines_are_there(
    prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = small_config(prepared, tmp_path / "runs", "elastic")
    config = replace(
        config,
        model=ModelConfig(factory=NETWORK),
        schedule=replace(config.schedule, max_steps=_STEPS),
        rhythm=replace(config.rhythm, validate_every_epochs=5.0, checkpoint_every_steps=5),
        guard=GuardConfig(hang_timeout_s=30.0),
        tracking=TrackingConfig(uri=f"sqlite:///{tmp_path}/mlflow.db"),
    )
    orders = Orders(str(tmp_path / "orders"))
    with LocalCluster({ORDERS_VARIABLE: orders.url}) as cluster:
        cluster.add(0)  # the driver's: it stays
        cluster.add(1)
        lost = cluster.add(1)
        places = PlacementConfig(
            min_workers=1, num_workers=3, cpus_per_worker=1, use_gpu=False, ray_address=cluster.address
        )
        run = DrivenRun(replace(config, placement=places), lambda: cluster.environment, tmp_path / "elastic.log")
        try:
            orders.pace(0.5)
            run.start()
            assert run.wait(lambda: run.step >= 6, 240), run.lines[-10:]
            cluster.lose(lost)
            assert run.wait(lambda: _workers(run)[-1:] == [1], 240), run.lines[-10:]
            step = run.step
            assert run.wait(lambda: run.step >= step + 3, 240), run.lines[-10:]
            cluster.add(1)
            cluster.add(1)
            assert run.wait(lambda: _workers(run)[-1:] == [3], 240), run.lines[-10:]
            orders.pace(0.0)
            run.wait(lambda: False, 300)
            assert run.exit_code() == 0, run.lines[-10:]
        finally:
            run.interrupt()
    numbers = _workers(run)
    assert (numbers[0], numbers[-1]) == (2, 3), numbers
    assert 1 in numbers

    folder = Path(config.storage) / config.name
    assert wrong_images(Storage(str(folder)), config, _STEPS) == 0
    alone = run_to_end(replace(config, name="alone"), 1)
    far = farthest_loss(folder, alone)
    with capsys.disabled():
        print(f"\nworkers {numbers}: losses within {far:.1e} of one worker's (limit {_TOLERANCE:.0e})")
    assert far < _TOLERANCE
    assert decisions(folder) == decisions(alone)


@pytest.mark.skipif(not EVERY_FAULT, reason="two minutes: make test-faults")
@pytest.mark.ray_cluster
@pytest.mark.timeout(600)
def test_one_ctrl_c_ends_a_run_that_waits_for_a_lost_machine(prepared: Path, tmp_path: Path) -> None:
    """Ray's controller, which its handler asks to end, hears nothing while it waits."""
    config = small_config(prepared, tmp_path / "runs", "waits", model=ModelConfig(factory=NETWORK))
    config = replace(config, schedule=replace(config.schedule, max_steps=10_000))
    config = replace(config, tracking=TrackingConfig(uri=f"sqlite:///{tmp_path}/mlflow.db"))
    with LocalCluster() as cluster:
        cluster.add(0)  # the driver's
        cluster.add(1)
        lost = cluster.add(1)
        places = PlacementConfig(num_workers=2, cpus_per_worker=1, use_gpu=False, ray_address=cluster.address)
        run = DrivenRun(replace(config, placement=places), lambda: cluster.environment, tmp_path / "waits.log")
        try:
            run.start()
            assert run.wait(lambda: run.step >= 6, 240), run.lines[-10:]
            cluster.lose(lost)
            assert run.wait(lambda: any("is lost to Ray" in line for line in run.lines), 120), run.lines[-10:]
            assert not run.wait(lambda: False, 15)  # until the controller waits
            assert run.interrupt(120) == 130, run.lines[-10:]
            assert "interrupted: " in run.lines[-1]
        finally:
            run.kill()


def _workers(run: DrivenRun) -> list[int]:
    """Numbers of workers, start by start, as the driver tells them."""
    found = [re.search(r"^training from step .*, (\d+) worker", line) for line in run.lines]
    return [int(match[1]) for match in found if match]
