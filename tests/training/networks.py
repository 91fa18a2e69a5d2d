"""Networks of the tests (``model.factory``): cheap to start and to step, with what makes exactness hard."""

from __future__ import annotations

from torch import Tensor, nn


class _Small(nn.Module):
    """A residual block under batch norm, dropout, then ``num_wide`` residual layers of ``width`` units."""

    def __init__(self, num_classes: int, channels: int, width: int, num_wide: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, channels, 3, 2, 1), nn.BatchNorm2d(channels), nn.ReLU())
        self.block = nn.Sequential(nn.Conv2d(channels, channels, 3, 1, 1), nn.BatchNorm2d(channels))
        self.pool, self.dropout = nn.AdaptiveAvgPool2d(4), nn.Dropout(0.1)
        self.widen = nn.Linear(16 * channels, width)
        self.wide = nn.ModuleList(nn.Linear(width, width) for _ in range(num_wide))
        self.classify = nn.Linear(width, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """images [N, 3, H, W] → logits [N, classes]."""
        x = self.stem(images / 64)
        x = self.pool((x + self.block(x)).relu())
        x = self.widen(self.dropout(x.flatten(1)))
        for layer in self.wide:
            x = x + layer(x.relu())
        return self.classify(x)


def three_buckets(*, num_classes: int, image_size: int) -> nn.Module:
    """28 MB of gradients: DDP lays them out in three buckets, the fewest whose order a ring of three shows."""
    return _Small(num_classes, channels=8, width=1024, num_wide=7)


def tiny(*, num_classes: int, image_size: int) -> nn.Module:
    """A few thousand weights."""
    return _Small(num_classes, channels=4, width=16, num_wide=1)
