"""Preparations into one output at the same time: one data set, whole, of one of them; the other says what happened."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from data_prep import parts, preparation
from data_prep.image_folder import main
from data_prep.preparation import Preparation
from tests.data_prep.test_image_folder import COMMON, encoded, write

ROOT = Path(__file__).parents[2]
OPTIONS = [*COMMON, "--images-per-shard", "2"]

# Every process waits until both have found that nothing is there.
MEETING = """
import json, sys, time
from pathlib import Path
from data_prep import image_folder
from data_prep.preparation import Preparation

meeting, who, arguments = Path(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3])
finished = Preparation.finished

def meet(self):
    found = finished(self)
    (meeting / who).touch()
    while len(list(meeting.iterdir())) < 2:
        time.sleep(0.001)
    return found

Preparation.finished = meet
sys.exit(image_folder.main(arguments))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Not to be changed."""
    files = {f"{label}/{k}.jpg": encoded(100 * n + k) for n, label in enumerate("abcd") for k in range(10)}
    return write(tmp_path_factory.mktemp("two") / "f", files)


@pytest.fixture(scope="module")
def alone(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, bytes]]:
    """Seed → what each preparation makes when nothing disturbs it."""
    found = {}
    for seed in ("1", "2"):
        out = tmp_path_factory.mktemp("alone") / "o"
        assert main([str(folder), "--out", str(out), *OPTIONS, "--seed", seed]) == 0
        found[seed] = {str(p.relative_to(out)): p.read_bytes() for p in out.rglob("*") if p.is_file()}
    return found


def together(commands: Sequence[Sequence[str]], meeting: Path) -> list[tuple[int, str, str]]:
    """Exit code, stdout and stderr of each."""
    meeting.mkdir()
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", MEETING, str(meeting), str(number), json.dumps(list(command))],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number, command in enumerate(commands)
    ]
    ended = [(process, *process.communicate(timeout=120)) for process in processes]
    return [(process.returncode, out, err) for process, out, err in ended]


def test_processes_with_other_options(folder: Path, alone: dict, tmp_path: Path, tree: Callable) -> None:
    out = tmp_path / "o"
    commands = [[str(folder), "--out", str(out), *OPTIONS, "--seed", seed] for seed in ("1", "2")]
    ended = together(commands, tmp_path / "meeting")
    assert sorted(code for code, _, _ in ended) == [0, 2], ended
    winner = [code for code, _, _ in ended].index(0)
    assert tree(out) == alone[str(winner + 1)]
    message = ended[1 - winner][2]
    assert "with another seed (" in message
    assert message.endswith("give another --out, or delete that folder to start over\n")


def test_processes_with_the_same_options(folder: Path, alone: dict, tmp_path: Path, tree: Callable) -> None:
    out = tmp_path / "o"
    ended = together([[str(folder), "--out", str(out), *OPTIONS, "--seed", "1"]] * 2, tmp_path / "meeting")
    assert [code for code, _, _ in ended] == [0, 0], ended
    assert tree(out) == alone["1"]
    assert not list(out.glob(".*"))


@pytest.mark.parametrize("moment", ["before the claim", "after a shard", "after the work"])
@pytest.mark.parametrize("seed", ["1", "2"])
def test_another_that_is_done_before(
    folder: Path,
    alone: dict,
    tmp_path: Path,
    tree: Callable,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
    moment: str,
    seed: str,
) -> None:
    """In the midst of the preparation of seed 1, another process makes a whole data set; of seed 2, which would be
    refused, after somebody has deleted the output.
    """
    out = tmp_path / "o"
    others: list[int] = []

    def other() -> None:
        if not others:
            others.append(-1)
            if seed == "2":
                shutil.rmtree(out, ignore_errors=True)
            others[0] = main([str(folder), "--out", str(out), *OPTIONS, "--seed", seed])

    work, claim, check_claim = Preparation.work, Preparation._claim, parts.check_claim

    def then_other(function: Callable, before: bool) -> Callable:
        def both(*arguments: Any, **options: Any) -> Any:
            if before:
                other()
            result = function(*arguments, **options)
            other()
            return result

        return both

    match moment:
        case "before the claim":
            monkeypatch.setattr(Preparation, "_claim", then_other(claim, before=True))
        case "after a shard":
            monkeypatch.setattr(parts, "check_claim", then_other(check_claim, before=False))
        case "after the work":
            monkeypatch.setattr(Preparation, "work", then_other(work, before=False))
    code = main([str(folder), "--out", str(out), *OPTIONS, "--seed", "1"])
    captured = capsys.readouterr()
    assert others == [0]
    assert code == (0 if seed == "1" else 2), captured.err
    if seed == "2":
        assert "holds a finished data set with another seed (2, now 1)" in captured.err
    else:
        assert "already finished; nothing was done" in captured.out
    found = tree(out)
    if moment == "after a shard" and seed == "2":
        # The shard that was under way when the output was deleted: of another name, and in no manifest.
        shards = {name for name in found if name.endswith(".tar")} - alone["2"].keys()
        assert len(shards) <= 1
        found = {name: data for name, data in found.items() if name not in shards}
    assert found == alone[seed]


def test_an_output_deleted_under_way(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    write_part = preparation.write_part
    out = tmp_path / "o"

    def deleting(*arguments: Any) -> Any:
        part = write_part(*arguments)
        shutil.rmtree(out)
        return part

    monkeypatch.setattr(preparation, "write_part", deleting)
    assert main([str(folder), "--out", str(out), *OPTIONS]) == 2
    message = "was deleted or taken over while this one was at work: run again, or give another --out\n"
    assert capsys.readouterr().err.endswith(message)
    assert not out.exists() or not [p for p in out.rglob("*") if p.is_file()]


@pytest.mark.parametrize("claim", [b"", b"[]", b"{"])
def test_a_damaged_claim(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture, claim: bytes) -> None:
    write(tmp_path, {"o/.parts/preparation.json": claim})
    assert main([str(folder), "--out", str(tmp_path / "o"), *OPTIONS]) == 2
    assert ".parts/preparation.json is damaged: delete '" in capsys.readouterr().err
