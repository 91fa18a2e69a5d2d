"""A network whose workers print, and the second of which crashes once."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

import torch.distributed as dist
from torch import Tensor, nn

from tests.training.networks import tiny

CRASHED = "WORKER_LOG_TEST"  # a file that says that it has


class _Talks(nn.Module):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network, self.said = network, False

    def forward(self, images: Tensor) -> Tensor:
        if self.training and not images.is_meta and dist.is_initialized() and not self.said:
            self.said, rank, crashed = True, dist.get_rank(), Path(os.environ[CRASHED])
            os.write(1, f"words of rank {rank} at https://me:hidden@host/x\n".encode())
            if rank == 1 and not crashed.exists():
                crashed.touch()
                ctypes.string_at(0)
        return self.network(images)


def talks(*, num_classes: int, image_size: int) -> nn.Module:
    """As ``tiny``."""
    return _Talks(tiny(num_classes=num_classes, image_size=image_size))
