"""What ``python -m benchmarks.scale`` tells holds together, and with what the project itself stores."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.scale import arguments, cost_of, site_of, storage, works
from jobs.campaign_recipes import ilsvrc2015
from orchestrator.campaign.plan import Plan, pack
from orchestrator.control.prediction import campaign_time
from orchestrator.ray_session import Cluster, Node
from orchestrator.training.assembly import build_model

ROOT = Path(__file__).parents[2]


def test_a_table_a_figure_and_a_line(tmp_path: Path) -> None:
    figure, results = tmp_path / "scale.png", tmp_path / "RESULTS.md"
    command = [sys.executable, "-m", "benchmarks.scale", "--gpus", "8", "64", "128"]
    command += ["--figure", str(figure), "--record", str(results)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert figure.read_bytes().startswith(b"\x89PNG")
    assert figure.stat().st_size < 100_000
    text = results.read_text()
    assert "## Scale on paper: a prediction, not a measurement" in text
    assert len([line for line in text.splitlines() if line.startswith("|")]) == 2 + 3 * 2
    told = {k: float(v) for k, v in (pair.split("=") for pair in done.stdout.splitlines()[-1].split())}
    assert told["paper_8_days"] > told["paper_64_days"] == told["paper_128_days"]
    assert told["growing_128_days"] < told["growing_64_days"] / 1.9
    for gpus in (8, 64, 128):
        assert told[f"growing_{gpus}_gpu_h"] <= told[f"growing_{gpus}_days"] * 24 * gpus * 1.01


def test_a_campaign_is_packed_as_it_is_predicted(monkeypatch: pytest.MonkeyPatch) -> None:
    """No member is given GPUs that would slow it."""
    monkeypatch.setattr("sys.argv", ["scale"])
    a = arguments()
    members, site = works(a, 0), site_of(a)
    steps = {work.name: work.images // work.global_batch_size for work in members}
    for gpus in (1, 8, 16, 32, 64, 512):
        cluster = Cluster(tuple(Node(12 * min(gpus, 8), min(gpus, 8)) for _ in range(max(1, gpus // 8))))
        found = {run.work.name: run.workers for run in campaign_time(members, gpus, site).runs}
        assert pack(Plan(ilsvrc2015(), steps), cluster).workers == found, gpus


def test_bytes_are_those_of_the_networks() -> None:
    config = ilsvrc2015().run_configs()["r34"]
    cost = cost_of(config)
    with torch.device("meta"):
        model = build_model(config, 1000)
    state = sum(tensor.nbytes for tensor in model.state_dict().values())
    momentum = sum(parameter.nbytes for parameter in model.parameters())
    assert (cost.model_bytes, cost.checkpoint_bytes) == (state, state + momentum)
    assert cost.batch_norms == 36
    assert storage().scores == 6 * 2 * 150_000 * 1000 * 4


def test_a_speed_that_the_fixed_part_leaves_no_room_for_is_refused() -> None:
    command = [sys.executable, "-m", "benchmarks.scale", "--images-per-s", "30000"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("error: 30000 images/s leave")
    assert "lower one of the two" in done.stderr


@pytest.mark.parametrize("option", ["--images-per-s", "--node-mtbf-h", "--link-gbit", "--largest-batch"])
def test_every_number_says_where_it_is_from(option: str) -> None:
    command = [sys.executable, "-m", "benchmarks.scale", "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    described = done.stdout.split(f"  {option}")[1].split("\n  --")[0]
    assert "default:" in described or "assumed" in described
