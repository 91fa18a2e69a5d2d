"""What a launch costs the driver grows with the nodes in megabytes at most; how long it takes benchmarks tell."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from orchestrator.config import GuardConfig
from orchestrator.control.mailbox import beat_interval_s

ROOT = Path(__file__).parents[2]


def test_the_plan_of_many_nodes_takes_megabytes() -> None:
    command = [sys.executable, "-m", "benchmarks.thousand_nodes", "--nodes", "300"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr  # every image once, all workers packed: asserted there
    found = re.search(r"^nodes=300 workers=2400 seconds=\S+ peak_mb=(\S+)$", done.stdout, re.MULTILINE)
    assert found, done.stdout
    assert float(found[1]) < 100


def test_signs_of_life_come_far_more_often_than_silence_is_noticed() -> None:
    for workers in (1, 64, 8000):
        assert beat_interval_s(workers) < GuardConfig().hang_timeout_s / 2 / 3
