"""A network that every check takes, and that cannot be trained."""

from __future__ import annotations

from torch import Tensor, nn

from tests.training.networks import tiny


class _Fails(nn.Module):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        if not images.is_meta and self.training:
            raise ValueError("this network fails in its first step")
        return self.network(images)


def fails_in_training(*, num_classes: int, image_size: int) -> nn.Module:
    """As ``tiny``, and fails."""
    return _Fails(tiny(num_classes=num_classes, image_size=image_size))
