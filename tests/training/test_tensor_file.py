"""The bytes of a safetensors file, against the library that defines it."""

from __future__ import annotations

import safetensors.torch
import torch

from orchestrator.training.tensor_file import is_finite, pieces


def whole(tensors: dict[str, torch.Tensor]) -> bytes:
    return b"".join(pieces(tensors))


def test_the_bytes_are_the_librarys() -> None:
    tensors = {
        "model/conv.weight": torch.randn(4, 3, 3, 3),
        "model/bn.num_batches_tracked": torch.tensor(7),
        'momentum/"é\\': torch.randn(5),
        "model/empty": torch.empty(0, 3),
    }
    assert whole(tensors) == safetensors.torch.save(tensors)


def test_all_types_and_layouts_come_back() -> None:
    number = torch.arange(24).reshape(2, 3, 4)
    types = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
    types += (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)
    tensors = {str(dtype): number.to(dtype) for dtype in types}
    tensors |= {"turned": torch.randn(3, 5).T, "last": torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)}
    for extra in ({}, {"unusual": torch.ones(3, dtype=torch.float8_e5m2)}):
        back = safetensors.torch.load(whole({n: t.contiguous() for n, t in tensors.items()} | extra))
        assert back.keys() == tensors.keys() | extra.keys()
        assert all(
            torch.equal(back[name], tensor) and back[name].dtype == tensor.dtype for name, tensor in tensors.items()
        )
    back = safetensors.torch.load(whole(tensors))
    assert all(torch.equal(back[name], tensor) for name, tensor in tensors.items())


def test_what_is_not_finite() -> None:
    for bad in (float("nan"), float("inf"), -float("inf")):
        for place in (0, 50, 99):
            tensor = torch.zeros(100)
            assert is_finite(tensor)
            tensor[place] = bad
            assert not is_finite(tensor)
    assert is_finite(torch.full((10,), torch.finfo(torch.float32).max))
    assert is_finite(torch.tensor(3))
    assert is_finite(torch.empty(0))
