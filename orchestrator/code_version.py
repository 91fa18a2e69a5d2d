"""Which code this is."""

from __future__ import annotations

import contextlib
import subprocess
from importlib import metadata
from pathlib import Path


def code_version() -> str:
    """Git commit of the checkout, "+" for uncommitted changes, else the version of the installed package."""
    folder = Path(__file__).parent
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        git = ["git", "-C", str(folder), "describe", "--always", "--dirty=+", "--abbrev=12"]
        return subprocess.run(git, check=True, capture_output=True, text=True).stdout.strip()
    with contextlib.suppress(metadata.PackageNotFoundError):
        return metadata.version("resnet-orchestrator")
    return "unknown"
