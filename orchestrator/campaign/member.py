"""A member of a campaign as a process of its own, and what of it is done in storage."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path, PurePosixPath
from typing import Any

from orchestrator.config import TrainConfig
from orchestrator.data.shards import UNLABELLED
from orchestrator.evaluation import ranking, results, scores
from orchestrator.evaluation.evaluate import score_name
from orchestrator.storage import Storage
from orchestrator.training.finished_model import find_model
from orchestrator.training.ownership import Process
from orchestrator.training.run import finished, run_storage

_SAID_LENGTH = 500
_MORE_THAN_PARTS = 1_000_000

# -- in storage -----------------------------------------------------------------------------------------------------


def is_done(config: TrainConfig, data_sha256: str) -> bool:
    """Whether a member's run has ended, and all its score files are there."""
    return finished(run_storage(config)) is not None and results.is_tested(config, data_sha256)


def score_urls(config: TrainConfig, data_sha256: str) -> dict[results.Test, str]:
    """URLs of the score files of a member that is done."""
    model, run = find_model(config), run_storage(config)
    assert model is not None, run.url
    return {
        test: f"{run.url}/{score_name(model.weights_sha256, config, data_sha256, test.split, test.protocol)}"
        for test in results.all_tests(config)
    }


def errors_of(config: TrainConfig, data_sha256: str) -> dict[str, float]:
    """Errors in percent, by name (val_ten_crop_top1_error), of a member that is done. Reads its scores.

    Raises ValueError where a score file is damaged.
    """
    found = dict[str, float]()
    for test, url in score_urls(config, data_sha256).items():
        loaded = scores.load(url)
        if (loaded.labels != UNLABELLED).any():
            errors, key = ranking.errors(loaded), f"{test.split}_{test.protocol.value}"
            found |= {f"{key}_top1_error": errors.top1_error, f"{key}_top5_error": errors.top5_error}
    return found


def progress_of(run: Storage) -> int:
    """A number that grows with what a run has stored: steps of its newest checkpoint, then a model, then scores.

    A score file stands for more than all the parts that it was put together from, which are gone then.
    """
    steps = [int(PurePosixPath(n).name.partition("-")[0]) for n in run.files("checkpoints") if n.endswith(".json")]
    later = [n for n in [*run.files("model"), *run.files(scores.FOLDER)] if n.endswith(".json")]
    parts = sum(len(run.files(folder)) for folder in run.folders(scores.FOLDER) if ".parts-" in folder)
    return max(steps, default=0) + run.exists("finished.json") + _MORE_THAN_PARTS * len(later) + parts


# -- as a process ---------------------------------------------------------------------------------------------------


class MemberProcess:
    """``command`` (jobs/member.py), which waits on its stdin for what to do, and ends when its stdin does.

    The driver holds the other end, so that no member outlives it, however it dies.
    """

    def __init__(self, command: Sequence[str], log: Path, environment: Mapping[str, str]) -> None:
        log.parent.mkdir(parents=True, exist_ok=True)
        self._log, self._begins_at = log, log.stat().st_size if log.exists() else 0
        with log.open("ab") as stream:
            # No terminal's Ctrl-C reaches it: that is for the driver, which then ends it.
            self._process = subprocess.Popen(
                list(command),
                stdin=subprocess.PIPE,
                stdout=stream,
                stderr=subprocess.STDOUT,
                env=dict(environment),
                start_new_session=True,
            )
        self.process = Process.of(self._process.pid)

    def begin(self, config: TrainConfig, recipe: TrainConfig, argv: Sequence[str]) -> None:
        """Let it train, finish and score ``config``. ``argv``: the command that goes on with the campaign."""
        order = {"config": config.to_json(), "recipe": recipe.to_json(), "argv": list(argv)}
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # it has ended: its exit code says so
            self._process.stdin.write(json.dumps(order).encode() + b"\n")
            self._process.stdin.flush()

    def exit_code(self) -> int | None:
        """None while it runs; negative: the signal that ended it."""
        return self._process.poll()

    def interrupt(self) -> None:
        """Ask it to make a checkpoint and end."""
        with suppress(ProcessLookupError):
            self._process.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """At once, with what it has started."""
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def close(self) -> None:
        """Once it has ended."""
        if self._process.stdin is not None:
            with suppress(BrokenPipeError):
                self._process.stdin.close()

    def said(self) -> str:
        """Its error, or its last words."""
        with suppress(OSError), self._log.open("rb") as stream:
            stream.seek(self._begins_at)
            lines = [line.strip() for line in stream.read().decode(errors="replace").splitlines() if line.strip()]
            errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
            return (errors[-1] if errors else " / ".join(lines[-3:]))[:_SAID_LENGTH]
        return ""


def plain_process(process: Process) -> dict[str, Any]:
    """For the journal."""
    return asdict(process)


def process_from(plain: Mapping[str, Any]) -> Process:
    """Inverse of ``plain_process``."""
    return Process(**plain)
