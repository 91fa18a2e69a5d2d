"""A small synthetic ILSVRC2012, and what its preparation comes to."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from data_prep import demo
from data_prep.ilsvrc import Arguments, prepare
from data_prep.preparation import Report

CROP = 32
IMAGES_PER_UNIT = 5


@dataclass(frozen=True)
class Prepared:
    """``tree``: name of each file of the data set → its bytes."""

    archives: Path
    out: Path
    report: Report
    tree: dict[str, bytes]


def tree_of(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture(scope="session")
def archives(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """4 classes, 40 images of train, 12 of val, 7 of test; about 200 KB. Not to be changed."""
    folder = tmp_path_factory.mktemp("archives")
    demo.generate(
        demo.Arguments(
            out=str(folder),
            num_classes=4,
            train_per_class=10,
            val_per_class=3,
            test_images=7,
            min_side=40,
            max_side=72,
        )
    )
    return folder


@pytest.fixture(scope="session")
def prepared(archives: Path, tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    """The data set of ``archives``, prepared in one go in this process. Not to be changed."""
    out = tmp_path_factory.mktemp("prepared") / "data_set"
    arguments = Arguments(archives=str(archives), out=str(out), crop=CROP, num_tasks=0)
    report = prepare(arguments, images_per_unit=IMAGES_PER_UNIT)
    return Prepared(archives, out, report, tree_of(out))


@pytest.fixture
def own_archives(archives: Path, tmp_path: Path) -> Path:
    """A copy of ``archives`` to spoil."""
    return Path(shutil.copytree(archives, tmp_path / "archives"))


@pytest.fixture
def tree() -> Callable[[Path], dict[str, bytes]]:
    return tree_of
