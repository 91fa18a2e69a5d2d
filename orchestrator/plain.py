"""Plain data: the canonical JSON form of dataclasses, strict to read, with a digest and the differences of two."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import types
import typing
from dataclasses import fields
from enum import Enum
from typing import Any, get_args, get_origin, get_type_hints


def digest(plain: dict[str, Any]) -> str:
    """SHA-256, 64 hexadecimal digits, of the canonical JSON form of plain data."""
    text = json.dumps(plain, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """Fields that differ, one line each: ``schedule.lr: 0.1 → 0.2``."""
    lines = []
    for key in sorted(old.keys() | new.keys()):
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            lines += differences(a, b, f"{prefix}{key}.")
        elif a != b:
            lines.append(f"{prefix}{key}: {json.dumps(a)} → {json.dumps(b)}")
    return lines


def to_plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        # 30 and 30.0 are one config, and have one digest.
        floats = {name for name, kind in get_type_hints(type(value)).items() if kind is float}
        plain = {f.name: to_plain(getattr(value, f.name)) for f in fields(value)}
        return {k: float(v) if k in floats else v for k, v in plain.items()}
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, tuple):
        return [to_plain(v) for v in value]
    return value


def from_plain(kind: Any, value: Any, where: str) -> Any:
    """Inverse of ``to_plain`` for a type of ours. Raises ValueError for an unknown, missing or ill-typed field."""
    if dataclasses.is_dataclass(kind):
        if not isinstance(value, dict):
            raise ValueError(f"{where}: an object is expected, not {value!r}")
        hints = get_type_hints(kind)
        unknown = value.keys() - hints.keys()
        missing = hints.keys() - value.keys()
        if unknown or missing:
            raise ValueError(f"{where}: unknown fields {sorted(unknown)}, missing fields {sorted(missing)}")
        return typing.cast(Any, kind)(**{k: from_plain(hints[k], v, f"{where}.{k}") for k, v in value.items()})
    if isinstance(kind, type) and issubclass(kind, Enum):
        return kind(value)
    if get_origin(kind) is tuple:
        return tuple(from_plain(get_args(kind)[0], v, where) for v in value)
    if get_origin(kind) is dict:  # plain data within
        kind = dict
    if get_origin(kind) in (types.UnionType, typing.Union):
        return (
            None if value is None else from_plain(next(a for a in get_args(kind) if a is not type(None)), value, where)
        )
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind) or (kind is not bool and isinstance(value, bool)):
        raise ValueError(f"{where}: {value!r} is no {kind.__name__}")
    return value
