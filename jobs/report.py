"""The paper's tables and figures beside what was run: ``python jobs/report.py --storage URL [URL …] --out DIR``.

Reads runs, campaigns and ensembles in the storages (and those in folders below them), and asks MLflow's server, where
there is one, for the pages of runs to link to. Writes DIR/index.html, DIR/report.md and DIR/figures; a report that is
there is replaced. Which run stands beside which row is decided by what it is: its network, shortcut and data set. What
is smaller than in the paper is told with it, and what was not run is said to be so.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import tyro

from jobs import cifar10, command_line, imagenet
from orchestrator.code_version import code_version
from orchestrator.control.mlflow_store import one_line, run_pages
from orchestrator.control.tracking import check, default_uri
from orchestrator.masking import masked
from orchestrator.report import findings, page, paper
from orchestrator.report.figures import figures
from orchestrator.report.findings import Findings
from orchestrator.report.page import Report
from orchestrator.report.tables import tables
from orchestrator.storage import Storage


@dataclass(frozen=True)
class Arguments:
    """What is reported, and where."""

    out: str
    """folder of the report: one of its own, inside a storage or elsewhere"""
    storage: tuple[str, ...] = ()
    """URLs of folders that hold runs and campaigns, or of such themselves; empty: IMAGENET_STORAGE"""
    tracking_uri: str = ""
    """MLflow's server, for links to runs; empty: MLFLOW_TRACKING_URI"""


def main() -> int:
    return command_line.launchable_as("report", run, parse)


def parse(argv: Sequence[str]) -> Arguments:
    """What is typed. Raises ValueError where no storage is named."""
    from_environment = tuple(filter(None, [os.environ.get("IMAGENET_STORAGE", "")]))
    arguments = tyro.cli(Arguments, args=list(argv), prog="python jobs/report.py", description=__doc__)
    storages = arguments.storage or from_environment
    if not storages:
        raise ValueError("no storage is named: give --storage URL, or set IMAGENET_STORAGE")
    return Arguments(arguments.out, storages, arguments.tracking_uri)


def run(arguments: Arguments) -> int:
    """Make the report. Returns the exit code."""
    out = Storage(arguments.out)
    page.check_place(out)
    uri = default_uri(arguments.tracking_uri or None, Path.cwd())
    if arguments.tracking_uri:
        check(uri)
    found = findings.read([Storage(url) for url in arguments.storage])
    pages, note = _pages(uri)
    recipes = [recipe() for recipe in (*imagenet.RECIPES.values(), *cifar10.RECIPES.values())]
    made = tables(found, recipes, pages)
    drawn, not_drawn = figures(found.runs, made.others, recipes)
    report = Report(
        storages=tuple(masked(url) for url in arguments.storage),
        counts=(
            f"{made.num_networks_run} of the {made.num_networks} networks of the paper's Tables 2 to 6 (its ensemble "
            f"is one) have a run here. Found {_counts(found)}"
        ),
        notes=tuple(filter(None, [note])),
        tables=made,
        figures=tuple(drawn),
        absent=(*made.absent, *not_drawn),
        source=paper.SOURCE,
        made=f"Made {datetime.now(UTC):%Y-%m-%d %H:%M} UTC by version {code_version()}",
    )
    page.publish(report, out)
    for each in found.damaged:
        print(f"warning: not in the report: {masked(each.url)}: {masked(each.error)}", file=sys.stderr)
    print(f"found     {_counts(found)}")
    print(f"report    {out.url}/{page.PAGE} (and {page.MARKDOWN})")
    return 0


def _counts(found: Findings) -> str:
    finished = sum(run.is_finished for run in found.runs)
    parts = [f"runs: {len(found.runs)} ({finished} finished)", f"ensembles: {len(found.ensembles)}"]
    parts += [f"campaigns: {len(found.campaigns)}"]
    parts += [f"not readable: {len(found.damaged)}"] if found.damaged else []
    return ", ".join(parts) + "."


def _pages(uri: str) -> tuple[dict[str, str], str]:
    """Addresses of runs in MLflow, by folder, and what is to be said of it."""
    try:
        pages = run_pages(uri)
    except Exception as error:  # whatever a client of HTTP raises: a report needs no server
        return {}, f"MLflow at {masked(uri)} cannot be read ({one_line(error)}): links lead to the list of runs."
    if uri.startswith("sqlite:"):
        return {}, "MLflow is a database here, without pages to link to: --tracking-uri names a server that has some."
    return pages, f"MLflow: {masked(uri)}, which knows {len(pages)} runs."


if __name__ == "__main__":
    sys.exit(command_line.exit_code(main, interrupted="the report before is whole, if there was one"))
