"""The fully-convolutional form of the networks is their classifier at every position."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from orchestrator.config import Family, Pool
from orchestrator.models import VGG, ResNet, build


def small(kind: str) -> nn.Module:
    torch.manual_seed(0)
    match kind:
        case "resnet":
            return ResNet(18, num_classes=7, width=8)
        case "padded":
            return ResNet(18, num_classes=7, width=8, pool=Pool.PADDED)
        case "bottleneck":
            return ResNet(50, num_classes=7, width=8)
        case "plain":
            return ResNet(18, num_classes=7, width=8, residual=False)
        case "cifar":
            return build(Family.CIFAR_RESNET, 8, num_classes=7)
        case _:
            return VGG(16, num_classes=7, image_size=64)


@pytest.mark.parametrize("kind", ["resnet", "padded", "bottleneck", "plain", "cifar", "vgg"])
@torch.inference_mode()
def test_windows_are_what_the_classifier_says_of_each(kind: str) -> None:
    crop_px = 32 if kind == "cifar" else 64
    model = small(kind).eval()
    features = model.forward_features(torch.randn(2, 3, crop_px, crop_px))  # type: ignore[operator]
    window = features.shape[2]
    one = model.classify_windows(features, window)  # type: ignore[operator]
    assert one.shape == (2, 7, 1, 1)
    torch.testing.assert_close(one[:, :, 0, 0], model.classify(features), rtol=1e-4, atol=1e-5)  # type: ignore[operator]
    features = model.forward_features(torch.randn(2, 3, crop_px + 70, crop_px + 32))  # type: ignore[operator]
    every = model.classify_windows(features, window)  # type: ignore[operator]
    height, width = features.shape[2] - window + 1, features.shape[3] - window + 1
    assert every.shape == (2, 7, height, width)
    assert height > width > 1
    for y in range(height):
        for x in range(width):
            part = model.classify(features[:, :, y : y + window, x : x + window])  # type: ignore[operator]
            torch.testing.assert_close(every[:, :, y, x], part, rtol=1e-4, atol=1e-5)


@torch.inference_mode()
def test_on_224_pixels_it_is_the_ordinary_forward_pass() -> None:
    torch.manual_seed(0)
    model = ResNet(50, width=16).eval()
    images = torch.randn(2, 3, 224, 224)
    features = model.forward_features(images)
    assert features.shape[2:] == (7, 7)
    logits = model(images)
    difference = model.classify_windows(features, 7)[:, :, 0, 0] - logits
    assert difference.abs().max() < 1e-5 * logits.abs().max()


def test_a_vgg_of_another_size_says_so() -> None:
    with pytest.raises(ValueError, match="classifies 2×2 features, not windows of 7×7"):
        small("vgg").classify_windows(torch.zeros(1, 512, 8, 8), 7)  # type: ignore[operator]
