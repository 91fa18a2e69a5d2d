"""Batch normalization whose unit is the batch-norm group, not the worker.

A global batch is made of groups (paper: 8 groups of 32 images). A training forward sees one group, normalizes with
that group's statistics and leaves the running statistics alone; these advance once per optimizer step, from the mean
over all groups (RunningStatistics). So weights, buffers and validation error do not depend on how the groups are
dealt out to workers.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class BatchNorm2d(nn.BatchNorm2d):
    """images [N, C, H, W] → the same, normalized per channel; in training over the N images given (one group).

    A training forward leaves the group's mean and unbiased variance ([C], float32, not in the state dict) in
    `group_mean` and `group_var`; `RunningStatistics` collects them from there. An evaluation forward reads
    `running_mean` and `running_var`, as always. There is no `num_batches_tracked`.

    Several processes may share one group: see `share_groups`.
    """

    running_mean: Tensor
    running_var: Tensor
    group_mean: Tensor
    group_var: Tensor
    # A differentiable sum over the processes that share this layer's group, and their number.
    all_reduce: Callable[[Tensor], Tensor] | None
    shared_by: int

    def __init__(self, num_features: int, eps: float = 1e-5, momentum: float = 0.1) -> None:
        super().__init__(num_features, eps, momentum)
        self.register_buffer("num_batches_tracked", None)
        self.register_buffer("group_mean", torch.zeros_like(self.running_mean), persistent=False)
        self.register_buffer("group_var", torch.zeros_like(self.running_var), persistent=False)
        self.all_reduce = None
        self.shared_by = 1
        self._zeroed_by_owner = False

    def reset_running_stats(self) -> None:
        self.running_mean.zero_()
        self.running_var.fill_(1)

    def forward(self, images: Tensor) -> Tensor:
        if not self.training:
            return F.batch_norm(
                images, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps
            )
        if self.all_reduce is not None:
            return self._forward_shared(images, self.all_reduce)
        if not self._zeroed_by_owner:
            # The kernel writes (1 - momentum)·old + momentum·new, and 0·NaN is NaN: one bad batch would stay for ever.
            # Through .data, as autograd saved the buffers of earlier forwards (unread in training) and checks versions.
            self.group_mean.data.zero_()
            self.group_var.data.zero_()
        return F.batch_norm(images, self.group_mean, self.group_var, self.weight, self.bias, True, 1.0, self.eps)

    def _forward_shared(self, images: Tensor, all_reduce: Callable[[Tensor], Tensor]) -> Tensor:
        # Plain differentiable operations: the gradient through the statistics crosses processes inside all_reduce.
        # The statistics' dtype is that of the buffers (float32), whatever autocast made of the images.
        x_NCHW = images.to(self.group_mean.dtype)
        num_local = x_NCHW.numel() // self.num_features
        if num_local == 0:
            raise ValueError(
                f"No image for this process in a batch-norm group shared by {self.shared_by} processes: "
                "use fewer workers or a larger bn_group_size."
            )
        # The count travels with the sum: the shares may be uneven (32 images over 3 processes).
        sums = torch.cat([x_NCHW.sum((0, 2, 3)), x_NCHW.new_full((1,), num_local)])
        sums = all_reduce(sums)
        count = sums[-1].detach()
        mean_C = sums[:-1] / count
        # Two passes, as E[x²] - E[x]² cancels where the mean is large against the deviation.
        deviation_NCHW = x_NCHW - mean_C[:, None, None]
        squares_C = all_reduce(deviation_NCHW.square().sum((0, 2, 3)))
        with torch.no_grad():
            self.group_mean.copy_(mean_C)
            self.group_var.copy_(squares_C / (count - 1))
        scale_C = self.weight * torch.rsqrt(squares_C / count + self.eps)
        normalized = torch.addcmul(self.bias[:, None, None], deviation_NCHW, scale_C[:, None, None])
        return normalized.to(images.dtype)

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: object) -> None:
        # Weights trained elsewhere bring num_batches_tracked. The parent class would even invent it where a file
        # format (safetensors) does not carry the state dict's version, so its method is stepped over.
        state_dict.pop(prefix + "num_batches_tracked", None)
        nn.Module._load_from_state_dict(self, state_dict, prefix, *args)


def share_groups(model: nn.Module, all_reduce: Callable[[Tensor], Tensor] | None, shared_by: int) -> None:
    """Make `shared_by` processes share each batch-norm group: their images are normalized together in training.

    `all_reduce` returns the sum of its argument over these processes, and its gradient is the sum of the gradients
    over them; it may not change its argument. Their losses are to be added (not averaged) for the gradients to be
    those of one process with the whole group. With `shared_by` 1, `all_reduce` is None and nothing is shared.
    """
    if shared_by < 1 or (shared_by > 1) != (all_reduce is not None):
        raise ValueError(
            f"Groups shared by {shared_by} processes need {'an' if shared_by > 1 else 'no'} all_reduce: "
            "pass it where, and only where, shared_by is above 1."
        )
    for layer in _layers(model):
        layer.all_reduce = all_reduce
        layer.shared_by = shared_by


class RunningStatistics:
    """Advances the running statistics of all BatchNorm2d layers of a model, once per optimizer step.

    Build it after model.to(device): it makes every layer's group and running buffers views of flat tensors, so that a
    group costs one addition and a step one reduction. Loading a state dict (which copies in place) keeps the views.
    A model without batch normalization is fine: nothing happens.

        for group in local_groups:
            loss(model(group.images), group.labels).backward()
            statistics.accumulate()                  # anywhere between this group's forward and the next one's
        statistics.advance(world.sum_, num_groups)   # once, on every rank

    Between steps it holds no state of its own, so a checkpoint needs the model's state dict alone.
    """

    def __init__(self, model: nn.Module) -> None:
        self._layers = _layers(model)
        if not self._layers:
            return
        momenta = {layer.momentum for layer in self._layers}
        if len(momenta) > 1:
            raise ValueError(f"All BatchNorm2d layers of a model must have one momentum, not {momenta}.")
        self._momentum = float(momenta.pop() or 0.0)
        # [2 · sum of C]: for each layer its C means, then its C variances.
        self._running = torch.cat([b for layer in self._layers for b in (layer.running_mean, layer.running_var)])
        self._group = torch.zeros_like(self._running)
        self._sum = torch.zeros_like(self._running)
        begin = 0
        for layer in self._layers:
            for kind in ("mean", "var"):
                end = begin + layer.num_features
                setattr(layer, f"running_{kind}", self._running[begin:end])
                # .data gives each view a version counter of its own. Autograd saves the view for the backward (which
                # does not read it) and would take another layer's write or our zeroing for a change of it.
                setattr(layer, f"group_{kind}", self._group[begin:end].data)
                begin = end
            layer._zeroed_by_owner = True

    def accumulate(self) -> None:
        """Add the statistics of the group that the model has just seen; call it once after each group's forward.

        It also zeroes the layers' group buffers: a NaN in them would outlive the next forward (see BatchNorm2d)."""
        if self._layers:
            self._sum.add_(self._group)
            self._group.zero_()

    def advance(self, reduce: Callable[[Tensor], object] | None, num_groups: int, unless: Tensor | None = None) -> None:
        """running = (1 - momentum)·running + momentum·(mean over the `num_groups` groups of the global batch).

        `reduce` sums a tensor over all ranks in place (None: a single process). Where several processes share a group
        each of them has accumulated it, which is taken into account; `num_groups` stays the number of groups.
        `unless` [] bool: where it is true the running statistics stay as they are; nobody waits to look at it."""
        if num_groups < 1:
            raise ValueError(f"A global batch has at least one batch-norm group, not {num_groups}.")
        if not self._layers:
            return
        first, last = self._layers[0], self._layers[-1]
        replaced = (
            "The model's buffers were replaced after RunningStatistics(model): model.to, or load with assign=True"
        )
        assert first.running_mean.data_ptr() == self._running.data_ptr(), replaced
        assert last.group_var.data_ptr() == self._group[-last.num_features :].data_ptr(), replaced
        if reduce is not None:
            reduce(self._sum)
        mean = self._sum.div_(num_groups * first.shared_by)
        if unless is not None:
            mean = torch.where(unless, self._running, mean)
        self._running.lerp_(mean, self._momentum)
        self.discard()

    def discard(self) -> None:
        """Forget what was accumulated since the last step: for a step that is given up (NaN, rollback)."""
        if self._layers:
            self._sum.zero_()
            self._group.zero_()


def _layers(model: nn.Module) -> list[BatchNorm2d]:
    return [module for module in model.modules() if isinstance(module, BatchNorm2d)]
