"""The paper's tables with what was found beside them, as cells of text and links. Pure."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from orchestrator import models
from orchestrator.config import Family, Protocol, TrainConfig
from orchestrator.control.description import network as words_of
from orchestrator.control.terminal import duration
from orchestrator.evaluation.ensemble import Choice
from orchestrator.masking import masked
from orchestrator.report import paper
from orchestrator.report.cells import Cell, Link, Row, Table, folder_uri
from orchestrator.report.findings import DataFacts, Ensemble, Findings, Run
from orchestrator.report.group_errors import Alike, alike, error_on_test_set, in_words, unfinished
from orchestrator.report.matching import Group, against, fits, groups_of, is_of_task, recipe_of, settings, told
from orchestrator.report.paper import PaperTable, Task

NOT_RUN, NOTHING = "not run", "–"
_PROTOCOLS = {Protocol.TEN_CROP: "10-crop", Protocol.MULTI_SCALE: "multi-scale", Protocol.ONE_CROP: "1-crop"}


_CHOICES = {
    Choice.PLAIN: "all alike",
    Choice.GREEDY: "chosen greedily on labelled images",
    Choice.GIVEN: "weights as given",
}


@dataclass(frozen=True)
class Tables:
    """All tables of a report. absent: what was not run, or not tested as in the paper, a line each; num_networks,
    num_networks_run: networks of the paper's Tables 2 to 6, the ensemble as one, each once, and those of which there
    is a run; others: runs that no row is about."""

    results: tuple[Table, ...]
    other: Table | None
    runs: Table
    damaged: Table | None
    campaigns: Table | None
    absent: tuple[str, ...]
    num_networks: int
    num_networks_run: int
    others: tuple[Run, ...]


def tables(findings: Findings, recipes: Sequence[TrainConfig], pages: Mapping[str, str]) -> Tables:
    """recipes: the paper's, each network's before any other of the same; pages: of runs in MLflow, by folder."""
    return _Builder(findings, recipes, pages).build()


class _Builder:
    def __init__(self, findings: Findings, recipes: Sequence[TrainConfig], pages: Mapping[str, str]) -> None:
        self._findings, self._recipes, self._pages = findings, recipes, pages
        self._anchors = {run.url: f"run-{number}" for number, run in enumerate(findings.runs, start=1)}
        self._shown: set[str] = set()
        self._absent: list[str] = []
        self._not_run: dict[str, list[str]] = {}
        self._networks: dict[paper.Network | str, bool] = {}  # of Tables 2 to 6: whether it was run

    def build(self) -> Tables:
        results = [self._table(each) for each in paper.IMAGENET_TABLES]
        used, ensembles = self._ensembles()
        results += [ensembles, *(self._table(each) for each in paper.CIFAR_TABLES)]
        other = [run for run in self._findings.runs if run.url not in self._shown]
        rest = [each for each in self._findings.ensembles if each not in used]
        campaigns = self._campaigns()
        return Tables(
            tuple(results),
            self._other(other, rest) if other or rest else None,
            self._runs(),
            self._damaged(),
            campaigns,
            (*self._lines_of_absent(), *dict.fromkeys(self._absent)),
            len(self._networks),
            sum(self._networks.values()),
            tuple(other),
        )

    def _lines_of_absent(self) -> list[str]:
        return [f"{title}: {', '.join(networks)}" for title, networks in self._not_run.items()]

    # -- cells ------------------------------------------------------------------------------------------------------

    def _link(self, run: Run) -> Link:
        """To the run in MLflow; without that, to its row in the list of runs."""
        return Link(run.name, self._pages.get(run.url) or f"#{self._anchors[run.url]}")

    def _links(self, group: Group) -> tuple[Link, ...]:
        return tuple(map(self._link, group.runs))

    def _ours(self, group: Group, text: str, absent: str) -> Cell:
        links = self._links(group)
        if not text:
            return Cell(absent, links, is_missing=True)
        return Cell("", (replace(links[0], text=text),)) if len(links) == 1 else Cell(text, links)

    def _validation(self, group: Group) -> Cell:
        last, best = group.values(lambda run: run.last_top1), group.values(lambda run: run.best_top1)
        if not last:
            return Cell("no validation yet", is_missing=True)
        return Cell(f"{told(last)}; best {told(best).partition(' (')[0]}{unfinished(group)}")

    def _against(self, group: Group, network: paper.Network, tests: Alike | None) -> Cell:
        differing = settings(recipe_of(network, self._recipes), group.first)
        summary = f"other settings that differ: {len(differing)} (in brackets: the recipe's)" if differing else ""
        size = against(group.first, network.task.scale, tests.any if tests is not None else None)
        return Cell(size, summary=summary, more=tuple(differing))

    # -- the paper's tables -----------------------------------------------------------------------------------------

    def _table(self, table: PaperTable) -> Table:
        is_cifar = table.protocol is None
        columns = ["network"]
        if is_cifar:
            columns += [
                "parameters: paper",
                "parameters: ours",
                "paper's error, %",
                "our error after the last step, %",
                "our best validation, %",
            ]
        else:
            kinds = ("top-1", "top-5") if table.has_top5 else ("top-1",)
            columns += [f"{whose} {kind}, %" for kind in kinds for whose in ("paper's", "our")]
            columns += ["top-1 in training: last; best, %"]
        columns += ["size, against the paper's"]
        rows: list[Row] = []
        for row in table.rows:
            groups = groups_of([r for r in self._findings.runs if fits(row.network, r.config.model, r.data)])
            if table is not paper.FIGURE_6_PLAIN:
                self._networks[row.network] = bool(groups)
            if not groups:
                self._not_run.setdefault(table.title.partition(":")[0], []).append(row.network.label)
                rows.append(_empty(row, columns))
            for group in groups:
                self._shown |= {run.url for run in group.runs}
                rows.append(Row(tuple(self._cells(table, row, group))))
        return Table(table.key, table.title, tuple(columns), tuple(rows), _note(table))

    def _cells(self, table: PaperTable, row: paper.Row, group: Group) -> list[Cell]:
        cells = [Cell(row.network.label)]
        if table.protocol is None:
            cells += [
                _or_nothing(row.parameters),
                Cell(f"{_parameters(row.network) / 1e6:.2f}M"),
                _or_nothing(row.top1),
            ]
            error = error_on_test_set(group)
            cells += [self._ours(group, error.text, "no error yet")]
            cells += [self._ours(group, in_words(group, lambda run: run.best_top1), "no error yet")]
            return [*cells, self._against(group, row.network, error.tests)]
        absent = f"not tested by {_PROTOCOLS[table.protocol]}"
        tests = next(iter(alike(group, "val", table.protocol.value)), None)
        place = f"{table.title.partition(':')[0]}: {row.network.label}"
        if tests is None:
            self._absent.append(f"{place}: trained, {absent}")
            top1 = top5 = ""
        else:
            if tests.procedure.departures:
                self._absent.append(f"{place}: tested otherwise than in the paper: {tests.procedure}")
            top1, top5 = (in_words(group, of, tests.procedure) for of in (tests.top1, tests.top5))
        cells += [Cell(row.top1), self._ours(group, top1, absent)]
        cells += [Cell(row.top5), self._ours(group, top5, absent)] if table.has_top5 else []
        return [*cells, self._validation(group), self._against(group, row.network, tests)]

    def _ensembles(self) -> tuple[list[Ensemble], Table]:
        """Those of residual networks on ImageNet, and their table."""
        used = [each for each in self._findings.ensembles if _is_papers(each)]
        label, top5 = Cell(paper.ENSEMBLE_LABEL), Cell(f"{paper.ENSEMBLE_TOP5} (test)")
        self._networks[paper.ENSEMBLE_LABEL] = bool(used)
        rows = [Row((label, top5, *self._ensemble(each))) for each in used]
        if not used:
            self._not_run[paper.TABLE_5_TITLE.partition(":")[0]] = [paper.ENSEMBLE_LABEL]
            rows = [Row((label, top5, *[Cell(NOT_RUN, is_missing=True)] * 2, *[_or_nothing("")] * 2))]
        columns = (
            "ensemble",
            "paper's top-5, %",
            "our top-5, %",
            "our top-1, %",
            "size, against the paper's",
            "members",
        )
        note = (
            "The paper's figure is the test server's. Ours are of the splits whose labels are known; which four "
            "networks stood beside the two of 152 layers is not published."
        )
        return used, Table(paper.TABLE_5_KEY, paper.TABLE_5_TITLE, tuple(columns), tuple(rows), note)

    def _ensemble(self, found: Ensemble) -> list[Cell]:
        """top-5, top-1, size, members."""
        chosen = _CHOICES[found.choice]

        def of(split: str) -> str:
            parts = [split, _protocol(found.protocol)]
            parts += ["held out from the choice"] if split in found.held_out else []
            return ", ".join(parts)

        otherwise = f"; {'; '.join(found.procedures)}" if found.procedures else ""
        texts = [
            "; ".join(f"{error[place]:.2f} ({of(split)})" for split, error in found.errors.items()) for place in (1, 0)
        ]
        link = (Link("folder", folder_uri(found.url)),)
        texts = [text and text + otherwise for text in texts]
        cells = [Cell(text or "no split with labels", link, is_missing=not text) for text in texts]
        images = ", ".join(f"{error[2]:,} images of {split}" for split, error in found.errors.items())
        size = f"{len(found.members)} of {paper.ENSEMBLE_MEMBERS} members, {chosen}, on {found.data_name}"
        if found.classes not in (None, Task.IMAGENET.scale.classes):
            size += f", {found.classes:,} of {Task.IMAGENET.scale.classes:,} classes"
        networks = [words_of(model) if model else name for name, model in zip(found.members, found.models, strict=True)]
        by_url = {run.url: run for run in self._findings.runs}
        folder = found.url.rpartition("/ensemble/")[0]
        # As the ensemble has recorded them, or where a campaign that was moved has them now.
        places = [{url, f"{folder}/members/{name}"} for url, name in zip(found.runs, found.members, strict=True)]
        links = tuple(self._link(by_url[url]) for urls in places for url in sorted(urls & by_url.keys())[:1])
        return [*cells, Cell(f"{size}; {images}" if images else size), Cell(", ".join(networks), links)]

    # -- the rest ---------------------------------------------------------------------------------------------------

    def _other(self, runs: Sequence[Run], ensembles: Sequence[Ensemble]) -> Table:
        rows = []
        for group in groups_of(runs):
            run = group.first
            tests = dict.fromkeys((t.split, t.protocol) for each in group.runs for t in each.tests)
            told_tests = [
                f"{split} by {_protocol(name)}: {said}"
                for split, name in tests
                for each in alike(group, split, name)
                if (said := in_words(group, each.top1, each.procedure))
            ]
            rows.append(
                Row(
                    (
                        Cell(words_of(run.config.model)),
                        Cell(run.data.name or "data set not readable"),
                        self._validation(group),
                        Cell("; ".join(told_tests) or NOTHING, is_missing=not told_tests),
                        Cell(against(run, None)),
                        Cell("", self._links(group)),
                    )
                )
            )
        for each in ensembles:
            _, top1, size, members = self._ensemble(each)
            first = Cell(f"ensemble of {len(each.members)}")
            rows.append(Row((first, Cell(each.data_name), Cell(NOTHING), top1, size, members)))
        columns = ("network", "data", "top-1 in training: last; best, %", "tests: top-1, %", "size", "runs")
        return Table(
            "other-runs", "Other runs", columns, tuple(rows), "Runs and ensembles that no row of the paper is about."
        )

    def _runs(self) -> Table:
        columns = ["run", "network", "recipe", "seed", "data", "state", "step", "training images", "last error, %"]
        columns += ["best, %", "time", "bottleneck", "where"]
        return Table("runs", "All runs", tuple(columns), tuple(map(self._run, self._findings.runs)), _NOTE_RUNS)

    def _run(self, run: Run) -> Row:
        state = "finished" if run.is_finished else "unfinished"
        of = f" of {run.steps:,}" if run.steps is not None and not run.is_finished else ""
        images = f"{run.data.train_images:,}" if run.data.train_images is not None else "not known"
        links = [Link("MLflow", self._pages[run.url])] if run.url in self._pages else []
        problems = tuple(masked(problem) for problem in run.problems)
        cells = (
            Cell(f"{run.campaign}/{run.name}" if run.campaign else run.name),
            Cell(words_of(run.config.model)),
            Cell(run.config.recipe or NOTHING),
            Cell(str(run.config.seed)),
            Cell(run.data.name or "not readable"),
            Cell(state if not problems else f"{state}; damaged: {'; '.join(problems)}"),
            Cell(f"{run.step:,}{of}"),
            Cell(images),
            Cell(_errors(run.last_top1, run.last_top5)),
            Cell(f"{run.best_top1:.2f}" if run.best_top1 is not None else NOTHING),
            Cell(duration(run.seconds) if run.seconds else NOTHING),
            Cell(run.bottleneck or NOTHING),
            Cell("", (*links, Link(masked(run.url), folder_uri(run.url)))),
        )
        return Row(cells, self._anchors[run.url])

    def _damaged(self) -> Table | None:
        rows = [Row((Cell(masked(each.url)), Cell(masked(each.error)))) for each in self._findings.damaged]
        title = "Could not be read"
        return Table("damaged", title, ("folder", "error"), tuple(rows)) if rows else None

    def _campaigns(self) -> Table | None:
        rows = []
        for each in self._findings.campaigns:
            done = sum(state == "done" for _, state in each.members)
            states = "; ".join(f"{name}: {state}" for name, state in each.members if state != "done")
            said = f"{done} of {len(each.members)} members done" + (f"; {masked(states)}" if states else "")
            rows.append(Row((Cell(each.name), Cell(said), Cell("", (Link(masked(each.url), folder_uri(each.url)),)))))
            self._absent += [
                f"campaign {each.name}: member {name}: {masked(state)}"
                for name, state in each.members
                if state != "done"
            ]
        return Table("campaigns", "Campaigns", ("campaign", "state", "where"), tuple(rows)) if rows else None


_NOTE_RUNS = (
    "Errors: top-1 / top-5 of the last validation in training (one crop), and the lowest top-1 beside it. Time: what "
    "the journal accounts for, over all starts."
)


def _note(table: PaperTable) -> str:
    if table.protocol is None:
        return (
            "Ours after the last step: of the test set where that was scored or validates, of one split for all seeds; "
            "each cell says which. The best validation beside it is chosen by the same images."
        )
    how = _PROTOCOLS[table.protocol]
    return f"Ours by {how} on the validation images of the run's own data set. Errors in training are of one crop."


def _errors(top1: float | None, top5: float | None) -> str:
    if top1 is None:
        return NOTHING
    return f"{top1:.2f} / {top5:.2f}" if top5 is not None and math.isfinite(top5) else f"{top1:.2f}"


def _empty(row: paper.Row, columns: Sequence[str]) -> Row:
    """Of a network of which there is no run."""
    known = {"network": row.network.label, "parameters: paper": row.parameters}
    known |= {"paper's error, %": row.top1, "paper's top-1, %": row.top1, "paper's top-5, %": row.top5}
    known |= {column: NOT_RUN for column in columns if column.startswith("our ")}
    cells = [_or_nothing(known.get(column, "")) for column in columns]
    return Row(tuple(replace(cell, is_missing=True) if cell.text == NOT_RUN else cell for cell in cells))


def _protocol(name: str) -> str:
    return next((words for protocol, words in _PROTOCOLS.items() if protocol.value == name), name)


def _or_nothing(text: str) -> Cell:
    return Cell(text or NOTHING, is_missing=not text)


def _is_papers(found: Ensemble) -> bool:
    models_of = [model for model in found.models if model is not None and not model.factory]
    is_all = len(models_of) == len(found.members) > 1
    is_resnet = all(model.family is Family.RESNET for model in models_of)
    return is_all and is_resnet and is_of_task(Task.IMAGENET, DataFacts("", found.data_name))


@functools.cache
def _parameters(network: paper.Network) -> int:
    """Counted, as no file holds it."""
    with torch.device("meta"):
        return models.count_parameters(models.build(network.family, network.depth, num_classes=10, image_size=32))
