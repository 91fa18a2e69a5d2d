"""Train, finish and score in one job, ended by signals in its tests; and what is refused of a test."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from torch import Tensor, nn

from jobs import evaluate
from orchestrator.config import EvaluationConfig, ModelConfig, Protocol, TrainConfig
from orchestrator.evaluation import scores
from orchestrator.evaluation.results import result_events
from orchestrator.evaluation.stages import do_job
from orchestrator.storage import Storage
from orchestrator.training.finished_model import find_models, finish_model
from orchestrator.training.run import config_of
from orchestrator.world import World
from tests.jobs.conftest import Run
from tests.training.group import options, run_to_end, small_config, take_number
from tests.training.networks import tiny

ROOT = Path(__file__).parents[2]
TRAP = "EVALUATION_TRAP"  # a file that holds: signal, pid (0: whoever meets it), what must be there


class _Trapped(nn.Module):
    """``tiny``; when it is applied in a test, and the file that TRAP names is there, a signal is sent, once."""

    def __init__(self, num_classes: int, image_size: int) -> None:
        super().__init__()
        self.net = tiny(num_classes=num_classes, image_size=image_size)

    def forward(self, images: Tensor) -> Tensor:
        """images [N, 3, H, W] → logits [N, classes]."""
        trap = Path(os.environ.get(TRAP, "/nowhere"))
        if not self.training and not images.is_meta and trap.exists():
            number, pid, pattern = trap.read_text().split()
            if list(trap.parent.glob(pattern)):
                try:
                    trap.rename(trap.with_suffix(".sprung"))
                except FileNotFoundError:  # another worker was first
                    return self.net(images)
                os.kill(int(pid) or os.getpid(), int(number))
                time.sleep(12)  # what the driver then wishes comes with a sign of life, once a second
        return self.net(images)


def trapped(*, num_classes: int, image_size: int) -> nn.Module:
    return _Trapped(num_classes, image_size)


def trapped_config(prepared: Path, storage: Path, name: str) -> TrainConfig:
    return small_config(prepared, storage, name, model=ModelConfig(factory="tests.jobs.test_evaluate:trapped"))


TESTS = ["--evaluation.protocols", "one_crop", "ten_crop", "--evaluation.splits", "val", "test"]
TESTS += ["--evaluation.precise-bn-images", "40"]


def tracked(database: Path) -> list[str]:
    """A database is made in seconds, or on a busy machine in a minute."""
    return ["--tracking.uri", f"sqlite:///{database}", "--tracking.wait-s", "300"]


def environment(tmp_path: Path) -> dict[str, str]:
    ours = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "IMAGENET_", "MLFLOW_"))}
    # The code's version is in the files: a commit in the middle of a test must not make them differ.
    return ours | {"PYTHONPATH": str(ROOT), TRAP: str(tmp_path / "trap"), "COLUMNS": "200", "GIT_DIR": "/nowhere"}


def files_of(run: Path) -> dict[str, bytes]:
    """Score files by name; their records name the model of this folder, and so are equal too."""
    return {path.name: path.read_bytes() for path in sorted((run / "scores").iterdir()) if path.is_file()}


def metrics_of(database: Path) -> list[tuple[str, float, int]]:
    with sqlite3.connect(database) as connection:
        return list(connection.execute("SELECT key, value, step FROM metrics WHERE key LIKE '%crop%' ORDER BY key"))


def status_of(database: Path) -> list[str]:
    with sqlite3.connect(database) as connection:
        return [row[0] for row in connection.execute("SELECT status FROM runs")]


@pytest.mark.ray_cluster
@pytest.mark.timeout(1200)
def test_ended_in_its_tests_it_ends_with_the_same_scores(prepared: Path, tmp_path: Path) -> None:
    config = trapped_config(prepared, tmp_path / "runs", "r")
    run, database, trap = tmp_path / "runs" / "r", tmp_path / "mlflow.db", tmp_path / "trap"
    tracking = tracked(database)
    command = [sys.executable, str(ROOT / "jobs/imagenet.py"), "resnet18", *options(config), *TESTS, *tracking]
    command += ["--placement.num-workers", "2", "--placement.cpus-per-worker", "1"]

    # SIGTERM to the driver when the first test is done: it leaves what is scored behind, and ends.
    driver = subprocess.Popen(
        command, cwd=tmp_path, env=environment(tmp_path), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    trap.write_text(f"{int(signal.SIGTERM)} {driver.pid} runs/r/scores/val-one_crop-*.json")
    said, _ = driver.communicate(timeout=400)
    assert driver.returncode == 128 + signal.SIGTERM, said
    assert "asked to leave (SIGTERM)" in said
    assert "left: run 'r' left its place in its tests; what is scored is kept: the same command goes on" in said
    assert not trap.exists()
    assert status_of(database) == ["KILLED"]
    assert json.loads((run / "attempts" / "000001.lease").read_text())["released"]
    before = {path: path.stat().st_mtime_ns for path in [run / "finished.json", *(run / "model").iterdir()]}
    assert sorted(path.suffix for path in before) == [".json", ".json", ".safetensors"]
    done = files_of(run)
    assert any(name.startswith("val-one_crop") and name.endswith(".arrow") for name in done)
    assert not any(name.startswith("test-ten_crop") and name.endswith(".json") for name in done)

    # The same command; SIGKILL to one of its workers in a test that it still has to do.
    trap.write_text(f"{int(signal.SIGKILL)} 0 runs/r/scores/val-one_crop-*.json")
    again = subprocess.run(
        command, cwd=tmp_path, env=environment(tmp_path), capture_output=True, text=True, timeout=400, check=False
    )
    said = again.stdout + again.stderr
    assert again.returncode == 0, said
    assert not trap.exists()
    assert "all workers start again" in said
    assert "training from" not in said
    assert "testing step 8: test by ten_crop" in said
    assert "testing step 8: val by one_crop" not in said
    assert "val by ten_crop: " in said
    assert "images without labels, in scores/test-ten_crop-" in said
    assert {path: path.stat().st_mtime_ns for path in before} == before  # nothing was trained or finished again
    assert status_of(database) == ["FINISHED"]
    assert [(key, step) for key, _, step in metrics_of(database)] == [
        (f"val_{protocol}_{kind}_error", 8) for protocol in ("one_crop", "ten_crop") for kind in ("top1", "top5")
    ]
    files = files_of(run)
    assert {name.rpartition("-")[0] for name in files} == {
        f"{split}-{protocol}" for split in ("val", "test") for protocol in ("one_crop", "ten_crop")
    }
    assert all(files[name] == content for name, content in done.items())
    assert all(path.is_file() for path in (run / "scores").iterdir()), "parts are left"
    (record,) = find_models(Storage(str(run)))
    assert (record.step, record.precise_bn_images) == (8, 40)
    loaded = {name: scores.load(str(run / "scores" / name)) for name in files if name.endswith(".arrow")}
    assert all(of.info.model == record.to_json() for of in loaded.values())
    shown = {key: value for key, value, _ in metrics_of(database)}
    ten_crop = next(of for name, of in loaded.items() if name.startswith("val-ten_crop"))
    wrong = (ten_crop.scores.argmax(1) != ten_crop.labels) | ~ten_crop.decoded
    assert shown["val_ten_crop_top1_error"] == pytest.approx(100 * wrong.mean(), rel=1e-5)

    # A plain process group of another size makes the same bytes; MLflow has them already.
    shutil.rmtree(run / "scores")
    words = ["--storage", str(tmp_path / "runs"), "--name", "r", *TESTS, *tracking]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "3", "--master-port", str(_port())]
    plain = subprocess.run(
        [*torchrun, str(ROOT / "jobs/evaluate.py"), *words],
        cwd=tmp_path,
        env=environment(tmp_path),
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert plain.returncode == 0, plain.stdout + plain.stderr
    assert files_of(run) == files
    assert {key: value for key, value, _ in metrics_of(database)} == shown
    assert len(metrics_of(database)) == len(shown)


def test_what_cannot_be_tested_is_refused(typed: Run, tmp_path: Path, prepared: Path) -> None:
    config = small_config(prepared, tmp_path / "runs", "r", model=ModelConfig(factory="tests.training.networks:tiny"))
    run = run_to_end(replace(config, schedule=replace(config.schedule, max_steps=1)), 1)

    def refused(*words: str, saying: str, name: str = "r") -> None:
        before = sorted(tmp_path.rglob("*"))
        code, text = typed("--storage", str(tmp_path / "runs"), "--name", name, *words, main=evaluate.main)
        assert code == 2, text
        assert saying in " ".join(text.split()), text
        assert sorted(tmp_path.rglob("*")) == before
        assert "ray" not in sys.modules or not sys.modules["ray"].is_initialized()

    one_crop = ("--evaluation.protocols", "one_crop")
    refused(saying="no test is asked for")
    refused(*one_crop, name="another", saying="there is no run")
    refused(*one_crop, "--evaluation.splits", "tset", saying="has no split 'tset': it has test, train, val")
    refused("--evaluation.protocols", "multi_scale", saying="_Small has no forward_features")
    refused(*one_crop, "--data", str(tmp_path / "nothing"), saying="no prepared data set at")

    # Other data: not before the model is finished, and never with other classes.
    others = {"renamed": {"wnid": "n99999999"}, "fewer": None}
    for name, change in others.items():
        other = tmp_path / name
        shutil.copytree(prepared, other)
        manifest = json.loads((other / "manifest.json").read_text())
        if change is None:
            manifest["classes"] = manifest["classes"][:-1]
        else:
            manifest["classes"][2] |= change
        (other / "manifest.json").write_text(json.dumps(manifest))
    refused(*one_crop, "--data", str(tmp_path / "renamed"), saying="is not finished yet, which takes the data set")
    finish_model(config_of(Storage(str(run)), config), World(), cpus=1, code_version="test")
    refused(*one_crop, "--data", str(tmp_path / "renamed"), saying="; the model does not know n99999999)")
    refused(*one_crop, "--data", str(tmp_path / "fewer"), saying="has 5 classes, the model was trained on 6;")

    words = ["--storage", str(tmp_path / "runs"), "--name", "r", *one_crop, "--input.max-undecodable", "7"]
    config = evaluate.parse(words).config
    assert (config.input.max_undecodable, config.input.crop_px) == (7, 32)

    # What a start would do.
    code, text = typed("--storage", str(tmp_path / "runs"), "--name", "r", *one_crop, "--dry-run", main=evaluate.main)
    assert code == 0, text
    for fact in (
        "a start would test it as it stands, and not train it",
        "finished model of the last checkpoint: done",
        "val by one_crop: to come",
    ):
        assert fact in " ".join(text.split()), text


def test_results_are_delivered_at_a_later_start(typed: Run, tmp_path: Path, prepared: Path) -> None:
    """The journal is closed when the tests begin, and MLflow may have been away, or have lost all of it."""
    config = small_config(prepared, tmp_path / "runs", "r", model=ModelConfig(factory="tests.training.networks:tiny"))
    config = replace(config, schedule=replace(config.schedule, max_steps=2))
    run_to_end(config, 1)
    tested = replace(config, evaluation=EvaluationConfig((Protocol.ONE_CROP, Protocol.TEN_CROP), ("test", "val")))
    told: list[dict[str, object]] = []
    attempt = take_number(Storage(str(tmp_path / "runs" / "r")))
    outcome = do_job(tested, World(), attempt=attempt, cpus=1, emit=told.append)
    assert outcome is not None
    results = [event for event in told if event["kind"] == "scores"]
    assert [(event["split"], event["protocol"]) for event in results] == [
        (split, protocol) for split in ("test", "val") for protocol in ("one_crop", "ten_crop")
    ]
    assert results == result_events(Storage(str(tmp_path / "runs" / "r")))
    # Validation has seen the same views: these errors are those of the end of training.
    assert results[2]["top1_error"] == pytest.approx(outcome.validation_top1_error, abs=1e-9)

    for name in ("mlflow.db", "mlflow.db", "another.db"):
        database = tmp_path / name
        code, text = typed("resnet18", *options(tested), *tracked(database), *TESTS[:6])
        assert code == 0, text
        assert f"val by one_crop: {outcome.validation_top1_error:.2f} % top-1" in " ".join(text.split())
        shown = metrics_of(database)
        assert [(key, step) for key, _, step in shown] == [
            (f"val_{protocol}_{kind}_error", 2) for protocol in ("one_crop", "ten_crop") for kind in ("top1", "top5")
        ]
        assert shown[0][1] == pytest.approx(outcome.validation_top1_error, rel=1e-5)
        assert status_of(database) == ["FINISHED"]


def _port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
