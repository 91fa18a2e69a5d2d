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
from orchestrator.evaluation import ranking, scores
from tests.docs.test_examples import ROOT, example
from tests.evaluation.score_files import member
from tests.evaluation.scored_runs import scored_runs

PAGE = "from_scores_to_submission.md"


@pytest.fixture(scope="module")
def runs(data: DataSet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    scored_runs(folder, data)
    return folder


def test_seven_lines_read_a_score_file(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Also one with an image without pixels that its scores would be right of, and one without labels."""
    script, number = example(PAGE, "python"), "000000000000"
    assert sum(map(bool, script.splitlines())) == 7
    member(tmp_path, "b", np.eye(7), np.arange(7), decoded=np.arange(7) != 3)
    (val,) = (runs / "a" / "scores").glob("val-ten_crop-*.arrow")
    (test,) = (runs / "a" / "scores").glob("test-ten_crop-*.arrow")
    for path in (val, test, tmp_path / "b/scores/x.arrow"):
        exec(script.replace(f"/runs/a/scores/val-ten_crop-{number}.arrow", str(path)), {})
        file, said = scores.load(str(path)), capsys.readouterr().out
        of = (0, 0) if path == test else (ranking.errors(file).wrong_top1, len(file))
        name = file.info.model["name"]
        assert said == f"{name}: {of[0]} of {of[1]} labelled images are wrong in the top 1\n"


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
    runs: Path, data: DataSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Typed twice: the second time nothing changes."""
    out = tmp_path / "out"
    script = example(PAGE, "bash").replace("/data", data.storage.url)
    script = script.replace("/runs", str(runs)).replace("/submissions", str(out))
    lines = [line for line in script.splitlines() if not line.startswith("#")]
    said = "".join(typed(line, monkeypatch, capsys) for line in lines)
    left = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for line in lines:
        typed(line, monkeypatch, capsys)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == left
    made = json.loads((out / "ensemble/ensemble.json").read_text())
    assert [m["name"] for m in made["members"]] == ["a", "b", "c"]
    assert set(made["scores"]) == {"val", "test"}
    assert said.count("no problems") == 4
    errors = made["errors"]["val"]
    assert f"30 images: {errors['top1_error']:.2f} % top-1 error, {errors['top5_error']:.2f} %" in said
    lines = (out / "submission.txt").read_text().splitlines()
    assert len(lines) == 10
    assert all(len(set(line.split())) == 5 for line in lines)
    assert len((out / "submission.csv").read_text().splitlines()) == 11
    lineage = json.loads((out / "submission.txt.lineage.json").read_text())
    assert [s["md5"] for s in lineage["sources"]] == [s.md5 for s in data.manifest.sources]
    assert all(len(s["md5"]) == 32 for s in lineage["sources"])
