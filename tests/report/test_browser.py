"""The page as a browser shows it. Skipped without Debian's chromium."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import urllib.parse
from pathlib import Path
from typing import Any

import pytest

from jobs import report
from orchestrator.report import paper
from tests.report.conftest import RECIPE

CHROMIUM = shutil.which("chromium")
pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium (apt-get install chromium)"),
    pytest.mark.timeout(600),  # the first test waits for the runs of all
]

# What the page is once it is loaded, written into it for --dump-dom.
SCRIPT = """
<script>
addEventListener("load", () => {
  const of = (query) => [...document.querySelectorAll(query)];
  const links = of("a").map((a) => a.getAttribute("href"));
  const result = {
    rows: Object.fromEntries(of("section").filter((s) => s.querySelector("table")).map((s) => [s.id,
      [...s.querySelectorAll("tbody tr")].map((row) => [...row.children].map((cell) => cell.innerText.trim()))])),
    heads: Object.fromEntries(of("section").filter((s) => s.querySelector("table")).map((s) => [s.id,
      s.querySelectorAll("thead th").length])),
    images: of("img").map((i) => [i.getAttribute("src"), i.naturalWidth, i.alt, i.getBoundingClientRect().width]),
    dead: links.filter((l) => l.startsWith("#") && !document.getElementById(l.slice(1))),
    files: links.filter((l) => l.startsWith("file:")),
    others: links.filter((l) => !l.startsWith("file:") && !l.startsWith("#")),
    twice: of("[id]").map((e) => e.id).filter((id, i, all) => all.indexOf(id) !== i),
    bold: of("b").length,
    overflow: document.documentElement.scrollWidth - innerWidth,
  };
  const pre = document.createElement("pre");
  pre.id = "result";
  pre.textContent = encodeURIComponent(JSON.stringify(result));
  document.body.append(pre);
});
</script>
</body>"""


DEMO = Path(__file__).parents[2] / "build" / "demo" / "campaigns"


@pytest.fixture(scope="module")
def shown(storage: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return in_a_browser(storage, tmp_path_factory.mktemp("shown"))


def in_a_browser(storage: Path, folder: Path) -> dict[str, Any]:
    """What a browser makes of a report on ``storage``."""
    assert report.run(report.Arguments(str(folder / "report"), (str(storage),), "")) == 0
    html = (folder / "report/index.html").read_text()
    copy = folder / "report/copy.html"
    copy.write_text(html.replace("</body>", SCRIPT))
    profile = f"--user-data-dir={folder / 'profile'}"
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--window-size=1280,900", profile, "--dump-dom"]
    done = subprocess.run(
        [str(CHROMIUM), *flags, copy.as_uri()], capture_output=True, text=True, timeout=120, check=True
    )
    found = re.search(r'<pre id="result">(.*?)</pre>', done.stdout)
    assert found, done.stderr[-2000:]
    return {"html": html, **json.loads(urllib.parse.unquote(found[1]))}


def test_every_table_has_its_rows(shown: dict[str, Any]) -> None:
    rows = {key: [row[0] for row in of] for key, of in shown["rows"].items()}
    for table in (*paper.IMAGENET_TABLES, *paper.CIFAR_TABLES):
        assert rows[table.key] == [row.network.label for row in table.rows]
    assert rows[paper.TABLE_5_KEY] == [paper.ENSEMBLE_LABEL]
    assert sorted(rows["runs"]) == ["odd", "p20", "r20-a", "r20-b", "r20-c", "six/r34-a", "six/r34-b"]
    assert rows["other-runs"] == ["tests.training.networks:tiny"]
    assert len(rows["damaged"]) == len(rows["campaigns"]) == 1
    for key, of in shown["rows"].items():
        assert {len(row) for row in of} == {shown["heads"][key]}, key


def test_numbers_stand_beside_the_papers(shown: dict[str, Any]) -> None:
    r20, r32 = shown["rows"]["table-6"][:2]
    assert r20[1:4] == ["0.27M", "0.27M", "8.75"]
    assert re.fullmatch(
        r"\d+\.\d\d ± \d+\.\d\d \(2 seeds\); 1 more unfinished; validation, not the test set\s+r20-a\s+r20-b\s+r20-c",
        r20[4],
    )
    assert "40 of 50,000 images, 4 of 64,000 steps, 40 validation images instead of 10,000 test images" in r20[6]
    assert r32[4] == "not run"
    (r34,) = [row for row in shown["rows"]["table-3"] if row[0] == "ResNet-34 B"]
    assert r34[1] == "24.52"
    assert "(2 seeds)" in r34[2]
    assert "6 of 1,000 classes, 32 of 224 px" in r34[6]
    (ensemble,) = shown["rows"]["table-5"]
    assert ensemble[1] == "3.57 (test)"
    assert "(val, 10-crop)" in ensemble[2]
    assert RECIPE in {row[2] for row in shown["rows"]["runs"]}
    assert "step" not in shown["rows"]["runs"][0][5]
    (unfinished,) = [row for row in shown["rows"]["runs"] if row[0] == "r20-c"]
    assert unfinished[5:7] == ["unfinished", "3 of 4"]


def test_what_is_typed_is_no_markup(shown: dict[str, Any]) -> None:
    assert shown["bold"] == 0


def test_images_load(shown: dict[str, Any]) -> None:
    assert len(shown["images"]) == 5
    for source, width_px, alt, shown_px in shown["images"]:
        assert width_px > 600, source
        assert shown_px > 0.6 * width_px, source  # else its text is too small to read
        assert alt


def test_links_lead_somewhere(shown: dict[str, Any]) -> None:
    assert shown["dead"] == []
    assert shown["twice"] == []
    assert shown["others"] == []
    assert shown["files"]
    for uri in shown["files"]:
        assert Path(urllib.parse.unquote(urllib.parse.urlsplit(uri).path)).is_dir(), uri


def test_the_page_is_whole(shown: dict[str, Any]) -> None:
    """It needs its figures and nothing else, and no sideways scrolling."""
    assert all(source.startswith("figures/") for source in re.findall(r'src="([^"]*)"', shown["html"]))
    assert not re.search(r"<link|<script|@import|url\(|<iframe|<object", shown["html"])
    assert shown["overflow"] <= 0


@pytest.mark.skipif(not DEMO.exists(), reason="there is no build/demo: make demo")
def test_the_report_of_the_demo(tmp_path: Path) -> None:
    shown = in_a_browser(DEMO, tmp_path)
    assert sorted(row[0] for row in shown["rows"]["runs"]) == ["demo/r18-a", "demo/r18-b", "demo/r34"]
    assert all(row[5] == "finished" for row in shown["rows"]["runs"])
    assert shown["images"]
    assert all(width_px > 600 for _, width_px, *_ in shown["images"])
    assert shown["dead"] == shown["twice"] == shown["others"] == []
    assert all(Path(urllib.parse.unquote(urllib.parse.urlsplit(uri).path)).is_dir() for uri in shown["files"])
    assert shown["overflow"] <= 0
