"""What was measured of an ensemble, as tables for people and as JSON for programs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from orchestrator.evaluation.analysis import LabelledAnalysis, SplitAnalysis, Subset, Tested
from orchestrator.evaluation.bootstrap import Estimate

_HARDEST = 20  # classes


@dataclass(frozen=True)
class Table:
    """rows: as many cells each as there are columns. note: a sentence below it."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""


def files(analyses: Mapping[str, SplitAnalysis], weighting: str, chosen_on: str = "") -> dict[str, bytes]:
    """``report.json`` and ``report.md``, by name. chosen_on: the split whose images the weights were chosen on."""
    plain = {split: asdict(analysis) for split, analysis in analyses.items()}
    lines = ["# Ensemble", "", f"Weights: {weighting}. Errors in percent, with their 95 % bootstrap intervals.", ""]
    for split, analysis in analyses.items():
        lines += [f"## {split}: {summary(analysis)}", ""]
        if analysis.labelled is not None:
            lines += [f"![what each member adds](figures/{split}.png)", ""]
        for table in tables(analysis, is_flattered=split == chosen_on):
            lines += [f"### {table.title}", "", _line(table.columns), f"|{'---|' * len(table.columns)}"]
            lines += [*map(_line, table.rows), ""]
            lines += [table.note, ""] if table.note else []
    return {
        "report.json": (json.dumps(plain, indent=1, sort_keys=True, allow_nan=False) + "\n").encode(),
        "report.md": "\n".join(lines).encode(),
    }


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"


def summary(analysis: SplitAnalysis) -> str:
    """One line."""
    words = f"{analysis.num_images} images"
    if analysis.num_labelled != analysis.num_images:
        words += f", {analysis.num_labelled} of them labelled"
    if analysis.num_undecodable:
        words += f", {analysis.num_undecodable} undecodable"
    return words


def tables(analysis: SplitAnalysis, *, is_flattered: bool) -> list[Table]:
    """The tables of one split, the most telling first. is_flattered: the weights were chosen on its images."""
    found = []
    if analysis.labelled is not None:
        of = analysis.labelled
        found += [_members(of, is_flattered)]
        found += [_sizes(of)] if len(of.members) > 1 else []
        found += [_confused(of)] if of.confused else []
        found += [_hardest(of)]
    if analysis.agreement:
        rows = tuple((a.first, a.second, _percent(a.same_top1), _percent(a.both_wrong)) for a in analysis.agreement)
        found.append(Table("Agreement", ("member", "member", "same first class %", "both wrong %"), rows))
    return found


def _members(of: LabelledAnalysis, is_flattered: bool) -> Table:
    rows = [
        (
            m.name,
            f"{m.weight:g}",
            *_errors(m.alone),
            _difference(m.gain.top1),
            _difference(m.without.top1) if m.without else "–",
        )
        for m in of.members
    ]
    is_plain = len({m.weight for m in of.members}) == 1
    name = "**average**" if is_plain else "**ensemble**"
    rows += [(f"{name} (chosen on these images)" if is_flattered else name, "", *_errors(of.ensemble), "", "")]
    rows += [] if is_plain else [("plain average", "", *_errors(of.plain), "", "")]
    note = (
        "Average − member: top-1 error of the plain average of all minus the member's own, points; below 0: the "
        "average is better. Without it: points by which the ensemble's top-1 error rises where it is left out."
    )
    if of.greedy is not None:
        g = of.greedy
        rows += [("greedy choice, held out", "", *_errors(g.held_out), "", "")]
        weights = ", ".join(f"{n} × {name}" for name, n in g.weights.items() if n)
        note += (
            f" Greedy choice with replacement, by top-5 error, then top-1: {weights}; {g.seen.top1_error:.2f} / "
            f"{g.seen.top5_error:.2f} % on the images it was made on, which flatters it. Held out: each of "
            f"{len(g.fold_weights)} folds with the weights chosen on the others; that minus the plain average: "
            f"{_difference(g.against_plain.top1)} top-1, {_difference(g.against_plain.top5)} top-5."
        )
    columns = ("", "weight", "top-1 error %", "top-5 error %", "average − member", "without it")
    return Table("Members and their average", columns, tuple(rows), note)


def _sizes(of: LabelledAnalysis) -> Table:
    rows = []
    for size in range(1, of.largest_subset + 1):
        subsets = [s for s in of.subsets if len(s.members) == size]
        best = min(subsets, key=lambda s: (s.top1_error, s.top5_error))
        errors = [f"{each:.2f}" for each in _spread(subsets)]
        rows.append((str(size), str(len(subsets)), *errors, ", ".join(best.members)))
    columns = ("members", "subsets", "best top-1 %", "mean", "worst", "best top-5 %", "the best by top-1")
    note = "Plain averages. The best of many looks better than it is: compare with the held-out figure above."
    if of.largest_subset < len(of.members):
        note += f" Subsets of more than {of.largest_subset} of the {len(of.members)} members were left out."
    return Table("By number of members", columns, tuple(rows), note)


def _spread(subsets: Sequence[Subset]) -> tuple[float, ...]:
    top1 = [s.top1_error for s in subsets]
    return min(top1), sum(top1) / len(top1), max(top1), min(s.top5_error for s in subsets)


def _confused(of: LabelledAnalysis) -> Table:
    rows = tuple((c.words, c.taken_for_words, str(c.num_images)) for c in of.confused)
    return Table("Most confused", ("class", "taken for", "images"), rows)


def _hardest(of: LabelledAnalysis) -> Table:
    there = [c for c in of.classes if c.top1_error is not None]
    hardest = sorted(there, key=lambda c: (-(c.top1_error or 0.0), c.label))[:_HARDEST]
    rows = tuple(
        (c.words or c.wnid, str(c.num_images), _percent(c.top1_error), _percent(c.top5_error)) for c in hardest
    )
    all_shown = len(hardest) == len(of.classes)
    note = "" if all_shown else f"The {len(hardest)} hardest of {len(of.classes)}; all are in report.json."
    return Table("Errors by class", ("class", "images", "top-1 error %", "top-5 error %"), rows, note)


def _errors(tested: Tested) -> tuple[str, str]:
    return _estimate(tested.top1), _estimate(tested.top5)


def _estimate(of: Estimate) -> str:
    return f"{of.value:.2f} [{of.low:.2f}, {of.high:.2f}]"


def _difference(of: Estimate) -> str:
    return f"{of.value:+.2f} [{of.low:+.2f}, {of.high:+.2f}]"


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"
