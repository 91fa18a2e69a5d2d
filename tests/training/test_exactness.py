"""Promises 2, 3 and 6 on real process groups: killed and gone on with, and at other numbers of workers."""

from __future__ import annotations

import json
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from orchestrator.config import BatchConfig, ModelConfig, ScheduleConfig, TrainConfig
from orchestrator.data.decoder import DecodeSettings
from orchestrator.data.shards import Split
from orchestrator.storage import Storage
from orchestrator.training.run import run_storage
from orchestrator.training.trainer import train
from orchestrator.world import World
from tests.training.group import (
    CONTEXT,
    EVERY_FAULT,
    Group,
    check_equal,
    check_samples,
    farthest_number,
    history,
    last_snapshot,
    open_run,
    run_to_end,
    small_config,
    take_number,
    weights_digest,
)
from tests.training.traps import Moment, Trap, kill


@pytest.mark.parametrize("size", [1, 2, 3] if EVERY_FAULT else [3])
def test_killed_and_started_again_ends_with_the_same_bits(
    size: int, prepared: Path, undisturbed: dict[int, Path], tmp_path: Path
) -> None:
    config = small_config(prepared, tmp_path, "killed")
    # After step 5: past the checkpoint of step 4, before the next.
    Group(config, size).kill_when(lambda e: e["kind"] == "train" and e["step"] == 5)
    assert not (tmp_path / "killed" / "finished.json").exists()
    second = Group(config, size)
    assert second.wait() == [0] * size
    started = next(e for e in second.events() if e["kind"] == "start")
    assert 3 <= started["step"] <= 5  # it went on, it did not begin again
    check_equal(second.run_path, undisturbed[size])
    check_samples(config, second.run_path)


def test_a_run_decides_and_learns(undisturbed: dict[int, Path]) -> None:
    journal = last_snapshot(undisturbed[1]).journal
    assert [e["step"] for e in journal if e["kind"] == "train"] == list(range(1, 9))
    assert any(e["kind"] == "decision" for e in journal)  # else exactness would be tested without a drop
    losses = [e["metrics"]["train_loss"] for e in journal if e["kind"] == "train"]
    assert sum(losses[-3:]) < sum(losses[:3])


def of_the_way(start: dict[str, torch.Tensor], a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """Distance between two sets of weights, relative to how far training has moved them."""
    names = [n for n in start if n.startswith("model/") and "running_" not in n]
    apart = sum(float((a[n] - b[n]).square().sum()) for n in names)
    return float((apart / sum(float((a[n] - start[n]).square().sum()) for n in names)) ** 0.5)


@pytest.mark.parametrize("size", [2, 3])
def test_other_numbers_of_workers_agree_up_to_rounding(size: int, undisturbed: dict[int, Path]) -> None:
    """Only the order of additions differs: 1e-5 of each tensor in the first steps.

    Later a rounded zero flips a ReLU now and then, which moves one channel's gradient for good (0.5 % of the way was
    seen); the statistics of all layers and the errors stay together.
    """
    one, many = (
        {r.step: c.load(r) for r in c.records()} for c in (open_run(undisturbed[1]), open_run(undisturbed[size]))
    )
    assert one.keys() == many.keys() == {2, 3, 4, 6, 8}
    assert farthest_number(one[2].tensors, many[2].tensors) < 1e-5
    assert farthest_number(one[8].tensors, many[8].tensors, "running_") < 1e-3
    assert of_the_way(one[2].tensors, one[8].tensors, many[8].tensors) < 0.03
    for a, b in zip(history(one[8].journal), history(many[8].journal), strict=True):
        assert (a["kind"], a["step"], a["epoch"]) == (b["kind"], b["step"], b["epoch"])
        if a["kind"] == "validation":
            assert a["metrics"]["validation_top1_error"] == b["metrics"]["validation_top1_error"]
        if a["kind"] == "train":
            assert a["metrics"]["train_loss"] == pytest.approx(b["metrics"]["train_loss"], rel=1e-3)


def tiny_config(data: Path, storage: Path, name: str, batch: BatchConfig, **rhythm: float) -> TrainConfig:
    config = small_config(data, storage, name, model=ModelConfig(factory="tests.training.networks:tiny"), batch=batch)
    return replace(config, rhythm=replace(config.rhythm, **rhythm))


def test_dropout_is_a_function_of_the_step(prepared: Path, tmp_path: Path) -> None:
    """It is drawn from (seed, step, group): a resumed run draws the same."""
    config = tiny_config(prepared, tmp_path, "whole", BatchConfig(4, 2), checkpoint_every_steps=1)
    config = replace(config, schedule=replace(config.schedule, max_steps=2))
    whole, halted = run_to_end(config, 1), replace(config, name="halted")
    Group(halted, 1, Trap(Moment.RECORD, 1)).wait_for_trap()
    second = Group(halted, 1)
    assert second.wait() == [0]
    assert next(e for e in second.events() if e["kind"] == "start")["step"] == 1
    assert weights_digest(second.run_path) == weights_digest(whole)


def test_a_measurement_that_was_interrupted_is_finished(prepared: Path, tmp_path: Path) -> None:
    """Sums since the last measurement are in the checkpoint: step 6 lies between the measurements of 4 and 8."""
    config = tiny_config(prepared, tmp_path, "whole", BatchConfig(24, 8), log_every_steps=4)
    whole, halted = run_to_end(config, 1), replace(config, name="halted")
    Group(halted, 1, Trap(Moment.RECORD, 6)).wait_for_trap()
    second = Group(halted, 1)
    assert second.wait() == [0]
    assert next(e for e in second.events() if e["kind"] == "start")["step"] == 6
    assert history(last_snapshot(second.run_path).journal) == history(last_snapshot(whole).journal)


def first_reads(config: TrainConfig, told: Path) -> None:
    """Goes on with a run up to the end of one step; tells its number and the images read until then. In a child."""
    read, counts = Split.read, Counter[str]()

    def counting(self: Split, indices: np.ndarray) -> list[np.ndarray]:
        counts[self.name] += len(indices)
        return read(self, indices)

    def seen(step: int, images: np.ndarray) -> None:
        told.write_text(json.dumps([step, counts]))
        kill()

    Split.read = counting  # type: ignore[method-assign]
    train(config, World(), attempt=take_number(run_storage(config)), cpus=1, seen=seen)


@pytest.mark.parametrize("step", [1, 95])
def test_resuming_reads_no_more_late_in_an_epoch(step: int, prepared: Path, tmp_path: Path) -> None:
    """At 1 % and 99 % of an epoch of 96 images: what the input side works ahead, and nothing that was seen before."""
    rhythm = {"checkpoint_every_steps": step, "validate_every_epochs": 100.0}
    config = tiny_config(prepared, tmp_path, "halted", BatchConfig(1, 1), **rhythm)
    config = replace(config, schedule=replace(config.schedule, max_steps=200))
    Group(config, 1, Trap(Moment.RECORD, step)).wait_for_trap()
    told = tmp_path / "reads.json"
    process = CONTEXT.Process(target=first_reads, args=(config, told))
    process.start()
    process.join(120)
    assert json.loads(told.read_text()) == [step, {"train": DecodeSettings.prefetch_batches}]


def refusal(group: Group) -> str:
    """What a group that ends with an error printed last."""
    assert group.wait()[0] == 1
    assert not (group.run_path / "finished.json").exists()
    return (group.run_path / "error.txt").read_text()


def test_a_superseded_group_stops(prepared: Path, tmp_path: Path) -> None:
    config = tiny_config(prepared, tmp_path, "two", BatchConfig(24, 8))
    config = replace(config, schedule=ScheduleConfig(max_steps=5000, lr=0.003))
    first = Group(config, 1)
    deadline_s = time.monotonic() + 120
    while not open_run(first.run_path).records():
        assert time.monotonic() < deadline_s
        time.sleep(0.05)
    take_number(Storage(str(first.run_path)))
    assert "was started again (start number 2)" in refusal(first)
    assert open_run(first.run_path).records()[-1].step < 5000
