"""Batch normalization whose unit is the batch-norm group, not the worker.

A global batch is made of groups (paper: 8 groups of 32 images). A training forward sees one group, or several at once
(`group_size`), normalizes each with that group's statistics and leaves the running statistics alone; these advance
once per optimizer step, from the mean over all groups (RunningStatistics). So weights, buffers and validation error do
not depend on how the groups are dealt out to workers.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class BatchNorm2d(nn.BatchNorm2d):
    """images [N, C, H, W] → the same, normalized per channel; in training over the N images given (one group), or over
    each `group_size` of them (0: all).

    A training forward leaves the group's mean and unbiased variance ([C], float32, not in the state dict) in
    `group_mean` and `group_var`, of several groups the sums; `RunningStatistics` collects them from there. An
    evaluation forward reads `running_mean` and `running_var`, as always. There is no `num_batches_tracked`.

    Several processes may share one group: see `share_groups`.
    """

    running_mean: Tensor
    running_var: Tensor
    group_mean: Tensor
    group_var: Tensor
    # A differentiable sum over the processes that share this layer's group, and their number.
    all_reduce: Callable[[Tensor], Tensor] | None
    shared_by: int
    # Under torch.compile, of the last forward: [2, C], what group_mean and group_var hold otherwise. A graph returns
    # it; buffers that it would change are views of one tensor (RunningStatistics), which graphs handle badly.
    graph_statistics: Tensor | None

    def __init__(self, num_features: int, eps: float = 1e-5, momentum: float = 0.1) -> None:
        super().__init__(num_features, eps, momentum)
        self.register_buffer("num_batches_tracked", None)
        self.register_buffer("group_mean", torch.zeros_like(self.running_mean), persistent=False)
        self.register_buffer("group_var", torch.zeros_like(self.running_var), persistent=False)
        self.all_reduce = None
        self.shared_by = 1
        self.group_size = 0
        self.graph_statistics = None
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
        group_size = self.group_size or len(images)
        if len(images) % group_size:
            raise ValueError(f"{len(images)} images are no whole number of batch-norm groups of {group_size}")
        if torch.compiler.is_compiling():
            return self._forward_plain(images, group_size)
        if group_size < len(images):
            out, mean_GC, var_GC = _NormalizedByGroup.apply(images, self.weight, self.bias, group_size, self.eps)
            self.group_mean.data.copy_(mean_GC.sum(0))
            self.group_var.data.copy_(var_GC.sum(0))
            return out
        if not self._zeroed_by_owner:
            # The kernel writes (1 - momentum)·old + momentum·new, and 0·NaN is NaN: one bad batch would stay for ever.
            # Through .data, as autograd saved the buffers of earlier forwards (unread in training) and checks versions.
            self.group_mean.data.zero_()
            self.group_var.data.zero_()
        return F.batch_norm(images, self.group_mean, self.group_var, self.weight, self.bias, True, 1.0, self.eps)

    def _forward_plain(self, images: Tensor, group_size: int) -> Tensor:
        """Plain operations, which a compiler turns into few passes over the images."""
        _, C, H, W = images.shape
        x_GNCHW = images.to(self.group_mean.dtype).view(-1, group_size, C, H, W)
        var_GC, mean_GC = torch.var_mean(x_GNCHW, (1, 3, 4), correction=0)
        count = group_size * H * W
        self.graph_statistics = torch.stack([mean_GC.sum(0), var_GC.sum(0) * (count / (count - 1))]).detach()
        scale_GC = self.weight * torch.rsqrt(var_GC + self.eps)
        shift_GC = self.bias - mean_GC * scale_GC
        normalized = x_GNCHW * scale_GC[:, None, :, None, None] + shift_GC[:, None, :, None, None]
        return normalized.view(images.shape).to(images.dtype)

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


class _NormalizedByGroup(torch.autograd.Function):
    """Each `group_size` of images [N, C, H, W] normalized by itself, with the kernels that normalize one group alone.
    (On a GPU in float32 cuDNN may normalize one group alone.)

    Returns them, and each group's mean and unbiased variance, [G, C] float32.
    """

    @staticmethod
    def forward(
        ctx: Any, images: Tensor, weight: Tensor, bias: Tensor, group_size: int, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        num_groups, num_features = len(images) // group_size, images.shape[1]
        # Zero, since the kernel writes (1 - momentum)·old + momentum·new.
        mean_GC, var_GC, saved_mean_GC, saved_scale_GC = weight.new_zeros(4, num_groups, num_features)
        out = torch.empty_like(images)
        for g in range(num_groups):
            group = slice(g * group_size, (g + 1) * group_size)
            torch.native_batch_norm(
                *(images[group], weight, bias, mean_GC[g], var_GC[g], True, 1.0, eps),
                out=(out[group], saved_mean_GC[g], saved_scale_GC[g]),
            )
        ctx.save_for_backward(images, weight, saved_mean_GC, saved_scale_GC)
        ctx.group_size, ctx.eps = group_size, eps
        ctx.mark_non_differentiable(mean_GC, var_GC)
        return out, mean_GC, var_GC

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        images, weight, saved_mean_GC, saved_scale_GC = ctx.saved_tensors
        size = ctx.group_size
        # The kernels want both in one layout.
        grad_out = gradients[0].contiguous(memory_format=_layout(images))
        grad_images, grad_weight, grad_bias = (
            torch.empty_like(images),
            torch.zeros_like(weight),
            torch.zeros_like(weight),
        )
        for g in range(len(images) // size):
            group = slice(g * size, (g + 1) * size)
            saved = saved_mean_GC[g], saved_scale_GC[g]
            found = torch.ops.aten.native_batch_norm_backward(
                *(grad_out[group], images[group], weight, None, None, *saved, True, ctx.eps), [True, True, True]
            )
            grad_images[group] = found[0]
            grad_weight += found[1]
            grad_bias += found[2]
        return grad_images, grad_weight, grad_bias, None, None


def _layout(images: Tensor) -> torch.memory_format:
    is_last = images.is_contiguous(memory_format=torch.channels_last) and not images.is_contiguous()
    return torch.channels_last if is_last else torch.contiguous_format


def group_images(model: nn.Module, group_size: int) -> None:
    """Normalize each `group_size` images of a training forward by themselves; 0: all of them together."""
    for layer in _layers(model):
        layer.group_size = group_size


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
        statistics.reduce(world.sum_)
        statistics.advance(num_groups)               # once, on every rank

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
        if not self._layers:
            return
        left = [layer.graph_statistics for layer in self._layers]
        compiled = [each.reshape(-1) for each in left if each is not None]
        if len(compiled) == len(left):
            self._sum.add_(torch.cat(compiled))
        else:  # of a user's own network some layers may not be compiled
            for layer, found in zip(self._layers, left, strict=True):
                if found is not None:
                    layer.group_mean.data.copy_(found[0])
                    layer.group_var.data.copy_(found[1])
            self._sum.add_(self._group)
        for layer in self._layers:
            layer.graph_statistics = None
        self._group.zero_()

    def reduce(self, sum_: Callable[[Tensor], object]) -> None:
        """Add up over all ranks what was accumulated: `sum_` sums a tensor over them in place. Collective."""
        if self._layers:
            sum_(self._sum)

    def advance(self, num_groups: int, unless: Tensor | None = None) -> None:
        """running = (1 - momentum)·running + momentum·(mean over the `num_groups` groups of the global batch).

        Where several processes share a group
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
