"""``--on ray``: the checkout as a job of a head that asks for a token. Submitted twice it runs once, and stop leaves a
checkpoint."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from tests.cluster.ray_head import RAY, Head, ray_head
from tests.cluster.slurm_cluster import wait_for
from tests.training.group import check_equal, options, run_to_end, small_config

ROOT = Path(__file__).parents[2]
_LARGE = 30_000_000

pytestmark = [
    pytest.mark.skipif("TEST_CLUSTER" not in os.environ, reason="three minutes: make test-cluster"),
    pytest.mark.ray_cluster,
    pytest.mark.timeout(900),
]


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    with ray_head() as found:
        listed = [RAY, "job", "list", "--address", found.dashboard]

        def takes_jobs() -> bool:  # its agent starts after the head
            done = subprocess.run(listed, env=found.environment, capture_output=True, timeout=60, check=False)
            return done.returncode == 0

        wait_for(takes_jobs, "the head takes no jobs", 120)
        yield found


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As a user has it: beside the code an environment, built things and data, all of which stay here."""
    folder = tmp_path_factory.mktemp("checkout")
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
    for name in listed.stdout.splitlines():
        if not name.startswith("tests/") and (ROOT / name).exists():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes((ROOT / name).read_bytes())
    large = [".venv/lib/torch.so", ".git/objects/pack", "build/demo/x.bin", "archives/train.tar", "runs/s.arrow"]
    large += ["mlflow.db", "launches/six/log", "mlruns/0/x", "model/a.safetensors", "jobs/__pycache__/x.pyc"]
    for name in large:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(os.urandom(_LARGE))
    return folder


def test_a_job_runs_once_is_stopped_with_a_checkpoint_and_goes_on(
    head: Head, checkout: Path, prepared: Path, tmp_path: Path
) -> None:
    config = small_config(prepared, tmp_path / "runs", "r")
    config = replace(config, schedule=replace(config.schedule, max_steps=30))
    config = replace(config, rhythm=replace(config.rhythm, checkpoint_every_steps=1000, validate_every_epochs=100.0))
    words = [sys.executable, "jobs/imagenet.py", "resnet18", *options(config), "--placement.num-workers", "2"]
    words += ["--placement.cpus-per-worker", "1", "--tracking.uri", f"sqlite:///{tmp_path}/mlflow.db", "--on", "ray"]
    words += ["--ray.dashboard", head.dashboard, "--launches", str(tmp_path / "launches")]

    def typed(*command: str, environment: dict[str, str] = head.environment) -> tuple[int, str]:
        done = subprocess.run(
            command,
            cwd=checkout,
            env=environment | {"PYTHONPATH": str(checkout)},
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        return done.returncode, done.stdout + done.stderr

    def ask(*about: str, environment: dict[str, str] = head.environment) -> tuple[int, str]:
        launches = ("--launches", str(tmp_path / "launches"))
        return typed(sys.executable, "-m", "cluster", about[0], "r", *about[1:], *launches, environment=environment)

    stranger = head.stranger(tmp_path)
    code, said = typed(*words, environment=stranger)
    assert code == 2, said
    assert "asks for its token" in said
    assert "RAY_AUTH_TOKEN_PATH" in said
    assert not list((tmp_path / "launches" / "r").glob("0*"))  # nothing is in the way of the next one

    code, said = typed(*words)
    assert code == 0, said
    assert "launched: r on ray" in said
    assert "launched already: r on ray" in typed(*words)[1]
    wait_for(lambda: "r  step 4/30" in ask("log")[1], lambda: "\n".join((ask("status")[1], ask("log")[1])), 240)
    assert "r: running on ray" in ask("status")[1]
    code, said = ask("status", environment=stranger)
    assert code != 0
    assert "token" in said.lower(), said
    assert ask("stop", environment=stranger)[0] != 0

    # Nobody else on the machine, and no log, gets to see the token; nothing listens beyond loopback without it.
    token = (head.folder / "token").read_text()
    assert not [p for p in psutil.process_iter(["cmdline"]) if any(token in w for w in p.info["cmdline"] or [])]
    kept = [*head.folder.glob("s/session_*/logs/**/*"), *tmp_path.rglob("*")]
    assert not [path for path in kept if path.is_file() and token.encode() in path.read_bytes()]
    port = int(head.dashboard.rpartition(":")[2])
    listening = [c.laddr.ip for c in psutil.net_connections("tcp") if c.status == "LISTEN" and c.laddr.port == port]
    assert listening == ["127.0.0.1"]

    packages = [path for path in head.folder.rglob("_ray_pkg_*") if path.is_dir()]
    assert len(packages) == 1, packages
    uploaded = sum(path.stat().st_size for path in packages[0].rglob("*") if path.is_file())
    assert (packages[0] / "jobs" / "imagenet.py").exists()
    assert uploaded < _LARGE / 3, sorted(p for p in packages[0].rglob("*") if p.is_file() and p.stat().st_size > 1e6)

    assert ask("stop", "--wait-s", "120")[1].startswith("r: stopped")
    code, said = ask("status")
    assert (code, said.startswith("r: stopped on ray")) == (1, True), said
    assert "left: run 'r' left its place at step" in ask("log")[1]
    assert len(list((tmp_path / "runs" / "r" / "checkpoints").glob("*.json"))) == 1

    assert "launched: r on ray" in typed(*words)[1]
    code, said = ask("log", "--follow")
    assert code == 0, said
    assert "going on from the checkpoint of step" in said
    assert "r: finished on ray" in ask("status")[1]
    assert [p.name for p in sorted((tmp_path / "runs" / "r" / "attempts").glob("*.json"))] == [
        "000001.json",
        "000002.json",
    ]
    check_equal(tmp_path / "runs" / "r", run_to_end(replace(config, storage=str(tmp_path / "plain")), 2))
