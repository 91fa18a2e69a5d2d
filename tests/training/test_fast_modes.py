"""What makes training faster changes roundings alone, and a run that is killed goes on to the same bits."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from orchestrator.config import (
    BatchConfig,
    Compile,
    Family,
    ModelConfig,
    NumericsConfig,
    OptimizerConfig,
    Precision,
    TrainConfig,
)
from orchestrator.data.pipeline import Batch
from orchestrator.training.assembly import compile_mode, draws, groups_at_once
from orchestrator.training.step import ClassificationStep
from orchestrator.world import World
from tests.training.group import Group, check_equal, in_group, last_snapshot, run_to_end, small_config
from tests.training.own_network import build

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def losses(run: Path) -> torch.Tensor:
    return torch.tensor([e["metrics"]["train_loss"] for e in last_snapshot(run).journal if e["kind"] == "train"])


def config_of(data: Path, storage: Path, name: str, numerics: NumericsConfig, *, own: bool) -> TrainConfig:
    config = replace(small_config(data, storage, name), numerics=numerics)
    if not own:
        config = replace(config, schedule=replace(config.schedule, max_steps=3))
    return replace(config, model=ModelConfig(factory="tests.training.own_network:build")) if own else config


@pytest.mark.parametrize(
    ("name", "numerics", "own", "workers", "tolerance"),
    [
        ("at-once", NumericsConfig(groups_at_once=2), False, 1, 2e-3),  # two groups, then one
        ("compiled", NumericsConfig(compile=Compile.DEFAULT), True, 2, 1e-4),
        ("tf32", NumericsConfig(precision=Precision.TF32), True, 1, 0.0),  # fp32 on a CPU
    ],
)
def test_losses_are_those_of_the_plain_mode(
    prepared: Path, tmp_path: Path, name: str, numerics: NumericsConfig, own: bool, workers: int, tolerance: float
) -> None:
    plain = run_to_end(config_of(prepared, tmp_path, "plain", NumericsConfig(), own=own), workers)
    fast = run_to_end(config_of(prepared, tmp_path, name, numerics, own=own), workers)
    assert len(losses(plain)) >= 3
    torch.testing.assert_close(losses(fast), losses(plain), rtol=tolerance, atol=0)


def _sum_in_bf16(world: World) -> None:
    torch.manual_seed(0)
    network, images = torch.nn.Linear(40, 30), torch.randn(6, 40)
    parallel = world.distribute(network, lambda: None, in_bf16=True)
    parallel(images[world.rank :: world.size]).square().sum().backward()
    ours = network.weight.grad.clone()
    network.zero_grad()
    network(images).square().sum().backward()
    whole = network.weight.grad
    assert not torch.equal(ours, whole)  # it was rounded
    assert float((ours - whole).norm() / whole.norm()) < 0.01


def test_gradients_summed_in_bfloat16_are_the_sum(tmp_path: Path) -> None:
    assert in_group(_sum_in_bf16, 2, tmp_path) == [0, 0]


def test_every_validation_tells_of_its_time(prepared: Path, tmp_path: Path) -> None:
    run = run_to_end(config_of(prepared, tmp_path, "r", NumericsConfig(), own=True), 1)
    validations = [e for e in last_snapshot(run).journal if e["kind"] == "validation"]
    assert validations
    assert all(e["seconds"]["validation"] > 0 for e in validations)


def test_a_compiled_run_that_is_killed_ends_with_the_same_bits(prepared: Path, tmp_path: Path) -> None:
    numerics = NumericsConfig(compile=Compile.DEFAULT)
    whole = run_to_end(config_of(prepared, tmp_path, "whole", numerics, own=True), 1)
    config = config_of(prepared, tmp_path, "killed", numerics, own=True)
    Group(config, 1).kill_when(lambda event: event["kind"] == "train" and event["step"] == 5)
    check_equal(run_to_end(config, 1), whole)


def test_without_a_compiler_it_is_told_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", ("no-such-compiler",))
    torch.compiler.reset()
    step = ClassificationStep(
        build(2, 8),
        World(),
        BatchConfig(4, 4),
        OptimizerConfig(),
        autocast=None,
        crop_px=8,
        seed=0,
        compile_mode="default",
    )
    batch = Batch(torch.randn(4, 3, 8, 8), torch.zeros(4, dtype=torch.int64), np.arange(4), np.ones(4, bool))
    with pytest.raises(ValueError, match="a C\\+\\+ compiler is needed"):
        step(batch, 0, 0.1)


def test_what_goes_together_is_decided_by_network_and_device() -> None:
    assert (groups_at_once(TrainConfig(), CPU), groups_at_once(TrainConfig(), GPU)) == (1, 0)
    told = TrainConfig(numerics=NumericsConfig(groups_at_once=4))
    assert (groups_at_once(told, CPU), groups_at_once(told, GPU)) == (4, 4)
    vgg = TrainConfig(model=ModelConfig(family=Family.VGG, depth=16))
    assert draws(vgg)
    assert groups_at_once(vgg, GPU) == 1
    with pytest.raises(ValueError, match=r"numerics\.groups_at_once: this network draws"):
        groups_at_once(replace(told, model=vgg.model), GPU)
    assert compile_mode(TrainConfig()) is None
    assert compile_mode(TrainConfig(numerics=NumericsConfig(compile=Compile.MAX_AUTOTUNE))) == "max-autotune"
