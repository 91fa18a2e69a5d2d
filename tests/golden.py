"""Golden losses: a few steps of each kind of job on CPU, equal to the last bit before and after a refactor.

    python -m tests.golden --against HEAD~1     # this tree and another commit, on this machine
    python -m tests.golden --write              # record this machine's values in tests/golden.json

Bits depend on the processor and on versions, so recorded values are kept by both.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy
import nvidia.dali
import PIL
import torch

from orchestrator.config import CropStyle, Family, InputConfig, MeanKind, ModelConfig, RegularizationConfig, TrainConfig
from tests.data.planes import build_planes, random_images
from tests.training.group import last_snapshot, run_to_end, small_config, weights_digest

ROOT = Path(__file__).parents[1]
RECORDED = ROOT / "tests" / "golden.json"
DEMO = ("--num-classes", "6", "--train-per-class", "16", "--val-per-class", "5", "--test-images", "10")


def machine() -> str:
    """What bits depend on."""
    info = dict(
        (part.strip() for part in line.split(":", 1))
        for line in Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    )
    processor = " ".join(info.get(key, "?") for key in ("model name", "cpu family", "model"))
    capability = torch.backends.cpu.get_cpu_capability()
    versions = f"torch {torch.__version__}, DALI {nvidia.dali.__version__}, numpy {numpy.__version__}"
    return f"{processor}, {capability}, {versions}, pillow {PIL.__version__}"


def kinds(data: Path, storage: Path) -> dict[str, tuple[TrainConfig, int]]:
    """Name → config and number of workers."""
    residual = small_config(data, storage, "residual")
    crop = InputConfig(crop_px=32, crop_style=CropStyle.RANDOM_AREA, mean=MeanKind.CHANNEL, test_shorter_side_px=36)
    plain = replace(residual, name="plain", model=ModelConfig(family=Family.PLAIN, depth=18), input=crop)
    jobs = {"residual, 1 worker": (residual, 1), "plain, random area, 2 workers": (plain, 2)}
    build_planes(storage / "planes", {"train": random_images(0, 100), "val": random_images(1, 31)})
    small = small_config(
        storage / "planes",
        storage,
        "small",
        model=ModelConfig(family=Family.CIFAR_RESNET, depth=8),
        input=InputConfig(crop_px=32, crop_style=CropStyle.PADDED, colour_std=0.0, test_shorter_side_px=32),
        regularization=RegularizationConfig(label_smoothing=0.1, average_decay=0.9),
    )
    return jobs | {"small images in memory, averaged, 2 workers": (small, 2)}


def outcome_of(run: Path) -> dict[str, Any]:
    """Losses of every step as exact numbers, and the digest of the weights."""
    journal = last_snapshot(run).journal
    losses = [e["metrics"]["train_loss"].hex() for e in journal if e["kind"] == "train"]
    return {"losses": losses, "weights_sha256": weights_digest(run)}


def measure() -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for arguments in (
            ("data_prep.demo", "--out", f"{folder}/archives", *DEMO),
            ("data_prep.ilsvrc", f"{folder}/archives", "--out", f"{folder}/data", "--crop", "64", "--num-tasks", "0"),
        ):
            subprocess.run([sys.executable, "-m", *arguments], check=True, stdout=subprocess.DEVNULL)
        jobs = kinds(folder / "data", folder / "runs").items()
        return {kind: outcome_of(run_to_end(config, size)) for kind, (config, size) in jobs}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", metavar="COMMIT")
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    mine = measure()
    if arguments.write:
        recorded = json.loads(RECORDED.read_text()) if RECORDED.exists() else {}
        RECORDED.write_text(json.dumps(recorded | {machine(): mine}, indent=1, sort_keys=True) + "\n")
    if arguments.against:
        with tempfile.TemporaryDirectory() as name:
            subprocess.run(
                ["git", "-C", ROOT, "worktree", "add", "--quiet", "--detach", name, arguments.against], check=True
            )
            try:
                # The other tree's packages go first on the path of its own process.
                done = subprocess.run([sys.executable, "-m", "tests.golden"], cwd=name, capture_output=True, text=True)
            finally:
                subprocess.run(["git", "-C", ROOT, "worktree", "remove", "--force", name], check=True)
        if done.returncode:
            print(f"{arguments.against} has no golden losses to compare with:\n{done.stderr[-500:]}")
            return 1
        other = json.loads(done.stdout)
        differing = sorted(kind for kind in mine.keys() | other.keys() if mine.get(kind) != other.get(kind))
        print(f"{len(mine)} kinds of jobs against {arguments.against}: {differing or 'all equal'}")
        return bool(differing)
    print(json.dumps(mine, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
