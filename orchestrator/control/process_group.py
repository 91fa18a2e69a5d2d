"""Ray Train's process group, over the network of the nodes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ray.train.torch import TorchConfig
from ray.train.torch.config import _TorchBackend

from orchestrator.control.interface import choose_interface


class _Backend(_TorchBackend):
    def on_start(self, worker_group: Any, backend_config: TorchConfig) -> None:
        worker_group.execute(choose_interface)
        super().on_start(worker_group, backend_config)


@dataclass
class TorchOnNodes(TorchConfig):
    """To be given to a trainer as its ``torch_config``."""

    @property
    def backend_cls(self) -> type[_TorchBackend]:
        return _Backend
