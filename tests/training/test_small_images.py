"""Runs on a set of small images in memory keep the promises that runs on photographs keep; so do averaged weights."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from orchestrator.config import (
    CropStyle,
    Family,
    InputConfig,
    ModelConfig,
    RegularizationConfig,
    TrackingConfig,
    TrainConfig,
)
from orchestrator.data.decoder import DecodeSettings
from orchestrator.data.inputs import eval_input
from orchestrator.data.shards import DataSet
from orchestrator.storage import Storage
from orchestrator.training import run as run_module
from orchestrator.training.assembly import views_of
from orchestrator.training.averaging import MovingAverage
from orchestrator.training.checkpoint import weights_sha256
from orchestrator.training.finished_model import finish_model, load_model, read_model
from orchestrator.training.meters import cross_entropy, smoothed
from orchestrator.training.run import fix_identity
from orchestrator.training.validation import validate
from orchestrator.world import World
from tests.data.planes import build_planes, random_images
from tests.training.group import (
    Group,
    check_equal,
    check_samples,
    farthest_norm,
    last_snapshot,
    run_to_end,
    small_config,
)

AVERAGED = RegularizationConfig(label_smoothing=0.1, average_decay=0.9)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("planes")
    build_planes(folder, {"train": random_images(0, 100), "val": random_images(1, 31)})
    return folder


def config_of(data: Path, storage: Path, name: str, regularization: RegularizationConfig | None = None) -> TrainConfig:
    """ResNet-8 on 32 × 32 pixels, 8 steps of three batch-norm groups of 8."""
    return small_config(
        data,
        storage,
        name,
        model=ModelConfig(family=Family.CIFAR_RESNET, depth=8),
        input=InputConfig(crop_px=32, crop_style=CropStyle.PADDED, colour_std=0.0, test_shorter_side_px=32),
        regularization=regularization or RegularizationConfig(),
    )


def losses(run: Path) -> torch.Tensor:
    return torch.tensor([e["metrics"]["train_loss"] for e in last_snapshot(run).journal if e["kind"] == "train"])


@pytest.mark.parametrize("regularization", [RegularizationConfig(), AVERAGED], ids=["plain", "averaged"])
def test_a_killed_run_ends_with_the_same_bits(
    small: Path, tmp_path: Path, regularization: RegularizationConfig
) -> None:
    whole = config_of(small, tmp_path, "whole", regularization)
    unbroken = run_to_end(whole, 2)
    broken = config_of(small, tmp_path, "broken", regularization)
    Group(broken, 2).kill_when(lambda event: event["kind"] == "train" and event["step"] >= 5)
    check_equal(run_to_end(broken, 2), unbroken)
    check_samples(whole, unbroken)


def test_any_number_of_workers_sees_the_same(small: Path, tmp_path: Path) -> None:
    runs = {size: run_to_end(config_of(small, tmp_path, f"w{size}", AVERAGED), size) for size in (1, 2, 3)}
    for size in (2, 3):
        check_samples(config_of(small, tmp_path, f"w{size}", AVERAGED), runs[size])
        torch.testing.assert_close(losses(runs[size]), losses(runs[1]), rtol=1e-4, atol=0)
        a, b = last_snapshot(runs[1]).tensors, last_snapshot(runs[size]).tensors
        assert farthest_norm(a, b, "average/") < 1e-2


def test_the_average_is_validated_and_tested(small: Path, tmp_path: Path) -> None:
    config = config_of(small, tmp_path, "r", AVERAGED)
    run, data = run_to_end(config, 1), DataSet(Storage(str(small)))
    snapshot = last_snapshot(run)
    average = {
        f"model/{n.removeprefix('average/')}": t for n, t in snapshot.tensors.items() if n.startswith("average/")
    }
    trained = {n: t for n, t in snapshot.tensors.items() if n.startswith("model/")}
    assert average.keys() == trained.keys()
    assert not any(torch.equal(average[name], trained[name]) for name in trained if name.endswith("conv1.weight"))
    told = [e for e in snapshot.journal if e["kind"] == "validation"][-1]["metrics"]["validation_loss"]
    found = []
    for tensors in (average, trained):
        model = load_model(config, 10, tensors, "here").to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        _, view, mean, _ = views_of(config, data)
        size, split = config.rhythm.validation_batch_size, data.split("val")
        with closing(eval_input(data, split, view, mean, DecodeSettings(), size, 0)) as batches:
            found.append(validate(model, batches, World(), None).loss)
    assert found[0] == pytest.approx(told, rel=1e-6)
    assert found[1] != pytest.approx(told, rel=1e-3)
    record = finish_model(config, World(), cpus=1, code_version="")
    finished = read_model(Storage(str(run)), record)
    assert record.weights_sha256 == weights_sha256(average)
    assert all(torch.equal(finished[name], tensor) for name, tensor in average.items())


def test_an_average_follows_as_its_formula_says() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    average = MovingAverage(model, 0.5)
    expected = {name: t.clone().double() for name, t in model.state_dict().items()}
    for step in range(12):
        with torch.no_grad():
            for tensor in model.state_dict().values():
                tensor.add_(1 if tensor.dtype == torch.int64 else torch.randn_like(tensor))
        average.follow(step)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = {n: decay * t + (1 - decay) * model.state_dict()[n].double() for n, t in expected.items()}
    for name, tensor in average.model.state_dict().items():
        if tensor.is_floating_point():
            torch.testing.assert_close(tensor.double(), expected[name], rtol=1e-5, atol=1e-6)
    assert not any(p.requires_grad for p in average.model.parameters())
    assert not average.model.training


def test_a_smoothed_label_is_dealt_out_over_all_classes() -> None:
    torch.manual_seed(0)
    logits, labels = torch.randn(4, 7), torch.tensor([0, 3, 6, 2])
    targets = torch.full((4, 7), 0.1 / 7)
    targets[torch.arange(4), labels] += 0.9
    torch.testing.assert_close(smoothed(logits, labels, 0.1), -(targets * logits.log_softmax(1)).sum(1))
    torch.testing.assert_close(smoothed(logits, labels, 0.0), cross_entropy(logits, labels))


def test_the_objective_is_smoothed_and_the_loss_that_is_told_is_not(small: Path, tmp_path: Path) -> None:
    plain = run_to_end(config_of(small, tmp_path, "plain"), 1)
    config = config_of(small, tmp_path, "smoothed", replace(AVERAGED, average_decay=0.0))
    other = run_to_end(config, 1)
    assert losses(other)[0] == losses(plain)[0]  # the first is before any step
    assert losses(other)[1] != losses(plain)[1]


@pytest.mark.parametrize("field", ["label_smoothing", "average_decay"])
def test_what_is_no_share_is_refused(field: str) -> None:
    with pytest.raises(ValueError, match=rf"regularization\.{field} must be in \[0, 1\), not 1"):
        TrainConfig(regularization=replace(RegularizationConfig(), **{field: 1.0}))


def test_a_test_of_a_run_is_recorded_where_its_training_was(small: Path, tmp_path: Path) -> None:
    config = replace(config_of(small, tmp_path, "r"), tracking=TrackingConfig(experiment="cifar10"))
    run = Storage(str(tmp_path)).sub("r")
    fix_identity(run, config, DataSet(Storage(str(small))))
    base = TrainConfig(storage=str(tmp_path), name="r")
    assert run_module.config_of(run, base).tracking.experiment == "cifar10"
    named = replace(base, tracking=TrackingConfig(experiment="mine"))
    assert run_module.config_of(run, named).tracking.experiment == "mine"


def test_tied_weights_are_averaged_once() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(2, 2), nn.Linear(2, 2)
            self.b.weight = self.a.weight

    model = Tied()
    average, before = MovingAverage(model, 0.5), model.a.weight.detach().clone()
    with torch.no_grad():
        model.a.weight.add_(1)
    average.follow(0)
    torch.testing.assert_close(average.model.state_dict()["b.weight"], before + 0.9)
