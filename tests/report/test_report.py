"""The command line, what it writes, and what it refuses."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from mlflow import MlflowClient

from jobs import command_line, report
from orchestrator.control.mlflow_store import run_pages
from orchestrator.report import page
from orchestrator.report.findings import Findings
from tests.mlflow_server import MlflowServer, free_port
from tests.report.conftest import RECIPE

pytestmark = pytest.mark.timeout(600)  # the first test waits for the runs of all
Typed = Callable[..., tuple[int, str]]


@pytest.fixture
def typed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Typed:
    """Type ``python jobs/report.py …``; the exit code and what was printed."""
    for name in ("IMAGENET_STORAGE", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["jobs/report.py", *arguments])
        try:
            code = command_line.exit_code(report.main)
        except SystemExit as stop:
            code = int(stop.code or 0)
        printed = capsys.readouterr()
        return code, printed.out + printed.err

    return run


def files_in(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_a_report(typed: Typed, storage: Path, tmp_path: Path) -> None:
    code, text = typed("--storage", str(storage), "--out", "out")
    assert code == 0, text
    assert "runs: 7 (6 finished), ensembles: 1, campaigns: 1, not readable: 1" in text
    assert f"warning: not in the report: {storage}/runs/broken: " in text
    written = files_in(tmp_path / "out")
    figures = sorted(name.rpartition("-")[0] for name in written if name.endswith(".png"))
    assert figures == [f"figures/figure-{name}" for name in ("1", "4", "6", "7", "other")]
    assert {name for name in written if not name.endswith(".png")} == {"index.html", "report.md"}
    html, markdown = ((tmp_path / "out" / name).read_text() for name in ("index.html", "report.md"))
    for name in written:
        if name.endswith(".png"):
            assert name in html
            assert name in markdown
    # No more is made where nothing changed, and what the old report alone had goes.
    stale = tmp_path / "out/figures/figure-4-0123456789ab.png"
    stale.write_bytes(b"old")
    mine = tmp_path / "out/figures/mine.png"
    mine.write_bytes(b"of somebody else")
    assert typed("--storage", str(storage), "--out", "out")[0] == 0
    assert files_in(tmp_path / "out") == written | {"figures/mine.png"}


def test_what_somebody_typed_is_shown_as_typed(typed: Typed, storage: Path, tmp_path: Path) -> None:
    assert typed("--storage", str(storage), "--out", "out")[0] == 0
    html, markdown = ((tmp_path / "out" / name).read_text() for name in ("index.html", "report.md"))
    assert RECIPE not in html
    assert "&lt;b&gt;x&lt;/b&gt; &amp; co" in html
    assert RECIPE not in markdown
    assert "&lt;b&gt;x&lt;/b&gt; &amp; co" in markdown
    assert page.text("a|b_c`d`[x](y)\n<i>") == "a\\|b\\_c\\`d\\`\\[x\\](y) &lt;i&gt;"


def test_a_report_that_fails_leaves_the_old_one(
    typed: Typed, storage: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert typed("--storage", str(storage), "--out", "out")[0] == 0
    before = {name: (tmp_path / "out" / name).read_bytes() for name in files_in(tmp_path / "out")}

    def full(report: page.Report) -> str:
        raise OSError("no space left on device")

    monkeypatch.setattr(page, "page", full)
    code, text = typed("--storage", f"{storage}/runs/p20", "--out", "out")
    assert (code, "no space left" in text) == (1, True)
    after = {name: (tmp_path / "out" / name).read_bytes() for name in files_in(tmp_path / "out")}
    assert all(after[name] == content for name, content in before.items())


def test_inside_the_storage_it_is_no_run(typed: Typed, storage: Path, tmp_path: Path) -> None:
    shutil.copytree(storage / "runs/p20", tmp_path / "runs/p20")
    for _ in range(2):
        code, text = typed("--storage", "runs", "--out", "runs/report")
        assert code == 0, text
        assert "runs: 1 (1 finished), ensembles: 0, campaigns: 0." in text
    assert (tmp_path / "runs/report/index.html").exists()


def test_what_is_refused(typed: Typed, storage: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "empty").mkdir()
    for arguments, says in (
        (("--out", "o"), "no storage is named"),
        (("--storage", "none", "--out", "o"), f"there is nothing at {tmp_path}/none"),
        (("--storage", str(storage), "none", "--out", "o"), f"there is nothing at {tmp_path}/none"),
        (("--storage", "empty", "--out", "o"), f"there is nothing at {tmp_path}/empty"),
        (("--storage", str(tmp_path), "--out", "o"), "no run, campaign or ensemble is in"),
        (("--storage", str(storage), "--out", "file"), f"--out {tmp_path}/file is a file"),
        (("--storage", str(storage), "--out", f"{storage}/runs/p20"), "is the folder of a run"),
        (("--storage", str(storage), "--out", f"{storage}/runs/six/ensemble/ten_crop"), "is the folder of a run"),
        (("--storage", str(storage), "--out", "o", "--tracking-uri", "ftp://x"), "unknown scheme"),
        (("--storage", "s3://key:hidden@bucket/runs", "--out", "o"), "credentials"),
    ):
        code, text = typed(*arguments)
        assert code == 2, text
        assert says in text
        assert "hidden" not in text
        assert not (tmp_path / "o").exists()


def test_without_mlflow(typed: Typed, storage: Path, tmp_path: Path) -> None:
    """A server that does not answer holds nothing up, and its password is not shown."""
    uri = f"http://me:hidden@127.0.0.1:{free_port()}"
    code, text = typed("--storage", str(storage), "--out", "out", "--tracking-uri", uri)
    assert code == 0, text
    for name in ("index.html", "report.md"):
        shown = (tmp_path / "out" / name).read_text()
        assert "cannot be read" in shown
        assert "hidden" not in shown


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MlflowServer]:
    started = MlflowServer(tmp_path_factory.mktemp("mlflow"))
    started.start()
    try:
        started.wait_ready()
        yield started
    finally:
        started.stop()


def test_links_to_mlflow(typed: Typed, storage: Path, found: Findings, server: MlflowServer, tmp_path: Path) -> None:
    client = MlflowClient(server.uri)
    assert run_pages(server.uri) == {}
    addresses = {}
    for number, run in enumerate(found.runs[:3]):
        experiment = client.create_experiment(f"experiment {number}")
        made = client.create_run(experiment, tags={"run_key": run.url})
        client.log_metric(made.info.run_id, "validation_top1_error", 1.0)
        client.create_run(experiment, tags={"run_key": run.url})  # an empty twin
        client.create_run(experiment)  # of something else
        rest = f"#/experiments/{experiment}/runs/{made.info.run_id}?workflowType=machine_learning"
        addresses[run.url] = f"{server.uri}/{rest}"
    assert run_pages(server.uri.replace("http://", "http://me:hidden@")) == addresses
    code, text = typed("--storage", str(storage), "--out", "out", "--tracking-uri", server.uri)
    assert code == 0, text
    html = (tmp_path / "out/index.html").read_text()
    for address in addresses.values():
        assert f'href="{address}"' in html


def test_no_secret_of_a_config_is_shown(typed: Typed, storage: Path, tmp_path: Path) -> None:
    """Where the page shows what the config says: the recipe, and the reason why a run cannot be read."""
    shutil.copytree(storage / "runs/p20", tmp_path / "runs/p20")
    path = tmp_path / "runs/p20/config.json"
    content = json.loads(path.read_text())
    recipe = "of s3://key:hid/den@bucket/x and https://host/y?api_key=hidden&sig=hidden"
    path.write_text(json.dumps(content | {"data": "s3://key:hidden@bucket/data", "recipe": recipe}))
    code, text = typed("--storage", "runs", "--out", "out")
    assert code == 0, text
    for name, mark in (("index.html", "***"), ("report.md", r"\*\*\*")):
        shown = (tmp_path / "out" / name).read_text()
        assert "hidden" not in shown
        assert "hid/den" not in shown
        assert f"sig={mark}" in shown


def test_a_page_that_cannot_be_rendered_replaces_nothing(
    typed: Typed, storage: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert typed("--storage", f"{storage}/runs/p20", "--out", "out")[0] == 0
    before = files_in(tmp_path / "out")
    markdown = (tmp_path / "out/report.md").read_bytes()
    monkeypatch.setattr(page, "page", lambda report: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        typed("--storage", f"{storage}/runs/r20-a", "--out", "out")
    assert files_in(tmp_path / "out") == before
    assert (tmp_path / "out/report.md").read_bytes() == markdown
