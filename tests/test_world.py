"""Processes that work together, and those that stand by: real process groups."""

from __future__ import annotations

import multiprocessing
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from orchestrator.world import World, largest_share, share_of

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["torch", "orchestrator.world"])


@pytest.mark.parametrize(
    ("num_workers", "share"),
    [(1, 1), (3, 3), (8, 8), (9, 8), (15, 8), (16, 16), (23, 16), (24, 16), (32, 32), (400, 256)],
)
def test_the_most_workers_that_can_share_groups(num_workers: int, share: int) -> None:
    assert largest_share(num_workers, 256, 32) == share
    share_of(0, share, 256, 32)


def take_part(rank: int, rendezvous: Path, results: multiprocessing.Queue[Any]) -> None:
    """One of four processes of which three can work; the third wishes for something in step 5."""
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=4)
    world = World.from_process_group(size=3)
    if world.stands_by:
        results.put((rank, None))
        dist.barrier()  # of all four: the workers have ended
        return
    agreement = world.agreement()
    wishes = [agreement.ask(2 if rank == 2 and step == 5 else int(rank == 1 and step >= 7)) for step in range(12)]
    shared = world.group_sum(3)
    assert shared is not None
    x = torch.full((2,), float(rank + 1), requires_grad=True)
    shared(x).sum().backward()
    assert x.grad is not None
    found = {
        "gathered": world.gather(10.0 * rank),
        "first": world.from_first(7 + rank),
        "wishes": wishes,
        "shared": shared(x).tolist(),
        "gradient": x.grad.tolist(),
    }
    world.barrier()
    results.put((rank, found))
    dist.barrier()


def test_some_work_together_and_one_stands_by(tmp_path: Path) -> None:
    results = _CONTEXT.Queue()
    processes = [_CONTEXT.Process(target=take_part, args=(rank, tmp_path / "rendezvous", results)) for rank in range(4)]
    for process in processes:
        process.start()
    found = dict(results.get(timeout=120) for _ in processes)
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert found.pop(3) is None
    assert found.keys() == {0, 1, 2}
    for each in found.values():
        assert each["gathered"] == [0, 10, 20]
        assert each["first"] == 7
        assert each["shared"] == [6, 6]
        assert each["gradient"] == [3, 3]
        # The highest wish of any of them, at the same step for all, two steps later.
        assert each["wishes"] == [0] * 7 + [2, 0] + [1] * 3


def test_alone_a_wish_is_granted_at_once() -> None:
    agreement = World().agreement()
    assert [agreement.ask(wish) for wish in (0, 2, 1)] == [0, 2, 1]
    assert World().gather(3.0) == [3.0]
