"""Predictions against simulations of the same machines, published figures, and what was measured."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest

from orchestrator.control.prediction import (
    GPU_FIXED_S,
    NODE_MTBF_S,
    Chip,
    Faults,
    ModelCost,
    Site,
    Wires,
    Work,
    assumed_chip,
    campaign_time,
    daly_s,
    goodput,
    in_turn,
    run_time,
    step_time,
    stored,
    young_s,
)

MINUTE, HOUR = 60.0, 3600.0
R50 = ModelCost(flops=3_857_973_248, layers=50, parameters=25_557_032, buffers=53_120, batch_norms=53)
WIRES = Wires(8, 360e9, 320e9, 3e-6, 5e-6, 20e-6)
SITE = Site(WIRES, math.inf, NODE_MTBF_S, 180.0, 5.0, 1e-9)

# -- faults -----------------------------------------------------------------------------------------------------------


def simulated_goodput(interval_s: float, faults: Faults, seed: int, num_failures: int) -> float:
    """Useful time of all time of a run that is followed event by event."""
    rng = np.random.default_rng(seed)
    now_s, kept_s, failures = 0.0, 0.0, 0
    fails_at_s = rng.exponential(faults.mtbf_s)
    position_s, counts_at_s, is_up = 0.0, math.inf, True  # of the newest checkpoint, which counts from then on
    while failures < num_failures:
        ends_at_s = now_s + (interval_s + faults.stall_s if is_up else faults.restart_s)
        if counts_at_s <= min(ends_at_s, fails_at_s):
            kept_s, counts_at_s = position_s, math.inf
        if fails_at_s < ends_at_s:  # in a restart as well
            now_s, failures, is_up = fails_at_s, failures + 1, False
            fails_at_s = now_s + rng.exponential(faults.mtbf_s)
            position_s, counts_at_s = kept_s, math.inf
            continue
        now_s = ends_at_s
        if is_up:
            position_s += interval_s
            counts_at_s = now_s + faults.publish_s
        is_up = True
    return kept_s / now_s


GRID = [
    Faults(mtbf_s, stall_s, restart_s, publish_s)
    for mtbf_s, stall_s, restart_s, publish_s in product(
        (15 * MINUTE, 6 * HOUR), (2.0, 60.0), (30.0, 10 * MINUTE), (0.0, 60.0)
    )
]


@pytest.mark.parametrize("faults", GRID, ids=str)
def test_goodput_is_that_of_a_simulated_run(faults: Faults) -> None:
    best_s = max(daly_s(faults.stall_s, faults.mtbf_s), 1.1 * faults.publish_s)
    for number, interval_s in enumerate((best_s, 3 * best_s)):
        found = simulated_goodput(interval_s, faults, seed=number, num_failures=6000)
        assert goodput(interval_s, faults) == pytest.approx(found, rel=0.03), interval_s


def test_intervals_are_dalys_own() -> None:
    """The examples under figures 3 to 5 of his paper: dumps of 5 minutes."""
    for mtbf_s, minutes in ((24 * HOUR, 117), (6 * HOUR, 57), (15 * MINUTE, 9.1)):
        assert daly_s(5 * MINUTE, mtbf_s) / MINUTE == pytest.approx(minutes, abs=0.5 if minutes > 10 else 0.05)
    assert young_s(5 * MINUTE, 24 * HOUR) / MINUTE == pytest.approx(120)
    assert daly_s(100.0, 20.0) == 20.0


@pytest.mark.parametrize("faults", GRID, ids=str)
def test_no_other_interval_is_better(faults: Faults) -> None:
    best = max(goodput(s, faults) for s in np.geomspace(1.0, faults.mtbf_s * 3, 2000))
    assert best * 0.998 < goodput(daly_s(faults.stall_s, faults.mtbf_s), faults) <= best * (1 + 1e-6)


def test_a_run_that_gets_nowhere() -> None:
    assert goodput(1e6, Faults(mtbf_s=60.0, stall_s=1.0, restart_s=10.0)) == 0.0
    assert goodput(100.0, Faults(mtbf_s=1e12, stall_s=1e-9, restart_s=10.0)) == pytest.approx(1.0)


# -- a step -----------------------------------------------------------------------------------------------------------


def test_both_measured_speeds_of_one_gpu_come_out() -> None:
    """benchmarks/RESULTS.md: ResNet-50 on an H100, a batch of 256 in groups of 32 and in one."""
    chip = Chip.measured(4112, 256, GPU_FIXED_S)
    for group, images_per_s in ((32, 1782), (256, 4112)):
        assert 256 / step_time(R50, chip, WIRES, 1, 256, group).seconds == pytest.approx(images_per_s, rel=0.01)
    with pytest.raises(ValueError, match="less than the fixed"):
        Chip.measured(4112, 16, GPU_FIXED_S)


def test_measured_speed_of_cores() -> None:
    small = ModelCost(flops=148_050_944, layers=18, parameters=11_181_642)
    assert assumed_chip(small, cpus=2).images_per_s == pytest.approx(134.5, rel=0.05)  # benchmarks/RESULTS.md: 130-139
    other = ModelCost(flops=2 * R50.flops, layers=100, parameters=1)
    assert assumed_chip(other).pass_s(32) == pytest.approx(2 * assumed_chip(R50).pass_s(32))


def test_a_reduction_is_rings_in_nodes_and_between_them() -> None:
    wires = Wires(4, 100.0, 10.0, 1.0, 3.0, 7.0)
    assert wires.reduce_s(1000, 1) == 0
    assert wires.reduce_s(1000, 2) == 7 + 2 * 1 / 2 * 1000 / 100 + 2 * 1
    assert wires.reduce_s(1000, 8) == 7 + 2 * 3 / 4 * 1000 / 100 + 2 * 3 * 1 + 2 * 1 / 2 * 1000 / 10 + 2 * 1 * 3


def exposed_bucket_by_bucket(buckets: int, bucket_s: float, window_s: float) -> float:
    """Buckets are ready one after another while the backward pass computes; one is reduced at a time."""
    done_s = 0.0
    for number in range(1, buckets + 1):
        done_s = max(done_s, window_s * number / buckets) + bucket_s
    return done_s - window_s


def test_what_the_backward_pass_hides() -> None:
    for network_gbyte, workers, fixed_s in product((0.5, 5.0, 500.0), (2, 8, 64), (0.0, 0.05)):
        wires = Wires(8, network_gbyte * 1e9, network_gbyte * 1e9, 1e-6, 5e-6, 2e-5)
        chip, batch = Chip(fixed_s, 2000.0), 32 * workers
        found = step_time(R50, chip, wires, workers, batch, 32)
        buckets = math.ceil(4 * R50.parameters / (25 << 20))
        bucket_s = wires.reduce_s(4 * R50.parameters // buckets, workers)
        expected = exposed_bucket_by_bucket(buckets, bucket_s, 2 / 3 * (fixed_s + 32 / 2000))
        statistics_s = wires.reduce_s(4 * R50.buffers, workers)
        assert found.exposed_s == pytest.approx(expected + statistics_s)
        assert found.exposed_s >= bucket_s  # the last one is never hidden
        assert found.compute_s == pytest.approx(fixed_s + 32 / 2000)


def test_the_batch_norm_group_is_the_unit_of_work() -> None:
    chip = assumed_chip(R50)
    steps = {n: step_time(R50, chip, WIRES, n, 256, 32) for n in (1, 3, 4, 5, 7, 8, 16)}
    pass_s = chip.pass_s(32)
    assert [round(steps[n].compute_s / pass_s, 6) for n in (1, 3, 4, 5, 7, 8)] == [8, 3, 2, 2, 2, 1]
    assert pass_s / 2 < steps[16].compute_s  # the fixed part stays, and statistics are to be reduced
    with pytest.raises(ValueError, match="cannot share"):
        step_time(R50, chip, WIRES, 9, 256, 32)
    fed = step_time(R50, chip, WIRES, 1, 256, 32, input_images_per_s=100.0)
    assert fed.seconds == fed.input_s == pytest.approx(2.56)


# -- runs and campaigns -----------------------------------------------------------------------------------------------


def work(name: str, images: int, largest_batch_size: int = 0) -> Work:
    return Work(name, R50, assumed_chip(R50), images, 0, 256, 32, largest_batch_size)


def test_a_run() -> None:
    run = run_time(work("a", 25_600), 4, SITE)
    step_s = step_time(R50, assumed_chip(R50), WIRES, 4, 256, 32).seconds
    assert (run.steps, run.batch_size) == (100, 256)
    assert run.useful_s == pytest.approx(100 * step_s)
    assert run.wall_s > run.useful_s
    assert run.interval_s == daly_s(1e-9 * R50.checkpoint_bytes, NODE_MTBF_S)
    assert 0.9 < run.efficiency <= 1
    assert run_time(work("a", 25_600), 1, SITE).efficiency == 1
    two_nodes = run_time(work("a", 25_600), 16, SITE)
    assert two_nodes.interval_s == pytest.approx(run.interval_s / math.sqrt(2), rel=1e-3)
    growing = run_time(work("a", 256_000, 8192), 64, SITE)
    assert (growing.batch_size, growing.steps) == (2048, 125)
    assert work("a", 1, 8192).workers(4096) == 256
    assert work("a", 1).workers(4096) == 8
    assert work("a", 1, 8192).batch_size(1) == 256


def test_members_take_turns() -> None:
    runs = [run_time(work(str(n), 25_600 * n), 4, SITE) for n in (1, 2, 3)]
    one, two, three = (run.wall_s for run in runs)
    assert in_turn(runs, 4).wall_s == pytest.approx(one + two + three)
    assert in_turn(runs, 8).wall_s == pytest.approx(max(three, two + one))
    assert in_turn(runs, 15).wall_s == pytest.approx(three)
    assert [in_turn(runs, n).busy for n in (4, 8, 15)] == [4, 8, 12]
    assert in_turn(runs, 8).worker_s == pytest.approx(4 * (one + two + three))


def test_no_more_workers_than_help() -> None:
    """With the paper's batch: a group for each worker of each member, and not one of the rest."""
    works = [work(str(n), 256_000) for n in range(6)]
    found = {slots: campaign_time(works, slots, SITE) for slots in (8, 64, 512, 4096)}
    assert [found[slots].busy for slots in (64, 512, 4096)] == [48, 48, 48]
    assert found[4096].wall_s == found[64].wall_s < found[8].wall_s
    growing = [work(str(n), 256_000, 8192) for n in range(6)]
    half, full = (campaign_time(growing, slots, SITE) for slots in (512, 4096))
    assert 500 <= half.busy <= 512
    assert 1490 <= full.busy <= 1536  # 256 a member, by the largest batch
    assert full.wall_s < half.wall_s


def test_what_is_stored() -> None:
    found = stored(R50.checkpoint_bytes, R50.model_bytes, keep_last=2, scored_images=150_000, num_classes=1000)
    assert R50.checkpoint_bytes == 2 * 4 * 25_557_032 + 4 * 53_120
    assert (found.checkpoints, found.model) == (4 * R50.checkpoint_bytes, R50.model_bytes)
    assert found.scores == 600_000_000
    assert found.total == found.checkpoints + found.model + found.scores
    assert stored(8, 4, 2, 0, 1000).total == 32
