"""``--on`` as it is typed: checked before anything is launched, previewed, refused in words."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from jobs import campaign, contact_sheet, ensemble, rehearse, submission
from tests.jobs.conftest import Run
from tests.training.group import options, small_config


def test_a_preview_launches_nothing(prepared: Path, tmp_path: Path, typed: Run) -> None:
    words = ("resnet18", *options(small_config(prepared, tmp_path / "runs", "r")))
    code, text = typed(*words, "--on", "slurm", "--slurm.nodes", "4", "--dry-run")
    assert code == 0, text
    assert "#SBATCH --nodes=4\n" in text
    code, text = typed(*words, "--on", "ray", "--ray.dashboard", "http://head:8265", "--dry-run")
    assert code == 0, text
    assert "ray job submit --address http://head:8265 --submission-id r-000001 --working-dir . -- python" in text
    assert "--schedule.max-steps 8" in text
    assert "--on" not in text
    code, text = typed(*words, "--on=local", "--launch-name", "mine", "--dry-run")
    assert code == 0, text
    assert "launches/mine/000001/log.txt" in text
    code, text = typed("small", "--name", "six", "--on", "slurm", "--dry-run", main=campaign.main)
    assert code == 0, text
    assert "#SBATCH --job-name=six-000001\n" in text
    assert "--array" not in text
    words = ("small", "--name", "six", "--max-at-once", "2", "--on", "slurm", "--slurm.array", "--dry-run")
    code, text = typed(*words, main=campaign.main)
    assert code == 0, text
    of_members, of_the_rest = text.split("#!/bin/bash")[1:]
    assert "#SBATCH --array=0-2%2\n" in of_members
    assert "#SBATCH --job-name=six-000001-members\n" in of_members
    assert "#SBATCH --dependency=afterany:ARRAY\n" in of_the_rest
    words = ("member", "r34", "small", "--name", "six", "--on", "local", "--dry-run")
    code, text = typed(*words, main=campaign.main)
    assert code == 0, text
    assert "launches/six-r34/000001/log.txt" in text
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("main", "arguments", "name"),
    [
        (ensemble.main, ("--scores", "a.arrow", "--out", "out"), "ensemble"),
        (submission.main, ("check", "submission.txt"), "submission"),
        (rehearse.main, ("--storage", "runs"), "rehearsal"),
        (contact_sheet.main, ("--data", "set", "--out", "sheet.png"), "contact-sheet"),
    ],
)
def test_every_job_is_launched_elsewhere(
    main: Callable[[], int], arguments: tuple[str, ...], name: str, tmp_path: Path, typed: Run
) -> None:
    code, text = typed(*arguments, "--on", "local", "--dry-run", main=main)
    assert code == 0, text
    assert f"{' '.join(arguments)} > " in text
    assert f"launches/{name}/000001/log.txt" in text
    code, text = typed(*arguments, "--outt", "x", "--on", "local", "--dry-run", main=main)
    assert code == 2
    assert "--outt" in text
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--on", "local", "--schedule.max-stepz", "3"), "--schedule.max-stepz"),
        (("--on", "moon"), "moon"),
        (("--on", "slurm", "--slurm.nodes", "0"), "--slurm.nodes must be at least 1, not 0"),
        (
            ("--on", "slurm", "--slurm.gpus-per-node", "8"),
            "--slurm.cpus-per-node 1 is less than --slurm.gpus-per-node 8",
        ),
        (("--on", "slurm", "--slurm.array"), "--slurm.array is for a campaign (jobs/campaign.py) --on slurm"),
        (("--on", "slurm"), "there is no sbatch here: launch from a machine of the SLURM cluster"),
        (("--on", "ray", "--ray.dashboard", "http://127.0.0.1:9"), "no Ray cluster takes jobs at http://127.0.0.1:9"),
        (("--on", "local", "--launch-name", "a/b"), "a job cannot be called 'a/b'"),
    ],
)
def test_wrong_input(
    more: tuple[str, ...], said: str, prepared: Path, tmp_path: Path, typed: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    code, text = typed("resnet18", *options(small_config(prepared, tmp_path / "runs", "r")), *more)
    assert code == 2, text
    assert said in " ".join(text.split())
    assert not list(tmp_path.rglob("*.txt"))
    assert not list((tmp_path / "launches").glob("*/0*"))  # nothing is in the way of the same command, mended
