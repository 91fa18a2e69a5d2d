"""Ways to do the same training step, for benchmarks: what is compiled, in which arithmetic, how many groups at once."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum

import torch
from torch import nn

from orchestrator.config import Compile, Precision, TrainConfig
from orchestrator.models import BatchNorm2d
from orchestrator.training.assembly import autocast_dtype, build_model, compile_mode, draws, set_arithmetic
from orchestrator.training.step import ClassificationStep
from orchestrator.world import World


class Way(Enum):
    """How the network is run."""

    SERIAL = "serial"  # kernel by kernel, one batch-norm group after another
    EAGER = "eager"  # kernel by kernel, all groups at once
    COMPILE = "compile"
    GRAPHS = "graphs"  # compiled, as CUDA graphs
    AUTOTUNE = "autotune"


_COMPILE = {
    Way.COMPILE: Compile.DEFAULT,
    Way.GRAPHS: Compile.REDUCE_OVERHEAD,
    Way.AUTOTUNE: Compile.MAX_AUTOTUNE,
}


@dataclass(frozen=True)
class Mode:
    """A way in an arithmetic."""

    way: Way
    precision: Precision

    @property
    def name(self) -> str:
        return f"{self.way.value}, {self.precision.value}"

    def applied(self, config: TrainConfig) -> TrainConfig:
        numerics = replace(
            config.numerics,
            precision=self.precision,
            compile=_COMPILE.get(self.way, Compile.OFF),
            groups_at_once=1 if self.way is Way.SERIAL else 0,
        )
        return replace(config, numerics=numerics)

    def set_arithmetic(self, world: World, cpus: int) -> None:
        set_arithmetic(world.device, num_threads=cpus, deterministic=False, precision=self.precision)


REFERENCE = Mode(Way.SERIAL, Precision.FP32)


def step_of(config: TrainConfig, mode: Mode, world: World, num_classes: int, seed: int = 0) -> ClassificationStep:
    """The product's own step, with weights drawn by ``seed``."""
    config = mode.applied(config)
    torch.manual_seed(seed)
    model = build_model(config, num_classes).to(world.device)
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # missing in torch's stubs
    return ClassificationStep(
        model,
        world,
        config.batch,
        config.optimizer,
        autocast=autocast_dtype(mode.precision, world.device),
        crop_px=config.input.crop_px,
        seed=seed,
        groups_at_once=config.numerics.groups_at_once,  # all of them on a CPU too
        compile_mode=compile_mode(config),
        draws=draws(config),
    )


class BareStep:
    """The least that PyTorch does for a step: statistics over the whole batch, no meters, no guard, fused SGD."""

    def __init__(self, model: nn.Module, mode: Mode, world: World, *, weight_decay: float, momentum: float) -> None:
        """``model``: its batch norm is replaced by PyTorch's own."""
        _plain_batch_norm(model)
        self._model = model.to(world.device)
        self._model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        on_gpu = world.device.type == "cuda"
        self._optimizer = torch.optim.SGD(
            model.parameters(), lr=1e-3, momentum=momentum, weight_decay=weight_decay, fused=on_gpu, foreach=not on_gpu
        )
        self._autocast = autocast_dtype(mode.precision, world.device)
        compiled = _COMPILE.get(mode.way)
        self._forward = (
            torch.compile(self._model, mode=compiled.value.replace("_", "-"), dynamic=False)
            if compiled
            else self._model
        )

    def __call__(self, images: torch.Tensor, labels: torch.Tensor) -> None:
        with torch.autocast(images.device.type, self._autocast, enabled=self._autocast is not None):
            logits = self._forward(images)
        nn.functional.cross_entropy(logits.float(), labels).backward()
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)


def _plain_batch_norm(module: nn.Module) -> None:
    for name, child in module.named_children():
        if isinstance(child, BatchNorm2d):
            setattr(module, name, nn.BatchNorm2d(child.num_features, child.eps, child.momentum))
        else:
            _plain_batch_norm(child)
