"""A small network, its record, and processes that score with it, for tests."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import torch
import torch.nn.functional as F

from orchestrator.config import EvaluationConfig, InputConfig, Protocol, TrainConfig
from orchestrator.data.shards import DataSet
from orchestrator.evaluation import scores
from orchestrator.evaluation.evaluate import evaluate
from orchestrator.models import BatchNorm2d, ResNet
from orchestrator.models.resnet import BasicBlock
from orchestrator.storage import Storage
from orchestrator.training.finished_model import ModelRecord
from orchestrator.training.notices import Event
from orchestrator.world import World
from tests.training.group import CONTEXT


def config_of(data: DataSet, folder: Path, crop_px: int = 32, **evaluation: object) -> TrainConfig:
    """Crops of ``crop_px`` pixels, shorter side in the paper's proportion."""
    shorter = round(crop_px * 256 / 224)
    sizes = InputConfig(crop_px=crop_px, scale_min_px=shorter, scale_max_px=2 * crop_px, test_shorter_side_px=shorter)
    return TrainConfig(
        data=data.storage.url,
        storage=str(folder),
        name="run",
        input=sizes,
        evaluation=EvaluationConfig(**{"batch_megapixels": 0.05, **evaluation}),  # type: ignore[arg-type]
    )


def network(num_classes: int, crop_px: int, seed: int = 0) -> ResNet:
    """An 18-layer network, an eighth as wide, that is not certain of anything.

    Its first layer sees what is larger than a pixel, and its blocks change little: as in a trained network, and unlike
    in a random one, the rounding of a pixel does not grow on its way.
    """
    torch.set_num_threads(1)  # the same network in every process
    torch.manual_seed(seed)
    model = ResNet(18, num_classes=num_classes, width=8)
    images = 3 * torch.randn(32, 3, crop_px, crop_px)
    for cells in (1, 2, 4, 8):  # structure at every scale, light and dark ones, as photographs have
        images += F.interpolate(160 * torch.rand(32, 3, cells, cells) - 80, size=crop_px, mode="bilinear")
    model.train()
    with torch.no_grad():
        model.conv1.weight.copy_(5 * F.avg_pool2d(model.conv1.weight, 5, stride=1, padding=2))
        for block in model.modules():
            if isinstance(block, BasicBlock):
                block.last_bn.weight.fill_(0.3)
        model(images)
        for layer in model.modules():
            if isinstance(layer, BatchNorm2d):
                layer.running_mean.copy_(layer.group_mean)
                layer.running_var.copy_(layer.group_var)
        logits = model.eval()(images)
        model.fc.weight.div_(logits.std(0).mean())
        model.fc.bias.copy_(-logits.mean(0) / logits.std(0).mean())
    return model


def mean_image(crop_px: int) -> torch.Tensor:
    """[3, S, S] float32, not the same at any two places."""
    return torch.linspace(80, 150, 3 * crop_px * crop_px).view(3, crop_px, crop_px)


def record_of(data: DataSet, num_classes: int | None = None) -> ModelRecord:
    return ModelRecord(
        file="model/000000008-last-bn0.safetensors",
        nbytes=1,
        sha256="0" * 64,
        weights_sha256="1" * 64,
        step=8,
        checkpoint="run/checkpoints/000000008-a000001",
        checkpoint_sha256="2" * 64,
        validation_top1_error=None,
        precise_bn_images=0,
        run="run",
        name="run",
        recipe="",
        config={},
        data_sha256=data.digest,
        num_classes=num_classes or data.num_classes,
        code_version="test",
        wnids=tuple(each.wnid for each in data.manifest.classes),
    )


def do(
    config: TrainConfig, protocol: Protocol, folder: Path, world: World, *, cpus: int = 1, **callbacks: object
) -> str:
    """A worker's share of the evaluation of the val split, in this process; the name of the score file."""
    data, crop_px = DataSet(Storage(config.data)), config.input.crop_px
    return evaluate(
        record_of(data),
        network(data.num_classes, crop_px),
        mean_image(crop_px),
        config,
        data,
        "val",
        protocol,
        world,
        cpus=cpus,
        run=Storage(str(folder)),
        code_version="test",
        **callbacks,  # type: ignore[arg-type]
    )


def score(config: TrainConfig, protocol: Protocol, folder: Path, **callbacks: object) -> scores.Scores:
    """Evaluate the val split in this process; what came out, verified."""
    return scores.load(f"{folder}/{do(config, protocol, folder, World(), **callbacks)}")


class Workers:
    """The processes of one start; ``die_at``: the rank that kills itself, and at which call of ``alive``."""

    def __init__(
        self, config: TrainConfig, protocol: Protocol, folder: Path, size: int, die_at: tuple[int, int] | None = None
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        settings = config.to_json(), protocol.value, str(folder), size, die_at
        self._processes = [CONTEXT.Process(target=_work, args=(rank, *settings)) for rank in range(size)]
        for process in self._processes:
            process.start()

    def end(self, timeout_s: float = 120) -> list[int | None]:
        """Exit codes by rank."""
        for process in self._processes:
            process.join(timeout_s)
        return [process.exitcode for process in self._processes]

    def end_killed(self, timeout_s: float = 120) -> None:
        """Until one has killed itself; then the others are killed too."""
        dead = None
        while dead is None:
            dead = next((p for p in self._processes if p.exitcode == -signal.SIGKILL), None)
            assert any(p.is_alive() for p in self._processes) or dead, [p.exitcode for p in self._processes]
            self._processes[0].join(0.01)
        for process in self._processes:
            if process.is_alive():
                process.kill()
            process.join(timeout_s)

    def events(self) -> list[Event]:
        """Of all starts so far, rank by rank."""
        files = sorted(self.folder.glob("events-*.jsonl"))
        return [json.loads(line) for file in files for line in file.read_text().splitlines()]


def _work(
    rank: int, config: dict[str, object], protocol: str, folder: str, size: int, die_at: tuple[int, int] | None
) -> None:
    calls = 0

    def alive() -> None:
        nonlocal calls
        calls += 1
        if die_at == (rank, calls):
            os.kill(os.getpid(), signal.SIGKILL)

    with open(f"{folder}/events-{rank}.jsonl", "a", buffering=1) as stream:

        def emit(event: Event) -> None:
            stream.write(json.dumps(event) + "\n")

        parsed = TrainConfig.from_json(config)
        do(parsed, Protocol(protocol), Path(folder), World(rank, size), emit=emit, alive=alive)
