"""Runs that several tests look at."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.training.group import run_to_end, small_config


@pytest.fixture(scope="session")
def undisturbed(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """The folder of an undisturbed run at 1, 2 and 3 workers."""
    folder = tmp_path_factory.mktemp("undisturbed")
    return {size: run_to_end(small_config(prepared, folder, f"w{size}"), size) for size in (1, 2, 3)}
