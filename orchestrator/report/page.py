"""A report as a page (HTML, self-contained but for its figures) and as Markdown, and how it comes to its place.

Figures carry a digest in their names and are there before a page names them; the page replaces the old one in one
move, and what the old one named goes last. Whoever opens it at any moment, or after a kill at any, sees a whole report.
"""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2

from orchestrator.evaluation import ensemble
from orchestrator.masking import masked
from orchestrator.report.cells import Cell, Link, Row, Table
from orchestrator.report.figures import Figure
from orchestrator.report.tables import Tables
from orchestrator.storage import Storage, sha256_hex

PAGE, MARKDOWN, FIGURES = "index.html", "report.md", "figures"
_TEMPLATE = "page.html.jinja"
_OURS = re.compile(rf"{FIGURES}/figure-\w+-[0-9a-f]{{12}}\.png")


@dataclass(frozen=True)
class Report:
    """All that is shown. storages, notes: masked; counts: what was found, in words; made: when, in words."""

    storages: tuple[str, ...]
    counts: str
    notes: tuple[str, ...]
    tables: Tables
    figures: tuple[Figure, ...]
    absent: tuple[str, ...]
    source: str
    made: str


def check_place(out: Storage) -> None:
    """Refuse a place where a report would mix with what a run leaves. Raises ValueError, OSError.

    A folder of its own inside a storage of runs is fine: it holds no config.json, so that no reader takes it for a run.
    """
    path = out.local_path("x")
    if path is not None and path.parent.exists() and not path.parent.is_dir():
        raise ValueError(f"--out {out.url} is a file: name a folder for the report")
    for name in ("config.json", "campaign.json", "manifest.json", ensemble.MANIFEST):
        if out.exists(name):
            raise ValueError(
                f"--out {out.url} is the folder of a run, campaign, ensemble or data set: name one of its own"
            )


def publish(report: Report, out: Storage) -> None:
    """Raises OSError where ``out`` cannot be written; the report before is whole then."""
    of_text, of_page = markdown(report).encode(), page(report).encode()
    for figure in report.figures:
        out.publish(file_of(figure), figure.png)
    out.publish(MARKDOWN, of_text)
    out.publish(PAGE, of_page)
    named = {file_of(figure) for figure in report.figures}
    for name in out.files(FIGURES):
        if _OURS.fullmatch(name) and name not in named:
            out.delete(name)


def file_of(figure: Figure) -> str:
    """Name of a figure's file in the report's folder."""
    return f"{FIGURES}/{figure.key}-{sha256_hex(figure.png)[:12]}.png"


def page(report: Report) -> str:
    """The page. Every text is masked and escaped: names and recipes are whatever a person has typed."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=lambda value: masked(value) if type(value) is str else value,  # not what a macro has made
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(_TEMPLATE).render(report=report, file_of=file_of, lists=lists(report))


def lists(report: Report) -> list[Table]:
    """Tables below those of the paper."""
    of = report.tables
    return [table for table in (of.other, of.runs, of.campaigns, of.damaged) if table is not None]


# -- Markdown -------------------------------------------------------------------------------------------------------


def markdown(report: Report) -> str:
    """The same for readers of text."""
    lines = ["# The paper's tables and figures, and what was run", ""]
    lines += [text(report.counts), "", f"Paper: {text(report.source)}. {text(report.made)}.", ""]
    lines += [f"- Storage: {text(each)}" for each in report.storages]
    lines += [f"- {text(note)}" for note in report.notes]
    for table in report.tables.results:
        lines += _table(table)
    for figure in report.figures:
        lines += [
            "",
            f"## {text(figure.title)}",
            "",
            f"![{text(figure.alt)}]({file_of(figure)})",
            "",
            text(figure.caption),
        ]
    lines += ["", "## What was not run", ""]
    lines += [f"- {text(each)}" for each in report.absent] or ["Nothing: every row has a run."]
    for table in lists(report):
        lines += _table(table)
    return "\n".join(lines) + "\n"


def _table(table: Table) -> Sequence[str]:
    lines = ["", f"## {text(table.title)}", ""]
    lines += [f"| {' | '.join(map(text, table.columns))} |", f"|{' --- |' * len(table.columns)}"]
    lines += map(_row, table.rows)
    return [*lines, "", text(table.note)] if table.note else lines


def _row(row: Row) -> str:
    cells = list(map(_cell, row.cells))
    if row.anchor:
        cells[0] = f'<a id="{row.anchor}"></a>{cells[0]}'
    return f"| {' | '.join(cells)} |"


def _cell(cell: Cell) -> str:
    parts = [text(cell.text), *map(_link, cell.links)]
    parts += [f"{text(cell.summary)}: {text('; '.join(cell.more))}"] if cell.more else []
    return "<br>".join(part for part in parts if part)


def _link(link: Link) -> str:
    href = masked(link.href).replace("(", "%28").replace(")", "%29").replace("|", "%7C")
    return f"[{text(link.text)}]({href})" if href else text(link.text)


def text(words: str) -> str:
    """``words`` in Markdown, masked, to be read as they are: no tag, no mark-up, no new cell."""
    escaped = html.escape(masked(" ".join(words.split())), quote=False)
    return re.sub(r"([\\`*_\[\]|~])", r"\\\1", escaped)
