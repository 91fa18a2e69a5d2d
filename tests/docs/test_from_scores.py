"""The page on score files, ensembles and submissions: all of its commands, on score files of generated numbers."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from orchestrator.data.shards import DataSet
from orchestrator.evaluation import scores
from tests.docs.test_examples import ROOT, example
from tests.evaluation.score_files import softmax
from tests.evaluation.scored_runs import scored_runs

PAGE = "from_scores_to_submission.md"


@pytest.fixture(scope="module")
def runs(data: DataSet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    scored_runs(folder, data)
    return folder


def test_five_lines_read_a_score_file(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (path,) = (runs / "a" / "scores").glob("val-ten_crop-*.arrow")
    script = example(PAGE, "python")
    assert len(script.splitlines()) == 5
    exec(script.replace("/runs/a/scores/val-ten_crop-000000000000.arrow", str(path)), {})
    file = scores.load(str(path))
    error = 100 * np.mean(file.scores.argmax(axis=1) != file.labels)
    assert capsys.readouterr().out == f"a: {error:.2f} % top-1 error\n"
    assert np.allclose(softmax(np.log(file.scores)), file.scores)


def typed(line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    """What a command prints. A shell takes it apart; this process runs it: an interpreter of its own takes seconds."""
    words = subprocess.run(["bash", "-c", f"printf '%s\\0' {line}"], capture_output=True, text=True, check=True).stdout
    python, script, *arguments = words.rstrip("\0").split("\0")
    assert python == "python"
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    printed = capsys.readouterr()
    assert end.value.code == 0, f"{line}: {printed.out} {printed.err}"
    return printed.out


def test_every_command(
    runs: Path, data: DataSet, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = example(PAGE, "bash").replace("/runs", str(runs)).replace("/data", data.storage.url)
    said = "".join(typed(line, monkeypatch, capsys) for line in script.splitlines() if not line.startswith("#"))
    made = json.loads((runs / "ensemble/ensemble.json").read_text())
    assert [m["name"] for m in made["members"]] == ["a", "b", "c"]
    assert set(made["scores"]) == {"val", "test"}
    assert said.count("no problems") == 4
    errors = made["errors"]["val"]
    assert f"30 images: {errors['top1_error']:.2f} % top-1 error, {errors['top5_error']:.2f} %" in said
    lines = (runs / "submission.txt").read_text().splitlines()
    assert len(lines) == 10
    assert all(len(set(line.split())) == 5 for line in lines)
    assert len((runs / "submission.csv").read_text().splitlines()) == 11
    lineage = json.loads((runs / "submission.txt.lineage.json").read_text())
    assert [s["md5"] for s in lineage["sources"]] == [s.md5 for s in data.manifest.sources]
    assert all(len(s["md5"]) == 32 for s in lineage["sources"])
