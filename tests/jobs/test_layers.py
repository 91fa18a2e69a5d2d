"""Layer responses of runs that were trained: what is measured, what is kept, what is refused."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from jobs import layers
from orchestrator.config import Family, ModelConfig, RegularizationConfig, TrainConfig
from orchestrator.data.decoder import DecodeSettings
from orchestrator.data.inputs import eval_input
from orchestrator.data.shards import DataSet
from orchestrator.evaluation.layer_record import GRADIENT_BATCHES, LayerRecord, spread
from orchestrator.models import BatchNorm2d
from orchestrator.plain import digest
from orchestrator.storage import Storage
from orchestrator.training.assembly import build_model, views_of
from tests.conftest import Shared
from tests.jobs.conftest import Run
from tests.training.group import last_snapshot, run_to_end, small_config, weights_digest

NETWORKS = {
    "resnet": ModelConfig(family=Family.CIFAR_RESNET, depth=8),
    "plain": ModelConfig(family=Family.CIFAR_PLAIN, depth=8),
}


def config_for(prepared: Path, storage: Path, name: str, model: ModelConfig, decay: float = 0.0) -> TrainConfig:
    config = small_config(prepared, storage, name, model=model, seed=len(name))
    regularization = RegularizationConfig(average_decay=decay)
    return replace(config, schedule=replace(config.schedule, max_steps=3), regularization=regularization)


@pytest.fixture(scope="module")
def trained(prepared: Path, shared: Shared) -> Path:
    """The folder of runs ``resnet``, whose tested weights are an average, and ``plain``."""

    def make(folder: Path) -> None:
        for name, model in NETWORKS.items():
            run_to_end(config_for(prepared, folder, name, model, 0.5 if name == "resnet" else 0.0), 1)

    return shared("layers", make)


@pytest.fixture
def runs(trained: Path, tmp_path: Path) -> Path:
    """A copy of the trained runs, to be measured."""
    return shutil.copytree(trained, tmp_path / "runs")


def record_of(run: Path) -> LayerRecord:
    (file,) = (run / "layers").iterdir()
    return LayerRecord.from_bytes(file.read_bytes())


def responses_of(config: TrainConfig, run: Path, kind: str) -> tuple[list[float], int]:
    """Standard deviations over every validation image that can be decoded, one image at a time, all responses kept."""
    data = DataSet(Storage(config.data))
    model = build_model(config, data.num_classes).eval()
    tensors = last_snapshot(run).tensors
    model.load_state_dict({n.removeprefix(kind): t for n, t in tensors.items() if n.startswith(kind)})
    kept: dict[torch.nn.Module, list[torch.Tensor]] = {}
    for module in model.modules():
        if isinstance(module, BatchNorm2d):
            kept[module] = []
            module.register_forward_hook(lambda norm, inputs, output: kept[norm].append(output.clone()))
    _, view, mean, _ = views_of(config, data)
    inputs = eval_input(data, data.split("val"), view, mean, DecodeSettings(), 7, 50)
    images = [image for batch in inputs.batches(0, 1) for image in batch.images[torch.from_numpy(batch.valid)]]
    with torch.no_grad():
        for image in images:
            model(image[None])
    return [torch.cat(its).double().std(correction=0).item() for its in kept.values()], len(images)


def test_trained_runs_are_measured_once(typed: Run, runs: Path, prepared: Path, tmp_path: Path) -> None:
    words = ["--storage", str(runs), "--name", "resnet", "plain"]
    code, said = typed(*words, main=layers.main)
    assert code == 0, said
    assert (tmp_path / "layers.png").read_bytes().startswith(b"\x89PNG")
    assert "resnet: 7 layers at step 3" in said
    records = {name: record_of(runs / name) for name in NETWORKS}
    for name, kind in (("resnet", "average/"), ("plain", "model/")):
        record, config = records[name], config_for(prepared, runs, name, NETWORKS[name])
        expected, count = responses_of(config, runs / name, kind)
        assert [layer.response_std for layer in record.layers] == pytest.approx(expected, rel=1e-4)
        assert (record.step, record.asked_images, record.num_images) == (3, 2000, count)
        assert record.gradient_batches == GRADIENT_BATCHES
        assert record.data_sha256 == DataSet(Storage(str(prepared))).digest
        assert f"{runs}/{name}/layers/000000003-2000.json" in said
        assert all(layer.gradient_norm > 0 and layer.response_gradient_norm > 0 for layer in record.layers)
    assert records["plain"].weights_sha256 == weights_digest(runs / "plain")
    assert records["resnet"].weights_sha256 != weights_digest(runs / "resnet")  # which is over both kinds of weights

    # The same command: nothing is measured, and the same figure drawn.
    files = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in runs.rglob("layers/*")}
    figure = (tmp_path / "layers.png").read_bytes()
    code, said = typed(*words, main=layers.main)
    assert code == 0, said
    assert "layers at step" not in said
    assert {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in runs.rglob("layers/*")} == files
    assert (tmp_path / "layers.png").read_bytes() == figure

    # What is damaged is measured again, and is the same to the last bit; so is what was measured of another checkpoint.
    first, second = sorted(files)
    first.write_bytes(files[first][0][:-20])
    other = json.loads(files[second][0])
    other["measured"]["layers"][0]["response_std"] = 1.0
    second.write_text(json.dumps(other))
    code, said = typed(*words, "--out", str(tmp_path / "again.png"), main=layers.main)
    assert code == 0, said
    assert said.count("7 layers at step 3") == 2
    assert {path: path.read_bytes() for path in files} == {path: content for path, (content, _) in files.items()}
    assert (tmp_path / "again.png").read_bytes() == figure


@pytest.mark.parametrize(("size", "num_images"), [(50_000, 2000), (10_000, 6000), (250, 120), (30, 4), (30, 2000)])
def test_images_lie_evenly_over_the_split(size: int, num_images: int) -> None:
    batch_size, every, shown = spread(size, num_images)
    assert len(set(shown.tolist())) == len(shown) == min(size, num_images)
    assert set((shown // batch_size % every).tolist()) == {0}
    tenths = np.histogram(shown, 10, (0, size))[0] * size / len(shown)  # each a tenth, but for where batches begin
    assert np.abs(tenths - size / 10).max() <= every * batch_size


def test_some_images_are_shown(typed: Run, runs: Path) -> None:
    code, said = typed("--storage", str(runs), "--name", "plain", "--num-images", "4", main=layers.main)
    assert code == 0, said
    assert record_of(runs / "plain").num_images == 4
    assert (runs / "plain" / "layers" / "000000003-4.json").exists()


def test_a_damaged_checkpoint_is_passed_over(typed: Run, runs: Path) -> None:
    newest, *_, before = sorted((runs / "plain" / "checkpoints").glob("*/tensors.safetensors"), reverse=True)
    newest.write_bytes(newest.read_bytes()[:-1])
    for is_new in (True, False):
        code, said = typed("--storage", str(runs), "--name", "plain", main=layers.main)
        assert code == 0, said
        assert "checkpoint of step 3 is not usable" in said
        assert ("7 layers at step" in said) == is_new
    record = record_of(runs / "plain")
    assert record.checkpoint == f"checkpoints/{before.parent.name}"
    assert record.step < 3


def test_what_cannot_be_measured_is_refused(typed: Run, runs: Path, prepared: Path, tmp_path: Path) -> None:
    vgg = runs / "vgg"
    vgg.mkdir()
    stored = json.loads((runs / "plain" / "config.json").read_text())
    stored["identity"]["model"] |= {"family": "vgg", "depth": 16}
    stored["sha256"] = digest(stored["identity"])
    (vgg / "config.json").write_text(json.dumps(stored))
    shutil.copytree(runs / "plain" / "checkpoints", vgg / "checkpoints")
    shutil.copytree(runs / "plain", runs / "new")
    shutil.rmtree(runs / "new" / "checkpoints")
    moved = shutil.copytree(prepared, tmp_path / "other")
    manifest = json.loads((moved / "manifest.json").read_text())
    (moved / "manifest.json").write_text(json.dumps(manifest | {"name": "another"}))

    def refused(*words: str, saying: str) -> None:
        code, said = typed("--storage", str(runs), *words, main=layers.main)
        assert code == 2, said
        assert saying in " ".join(said.split()), said
        assert not list(runs.rglob("layers/*"))
        assert not list(tmp_path.glob("*.png"))

    refused("--name", "plain", "nobody", saying="there is no run")
    refused("--name", "plain", "new", saying="has no checkpoint yet: there is nothing to measure; train it first")
    refused("--name", "plain", "vgg", saying="has no 3×3 convolution that batch norm follows")
    refused("--name", "plain", "--data", str(moved), saying="is not the one that run 'plain' was trained on")
    refused("--name", "plain", "--num-images", "0", saying="--num-images must be at least 1, not 0")
    refused("--name", "plain", "--out", "layers.pdf", saying="layers.pdf is no PNG file")
    refused("--name", "plain", "--out", "none/layers.png", saying="there is no folder none")
    refused(saying="--name is missing")
