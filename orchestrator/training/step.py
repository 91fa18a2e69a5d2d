"""One optimizer step of a classification network over this worker's share of the global batch."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

from orchestrator.config import BatchConfig, OptimizerConfig
from orchestrator.data.pipeline import Batch
from orchestrator.data.sampling import Purpose, mix64
from orchestrator.models import RunningStatistics, group_images, share_groups
from orchestrator.training.averaging import MovingAverage
from orchestrator.training.meters import Meter, Totals, cross_entropy, smoothed
from orchestrator.training.optimization import SGD
from orchestrator.world import World, share_of


class ClassificationStep:
    """Forward, backward, reduction and update; top-1 and top-5 errors and loss are added up on the way.

    The batch-norm group is the unit of work: this worker's groups go through the network one after another or some at
    once, gradients add up and are reduced over the workers with the last ones, running statistics advance once.
    """

    def __init__(
        self,
        model: nn.Module,
        world: World,
        batch: BatchConfig,
        optimizer: OptimizerConfig,
        *,
        autocast: torch.dtype | None,
        crop_px: int,
        seed: int,
        groups_at_once: int = 1,
        compile_mode: str | None = None,
        reduce_in_bf16: bool = False,
        draws: bool = True,
        label_smoothing: float = 0.0,
        average_decay: float = 0.0,
        ready: Callable[[], None] = lambda: None,
        reduced: Callable[[], None] = lambda: None,
    ) -> None:
        """``model`` is on the world's device; ``ready`` is told when this worker's own gradients are, ``reduced`` when
        all workers' are summed; ``groups_at_once``: 0: all; ``compile_mode``: torch.compile's, None: not compiled;
        ``draws``: whether the model draws random numbers (dropout, …); ``label_smoothing``: what every class has of a
        label, in all (Szegedy et al. 2015); ``average_decay``: of the average of the weights, 0: there is none.

        Collective. Raises ValueError where workers cannot share the groups.
        """
        self.model, self.optimizer = model, SGD(model, **asdict(optimizer))
        self.share = share_of(world.rank, world.size, batch.global_batch_size, batch.bn_group_size)
        self._world, self._batch, self._autocast, self._seed = world, batch, autocast, seed
        self._label_smoothing = label_smoothing
        # Copied before functions of process groups hang on the model.
        self._average = MovingAverage(model, average_decay) if average_decay else None
        share_groups(model, world.group_sum(self.share.sharers), self.share.sharers)
        self._statistics = RunningStatistics(model)
        self._at_once = min(groups_at_once or self.share.num_groups, self.share.num_groups)
        self._draws = draws
        # DDP's buckets hold them; a CUDA graph's own memory must not be what is left here (below).
        self._keeps_gradients = world.size > 1 or compile_mode is not None
        if self.share.sharers == 1:
            group_images(model, batch.bn_group_size)
        self._parallel, self._reduced = world.distribute(model, ready, in_bf16=reduce_in_bf16), reduced
        self._forward: Callable[[Tensor], Tensor] = self._parallel
        if compile_mode is not None:
            for p in model.parameters():
                if (
                    p.requires_grad
                ):  # of our own: the first backward would leave a CUDA graph's memory here, for one step
                    p.grad = torch.zeros_like(p)
            self._forward = _compiled(self._parallel, compile_mode)
        self._meter = Meter(world.device)
        model.train()
        if world.size > 1:
            self._settle_buckets(crop_px)

    def positions(self, step: int) -> np.ndarray:
        """Stream positions [N] int64 of this worker's images in ``step``."""
        return self.share.positions(step, self._batch.global_batch_size, self._batch.bn_group_size)

    def __call__(self, batch: Batch, step: int, lr: float) -> None:
        """Do optimizer step ``step`` at learning rate ``lr``. Does not wait for the device.

        A step whose gradients are not finite changes no weight; it is counted. Their average moves on.
        """
        share = self.share
        self._meter.add_samples(self.positions(step), batch.indices)
        if batch.replaced:
            self._meter.add_replaced(len(batch.replaced))
        for first in range(0, share.num_groups, self._at_once):
            last = min(first + self._at_once, share.num_groups)
            groups = slice(first * share.images_per_group, last * share.images_per_group)
            images, labels = batch.images[groups], batch.labels[groups]
            if self._draws:
                # Whatever draws does so in the same way after a restart and at any number of workers.
                torch.manual_seed(_group_seed(self._seed, step, share.first_group + first, share.first_image))
            with self._world.reducing(self._parallel, now=last == share.num_groups):
                with torch.autocast(images.device.type, self._autocast, enabled=self._autocast is not None):
                    logits = self._forward(images)
                losses = cross_entropy(logits, labels)
                objective = losses if not self._label_smoothing else smoothed(logits, labels, self._label_smoothing)
                (objective.sum() / self._batch.global_batch_size).backward()
            self._statistics.accumulate()
            self._meter.add(logits.detach().float(), labels, losses.detach())
        self._statistics.reduce(self._world.sum_)
        self._reduced()
        # Gradients are summed over all workers: what one of them finds not finite, all do, and leave the step out.
        bad = self.optimizer.not_finite()
        num_groups = self._batch.global_batch_size // self._batch.bn_group_size
        self._statistics.advance(num_groups, unless=bad)
        self.optimizer.step(lr, unless=bad)
        if self._average is not None:
            self._average.follow(step)
        if self._world.is_first:
            self._meter.add_skipped(bad)
        self.optimizer.forget_gradients(in_place=self._keeps_gradients)

    @property
    def tested(self) -> nn.Module:
        """The network that is validated: the average of the weights where there is one."""
        return self.model if self._average is None else self._average.model

    def take_totals(self) -> Totals:
        """Sums over all workers since the last call. Collective; waits for the device."""
        return self._meter.take(self._world.sum_)

    def tensors(self) -> dict[str, Tensor]:
        """Copies in host memory of all that training changes: model/<name>, momentum/<name> and, where there is an
        average of the weights, average/<name>."""
        state = {f"model/{name}": t for name, t in self.model.state_dict().items()}
        state |= {f"momentum/{name}": t for name, t in self.optimizer.momentum().items()}
        if self._average is not None:
            state |= {f"average/{name}": t for name, t in self._average.model.state_dict().items()}
        plain = torch.contiguous_format  # at once: what is channels last would be copied twice
        return {name: t.detach().to("cpu", copy=True, memory_format=plain) for name, t in state.items()}

    def load(self, tensors: dict[str, Tensor], lr: float) -> None:
        """Go on from ``tensors()`` of a run whose last step had learning rate ``lr``. Raises ValueError."""
        weights, momentum, average = (
            {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
            for prefix in ("model/", "momentum/", "average/")
        )
        try:
            self.model.load_state_dict(weights)
            if self._average is not None:
                self._average.model.load_state_dict(average)
        except RuntimeError as error:
            raise ValueError(
                f"the checkpoint is of another model: give a changed network another --name ({error})"
            ) from None
        self.optimizer.load(momentum, lr)

    def _settle_buckets(self, crop_px: int) -> None:
        """Two forward and backward passes that nobody sees.

        DDP lays its gradient buckets out anew after the first step, and a ring's order of additions follows the
        layout: without this, the first step after a restart would add in another order than the same step of an
        unbroken run.
        """
        count = self._at_once * self.share.images_per_group
        dtype = torch.float32 if self._autocast is None else torch.float16  # as batches come: nothing is compiled twice
        images = torch.zeros(count, 3, crop_px, crop_px, device=self._world.device, dtype=dtype)
        for _ in range(2):
            with torch.autocast(images.device.type, self._autocast, enabled=self._autocast is not None):
                logits = self._forward(images.contiguous(memory_format=torch.channels_last))
            logits.float().sum().backward()
        self._parallel.zero_grad(set_to_none=False)
        self._statistics.discard()


def _compiled(network: nn.Module, mode: str) -> Callable[[Tensor], Tensor]:
    """Compiled with DDP around it: graphs then end where a bucket of gradients is full. Raises ValueError when called
    where it cannot be compiled.
    """
    # torch unpickles what it finds in its cache, whose default place lies in a folder that all users write to.
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(Path.home() / ".cache" / "torchinductor"))
    forward = torch.compile(network, mode=mode, dynamic=False)

    def call(images: Tensor) -> Tensor:
        try:
            return cast(Tensor, forward(images))
        except torch._dynamo.exc.TorchDynamoException as error:
            said = str(error).strip().partition("\n")[0]
            raise ValueError(
                f"numerics.compile: the network cannot be compiled here ({said}): a C++ compiler is needed (g++), on a "
                "GPU Triton; or leave it off"
            ) from error

    return call


def _group_seed(seed: int, step: int, group: int, first_image: int) -> int:
    key = np.array([seed], np.uint64)
    for part in (step, group, first_image, Purpose.DROPOUT.value):
        key = mix64(key ^ np.uint64(part))
    return int(key[0] >> np.uint64(1))
