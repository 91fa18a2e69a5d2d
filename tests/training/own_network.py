"""A network of two layers, as a user brings it: what is compiled with it is compiled in seconds."""

from __future__ import annotations

from torch import nn

from orchestrator.models import BatchNorm2d


def build(num_classes: int, image_size: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, bias=False),
        BatchNorm2d(8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, num_classes),
    )
