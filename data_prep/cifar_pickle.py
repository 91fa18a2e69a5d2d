"""The pickles of CIFAR-10's Python version, read without unpickling.

A pickle is a program, and ``pickle`` runs whatever it names. Here the few instructions of which such a file consists
are carried out on plain values; of functions it may name the four that rebuild an array of bytes, and those are
stand-ins: nothing is imported, called or allocated because a file asks for it.
"""

from __future__ import annotations

import pickletools
from dataclasses import dataclass
from enum import Enum
from typing import Any, Literal, cast

import numpy as np

# A batch of 10,000 images takes 50,000; each may make an object a hundred times its size.
_MAX_INSTRUCTIONS = 200_000
_MARK = object()


class _Known(Enum):
    """What a file may name; ``UINT8`` is what ``DTYPE`` makes."""

    RECONSTRUCT = "numpy.core.multiarray _reconstruct"
    NDARRAY = "numpy ndarray"
    DTYPE = "numpy dtype"
    UINT8 = "uint8"
    ENCODE = "_codecs encode"  # bytes, written by Python 3 for Python 2


_GLOBALS = {known.value: known for known in _Known if known is not _Known.UINT8}
_GLOBALS["numpy._core.multiarray _reconstruct"] = _Known.RECONSTRUCT  # as NumPy 2 calls it


@dataclass
class _Array:
    values: np.ndarray | None = None


def read_batch(data: bytes, name: str, row_bytes: int) -> tuple[np.ndarray, np.ndarray]:
    """``data`` [n, row_bytes] uint8 and ``labels`` [n] int64 of a batch.

    Raises ValueError, naming the file ``name``, where it holds anything else.
    """
    content = _dictionary(data, name)
    array, labels = content.get(b"data"), content.get(b"labels")
    if not isinstance(array, _Array) or array.values is None or array.values.shape[1] != row_bytes:
        raise ValueError(f"{name} has no data of {row_bytes} bytes an image: is it a batch of CIFAR-10? {_AGAIN}")
    if not isinstance(labels, list) or not all(type(label) is int and 0 <= label < 256 for label in labels):
        raise ValueError(f"{name} has no labels that are small numbers: is it a batch of CIFAR-10? {_AGAIN}")
    if len(labels) != len(array.values):
        raise ValueError(f"{name} has {len(array.values)} images and {len(labels)} labels: {_AGAIN}")
    return array.values, np.array(labels, np.int64)


def read_class_names(data: bytes, name: str) -> list[str]:
    """``label_names`` of batches.meta. Raises ValueError, naming the file ``name``, where there are none."""
    names = _dictionary(data, name).get(b"label_names")
    if not isinstance(names, list) or not all(isinstance(n, bytes | str) for n in names):
        raise ValueError(f"{name} has no names of classes: {_AGAIN}")
    return [n if isinstance(n, str) else n.decode("latin-1") for n in names]


_AGAIN = "download the archive again"


def _dictionary(data: bytes, name: str) -> dict[bytes, Any]:
    try:
        value = _value(data)
    except (ValueError, IndexError, KeyError, TypeError) as error:
        raise ValueError(f"{name} is no pickle of CIFAR-10 ({error}), and was not unpickled: {_AGAIN}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{name} is no pickle of CIFAR-10 (it holds no dictionary): {_AGAIN}")
    return {key if isinstance(key, bytes) else str(key).encode(): item for key, item in value.items()}


def _value(data: bytes) -> Any:
    """What the pickle ``data`` describes. Raises ValueError, IndexError, KeyError or TypeError where it is no such."""
    stack: list[Any] = []
    memo: dict[int, Any] = {}
    room = len(data)  # for bytes made of text: each text of the file once
    for number, step in enumerate(pickletools.genops(data)):
        instruction, argument = step[0], cast(Any, step[1])
        if number == _MAX_INSTRUCTIONS:
            raise ValueError("more instructions than any such file has")
        match instruction.name:
            case "PROTO" | "FRAME":
                pass
            case "STOP":
                return stack.pop()
            case "MARK":
                stack.append(_MARK)
            case "NONE" | "NEWTRUE" | "NEWFALSE":
                stack.append({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[instruction.name])
            case "BININT" | "BININT1" | "BININT2" | "LONG1":
                stack.append(argument)
            case "BINUNICODE" | "SHORT_BINUNICODE" | "BINBYTES" | "SHORT_BINBYTES":
                stack.append(argument)
            case "BINSTRING" | "SHORT_BINSTRING":
                stack.append(argument.encode("latin-1"))
            case "EMPTY_DICT" | "EMPTY_LIST" | "EMPTY_TUPLE":
                stack.append({"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple}[instruction.name]())
            case "TUPLE":
                items = _marked(stack)
                stack.append(tuple(items))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                size = int(instruction.name[-1])
                stack[-size:] = [tuple(stack[-size:])]
            case "APPEND" | "APPENDS":
                items = _marked(stack) if instruction.name == "APPENDS" else [stack.pop()]
                _of(list, stack[-1]).extend(items)
            case "SETITEM" | "SETITEMS":
                items = _marked(stack) if instruction.name == "SETITEMS" else [stack.pop(-2), stack.pop()]
                keys = [_of((bytes, str), key) for key in items[::2]]  # of others the hash may take for ever
                _of(dict, stack[-1]).update(zip(keys, items[1::2], strict=True))
            case "BINPUT" | "LONG_BINPUT":
                memo[argument] = stack[-1]
            case "MEMOIZE":
                memo[len(memo)] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case "GLOBAL":
                stack.append(_known(argument))
            case "STACK_GLOBAL":
                of, called = stack.pop(-2), stack.pop()
                stack.append(_known(f"{_of(str, of)} {_of(str, called)}"))
            case "REDUCE":
                arguments = stack.pop()
                stack.append(_made(stack.pop(), arguments))
                room -= len(stack[-1]) if isinstance(stack[-1], bytes) else 0
                if room < 0:
                    raise ValueError("it makes more bytes than it has")
            case "BUILD":
                state = stack.pop()
                _fill(stack[-1], state)
            case other:
                raise ValueError(f"the instruction {other}")
    raise ValueError("it does not end")


def _marked(stack: list[Any]) -> list[Any]:
    """Takes what lies above the last mark, and the mark."""
    items: list[Any] = []
    while (item := stack.pop()) is not _MARK:
        items.append(item)
    return items[::-1]


def _of(kind: Any, value: Any) -> Any:
    if not isinstance(value, kind):
        raise TypeError(f"a {type(value).__name__} where none belongs")
    return value


def _known(name: str) -> _Known:
    if name not in _GLOBALS:
        raise ValueError(f"it names {name[:80]!r}")
    return _GLOBALS[name]


def _made(function: Any, arguments: Any) -> Any:
    match function, arguments:
        case _Known.RECONSTRUCT, (_Known.NDARRAY, (0,), b"b" | "b"):
            return _Array()
        case _Known.DTYPE, (b"u1" | "u1", *_):
            return _Known.UINT8
        case _Known.ENCODE, (str(text), "latin1"):
            return text.encode("latin-1")
    raise ValueError("it makes something else than an array of uint8")


def _fill(target: Any, state: Any) -> None:
    match target, state:
        case _Known.UINT8, tuple():  # byte order and alignment, which single bytes have not
            return
        case _Array(), (1, (int(rows), int(columns)), _Known.UINT8, bool(by_column), bytes(data)) if (
            rows >= 0 and columns >= 0 and rows * columns == len(data)
        ):
            order: Literal["F", "C"] = "F" if by_column else "C"
            target.values = np.frombuffer(data, np.uint8).reshape((rows, columns), order=order)
            return
    raise ValueError("an array that is not [n, m] uint8, or whose bytes are not all there")
