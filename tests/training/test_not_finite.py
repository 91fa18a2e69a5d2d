"""A loss or gradient that is not finite: the step changes nothing, on all workers, is counted, and has a limit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from orchestrator.config import BatchConfig, GuardConfig, ModelConfig, OptimizerConfig, TrainConfig
from orchestrator.data.pipeline import Batch
from orchestrator.models import build_own
from orchestrator.training.optimization import SGD
from orchestrator.training.step import ClassificationStep
from orchestrator.world import World
from tests.training.group import Group, history, last_snapshot, open_run, run_to_end, small_config, weights_digest
from tests.training.networks import tiny
from tests.training.traps import Moment, Trap


class _Sick(nn.Module):
    """Its logits are NaN in some groups of some steps: a function of what the trainer seeds for each group."""

    def __init__(self, num_classes: int, image_size: int) -> None:
        super().__init__()
        self.net = tiny(num_classes=num_classes, image_size=image_size)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.net(images)
        return logits * float("nan") if self.training and torch.initial_seed() % 12 == 0 else logits


def sick(*, num_classes: int, image_size: int) -> nn.Module:
    return _Sick(num_classes, image_size)


def sick_config(prepared: Path, storage: Path, name: str, max_skipped_steps: int) -> TrainConfig:
    network = ModelConfig(factory="tests.training.test_not_finite:sick")
    config = small_config(prepared, storage, name, model=network, batch=BatchConfig(24, 8))
    return replace(
        config,
        rhythm=replace(config.rhythm, checkpoint_every_steps=2, validate_every_epochs=9.0),
        schedule=replace(config.schedule, max_steps=12),
        guard=GuardConfig(max_skipped_steps=max_skipped_steps),
    )


def skipped_by_step(run: Path) -> list[int]:
    return [e["metrics"]["skipped_steps"] for e in last_snapshot(run).journal if e["kind"] == "train"]


def test_all_workers_leave_the_same_steps_out_and_a_resumed_run_too(prepared: Path, tmp_path: Path) -> None:
    one = run_to_end(sick_config(prepared, tmp_path, "one", 12), 1)
    skipped = skipped_by_step(one)
    assert 2 <= sum(skipped) <= 8, "the test needs some of each"
    two = run_to_end(sick_config(prepared, tmp_path, "two", 12), 2)
    assert skipped_by_step(two) == skipped
    first, second = last_snapshot(one).tensors, last_snapshot(two).tensors
    for name, tensor in first.items():
        assert tensor.isfinite().all(), name
        torch.testing.assert_close(second[name], tensor, rtol=1e-4, atol=1e-5)
    halted = sick_config(prepared, tmp_path, "halted", 12)
    Group(halted, 2, Trap(Moment.RECORD, 6)).wait_for_trap()
    resumed = run_to_end(halted, 2)
    assert weights_digest(resumed) == weights_digest(two)
    assert history(last_snapshot(resumed).journal) == history(last_snapshot(two).journal)


def test_more_than_the_limit_end_the_start_and_spoil_nothing(prepared: Path, tmp_path: Path) -> None:
    group = Group(sick_config(prepared, tmp_path, "limited", 1), 2)
    assert group.wait() == [1, 1]
    text = (group.run_path / "error.txt").read_text()
    for words in (
        "'limited'",
        "2 steps up to step",
        "guard.max_skipped_steps is 1",
        "the checkpoints before that are kept",
    ):
        assert words in text
    assert not (group.run_path / "finished.json").exists()
    left = open_run(group.run_path).newest()
    assert left is not None
    assert left.state["skipped_steps"] + sum(e["metrics"]["skipped_steps"] for e in left.journal if "metrics" in e) <= 2
    assert all(t.isfinite().all() for t in left.tensors.values())


def batch(bad: bool) -> Batch:
    images = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    if bad:
        images[3, 0, 0, 0] = float("inf")
    labels, indices = torch.arange(8) % 4, torch.arange(8).numpy()
    return Batch(images, labels, indices, valid=indices >= 0, num_unreadable=0, replaced=())


def step_of(model: nn.Module) -> ClassificationStep:
    return ClassificationStep(model, World(), BatchConfig(8, 8), OptimizerConfig(), autocast=None, crop_px=32, seed=0)


@pytest.mark.parametrize("first", [True, False])
def test_a_bad_step_changes_no_number(first: bool) -> None:
    """Weights, buffers, momentum; also where there is no momentum yet. The next step is as if it had not been."""
    torch.manual_seed(0)
    model = build_own("tests.training.networks:tiny", num_classes=4, image_size=32)
    step = step_of(model)
    if not first:
        step(batch(bad=False), 0, 0.1)
    before = step.tensors()
    step(batch(bad=True), 1, 0.1)
    totals = step.take_totals()
    assert (totals.skipped_steps, totals.images) == (1, 8 if first else 16)
    after = step.tensors()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    step(batch(bad=False), 2, 0.1)
    moved = step.tensors()
    assert any(not torch.equal(moved[name], before[name]) for name in before)
    assert all(t.isfinite().all() for t in moved.values())


@pytest.mark.parametrize("fused", [False, True])
def test_an_update_is_left_out_by_either_kernel(fused: bool) -> None:
    torch.manual_seed(0)
    net, twin = nn.Linear(4, 3), nn.Linear(4, 3)
    twin.load_state_dict(net.state_dict())

    def sgd(of: nn.Module) -> SGD:
        plain = {"momentum": 0.9, "weight_decay": 1e-4, "decay_batch_norm": True, "caffe_momentum": True}
        return SGD(of, fused=fused, **plain)  # type: ignore[arg-type]

    one, other = sgd(net), sgd(twin)
    for number, bad in enumerate((True, False, True, False, False)):
        images = torch.randn(5, 4, generator=torch.Generator().manual_seed(number))
        for of, optimizer in ((net, one), (twin, other)):
            if of is twin and bad:
                continue
            optimizer.forget_gradients(in_place=number % 2 == 0)
            of(images * (float("nan") if bad else 1.0)).sum().backward()
            found = optimizer.not_finite()
            assert bool(found) == bad
            optimizer.step(0.1 / (1 + number // 3), unless=found)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), twin.parameters(), strict=True))
    assert all(p.isfinite().all() for p in net.parameters())
