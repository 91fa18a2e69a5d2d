"""Rank, device, reductions and who computes what. The only door to torch.distributed.

The trainer runs from a World in a plain process group; Ray Train, torchrun and tests are thin callers that make one.
"""

import datetime
import inspect
import os
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


@dataclass(frozen=True)
class Share:
    """What one worker does of every global batch.

    Group numbers [first_group, first_group + num_groups), each of ``images_per_group`` images on this worker, starting
    at image ``first_image`` of the group. ``sharers`` workers share a group (1: every worker has whole groups).
    """

    first_group: int
    num_groups: int
    images_per_group: int
    first_image: int
    sharers: int

    def positions(self, step: int, global_batch_size: int, bn_group_size: int) -> np.ndarray:
        """Stream positions [num_groups · images_per_group] int64 of this worker's images in ``step``."""
        groups = np.arange(self.first_group, self.first_group + self.num_groups)[:, None]
        images = np.arange(self.first_image, self.first_image + self.images_per_group)[None, :]
        return (step * global_batch_size + groups * bn_group_size + images).reshape(-1)


def share_of(rank: int, size: int, global_batch_size: int, bn_group_size: int) -> Share:
    """Deal the batch-norm groups out. Raises ValueError where ``size`` workers cannot share them."""
    groups = global_batch_size // bn_group_size
    if size <= groups:
        each, rest = divmod(groups, size)
        first = rank * each + min(rank, rest)
        return Share(first, each + (rank < rest), bn_group_size, 0, 1)
    sharers = size // groups
    if size % groups or bn_group_size % sharers:
        raise ValueError(
            f"{size} workers cannot share {groups} batch-norm groups of {bn_group_size} images: "
            f"take up to {groups} workers, or a multiple of {groups} that divides every group evenly"
        )
    images = bn_group_size // sharers
    return Share(rank // sharers, 1, images, rank % sharers * images, sharers)


def largest_share(num_workers: int, global_batch_size: int, bn_group_size: int) -> int:
    """The most workers, up to ``num_workers``, that can share the batch-norm groups."""
    groups = global_batch_size // bn_group_size
    if num_workers <= groups:
        return num_workers
    return max(groups * n for n in range(1, num_workers // groups + 1) if bn_group_size % n == 0)


class World:
    """The processes of one training run, seen from one of them.

    rank: this process, 0 … size − 1; device: where it computes. A process of rank ``size`` or above stands by: it
    takes part in nothing.
    """

    def __init__(
        self, rank: int = 0, size: int = 1, device: torch.device | str = "cpu", group: dist.ProcessGroup | None = None
    ) -> None:
        self.rank, self.size, self.device, self._group = rank, size, torch.device(device), group

    @staticmethod
    def from_process_group(device: torch.device | str = "cpu", size: int = 0) -> "World":
        """The world of the default process group that the caller has initialized (Ray Train does).

        size: only its first ``size`` processes work, the others stand by; 0: all of them. Collective.
        """
        if not 0 < size < dist.get_world_size():
            return World(dist.get_rank(), dist.get_world_size(), device)
        return World(dist.get_rank(), size, device, dist.new_group(list(range(size))))

    @property
    def stands_by(self) -> bool:
        return self.rank >= self.size

    @staticmethod
    def from_environment(timeout_s: float = 600.0) -> "World":
        """Join the process group that torchrun's variables describe; a world of one where there are none."""
        use_gpu = torch.cuda.is_available()
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if use_gpu else torch.device("cpu")
        if use_gpu:
            torch.cuda.set_device(device)
        if "RANK" not in os.environ:
            return World(device=device)
        dist.init_process_group("nccl" if use_gpu else "gloo", timeout=datetime.timedelta(seconds=timeout_s))
        return World.from_process_group(device)

    @staticmethod
    def from_address(
        host: str, port: int, rank: int, size: int, device: torch.device | str = "cpu", timeout_s: float = 600.0
    ) -> "World":
        """Join the process group whose rank 0 listens at host:port. Raises RuntimeError where, within ``timeout_s``,
        the others are not met.
        """
        device = torch.device(device)
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            init_method=f"tcp://{host}:{port}",
            rank=rank,
            world_size=size,
            timeout=datetime.timedelta(seconds=timeout_s),
        )
        return World.from_process_group(device)

    def leave(self) -> None:
        """End the process group, if there is one."""
        if dist.is_available() and dist.is_initialized():
            dist.destroy_process_group()

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def sum_(self, tensor: Tensor) -> Tensor:
        """Sum over all ranks, in place."""
        if self.size > 1:
            dist.all_reduce(tensor, group=self._group)
        return tensor

    def from_first(self, value: int) -> int:
        """Rank 0's ``value``, on every rank."""
        if self.size == 1:
            return value
        tensor = torch.tensor([value], device=self.device)
        dist.broadcast(tensor, 0, group=self._group)
        return int(tensor.item())

    def gather(self, value: float) -> list[float]:
        """Every rank's ``value``, by rank, on every rank. Waits for all of them."""
        values = torch.zeros(self.size, dtype=torch.float64, device=self.device)
        values[self.rank] = value
        return [float(v) for v in self.sum_(values).tolist()]

    def agreement(self) -> "Agreement":
        """A means to agree on something in every step without waiting. Collective."""
        return Agreement(self.size, self.device, self._group)

    def barrier(self) -> None:
        """Wait for every rank."""
        if self.size > 1:
            self.sum_(torch.zeros(1, device=self.device))

    def group_sum(self, sharers: int) -> Callable[[Tensor], Tensor] | None:
        """A differentiable sum over the ``sharers`` ranks that share this rank's batch-norm group; None for one.

        Collective: every rank must call it.
        """
        if sharers == 1:
            return None
        mine: dist.ProcessGroup | None = None
        for first in range(0, self.size, sharers):
            # Those who stand by do not call this.
            group = dist.new_group(
                list(range(first, first + sharers)), use_local_synchronization=self._group is not None
            )
            if first <= self.rank < first + sharers:
                mine = group
        return lambda tensor: _GroupSum.apply(tensor, mine)

    @contextmanager
    def reducing(self, model: nn.Module, now: bool) -> Iterator[None]:
        """Backward passes inside reduce gradients over all ranks if ``now``, else only add them up locally."""
        if now or not isinstance(model, DistributedDataParallel):
            yield
        else:
            with model.no_sync():
                yield

    def distribute(self, model: nn.Module, ready: Callable[[], None], *, in_bf16: bool = False) -> nn.Module:
        """``model`` with gradients summed (not averaged) over all ranks during backward.

        ready: is called whenever more of this rank's own gradients are ready to be summed; in_bf16: they are rounded to
        bfloat16 for that.
        """
        if self.size == 1:
            return model
        # The running statistics are reduced once a step, over all groups. torch 2.13 renamed the option.
        renamed = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
        no_sync: dict[str, Any] = {"forward_sync_buffers" if renamed else "broadcast_buffers": False}
        parallel = DistributedDataParallel(
            model,
            device_ids=[self.device] if self.device.type == "cuda" else None,
            process_group=self._group,
            gradient_as_bucket_view=True,
            **no_sync,
        )
        parallel.register_comm_hook((ready, self._group, in_bf16), _sum_gradients)
        return parallel


class _GroupSum(torch.autograd.Function):
    """Sum over a process group; its gradient is the sum of the gradients, since every rank's loss counts."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        tensor = tensor.clone()
        dist.all_reduce(tensor, group=group)
        return tensor

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        gradient = gradients[0].clone()
        dist.all_reduce(gradient, group=ctx.group)
        return gradient, None


class Agreement:
    """The highest wish of any rank, known to all ranks at the same step, two steps after it was wished."""

    _delay_steps = 2  # by then the reduction has long been done, and a GPU has passed it

    def __init__(self, size: int, device: torch.device, group: dist.ProcessGroup | None) -> None:
        self._size, self._device, self._group = size, device, group
        self._pending: deque[tuple[dist.Work | None, Tensor, torch.cuda.Event | None]] = deque()

    def ask(self, wish: int) -> int:
        """Say this rank's wish (≥ 0) in this step; the highest wish of the step two before. Every rank calls it."""
        if self._size == 1:
            return wish
        mine, event, work = torch.full((1,), wish, device=self._device), None, None  # no copy: nobody waits
        if self._device.type == "cuda":
            dist.all_reduce(mine, dist.ReduceOp.MAX, group=self._group)
            mine = torch.empty(1, dtype=mine.dtype, pin_memory=True).copy_(mine, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        else:
            work = dist.all_reduce(mine, dist.ReduceOp.MAX, group=self._group, async_op=True)
        self._pending.append((work, mine, event))
        if len(self._pending) <= self._delay_steps:
            return 0
        work, answer, event = self._pending.popleft()
        if event is not None:
            event.synchronize()
        elif work is not None:
            work.wait()
        return int(answer.item())


def _sum_gradients(
    state: tuple[Callable[[], None], dist.ProcessGroup | None, bool], bucket: dist.GradBucket
) -> torch.futures.Future[Tensor]:
    """DDP divides by the number of ranks; here the loss is already scaled by the global batch."""
    ready, group, in_bf16 = state
    ready()
    gradients = bucket.buffer()
    work = dist.all_reduce(gradients.bfloat16() if in_bf16 else gradients, group=group, async_op=True)
    assert work is not None
    if in_bf16:
        return work.get_future().then(lambda done: gradients.copy_(done.value()[0]))
    return work.get_future().then(lambda done: done.value()[0])
