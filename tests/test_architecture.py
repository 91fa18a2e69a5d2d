"""Floors, doors and words: imports go downwards only, and one module each opens a heavy library."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("orchestrator", "cluster", "data_prep", "jobs")

# Bottom floor first. A module may import its own floor and those below.
FLOORS = (
    (
        "orchestrator.plain",
        "orchestrator.masking",
        "orchestrator.code_version",
        "orchestrator.config",
        "orchestrator.remote",
        "orchestrator.storage",
        "orchestrator.world",
        "orchestrator.models",
        "orchestrator.ray_session",
    ),
    ("orchestrator.data",),
    ("orchestrator.training",),
    ("orchestrator.evaluation",),
    ("orchestrator.control",),
    ("orchestrator.campaign",),
    ("orchestrator.report",),
    ("cluster",),
    ("jobs",),
)
DATA_PREP_MAY = (
    "data_prep",
    "orchestrator.data",
    "orchestrator.remote",
    "orchestrator.storage",
    "orchestrator.ray_session",
)
DOORS = {
    "fsspec": ("orchestrator.storage",),
    "torch.distributed": ("orchestrator.world",),
    "nvidia": ("orchestrator.data.decoder",),
    "mlflow": ("orchestrator.control.mlflow_store", "orchestrator.campaign.mlflow_campaign"),
    "ray": (
        "orchestrator.ray_session",
        "orchestrator.control",
        "orchestrator.campaign.driver",
        "cluster",
        "data_prep.fan_out",
    ),
    "submitit": ("cluster.slurm", "cluster.slurm_start"),
    "jinja2": ("orchestrator.report.page",),
    "prometheus_client": ("orchestrator.control.metrics",),
    "tyro": ("jobs", "data_prep", "cluster.command_line", "cluster.doctor"),
    "pickle": (),
}


def modules() -> dict[str, Path]:
    found = {}
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            found[name.removesuffix(".__init__")] = path
    return found


def imports(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def inside(name: str, place: str) -> bool:
    return name == place or name.startswith(f"{place}.")


def floor(name: str) -> int | None:
    return next((i for i, places in enumerate(FLOORS) if any(inside(name, p) for p in places)), None)


@pytest.mark.parametrize("name", modules())
def test_imports_go_downwards(name: str) -> None:
    for other in imports(modules()[name]):
        if not any(inside(other, p) for p in PACKAGES) or other in PACKAGES:
            continue
        if inside(name, "data_prep"):
            assert any(inside(other, p) for p in DATA_PREP_MAY), f"{name} imports {other}"
        elif name not in ("orchestrator",):
            above, below = floor(name), floor(other)
            if other == "orchestrator.models":
                below = 0
            assert above is not None, f"{name} lives on no floor"
            assert below is not None, f"{other} lives on no floor"
            assert below <= above, f"{name} imports {other} from above"


@pytest.mark.parametrize("library", DOORS)
def test_each_library_has_its_door(library: str) -> None:
    for name, path in modules().items():
        if any(inside(other, library) for other in imports(path)):
            assert any(inside(name, door) for door in DOORS[library]), f"{name} imports {library}"


def test_light_modules_import_in_a_moment() -> None:
    """Nothing below control pulls in Ray, MLflow or DALI before it is used."""
    heavy = "ray", "mlflow", "nvidia.dali", "submitit"
    code = (
        "import sys; import orchestrator.training.trainer, orchestrator.control.supervisor, jobs.imagenet, "
        f"data_prep.ilsvrc; print([m for m in {heavy!r} if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"
