"""The command line, typed in this process."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from jobs import command_line, imagenet

Run = Callable[..., tuple[int, str]]


@pytest.fixture
def typed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """Type ``python jobs/imagenet.py …``; the exit code and what was printed."""
    for name in ("IMAGENET_DATA", "IMAGENET_STORAGE", "MLFLOW_TRACKING_URI", "RAY_ADDRESS", "RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str, main: Callable[[], int] = imagenet.main) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["jobs/imagenet.py", *arguments])
        try:
            code = command_line.exit_code(main)
        except SystemExit as stop:
            code = int(stop.code or 0)
        printed = capsys.readouterr()
        return code, printed.out + printed.err

    return run
