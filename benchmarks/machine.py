"""On what something was measured, in a line; tables that are appended to a file of results."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

import torch

_PACKAGES = ("torch", "nvidia-dali-cuda130", "ray", "timm", "pillow")


def about() -> str:
    """Chip, processors and versions."""
    chip = torch.cuda.get_device_name() if torch.cuda.is_available() else _processor()
    versions = []
    for package in _PACKAGES:
        try:
            versions.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    cpus, load = len(os.sched_getaffinity(0)), os.getloadavg()[0]
    return f"{chip}, {cpus} CPUs (load {load:.1f}), Python {platform.python_version()}, {', '.join(versions)}"


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def record(path: Path, title: str, header: Sequence[str], rows: Iterable[Sequence[object]], note: str) -> None:
    """Append a table to ``path``: what, with which command, on what, when."""
    module = getattr(sys.modules["__main__"], "__spec__", None)
    command = f"python -m {module.name}" if module else f"python {sys.argv[0]}"
    lines = [f"## {title}", "", f"`{command} {shlex.join(sys.argv[1:])}`, {datetime.now(UTC):%Y-%m-%d}; {about()}."]
    lines += [note, "", f"| {' | '.join(header)} |", "|" + "---|" * len(header)]
    lines += [f"| {' | '.join(str(cell) for cell in row)} |" for row in rows]
    with path.open("a") as stream:
        stream.write("\n" + "\n".join(lines) + "\n")


def line_of(figures: Mapping[str, float]) -> str:
    """``name=value`` each, for machines."""
    return " ".join(f"{name}={value:.3g}" for name, value in figures.items())
