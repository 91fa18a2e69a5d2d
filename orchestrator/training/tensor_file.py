"""Tensors as a safetensors file in pieces, without a copy: training computes beside it.

``safetensors.torch.save`` copies everything twice and holds Python's lock meanwhile.
"""

from __future__ import annotations

import json
import math

import safetensors.torch
import torch
from torch import Tensor

_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def pieces(tensors: dict[str, Tensor]) -> list[memoryview]:
    """The file's content, piece by piece: views of the tensors, which lie in host memory and must not change.

    Other types than the usual go the slow way.
    """
    if not all(t.dtype in _NAMES for t in tensors.values()):
        return [memoryview(safetensors.torch.save(tensors))]
    # The largest elements first, so that every tensor is aligned.
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header, end = {}, 0
    for name in names:
        tensor = tensors[name]
        begin, end = end, end + tensor.nbytes
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    views = [tensors[name].contiguous().view(-1).view(torch.uint8).numpy().data for name in names]
    return [memoryview(len(text).to_bytes(8, "little") + text), *views]


def is_finite(tensor: Tensor) -> bool:
    """No NaN and no infinity in it. The extremes show both, in a tenth of the time of a look at each number."""
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    return all(math.isfinite(extreme) for extreme in tensor.aminmax())
