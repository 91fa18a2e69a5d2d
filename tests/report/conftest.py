"""A storage with small runs that were really trained, a campaign that waits, and what damage does."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from orchestrator.campaign.journal import fix_identity
from orchestrator.campaign.plan import Campaign, CampaignConfig, Member, Plan
from orchestrator.config import EvaluationConfig, Family, ModelConfig, Protocol, TrainConfig
from orchestrator.data.shards import DataSet
from orchestrator.evaluation import ensemble, scores
from orchestrator.evaluation.scores import ScoresInfo
from orchestrator.report import findings
from orchestrator.report.findings import Findings
from orchestrator.storage import Storage
from orchestrator.training.finished_model import ModelRecord
from tests.conftest import Shared
from tests.data.build import build, jpeg, noise_image
from tests.evaluation.score_files import softmax
from tests.training.group import Group, small_config

RECIPE = "<b>x</b> & co"  # of a run whose owner has typed that


def _cifar(folder: Path) -> Path:
    """A data set of CIFAR-10's name and number of classes: 40 images of 10 classes."""
    rng = np.random.default_rng(0)
    images = [(f"{i:03d}.jpg", jpeg(noise_image(rng, 40, 40)), i % 10) for i in range(40)]
    data = build(folder, images)
    data.storage.publish("manifest.json", replace(data.manifest, name="CIFAR-10, a part").to_bytes())
    return folder


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
        _train([_config(cifar, runs, f"r20-{letter}", residual, seed=seed) for seed, letter in enumerate("abc")])
        _train([_config(cifar, runs, "p20", plain), _config(prepared, runs, "odd", own, recipe=RECIPE)])
        _train(list(members.values()))

        (runs / "r20-c/finished.json").unlink()
        for path in (runs / "r20-c/checkpoints").glob("000000004*.json"):
            path.unlink()
        for name, steps in (("r20-a", (2, 4)), ("p20", (4,))):
            for step in steps:
                layers = [{"name": f"conv{i}", "response_std": step / 10 + i / 100} for i in range(19)]
                path = runs / name / "layers" / f"{step:09d}-a000001.json"
                path.parent.mkdir(exist_ok=True)
                path.write_text(json.dumps({"layers": layers}))
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
