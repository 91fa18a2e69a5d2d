"""``--dry-run``: everything told at once, the exit code of a start, nothing left behind."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest

from jobs import command_line
from jobs.imagenet import RECIPES, resnet18_64px
from orchestrator.config import BatchConfig
from tests.jobs.conftest import Run


def rehearsed(typed: Run, tmp_path: Path, *arguments: str) -> tuple[int, str]:
    """Exit code and page; asserts that nothing is left behind and no Ray was started."""
    before = sorted(tmp_path.rglob("*"))
    code, text = typed(*arguments, "--dry-run")
    assert sorted(tmp_path.rglob("*")) == before
    assert "ray" not in sys.modules or not sys.modules["ray"].is_initialized()
    assert "\x1b" not in text
    return code, text


def flat(text: str) -> str:
    return " ".join(text.split())


def test_a_page_tells_what_would_happen(typed: Run, tmp_path: Path, prepared: Path) -> None:
    arguments = ("resnet18_64px", "--data", str(prepared), "--storage", str(tmp_path / "runs"), "--name", "r")
    code, text = rehearsed(typed, tmp_path, *arguments, "--schedule.lr", "0.05", "--placement.num-workers", "2")
    assert code == 0, text
    for fact in (
        "new: a start would train from step 0 of 45",
        f"{tmp_path}/runs/r",
        "*schedule.lr=0.05(recipe:0.02)",
        "*placement.num_workers=2(recipe:0)",
        " schedule.max_epochs=30 ",
        "train: 96 images in",
        "val: 30 images in",
        "6 classes (from the data)",
        "resnet of 18 layers, 11,179,590 parameters",
        "45 steps: 30 epochs of 1.5 steps, 2,880 images seen",
        "learning rate 0.05, times 0.1",
        "64 images = 2 batch-norm groups of 32",
        "numbers of workers that fit: 1-2, 4, 8, 16, 32, 64",
        " CPU worker hours) for the 45 steps left and their validations, at ",
        "rhythm.checkpoint_every_steps 100 is one in 0:00:",
        "stored, at most: 357.9 MB: checkpoints 357.9 MB",
        "ok tracking: MLflow at sqlite:///",
        "A start would go on: exit code 0.",
    ):
        assert fact in flat(text), fact
    assert all(len(line) <= 80 or " " not in line.strip() for line in text.splitlines()), text


def test_every_problem_is_told_at_once(typed: Run, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    places = ("--data", str(tmp_path / "nothing"), "--storage", str(tmp_path / "file" / "runs"))
    code, text = rehearsed(typed, tmp_path, *places, "--tracking.uri", "sqlit:///x", "--placement.num-workers", "7000")
    assert code == 2, text
    for problem in (
        "refused data: no prepared data set at",
        "refused storage: storage",
        "cannot be read (NotADirectoryError",
        "skipped writing: not looked at, for want of storage",
        "refused groups: 7000 workers cannot share 8 batch-norm groups",
        "refused tracking: tracking URI sqlit:///x has the unknown scheme",
        "skipped network: not looked at, for want of data",
        "A start would be refused (data, storage, groups, tracking): exit code 2.",
    ):
        assert problem in flat(text), text
    code, text = rehearsed(typed, tmp_path, "--storage", "/proc/runs")
    assert code == 2, text
    assert "refused writing: storage '/proc' cannot be written" in flat(text)
    code, text = rehearsed(typed, tmp_path)
    assert code == 2, text
    assert "--data is missing: give --data URL or set IMAGENET_DATA" in flat(text)
    assert "data_prep.image_folder" in flat(text)
    assert "--storage is missing" in flat(text)
    code, text = rehearsed(typed, tmp_path, "--data", "gopher://host/data", "--storage", "memory://runs")
    assert code == 2
    assert "cannot be opened" in flat(text)
    assert "invisible to other processes" in flat(text)


def test_secrets_are_not_shown(typed: Run, tmp_path: Path, prepared: Path) -> None:
    arguments = ("--data", str(prepared), "--storage", str(tmp_path / "runs"))
    code, text = rehearsed(typed, tmp_path, *arguments, "--tracking.uri", "http://me:hidden@127.0.0.1:9")
    assert code == 0, text  # a server that is down holds nothing up
    assert "warning tracking: the tracking server http://***@127.0.0.1:9" in flat(text)
    assert "hidden" not in text


def test_torchrun_speaks_once_and_has_its_own_workers(
    typed: Run, tmp_path: Path, prepared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ("resnet18_64px", "--data", str(prepared), "--storage", str(tmp_path / "runs"))
    monkeypatch.setenv("RANK", "1")
    assert rehearsed(typed, tmp_path, *arguments) == (0, "")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "3")
    code, text = rehearsed(typed, tmp_path, *arguments)
    assert code == 2
    assert "refused workers: 3 workers cannot share 2 batch-norm groups" in flat(text)


def test_any_program_with_recipes_has_it(typed: Run, tmp_path: Path, prepared: Path) -> None:
    def tiny() -> command_line.TrainConfig:
        return replace(resnet18_64px(), batch=BatchConfig(8, 4))

    def main() -> int:
        return command_line.run(command_line.parse(sys.argv[1:], {"tiny": tiny}, default="tiny", program="other"))

    assert "tiny" not in RECIPES
    arguments = ("--data", str(prepared), "--storage", str(tmp_path / "runs"), "--dry-run")
    code, text = typed(*arguments, main=main)
    assert code == 0, text
    assert "recipe tiny;" in flat(text)
