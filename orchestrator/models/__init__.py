"""What is trained. Ours have forward_features(images), classify(features) and forward(images) → logits.

Ours have classify_windows(features, window) too, which a test on whole images needs.
"""

from collections.abc import Set as AbstractSet
from typing import Any

from orchestrator.config import Family, Pool, Shortcut, StrideOn
from orchestrator.models.batch_norm import BatchNorm2d, RunningStatistics, group_images, share_groups
from orchestrator.models.cifar import CifarResNet
from orchestrator.models.complexity import count_flops, count_layers, count_parameters
from orchestrator.models.own import build_own
from orchestrator.models.resnet import ResNet
from orchestrator.models.vgg import VGG

__all__ = [
    "VGG",
    "BatchNorm2d",
    "CifarResNet",
    "Family",
    "Pool",
    "ResNet",
    "RunningStatistics",
    "Shortcut",
    "StrideOn",
    "build",
    "build_own",
    "count_flops",
    "count_layers",
    "count_parameters",
    "group_images",
    "share_groups",
]


def build(
    family: Family,
    depth: int,
    *,
    num_classes: int,
    image_size: int = 224,
    shortcut: Shortcut | None = None,
    stride_on: StrideOn | None = None,
    pool: Pool | None = None,
    zero_gamma: bool = False,
) -> ResNet | CifarResNet | VGG:
    """A new, initialized model on the current default device, from torch's current random state.

    image_size: pixels; only VGG is tied to it. None means the model's own default. An option that the family does
    not have is refused, as it would otherwise be part of a run's name without effect."""
    given = {"shortcut": shortcut, "stride_on": stride_on, "pool": pool, "zero_gamma": zero_gamma or None}
    options: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    match family:
        case Family.RESNET:
            return ResNet(depth, num_classes=num_classes, **options)
        case Family.PLAIN:
            _refuse(family, options, allowed={"stride_on", "pool"})
            return ResNet(depth, num_classes=num_classes, residual=False, **options)
        case Family.VGG:
            _refuse(family, options)
            return VGG(depth, num_classes=num_classes, image_size=image_size)
        case Family.CIFAR_RESNET | Family.CIFAR_PLAIN:
            _refuse(family, options)
            return CifarResNet(depth, num_classes, residual=family is Family.CIFAR_RESNET)


def _refuse(family: Family, options: dict[str, Any], allowed: AbstractSet[str] = frozenset()) -> None:
    if refused := sorted(options.keys() - allowed):
        raise ValueError(f"The {family.value} family has no option {', '.join(refused)}: leave it out.")
