"""The stages of a job: what is done is not done again, and a place may be left in the middle of a test."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from orchestrator.config import EvaluationConfig, ModelConfig, Protocol, TrainConfig
from orchestrator.evaluation.results import is_tested, missing_tests
from orchestrator.evaluation.stages import do_job
from orchestrator.storage import Storage
from orchestrator.training.failures import PreemptedError
from orchestrator.training.finished_model import find_model
from orchestrator.training.pulse import Phase, Pulse, Wish
from orchestrator.world import World
from tests.training.group import small_config, take_number


class _Seen(Pulse):
    """Remembers the phases, and is told to leave its place when so many images of a test are scored."""

    def __init__(self, leave_at: int = 0) -> None:
        super().__init__()
        self.phases: list[Phase] = []
        self._leave_at, self.stored = leave_at, 0

    def at(self, phase: Phase, step: int) -> None:
        super().at(phase, step)
        if not self.phases or self.phases[-1] is not phase:
            self.phases.append(phase)

    @contextmanager
    def storing(self) -> Iterator[None]:
        self.stored += 1
        with super().storing():
            yield

    def hear(self, event: dict[str, Any]) -> None:
        if event["kind"] == "scoring" and 0 < self._leave_at <= event["done"]:
            self.wish = Wish.LEAVE


def work(config: TrainConfig, pulse: _Seen, **options: Any) -> list[dict[str, Any]]:
    """Do the job in this process; its events."""
    events: list[dict[str, Any]] = []

    def emit(event: dict[str, Any]) -> None:
        events.append(event)
        pulse.hear(event)

    attempt = take_number(Storage(config.storage).sub(config.name))
    do_job(config, World(), attempt=attempt, cpus=1, emit=emit, pulse=pulse, **options)
    return events


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_a_job_is_trained_finished_and_scored_once(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("orchestrator.evaluation.stages.code_version", lambda: "test")  # a commit may come in between
    config = small_config(prepared, tmp_path, "r", model=ModelConfig(factory="tests.training.networks:tiny"))
    config = replace(config, schedule=replace(config.schedule, max_steps=2))
    tests = EvaluationConfig((Protocol.ONE_CROP, Protocol.TEN_CROP), ("val", "test"), precise_bn_images=16)
    whole = replace(config, evaluation=tests)
    assert not is_tested(whole)

    # Only trained; then the rest is added, and left in the middle of the first test.
    pulse = _Seen()
    assert [e["kind"] for e in work(config, pulse)][-1] == "finished"
    assert pulse.phases[-1] is Phase.END
    run = tmp_path / "r"
    trained = files(run)
    pulse = _Seen(leave_at=16)
    with pytest.raises(PreemptedError, match="what is scored is kept"):
        work(whole, pulse)
    assert pulse.phases == [Phase.FINISH, Phase.SCORE]
    assert not is_tested(whole)
    parts = [path for path in (run / "scores").rglob("*") if path.is_file()]
    assert len(parts) == 2
    times = {path: path.stat().st_mtime_ns for path in [*(run / "model").iterdir(), *parts]}

    # A writer is killed in the middle of a file, as the next start finds it.
    for folder in ("scores", "model"):
        code = "import os, sys; from orchestrator.storage import Storage\n"
        code += "with Storage(sys.argv[1]).publishing('x.json') as stream: os.kill(os.getpid(), 9)"
        subprocess.run([sys.executable, "-c", code, str(run / folder)], check=False, cwd=Path(__file__).parents[2])
        assert len(list((run / folder).glob(".tmp-*"))) == 1

    pulse = _Seen()
    events = work(whole, pulse)
    assert not list(run.rglob(".tmp-*"))
    assert pulse.stored >= 4 + 1  # each score file, and the model that is read
    assert pulse.phases == [Phase.FINISH, Phase.SCORE, Phase.DONE]  # nobody to wait for
    assert [e["kind"] for e in events if e["kind"] in ("test", "scores")] == ["test", "scores"] * 4
    assert is_tested(whole)
    record = find_model(whole)
    assert record is not None
    assert missing_tests(whole, record, record.data_sha256) == []
    assert {path: path.stat().st_mtime_ns for path in times if path.parent.name == "model"} == {
        path: time for path, time in times.items() if path.parent.name == "model"
    }
    after = files(run)
    assert not [name for name in after if ".parts-" in name]
    assert {name: after[name] for name in trained if not name.startswith("attempts/")} == {
        name: content for name, content in trained.items() if not name.startswith("attempts/")
    }

    # Once more there is nothing to do; and an undisturbed evaluation has the same bytes.
    assert [e["kind"] for e in work(whole, _Seen())] == ["model"]
    shutil.rmtree(run / "scores")
    work(whole, _Seen(), trains=False)
    assert {n: c for n, c in files(run).items() if n.startswith("scores/")} == {
        n: c for n, c in after.items() if n.startswith("scores/")
    }
