"""Validation during training: the 1-crop errors of a split, every image counted once at any number of workers."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from orchestrator.data.inputs import EvalBatches
from orchestrator.training.meters import Meter, Totals, cross_entropy
from orchestrator.world import World


@torch.inference_mode()
def validate(
    model: nn.Module,
    batches: EvalBatches,
    world: World,
    autocast_dtype: torch.dtype | None,
    alive: Callable[[], None] = lambda: None,
) -> Totals:
    """Totals over all images of the split, the same on every rank; ``alive`` is told of every batch. Collective.

    Batches are fixed by the data set alone and dealt out whole, so a score does not depend on the number of workers.
    """
    meter = Meter(world.device)
    was_training = model.training
    model.eval()
    alive()
    for batch in batches.batches(world.rank, world.size):
        alive()
        with torch.autocast(world.device.type, autocast_dtype or torch.bfloat16, enabled=autocast_dtype is not None):
            logits = model(batch.images)
        weight = torch.from_numpy(batch.valid.astype("int64")).to(world.device, non_blocking=True)
        meter.add(logits.float(), batch.labels, cross_entropy(logits, batch.labels), weight)
        if batch.num_unreadable:
            meter.add_unreadable(batch.num_unreadable)
    model.train(was_training)
    return meter.take(world.sum_)
