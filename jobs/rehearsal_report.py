"""What a rehearsal has found: rows, totals, the table."""

from __future__ import annotations

import json
import sqlite3
from dataclasses import asdict, dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table


@dataclass
class Row:
    """What became of one fault. Times in seconds."""

    fault: str
    what: str
    promise: str
    injected: bool = True
    at_step: int = 0
    struck: str = ""
    survived: bool = False
    recover_s: float | None = None
    steps_redone: int = 0
    note: str = ""


@dataclass
class Report:
    """All that a rehearsal has found."""

    seed: int
    rows: list[Row] = field(default_factory=list)
    clean_sha256: str = ""
    sha256: str = ""
    wrong_images: int = 0
    tracking: str = ""
    notes: list[str] = field(default_factory=list)
    goodput_percent: float | None = None

    @property
    def is_as_promised(self) -> bool:
        kept = all(row.survived for row in self.rows if row.injected)
        return (
            kept and self.sha256 == self.clean_sha256 and not self.wrong_images and not self.tracking and not self.notes
        )


def tracking_faults(database: Path, run: str, steps: int) -> str:
    """What is wrong with the steps of the run at URL ``run`` in MLflow's database, which may have those of other
    rehearsals too; "" where each is there once."""
    with sqlite3.connect(database) as store:
        found = store.execute(
            "select step, count(*) from metrics join tags using (run_uuid) "
            "where tags.key = 'run_key' and tags.value = ? and metrics.key = 'train_loss' group by step",
            (run,),
        ).fetchall()
    twice = [step for step, count in found if count > 1]
    lost = sorted(set(range(1, steps + 1)) - {step for step, _ in found})
    words = [f"MLflow lacks the steps {lost[:10]}"] if lost else []
    return "; ".join([*words, f"MLflow has the steps {twice[:10]} more than once"] if twice else words)


_COLUMNS = ("fault", "injected at", "survived", "seconds to recover", "steps redone")


def _cells(row: Row) -> list[str]:
    if not row.injected:
        return [row.what, row.note, "–", "–", "–"]
    seconds = "–" if row.recover_s is None else f"{row.recover_s:.1f}"
    at = f"step {row.at_step}: {row.struck}" if row.at_step else row.struck
    survived = f"yes: {row.promise}" if row.survived else f"NO: {row.note}"
    return [row.what, at, survived, seconds, str(row.steps_redone)]


def _totals(report: Report) -> list[str]:
    lines = [f"images lost or repeated: {report.wrong_images}"]
    if report.goodput_percent is not None:
        lines.append(
            f"goodput: {report.goodput_percent:.1f} % (steps that were kept × time of a step undisturbed / all time)"
        )
    else:
        same = report.sha256 == report.clean_sha256
        digest = report.clean_sha256[:16]
        lines.append(f"weights equal to the clean run's: {'yes' if same else 'NO'} (SHA-256 {digest}…)")
        lines.append(f"every step once in MLflow: {report.tracking or 'yes'}")
    return [*lines, *report.notes]


def show(report: Report, out: Path) -> None:
    """The table in the terminal; ``rehearsal.json`` and ``rehearsal.md`` in ``out``."""
    table = Table(*_COLUMNS)
    for row in report.rows:
        table.add_row(*_cells(row))
    console = Console(highlight=False)
    console.print(table)
    for line in _totals(report):
        console.print(line, soft_wrap=True)
    text = [f"| {' | '.join(_COLUMNS)} |", f"|{'---|' * len(_COLUMNS)}"]
    text += [f"| {' | '.join(cell.replace('|', '/') for cell in _cells(row))} |" for row in report.rows]
    text += ["", *(f"- {line}" for line in _totals(report))]
    (out / "rehearsal.md").write_text("\n".join(["# Rehearsal", "", f"Seed {report.seed}.", "", *text, ""]))
    content = asdict(report) | {"as_promised": report.is_as_promised}
    (out / "rehearsal.json").write_text(json.dumps(content, indent=1) + "\n")
