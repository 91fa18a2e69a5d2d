"""Batch norm's mean and variance as true averages over training images, instead of the moving averages of training.

The released models were finished like this. Each layer's input is normalized with the statistics of its batch-norm
group, as in training; the groups' first and second moments are averaged. Legend: G groups, C channels of a layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from orchestrator.data.pipeline import Batch
from orchestrator.models import BatchNorm2d, share_groups
from orchestrator.world import World, share_of


@dataclass(frozen=True)
class Walk:
    """Which of G groups of ``group_size`` images, the first one at stream position ``start``, a worker does.

    In each round the workers take ``each`` groups in turn; ``sharers`` workers do one group together, each of them
    ``images_per_group`` images of it from number ``first_image`` on. place: this worker's turn, the same for sharers.
    """

    start: int
    num_groups: int
    group_size: int
    place: int
    each: int
    per_round: int
    images_per_group: int
    first_image: int
    sharers: int

    @staticmethod
    def of(world: World, num_images: int, start: int, global_batch_size: int, group_size: int) -> Walk:
        """Over ``num_images`` images, rounded up to whole groups. Raises ValueError where workers cannot share them."""
        share = share_of(world.rank, world.size, global_batch_size, group_size)
        each = -(-(global_batch_size // group_size) // world.size)  # so much at a time as in training
        return Walk(
            start=start,
            num_groups=-(-num_images // group_size),
            group_size=group_size,
            place=world.rank // share.sharers,
            each=each,
            per_round=each * (world.size // share.sharers),
            images_per_group=share.images_per_group,
            first_image=share.first_image,
            sharers=share.sharers,
        )

    @property
    def num_images(self) -> int:
        """Of all workers together."""
        return self.num_groups * self.group_size

    @property
    def num_rounds(self) -> int:
        return -(-self.num_groups // self.per_round)

    def positions(self, round_number: int) -> np.ndarray:
        """Stream positions [each · images_per_group] int64 of this worker in a round; in the last one some groups may
        lie past the end."""
        groups = np.arange(self.each) + round_number * self.per_round + self.place * self.each
        images = np.arange(self.images_per_group) + self.first_image
        return (self.start + groups[:, None] * self.group_size + images[None, :]).reshape(-1)


@torch.no_grad()
def precise_statistics(
    model: nn.Module,
    batches: Iterator[Batch],
    walk: Walk,
    world: World,
    autocast: torch.dtype | None,
    alive: Callable[[], None] = lambda: None,
) -> dict[str, Tensor]:
    """running_mean and running_var over the walk's images: [C] float32 in host memory, by name in the state dict.

    ``batches`` gives the images of ``walk.positions``, round by round. The population's mean and variance, summed in
    float64 in the order of the groups: the same on all ranks, and the same bits at any number of workers that have
    whole groups. Weights and buffers of ``model`` stay as they are; what draws in training (dropout) does not draw; a
    layer that sees no image keeps what it has, and is not in the result. Collective.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, BatchNorm2d)}
    if not layers:
        return {}
    counts = _Counts(layers)
    was_training = {module: module.training for module in model.modules()}
    share_groups(model, world.group_sum(walk.sharers), walk.sharers)
    try:
        model.eval()
        for layer in layers.values():
            layer.train()
        sums = torch.zeros(2 * sum(layer.num_features for layer in layers.values()), dtype=torch.float64)
        sums = sums.to(world.device)
        for round_number in range(walk.num_rounds):
            alive()
            batch = next(batches)
            moments = sums.new_zeros(walk.per_round, len(sums))
            for number in range(walk.each):
                slot = walk.place * walk.each + number
                if round_number * walk.per_round + slot >= walk.num_groups:
                    break
                images = batch.images[number * walk.images_per_group : (number + 1) * walk.images_per_group]
                with torch.autocast(images.device.type, autocast, enabled=autocast is not None):
                    model(images)
                if walk.first_image == 0:  # those who share a group all know its statistics
                    moments[slot] = counts.moments(walk.sharers)
            # Every row comes from one worker, so that this adds only zeros.
            for row in world.sum_(moments):
                sums += row
    finally:
        counts.close()
        share_groups(model, None, 1)
        for module, training in was_training.items():
            module.training = training
    return _statistics(counts, sums / walk.num_groups)


class _Counts:
    """How many numbers of a channel each layer has seen in the last forward: its variance divides by one less."""

    def __init__(self, layers: dict[str, BatchNorm2d]) -> None:
        self.layers = layers
        self.seen: dict[nn.Module, int] = {}
        self._hooks = [layer.register_forward_pre_hook(self._see) for layer in layers.values()]

    def _see(self, layer: nn.Module, inputs: tuple[Any, ...]) -> None:
        self.seen[layer] = inputs[0].numel() // inputs[0].shape[1]

    def moments(self, sharers: int) -> Tensor:
        """[2 · sum of C] float64: each layer's C means, then the C means of its squares, of the last group."""
        parts = []
        for layer in self.layers.values():
            mean, count = layer.group_mean.double(), self.seen.get(layer, 1) * sharers
            parts += [mean, layer.group_var.double() * ((count - 1) / count) + mean.square()]
        return torch.cat(parts)

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()


def _statistics(counts: _Counts, moments: Tensor) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    begin = 0
    for name, layer in counts.layers.items():
        end = begin + layer.num_features
        mean, square = moments[begin:end], moments[end : end + layer.num_features]
        begin = end + layer.num_features
        if layer in counts.seen:
            prefix = f"{name}." if name else ""
            found[f"{prefix}running_mean"] = mean.float().cpu()
            found[f"{prefix}running_var"] = (square - mean.square()).clamp_min(0).float().cpu()
    return found
