"""The product's training step against a plain PyTorch transcription of the paper's CIFAR recipe, to the last bit."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jobs import cifar10
from orchestrator.data.decoder import DecodeSettings
from orchestrator.data.inputs import train_input
from orchestrator.training.assembly import build_model, sample_stream, views_of
from orchestrator.training.optimization import PolicyState, learning_rate
from orchestrator.training.step import ClassificationStep
from orchestrator.world import World
from tests.data.planes import build_planes, random_images

BATCH, GROUP, STEPS, DROP = 128, 64, 3, 2  # the learning rate drops before the third step


class Block(nn.Module):
    """Two 3×3 convolutions and a shortcut without parameters (option A)."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.stride, self.more = after // before, after - before
        self.conv1 = nn.Conv2d(before, after, 3, self.stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(after, momentum=1.0)
        self.conv2 = nn.Conv2d(after, after, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(after, momentum=1.0)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.more))
        return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + shortcut)


class Net(nn.Module):
    """ResNet-20: 6·3 + 2 layers. Its batch norm keeps the statistics of the last forward (momentum 1)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16, momentum=1.0)
        self.layer1 = nn.Sequential(Block(16, 16), Block(16, 16), Block(16, 16))
        self.layer2 = nn.Sequential(Block(16, 32), Block(32, 32), Block(32, 32))
        self.layer3 = nn.Sequential(Block(32, 64), Block(64, 64), Block(64, 64))
        self.fc = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer3(self.layer2(self.layer1(F.relu(self.bn1(self.conv1(x))))))
        return self.fc(x.mean((2, 3)))


def batch_of(pixels: np.ndarray, images: np.ndarray, mean: np.ndarray, windows: list[tuple[int, int, bool]]) -> Tensor:
    """Padded by 4 pixels, cropped, mirrored: [N, 3, 32, 32] float32."""
    seen = []
    for image, (left, top, mirrored) in zip(images, windows, strict=True):
        padded = np.pad(pixels[image].astype(np.float32) - mean, ((0, 0), (4, 4), (4, 4)))
        window = padded[:, top : top + 32, left : left + 32]
        seen.append(torch.from_numpy((window[:, :, ::-1] if mirrored else window).copy()))
    return torch.stack(seen).contiguous(memory_format=torch.channels_last)


def test_a_step_is_the_recipe_to_the_last_bit(tmp_path: Path) -> None:
    data = build_planes(tmp_path, {"train": random_images(0, 400), "val": random_images(1, 10)})
    config = cifar10.resnet20()
    config = replace(config, schedule=replace(config.schedule, drop_steps=(DROP,), max_steps=STEPS))
    assert (config.batch.global_batch_size, config.batch.bn_group_size) == (BATCH, GROUP)

    # -- ours
    view, _, mean, axes = views_of(config, data)
    split = data.split("train")
    stream = sample_stream(config, split)
    torch.manual_seed(3)
    model = build_model(config, 10).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    ours = ClassificationStep(
        model, World(), config.batch, config.optimizer, autocast=None, crop_px=32, seed=0, draws=False
    )
    gradients: list[dict[str, Tensor]] = []
    update = ours.optimizer.step

    def step_and_keep(lr: float, unless: Tensor | None = None) -> None:
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
        update(lr, unless)

    ours.optimizer.step = step_and_keep  # type: ignore[method-assign]
    source = train_input(data, split, stream, view, axes, mean, DecodeSettings(), ours.positions, 0, 0)

    # -- the transcription
    plain = Net()
    plain.load_state_dict(weights, strict=False)
    plain.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    norms = [m for m in plain.modules() if isinstance(m, nn.BatchNorm2d)]
    running = {m: (torch.zeros(m.num_features), torch.ones(m.num_features)) for m in norms}
    sgd = torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
    pixels, labels = random_images(0, 400)
    mean_image = pixels.mean(0).astype(np.float32)

    with closing(source):
        for step in range(STEPS):
            ours(next(source), step, learning_rate(config.schedule, PolicyState(), step, STEPS))
            totals = ours.take_totals()

            positions = np.arange(step * BATCH, (step + 1) * BATCH)
            images = stream.images(positions)
            left, top, mirrored = view.windows(stream, positions)
            batch = batch_of(pixels, images, mean_image, list(zip(left, top, mirrored, strict=True)))
            answers, loss_units, wrong = torch.from_numpy(labels[images]), 0, 0
            batch_statistics = {m: (torch.zeros(m.num_features), torch.zeros(m.num_features)) for m in norms}
            for first in range(0, BATCH, GROUP):
                group = slice(first, first + GROUP)
                logits = plain(batch[group])
                losses = F.cross_entropy(logits, answers[group], reduction="none")
                (losses.sum() / BATCH).backward()
                loss_units += int((losses.detach().double() * 2**24).round().sum())
                wrong += int((logits.argmax(1) != answers[group]).sum())
                for m in norms:
                    batch_statistics[m][0].add_(m.running_mean)
                    batch_statistics[m][1].add_(m.running_var)
            for m in norms:
                for old, new in zip(running[m], batch_statistics[m], strict=True):
                    old.lerp_(new / (BATCH // GROUP), 0.1)
            if step == DROP:  # Caffe's momentum keeps its length
                for p in plain.parameters():
                    sgd.state[p]["momentum_buffer"].mul_(0.1 / 0.010000000000000002)
                sgd.param_groups[0]["lr"] = 0.010000000000000002  # 0.1 · 0.1

            assert (totals.images, totals.loss_units, totals.wrong_top1) == (BATCH, loss_units, wrong)
            for name, p in plain.named_parameters():
                assert p.grad is not None
                assert torch.equal(gradients[step][name], p.grad), (step, name)
            sgd.step()
            sgd.zero_grad()
            state = model.state_dict()
            for name, p in plain.named_parameters():
                assert torch.equal(state[name], p), (step, name)
            by_name = {m: name for name, m in plain.named_modules() if m in running}
            for m, (mean_, var) in running.items():
                assert torch.equal(state[f"{by_name[m]}.running_mean"], mean_), (step, by_name[m])
                assert torch.equal(state[f"{by_name[m]}.running_var"], var), (step, by_name[m])
