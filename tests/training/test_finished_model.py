"""The finished model: what is tested is the checkpoint, its mean, and true averages of batch norm's statistics."""

from __future__ import annotations

import copy
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from orchestrator.config import EvaluationConfig, ModelConfig, TrainConfig
from orchestrator.config import Tested as Which  # no class of tests
from orchestrator.data.inputs import TrainBatches, train_input
from orchestrator.data.pipeline import TrainInput
from orchestrator.data.shards import DataSet
from orchestrator.models import BatchNorm2d
from orchestrator.storage import Storage
from orchestrator.training.assembly import build_model, decode_settings, sample_stream, views_of
from orchestrator.training.checkpoint import Snapshot
from orchestrator.training.finished_model import ModelRecord, find_models, finish_model, load_model, read_model
from orchestrator.training.precise_statistics import Walk, precise_statistics
from orchestrator.training.run import finished
from orchestrator.world import World
from tests.training.group import in_group, last_snapshot, open_run, run_to_end, small_config
from tests.training.traps import kill

NUM_IMAGES = 60  # 8 groups of 8: neither whole batches of 24 nor an even share for two workers


def tiny_config(prepared: Path, storage: Path, name: str, **evaluation: object) -> TrainConfig:
    """Five steps of a network with batch norm and dropout."""
    config = small_config(prepared, storage, name, model=ModelConfig(factory="tests.training.networks:tiny"))
    config = replace(config, schedule=replace(config.schedule, max_steps=5, lr=0.01))
    return replace(config, evaluation=EvaluationConfig(**evaluation))  # type: ignore[arg-type]


def finish(world: World, config: TrainConfig, kill_at: int = 0) -> None:
    """In a process of a group; ``kill_at``: the last rank is killed before that batch of its walk, from 1 on."""
    count = 0

    def alive() -> None:
        nonlocal count
        count += 1
        kill(count == kill_at and world.rank == world.size - 1)

    finish_model(config, world, cpus=1, code_version="test", alive=alive)


@pytest.fixture(scope="module")
def trained(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    """A run that has ended."""
    config = tiny_config(prepared, tmp_path_factory.mktemp("trained"), "run")
    run_to_end(config, 1)
    return config


@pytest.fixture
def config(trained: TrainConfig, tmp_path: Path) -> TrainConfig:
    """A copy of it, to be finished with precise statistics."""
    shutil.copytree(Path(trained.storage) / "run", tmp_path / "run", ignore=shutil.ignore_patterns("model"))
    return replace(trained, storage=str(tmp_path), evaluation=EvaluationConfig(precise_bn_images=NUM_IMAGES))


def run_of(config: TrainConfig) -> Storage:
    return Storage(config.storage).sub(config.name)


def content(config: TrainConfig) -> tuple[ModelRecord, dict[str, Tensor]]:
    """The one finished model of the run, and its tensors."""
    (record,) = find_models(run_of(config))
    return record, read_model(run_of(config), record)


def far(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """Largest difference of a number, relative to the largest of its tensor."""
    assert a.keys() == b.keys()
    return max(float((a[n] - b[n]).abs().max() / b[n].abs().max().clamp_min(1e-6)) for n in a)


def naive_statistics(config: TrainConfig, tensors: dict[str, Tensor], step: int, num_groups: int) -> dict[str, Tensor]:
    """The same by hand: one image read at a time, torch's own batch norm, mean and variance of all that goes in."""
    data = DataSet(Storage(config.data))
    split, b = data.split("train"), config.batch
    view, _, mean, axes = views_of(config, data)
    first = step * b.global_batch_size
    settings = decode_settings(config, torch.device("cpu"), 1)
    stream = sample_stream(config, split)
    single = TrainInput(split, stream, view, axes, mean, settings, lambda n: np.array([first + n]), 0, 0)
    model = load_model(config, data.num_classes, tensors, "here")
    inputs: dict[str, list[Tensor]] = {}
    for name, module in list(model.named_modules()):
        if isinstance(module, BatchNorm2d):
            plain = nn.BatchNorm2d(module.num_features, module.eps)
            plain.load_state_dict({"num_batches_tracked": torch.tensor(0), **module.state_dict()})
            model.set_submodule(name, plain)
            seen = inputs.setdefault(name, [])
            plain.register_forward_pre_hook(lambda layer, given, seen=seen: seen.append(given[0].double()))
        elif isinstance(module, nn.Dropout):
            module.p = 0.0
    model.train()
    with torch.no_grad():
        for _ in range(num_groups):
            model(torch.cat([next(single).images for _ in range(b.bn_group_size)]))
    single.close()
    found = {}
    for name, seen in inputs.items():
        x_CM = torch.cat([t.transpose(0, 1).flatten(1) for t in seen], 1)
        found[f"model/{name}.running_mean"] = x_CM.mean(1).float()
        found[f"model/{name}.running_var"] = x_CM.var(1, correction=0).float()
    return found


def test_it_is_the_checkpoint_and_its_mean(trained: TrainConfig) -> None:
    config = trained
    record = finish_model(config, World(), cpus=1, code_version="test")
    snapshot, outcome = last_snapshot(Path(config.storage) / "run"), finished(run_of(config))
    assert outcome is not None
    tensors = read_model(run_of(config), record)
    mean = tensors.pop("input/mean")
    trained_weights = {n: t for n, t in snapshot.tensors.items() if n.startswith("model/")}
    assert tensors.keys() == trained_weights.keys()
    assert all(torch.equal(t, trained_weights[n]) for n, t in tensors.items())
    assert torch.equal(mean, torch.from_numpy(views_of(config, DataSet(Storage(config.data)))[2].value))
    assert record.file == "model/000000005-last-bn0.safetensors"
    assert (record.step, record.checkpoint) == (5, outcome.checkpoint)
    assert record.weights_sha256 == outcome.weights_sha256
    assert record.validation_top1_error == outcome.validation_top1_error
    assert ModelRecord.from_bytes(run_of(config).read(record.record_name)) == record
    # It is there: nothing of it is made, or even looked for, again.
    before = (Path(config.storage) / "run" / record.file).stat().st_mtime_ns
    elsewhere = replace(config, data="/nowhere")
    assert finish_model(elsewhere, World(), cpus=1, code_version="another") == record
    assert (Path(config.storage) / "run" / record.file).stat().st_mtime_ns == before


def test_the_best_checkpoint_may_be_another(trained: TrainConfig) -> None:
    config = replace(trained, evaluation=EvaluationConfig(checkpoint=Which.BEST))
    record = finish_model(config, World(), cpus=1, code_version="test")
    best = open_run(Path(config.storage) / "run").best()
    assert best is not None
    assert record.file == f"model/{best.step:09d}-best-bn0.safetensors"
    assert record.validation_top1_error == best.validation_top1_error


def test_precise_statistics_see_the_pixels_of_the_training(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The share of the JPEG engine is the checkpoint's."""
    shares = []

    def opened(*arguments: Any) -> TrainBatches:
        shares.append(arguments[6].hw_decoder_share)
        return train_input(*arguments)

    monkeypatch.setattr(Snapshot, "hw_decoder_share", 0.35)
    monkeypatch.setattr("orchestrator.training.finished_model.train_input", opened)
    finish_model(config, World(), cpus=1, code_version="test")
    assert shares == [0.35]


def test_precise_statistics_are_those_of_all_that_goes_in(config: TrainConfig, tmp_path: Path) -> None:
    snapshot = last_snapshot(tmp_path / "run")
    # What a restart finds, as well as what one, two and three workers make: the same bits, groups being whole.
    files = {}
    for size in (1, 2, 3):
        assert in_group(finish, size, tmp_path, config) == [0] * size
        record, tensors = content(config)
        files[size] = (tmp_path / "run" / record.file).read_bytes()
        shutil.rmtree(tmp_path / "run" / "model")
    assert files[1] == files[2] == files[3]
    assert (record.precise_bn_images, record.averaged_bn_images) == (NUM_IMAGES, 64)
    statistics = {n: t for n, t in tensors.items() if "running_" in n}
    naive = naive_statistics(config, snapshot.tensors, step=5, num_groups=8)
    assert far(statistics, naive) < 1e-5
    # Weights are as trained; the statistics are not the moving averages.
    del tensors["input/mean"]
    assert all(torch.equal(t, snapshot.tensors[n]) for n, t in tensors.items() if n not in statistics)
    assert far(statistics, {n: snapshot.tensors[n] for n in statistics}) > 0.05
    # Six workers share the three groups of a batch by two: sums within a group are of two parts.
    assert in_group(finish, 6, tmp_path, config) == [0] * 6
    _, shared = content(config)
    assert far({n: shared[n] for n in statistics}, statistics) < 1e-5


def test_killed_in_the_middle_it_is_the_same_file(config: TrainConfig, tmp_path: Path) -> None:
    assert in_group(finish, 1, tmp_path, config) == [0]
    record, _ = content(config)
    undisturbed = (tmp_path / "run" / record.file).read_bytes()
    shutil.rmtree(tmp_path / "run" / "model")
    codes = in_group(finish, 2, tmp_path, config, 2)
    assert codes[1] == -9
    assert codes[0] != 0
    assert not find_models(run_of(config))
    assert in_group(finish, 2, tmp_path, config) == [0, 0]
    assert (tmp_path / "run" / record.file).read_bytes() == undisturbed
    # A file without a record does not exist, and one that is not what was published is made again.
    (tmp_path / "run" / record.record_name).unlink()
    (tmp_path / "run" / record.file).write_bytes(undisturbed[:-1] + b"\xff")
    finish(World(), config)
    assert (tmp_path / "run" / record.file).read_bytes() == undisturbed
    (tmp_path / "run" / record.file).write_bytes(undisturbed[:-1] + b"\xff")
    told: list[str] = []
    finish_model(config, World(), cpus=1, code_version="test", emit=lambda event: told.append(event["text"]))
    assert "is not what was published" in told[0]
    assert (tmp_path / "run" / record.file).read_bytes() == undisturbed


def test_of_equal_weights_they_are_what_the_moving_averages_tend_to() -> None:
    """Torch's own cumulative average over the same groups: equal means; its variance is within groups alone."""
    torch.manual_seed(0)
    groups = [torch.randn(8, 3, 16, 16) * (1 + n) + n for n in range(5)]
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3), BatchNorm2d(6), nn.ReLU(), nn.Dropout(0.5), nn.Conv2d(6, 4, 3), BatchNorm2d(4)
    )
    layers = {1: nn.BatchNorm2d(6, momentum=None), 5: nn.BatchNorm2d(4, momentum=None)}
    theirs = copy.deepcopy(model)
    theirs[3] = nn.Identity()  # as in a test nothing is dropped
    for place, layer in layers.items():
        theirs[place] = layer

    def running(kind: str) -> dict[str, Tensor]:
        return {f"{n}.running_{kind}": getattr(layer, f"running_{kind}").clone() for n, layer in layers.items()}

    cumulative = [torch.zeros(6)]
    with torch.no_grad():
        for group in groups:
            theirs(group)
            cumulative.append(running("mean")["1.running_mean"])
    before = {n: t.clone() for n, t in model.state_dict().items()}

    class Batches:
        def __init__(self) -> None:
            self.left = iter(groups)

        def __iter__(self) -> Batches:
            return self

        def __next__(self) -> object:
            return type("Group", (), {"images": next(self.left)})

    walk = Walk.of(World(), 37, 0, 8, 8)
    assert walk.num_images == 40
    found = precise_statistics(model, iter(Batches()), walk, World(), None)  # type: ignore[arg-type]
    assert far({n: t for n, t in found.items() if "mean" in n}, running("mean")) < 1e-5
    group_means = torch.stack([n * cumulative[n] - (n - 1) * cumulative[n - 1] for n in range(1, 6)])
    values = 8 * 14 * 14
    within = running("var")["1.running_var"] * (values - 1) / values
    total = within + group_means.double().var(0, correction=0).float()
    assert float((found["1.running_var"] - total).abs().max() / total.max()) < 1e-5
    # The model is as it was, and so is what it does.
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert model.training
    assert not model[1]._forward_pre_hooks


def test_a_network_without_batch_norm_has_nothing_to_average(prepared: Path, tmp_path: Path) -> None:
    config = tiny_config(prepared, tmp_path, "plain", precise_bn_images=64)
    config = replace(config, model=ModelConfig(factory="tests.training.test_finished_model:without_batch_norm"))
    config = replace(config, schedule=replace(config.schedule, max_steps=1))
    run = run_to_end(config, 1)
    finish(World(), config)
    record, tensors = content(config)
    outcome = finished(Storage(str(run)))
    assert outcome is not None
    assert record.weights_sha256 == outcome.weights_sha256
    assert (record.precise_bn_images, record.averaged_bn_images) == (64, 0)
    assert "input/mean" in tensors


def without_batch_norm(*, num_classes: int, image_size: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * image_size**2, num_classes))


def test_what_cannot_be_tested_is_named(config: TrainConfig, prepared: Path, tmp_path: Path) -> None:
    plain = replace(config, evaluation=EvaluationConfig())

    def refused(config: TrainConfig) -> str:
        with pytest.raises(ValueError, match=" ") as error:
            finish_model(config, World(), cpus=1, code_version="test")
        return str(error.value)

    # Weights of another network, though the config says that it is this one.
    other = build_model(replace(plain, model=ModelConfig(depth=18)), 6)
    weights = {f"model/{name}": t for name, t in other.state_dict().items()}
    with pytest.raises(ValueError, match=r"holds the weights of another network.*stem.0.weight is not there.* more"):
        load_model(plain, 6, weights, "the checkpoint")
    with pytest.raises(ValueError, match=r"classify.weight is \[7, 16\], not \[6, 16\]"):
        load_model(plain, 6, {f"model/{n}": t for n, t in build_model(plain, 7).state_dict().items()}, "it")
    assert "schedule.lr: 0.01 → 0.02" in refused(replace(plain, schedule=replace(plain.schedule, lr=0.02)))
    assert "there is nothing to test" in refused(replace(plain, name="never"))
    for name in (tmp_path / "run" / "checkpoints").glob("000000005-*.json"):
        name.unlink()
    assert "checkpoint of step 5 is to be tested, and is gone" in refused(plain)
    # A run that has not ended is tested as far as it has come.
    (tmp_path / "run" / "finished.json").unlink()
    assert finish_model(plain, World(), cpus=1, code_version="test").step == 4
