"""Copies of what DALI shows, in memory that is used again."""

from __future__ import annotations

import numpy as np
import torch

from orchestrator.data.decoder import Buffers


def test_memory_is_used_again_once_nobody_sees_it() -> None:
    copies, source = Buffers(), np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    first = copies.copy_of(source)
    place = first.data_ptr()
    kept = first.permute(2, 0, 1)[1:]  # a view of it, as a batch has
    del first
    second = copies.copy_of(source + 100)
    assert second.data_ptr() != place
    assert torch.equal(kept, torch.from_numpy(source).permute(2, 0, 1)[1:])
    del kept
    third = copies.copy_of(source + 200)
    assert third.data_ptr() == place
    assert torch.equal(second, torch.from_numpy(source + 100))
    assert torch.equal(third, torch.from_numpy(source + 200))


def test_what_autograd_keeps_stays() -> None:
    copies, source = Buffers(), np.ones((4, 4), np.float32)
    weight = torch.ones(4, 4, requires_grad=True)
    product = copies.copy_of(source) * weight  # its backward needs the copy
    copies.copy_of(source * 7)
    product.sum().backward()
    assert weight.grad is not None
    assert torch.equal(weight.grad, torch.ones(4, 4))


def test_sizes_that_change_leave_nothing_behind() -> None:
    copies = Buffers()
    for size in range(1, 50):
        assert copies.copy_of(np.full((size,), size, np.uint8)).tolist() == [size] * size
    assert len(copies._arrays) == 1
