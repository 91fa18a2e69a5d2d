"""One run, driven from outside as a user does: the command is started, watched by what it prints, and started again."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from orchestrator.config import TrainConfig
from orchestrator.data.shards import DataSet
from orchestrator.storage import Storage
from orchestrator.training.assembly import sample_stream
from orchestrator.training.checkpoint import newest_journal
from orchestrator.training.meters import sample_checksum

_ROOT = Path(__file__).parents[2]
_STEP = re.compile(r"^\S+  step (\d+)/\d+ ")
_REPLACED = re.compile(r"^step (\d+): image (.+) cannot be decoded, (.+) takes its place$")
_BEGIN = re.compile(r"^training from step (\d+) to ")


def options(config: TrainConfig) -> list[str]:
    """The words of the command line that make this config of the default recipe."""

    def words(new: Mapping[str, Any], old: Mapping[str, Any], prefix: str) -> list[str]:
        found: list[str] = []
        for key, value in new.items():
            if isinstance(value, dict):
                found += words(value, old[key], f"{prefix}{key.replace('_', '-')}.")
            elif value != old[key]:
                found += [f"--{prefix}{key.replace('_', '-')}", str(value)]
        return found

    plain, default = config.to_json(), TrainConfig().to_json()
    del plain["recipe"], default["recipe"]
    return words(plain, default, "")


class DrivenRun:
    """The drivers of one run, one after another, and what they have printed. ``log`` keeps all of it."""

    def __init__(self, config: TrainConfig, environment: Callable[[], Mapping[str, str]], log: Path) -> None:
        """``environment`` is asked at every start: what the driver needs beside the environment of this process."""
        self.config, self.log = config, log
        self.lines: list[str] = []
        self.step = -1  # highest that was printed, over all starts
        self.begins: list[tuple[int, int]] = []  # of each worker group: its first step, and the highest before it
        self.num_starts = 0
        self._environment = environment
        self._process: subprocess.Popen[str] | None = None
        self._reader: threading.Thread | None = None

    @property
    def command(self) -> list[str]:
        return [sys.executable, "jobs/imagenet.py", "resnet50", *options(self.config)]

    def start(self) -> None:
        """The command, once more. No terminal's Ctrl-C reaches it: that is for whoever rehearses."""
        self._process = subprocess.Popen(
            self.command,
            cwd=_ROOT,
            env=self._variables(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self.num_starts += 1
        self._reader = threading.Thread(target=self._read, args=(self._process,), daemon=True)
        self._reader.start()

    def _variables(self) -> dict[str, str]:
        plain = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
        return plain | {"PYTHONUNBUFFERED": "1", "COLUMNS": "200"} | dict(self._environment())

    def _read(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        with self.log.open("a") as log:
            for line in process.stdout:
                log.write(line)
                log.flush()
                self.lines.append(line.rstrip("\n"))
                if found := _STEP.match(line):
                    self.step = max(self.step, int(found[1]))
                elif found := _BEGIN.match(line):
                    self.begins.append((int(found[1]), self.step))

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def exit_code(self) -> int | None:
        """Of the driver, once it has ended and all that it said is read; negative: the signal that killed it."""
        code = self._process.poll() if self._process else None
        if code is not None and self._reader is not None:
            self._reader.join(timeout=5)
        return code

    def wait(self, condition: Callable[[], bool], timeout_s: float) -> bool:
        """Until ``condition`` holds, the driver ends, or time is over; whether it holds."""
        deadline_s = time.monotonic() + timeout_s
        while not condition():
            if self.exit_code() is not None or time.monotonic() > deadline_s:
                return condition()
            time.sleep(0.02)
        return True

    def start_another(self, timeout_s: float = 120) -> tuple[int, str]:
        """The same command while the driver is at work: exit code and output."""
        done = subprocess.run(
            self.command,
            cwd=_ROOT,
            env=self._variables(),
            capture_output=True,
            text=True,
            timeout=timeout_s,
            start_new_session=True,
        )
        return done.returncode, done.stdout + done.stderr

    def interrupt(self, timeout_s: float = 60) -> int | None:
        """Ctrl-C, as often as it takes; at last SIGKILL. The exit code."""
        if self._process is None:
            return None
        with suppress(ProcessLookupError):
            self._process.send_signal(signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout_s)
        self.kill()
        return self.exit_code()

    def kill(self) -> None:
        """The driver, and all that it started."""
        if self._process is None:
            return
        tree: list[psutil.Process] = []
        with suppress(psutil.NoSuchProcess):
            tree = psutil.Process(self._process.pid).children(recursive=True)
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        for each in tree:
            with suppress(psutil.NoSuchProcess):
                each.kill()


def wrong_images(run: Storage, config: TrainConfig, steps: int, lines: Sequence[str] = ()) -> int:
    """Images that steps 1 to ``steps`` have lost or repeated, by the checksums in the journal of the newest checkpoint.

    A step counts with all its images. lines: what the run has printed: undecodable images, and what took their place.
    """
    data = DataSet(Storage(config.data))
    split = data.split("train")
    stream, number = sample_stream(config, split), {name: i for i, name in enumerate(split.names.to_pylist())}
    replaced = {
        (int(found[1]) + 1, number[found[2]]): number[found[3]] for line in lines if (found := _REPLACED.match(line))
    }
    told: dict[int, list[str]] = {}
    for event in newest_journal(run):
        if event["kind"] == "train":
            told.setdefault(int(event["step"]), []).append(event["samples"])
    size, wrong = config.batch.global_batch_size, 0
    for step in range(1, steps + 1):
        positions = np.arange((step - 1) * size, step * size)
        images = np.array([replaced.get((step, int(i)), int(i)) for i in stream.images(positions)])
        expected = f"{sample_checksum(positions, images) % 2**64:016x}"
        wrong += size * (told.get(step) != [expected])
    return wrong


class MlflowServer:
    """An MLflow server on loopback, in a process group of its own: to be ended, stopped and started again."""

    def __init__(self, folder: Path) -> None:
        self.database = folder / "mlflow.db"
        self._folder = folder
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self._port = int(probe.getsockname()[1])
        self.uri = f"http://127.0.0.1:{self._port}"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self._port)]
        command += ["--backend-store-uri", f"sqlite:///{self.database}", "--workers", "1"]
        command += ["--artifacts-destination", str(self._folder / "mlflow-artifacts")]
        quiet = {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        with (self._folder / "mlflow.log").open("ab") as log:
            self._process = subprocess.Popen(
                command, stdout=log, stderr=log, env=os.environ | quiet, cwd=self._folder, start_new_session=True
            )

    def wait_ready(self, timeout_s: float = 120) -> None:
        """Raises OSError where it does not answer in time."""
        deadline_s = time.monotonic() + timeout_s
        while True:
            with suppress(OSError):
                urllib.request.urlopen(f"{self.uri}/health", timeout=2).close()
                return
            if time.monotonic() > deadline_s or (self._process and self._process.poll() is not None):
                raise OSError(f"the rehearsal's MLflow server does not answer: see {self._folder / 'mlflow.log'}")
            time.sleep(0.2)

    def signal(self, number: signal.Signals) -> None:
        assert self._process is not None
        os.killpg(self._process.pid, number)

    def kill(self) -> None:
        if self._process is not None:
            with suppress(ProcessLookupError):
                self.signal(signal.SIGKILL)
            self._process.wait()
            self._process = None


def digest_of(run: Storage) -> str:
    """SHA-256 of the weights that a finished run ended with, "" for one that has not."""
    with suppress(FileNotFoundError):
        return str(json.loads(run.read("finished.json"))["weights_sha256"])
    return ""
