"""The weights that are tested, where they are not those that are trained: their exponential moving average."""

from __future__ import annotations

import copy
from functools import cached_property

import torch
from torch import Tensor, nn


class MovingAverage:
    """A copy of ``model`` whose floating-point weights and buffers follow the model's.

    After step t (from 0 on) they are d·average + (1 − d)·model, d = min(decay, (1 + t) / (10 + t)), so that the first
    steps, which are far from anything, are forgotten (TensorFlow's ExponentialMovingAverage with num_updates).
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self._decay, self._of = decay, model
        self.model = copy.deepcopy(model).eval().requires_grad_(False)

    @torch.no_grad()
    def follow(self, step: int) -> None:
        """Step ``step`` has been done. Does not wait for the device."""
        torch._foreach_lerp_(*self._tensors, 1 - min(self._decay, (1 + step) / (10 + step)))

    @cached_property
    def _tensors(self) -> tuple[list[Tensor], list[Tensor]]:
        """Averages, and what they are of. Not before the first step: until then buffers may be given other memory."""
        of, state = self._of.state_dict(), self.model.state_dict()
        # A tensor that has two names (tied weights) is moved once.
        first = {mean.data_ptr(): name for name, mean in reversed(state.items()) if mean.is_floating_point()}
        return [state[name] for name in first.values()], [of[name] for name in first.values()]
