"""The whole way with data and runs in a bucket: one request in twenty fails, and the store goes away for a while."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from orchestrator.data.shards import DataSet
from orchestrator.storage import Storage
from orchestrator.training.run import finished
from tests.s3_server import BUCKET, SECRET, S3Server
from tests.test_remote import OUTAGE_S
from tests.training.group import options, small_config, weights_digest

ROOT = Path(__file__).parents[2]


def until(condition: Callable[[], bool], timeout_s: float = 240) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.1)


def kill_all(process: subprocess.Popen[str]) -> None:
    """SIGKILL the process and all it has started."""
    for each in [*psutil.Process(process.pid).children(recursive=True), process]:
        each.send_signal(signal.SIGKILL)
    process.wait()


@pytest.mark.ray_cluster
@pytest.mark.timeout(600)
def test_preparing_training_and_resuming_in_a_bucket(
    archives: Path, prepared: Path, undisturbed: dict[int, Path], s3: S3Server, tmp_path: Path
) -> None:
    home = Storage(f"s3://{BUCKET}/{tmp_path.name}")
    for archive in archives.iterdir():
        home.publish(f"archives/{archive.name}", archive.read_bytes())
    s3.tell("fail 20")

    # -- prepared from a bucket to a bucket, which goes away meanwhile: the same bytes as on a disk
    prepare = [sys.executable, "-m", "data_prep.ilsvrc", f"{home.url}/archives", "--out", f"{home.url}/data"]
    prepare += ["--crop", "64", "--num-tasks", "0"]
    preparing = subprocess.Popen(prepare, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    until(lambda: preparing.poll() is not None or home.exists("data/.parts/preparation.json"))
    s3.tell("stop")
    time.sleep(OUTAGE_S)
    s3.tell("start")
    told = preparing.communicate()[1]
    assert preparing.returncode == 0, told
    assert "no answer; waiting" in told or OUTAGE_S < 10
    assert DataSet(home.sub("data")).digest == DataSet(Storage(str(prepared))).digest
    assert home.sub("data").find() == Storage(str(prepared)).find()

    # -- trained by two processes, killed after the first checkpoint
    config = small_config(Path("data"), Path("runs"), "remote")
    words = options(config)
    words[1], words[3] = f"{home.url}/data", f"{home.url}/runs"
    words += ["--tracking.uri", f"sqlite:///{tmp_path}/mlflow.db", "--placement.cache-dir", str(tmp_path / "cache")]
    job = ["jobs/imagenet.py", "resnet18", *words, "--placement.num-workers", "2"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    first = subprocess.Popen([*torchrun, *job], cwd=ROOT, env=environment, **pipes)  # type: ignore[call-overload]
    run = home.sub("runs/remote")
    until(lambda: first.poll() is not None or len(run.files("checkpoints")) >= 2)
    assert first.poll() is None, first.stdout.read()
    kill_all(first)
    assert finished(run) is None

    # -- gone on with (on Ray in "make outage"); the store goes away once it is under way
    go_on = [sys.executable, *job] if "OUTAGE_S" in os.environ else [*torchrun, *job]
    second = subprocess.Popen(go_on, cwd=ROOT, env=environment, **pipes)  # type: ignore[call-overload]
    said, has_begun, is_missed = [], threading.Event(), threading.Event()

    def listen() -> None:
        for line in second.stdout:
            said.append(line)
            if "going on from the checkpoint" in line:
                has_begun.set()
            if "no answer; waiting" in line:
                is_missed.set()

    listener = threading.Thread(target=listen)
    listener.start()
    assert has_begun.wait(200), "".join(said)
    s3.tell("stop")
    assert is_missed.wait(120), "".join(said)  # nothing ends without a store
    time.sleep(OUTAGE_S)
    s3.tell("start")
    listener.join()
    assert second.wait() == 0, "".join(said)

    # -- the same weights as an undisturbed run on a disk, and nothing secret in what was printed or stored
    outcome = finished(run)
    assert outcome is not None
    assert outcome.weights_sha256 == weights_digest(undisturbed[2])
    assert SECRET not in "".join(said)
    assert SECRET.encode() not in (tmp_path / "mlflow.db").read_bytes()
    assert not any(SECRET.encode() in run.read(name) for name in run.find())
    assert home.sub("runs").find().keys() == {f"remote/{name}" for name in run.find()}  # Ray's folder is gone
    assert run.read("figures/errors.png").startswith(b"\x89PNG")
    assert any((tmp_path / "cache").glob("*/*/train__*.tar"))
