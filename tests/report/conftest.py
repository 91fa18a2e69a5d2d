"""A storage with small runs that were really trained, a campaign that waits, and what damage does."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from orchestrator.campaign.journal import fix_identity
from orchestrator.campaign.plan import Campaign, CampaignConfig, Member, Plan
from orchestrator.config import CropStyle, EvaluationConfig, Family, InputConfig, ModelConfig, Protocol, TrainConfig
from orchestrator.data.shards import DataSet
from orchestrator.evaluation import ensemble, scores
from orchestrator.evaluation.layer_record import Measurement
from orchestrator.evaluation.scores import ScoresInfo
from orchestrator.report import findings
from orchestrator.report.findings import Findings
from orchestrator.storage import Storage
from orchestrator.training.finished_model import ModelRecord
from tests.conftest import Shared
from tests.data.planes import build_planes, random_images
from tests.evaluation.score_files import softmax
from tests.training.group import Group, small_config

RECIPE = "<b>x</b> & co"  # of a run whose owner has typed that


def _cifar(folder: Path) -> Path:
    """40 and 40 images of 10 classes, in memory as CIFAR-10's are."""
    build_planes(folder, {"train": random_images(0, 40), "val": random_images(1, 40)}, name="cifar10")
    return folder


_SMALL_IMAGES = InputConfig(crop_px=32, crop_style=CropStyle.PADDED, colour_std=0.0, test_shorter_side_px=32)


def _config(data: Path, storage: Path, name: str, model: ModelConfig, **fields: object) -> TrainConfig:
    """4 steps: a checkpoint at the third, and one validation at the last, as the epochs are shorter or longer."""
    config = small_config(data, storage, name, model=model)
    schedule, rhythm = replace(config.schedule, max_steps=4), replace(config.rhythm, validate_every_epochs=1.5)
    return replace(config, schedule=schedule, rhythm=replace(rhythm, keep_last=2), **fields)  # type: ignore[arg-type]


def _train(configs: Sequence[TrainConfig]) -> None:
    """Side by side."""
    groups = [Group(config, 1) for config in configs]
    assert [group.wait() for group in groups] == [[0]] * len(groups)


def _score(run: Path, config: TrainConfig, data: DataSet, protocol: str, seed: int) -> str:
    """What a test leaves in the folder of a run; the URL of its score file."""
    split, rng = data.split("val"), np.random.default_rng(seed)
    sha256 = f"{seed:064x}"
    record = ModelRecord(
        file="model/x.safetensors",
        nbytes=1,
        sha256=sha256,
        weights_sha256=sha256,
        step=4,
        checkpoint="",
        checkpoint_sha256="",
        validation_top1_error=None,
        precise_bn_images=0,
        run=str(run),
        name=config.name,
        recipe=config.recipe,
        config=config.identity(),
        data_sha256=data.digest,
        num_classes=data.num_classes,
        code_version="abc",
    )
    info = ScoresInfo(
        split="val",
        protocol={"kind": protocol, "crop_px": 32},
        classes=data.manifest.classes,
        model=record.to_json(),
        data={"url": data.storage.url, "sha256": data.digest, "name": data.manifest.name, "sources": []},
        code_version="abc",
    )
    name = scores.file_name("val", protocol, scores.key(sha256, data.digest, "val", info.protocol))
    truth = split.label[:, None] == np.arange(data.num_classes)
    made = scores.publish(
        Storage(str(run)),
        name,
        info,
        names=split.names,
        labels=split.label,
        decoded=split.decodable.astype(bool),
        width=split.width,
        height=split.height,
        scores=softmax(rng.normal(size=truth.shape) + truth),
    )
    return f"{run}/{made.name}"


def _campaign(data: DataSet, storage: Path) -> Campaign:
    """Two networks that are run, and one that waits."""
    depths = {"r34-a": 34, "r34-b": 34, "r50": 50}
    configs = {name: _config(Path(), Path(), name, ModelConfig(depth=depth)) for name, depth in depths.items()}
    return Campaign(
        tuple(Member(name, config) for name, config in configs.items()),
        CampaignConfig(
            data=data.storage.url,
            storage=str(storage),
            name="six",
            evaluation=EvaluationConfig(protocols=(Protocol.TEN_CROP,)),
            submit=False,
        ),
    )


@pytest.fixture(scope="session")
def storage(shared: Shared, prepared: Path) -> Path:
    """runs/: r20-a, -b and -c (three seeds, the last unfinished), p20 and odd; campaign six/ whose r34-a and r34-b are
    scored, and r50 waits, and an ensemble; broken; copy/ of the ensemble's manifest. cifar/: the data set."""

    def make(folder: Path) -> None:
        cifar, runs, data = _cifar(folder / "cifar"), folder / "runs", DataSet(Storage(str(prepared)))
        residual, plain = ModelConfig(Family.CIFAR_RESNET, 20), ModelConfig(Family.CIFAR_PLAIN, 20)
        campaign = _campaign(data, runs)
        fix_identity(Storage(f"{runs}/six"), Plan(campaign, dict.fromkeys(campaign.run_configs(), 4)), data.digest)
        members = {name: config for name, config in campaign.run_configs().items() if name != "r50"}
        own = ModelConfig(factory="tests.training.networks:tiny")
        twenty = [_config(cifar, runs, f"r20-{x}", residual, seed=i, input=_SMALL_IMAGES) for i, x in enumerate("abc")]
        _train(twenty)
        twenty.append(_config(cifar, runs, "p20", plain, input=_SMALL_IMAGES))
        _train([twenty[-1], _config(prepared, runs, "odd", own, recipe=RECIPE)])
        _train(list(members.values()))

        (runs / "r20-c/finished.json").unlink()
        for path in (runs / "r20-c/checkpoints").glob("000000004*.json"):
            path.unlink()
        for config in (twenty[0], twenty[-1]):
            for num_images in (10, 40):
                Measurement.of(config, num_images).record(torch.device("cpu"), 1, lambda text: None)
        shutil.copytree(runs / "r20-a", runs / "broken")
        (runs / "broken/config.json").write_text('{"sha256": ')

        folders = {name: runs / "six/members" / name for name in members}
        urls = [_score(folders[name], members[name], data, "ten_crop", i) for i, name in enumerate(members, start=1)]
        out = Storage(f"{runs}/six/ensemble/ten_crop")
        ensemble.build([scores.load(url) for url in urls], out, code_version="abc")
        shutil.copytree(runs / "six/ensemble/ten_crop", runs / "copy", ignore=shutil.ignore_patterns("scores"))

    return shared("reported", make)


@pytest.fixture(scope="session")
def found(storage: Path) -> Findings:
    return findings.read([Storage(str(storage))])
