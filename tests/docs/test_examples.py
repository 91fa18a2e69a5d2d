"""The examples of the documentation do what it says, as it says it."""

from __future__ import annotations

import gzip
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.data_prep.test_cifar10 import binary_files, tar_of
from tests.training.group import options, small_config

ROOT = Path(__file__).parents[2]
MAX_LINES = 30
in_full = pytest.mark.skipif("TEST_DOCS" not in os.environ, reason="a minute or two: make test-docs")


def example(page: str, language: str) -> str:
    """The one fenced block of ``language`` in a page."""
    (block,) = re.findall(rf"```{language}\n(.*?)```", (ROOT / "docs" / page).read_text(), re.DOTALL)
    assert len(block.splitlines()) < MAX_LINES
    return block


def environment(**changed: str) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "IMAGENET_", "MLFLOW_"))}
    return kept | {"PATH": f"{Path(sys.executable).parent}:{kept['PATH']}", **changed}


@in_full
@pytest.mark.ray_cluster
@pytest.mark.timeout(900)
def test_your_own_data(archives: Path, tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    for archive in ("ILSVRC2012_img_train.tar",):
        shutil.unpack_archive(archives / archive, photos)
    for number, inner in enumerate(sorted(photos.glob("*.tar"))):
        shutil.unpack_archive(inner, photos / ("cat", "dog", "cow", "hen", "ape", "owl")[number])
        inner.unlink()
    script = example("your_own_data.md", "bash")
    for place in ("/data", "/runs"):
        assert f"{place}" in script
        script = script.replace(f" {place}", f" {tmp_path}{place.replace('/data', '')}")
    where = environment(MLFLOW_TRACKING_URI=f"sqlite:///{tmp_path}/mlflow.db")
    done = subprocess.run(
        ["bash", "-ec", script], cwd=ROOT, env=where, capture_output=True, text=True, timeout=400, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "6 classes" in done.stdout
    assert "0 problems" in done.stdout
    assert "DRY RUN of first" in done.stdout
    assert (tmp_path / "runs" / "first" / "finished.json").exists()
    assert (tmp_path / "verify.png").exists()
    assert (tmp_path / "sheet.png").exists()


@in_full
@pytest.mark.ray_cluster
@pytest.mark.timeout(900)
def test_your_own_model(prepared: Path, tmp_path: Path) -> None:
    """On Ray: its workers find the network beside the script."""
    (tmp_path / "my_job.py").write_text(example("your_own_model.md", "python"))
    words = options(small_config(prepared, tmp_path / "runs", "own"))
    del words[words.index("--model.family") : words.index("--input.crop-px")]
    words += ["--schedule.max-steps", "4", "--tracking.uri", f"sqlite:///{tmp_path}/mlflow.db"]
    command = [sys.executable, "my_job.py", *words]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=400, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "own: 4 steps done" in done.stdout
    # Another network is another run.
    other = [*command, "--model.factory", "my_job:other_net"]
    refused = subprocess.run(other, cwd=tmp_path, env=environment(), capture_output=True, text=True, check=False)
    assert refused.returncode == 2
    assert "model.factory" in refused.stderr


@in_full
@pytest.mark.ray_cluster
@pytest.mark.timeout(900)
def test_reproducing_the_paper(tmp_path: Path) -> None:
    """Its commands for CIFAR-10, on a small archive, with networks of 8 layers and runs of a few steps."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "cifar-10-binary.tar.gz").write_bytes(gzip.compress(tar_of(binary_files())))
    script = example("reproducing_the_paper.md", "bash")
    for place in (" /data/", " /runs", " /report", " layers.png"):
        assert place in script
        script = script.replace(place, f" {tmp_path}/{place.strip(' /')}{'/' * place.endswith('/')}")
    for job, short in (
        ("jobs/cifar10.py", "--model.depth 8 --schedule.max-steps 3 --rhythm.validation-batch-size 50"),
        ("jobs/campaign.py", "--dry-run"),
        ("jobs/layers.py", "--num-images 10"),
    ):
        script, count = re.subn(rf"(python {job} .*)", rf"\1 {short}", script)
        assert count
    where = environment(MLFLOW_TRACKING_URI=f"sqlite:///{tmp_path}/mlflow.db")
    done = subprocess.run(
        ["bash", "-ec", script], cwd=ROOT, env=where, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 problems" in done.stdout
    assert "DRY RUN of r110-five-times" in done.stdout  # it takes too long for a test
    assert "submission   none" in done.stdout
    assert (tmp_path / "layers.png").stat().st_size > 10_000
    page = (tmp_path / "report" / "index.html").read_text()
    assert "r20" in page
