"""One figure of an ensemble: what each member adds."""

from __future__ import annotations

import io
from typing import Any

from orchestrator.evaluation.analysis import LabelledAnalysis

_LONGEST_NAME = 24


def png(of: LabelledAnalysis, split: str) -> bytes:
    """A PNG file of three panels that reads in black and white: every subset by its size; each member's own error
    against the ensemble's; how much worse the ensemble is without it. The same analysis gives the same bytes.
    """
    # Imported here: what never draws should not pay for matplotlib. No pyplot: its figures are global state.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    members = len(of.members)
    height = max(3.4, 1.5 + 0.34 * members)
    figure = Figure(figsize=(11.0, height), dpi=130, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    by_size, alone, without = figure.subplots(1, 3, width_ratios=[1.15, 1.0, 1.0])
    title = f"What each member adds: {split}, {of.errors.num_images} images, with 95 % intervals"
    figure.suptitle(title, fontsize=11, parse_math=False)
    _by_size(by_size, of)
    _alone(alone, of)
    _without(without, of)
    for axes in (by_size, alone, without):
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
        axes.set_axisbelow(True)
        axes.tick_params(labelsize=8.5)
    names = [m.name if len(m.name) <= _LONGEST_NAME else f"{m.name[: _LONGEST_NAME - 1]}…" for m in of.members]
    for axes in (alone, without):
        axes.set_ylim(members - 0.5, -0.5)
        axes.grid(axis="x", color="0.88", linewidth=0.6)
        # Names are the user's: a `$` in one is not mathematics.
        axes.set_yticks(range(members), names if axes is alone else [""] * members, parse_math=False)
    stream = io.BytesIO()
    canvas.print_png(stream, metadata={"Software": None})
    return stream.getvalue()


def _by_size(axes: Any, of: LabelledAnalysis) -> None:
    sizes = range(1, of.largest_subset + 1)
    subsets = {size: [s.top1_error for s in of.subsets if len(s.members) == size] for size in sizes}
    for size, top1 in subsets.items():
        label = "one subset" if size == 1 else None
        axes.plot([size] * len(top1), top1, "o", color="0.55", markerfacecolor="none", markersize=4, label=label)
    axes.plot(sizes, [sum(t) / len(t) for t in subsets.values()], "-", color="black", linewidth=1.8, label="mean")
    axes.plot(sizes, [min(t) for t in subsets.values()], ":", color="black", linewidth=1.2, label="best, chosen here")
    if of.greedy is not None:
        held_out = of.greedy.held_out.top1.value
        axes.axhline(held_out, color="0.3", linewidth=1.0, linestyle=(0, (5, 2)), label="greedy choice, held out")
    axes.set_xticks(list(sizes))
    axes.set_title("plain averages of every subset", fontsize=9.5)
    axes.set_xlabel("members in the average", fontsize=9)
    axes.set_ylabel("top-1 error (%)", fontsize=9)
    axes.grid(axis="y", color="0.88", linewidth=0.6)
    axes.legend(fontsize=7.5, framealpha=0.9, edgecolor="0.8")


def _alone(axes: Any, of: LabelledAnalysis) -> None:
    ensemble = of.ensemble.top1
    axes.axvspan(ensemble.low, ensemble.high, color="0.9", linewidth=0)
    axes.axvline(ensemble.value, color="black", linewidth=1.4)
    for row, member in enumerate(of.members):
        top1 = member.alone.top1
        axes.plot([top1.low, top1.high], [row, row], "-", color="0.45", linewidth=1.0)
        axes.plot([top1.value], [row], "o", color="black", markerfacecolor="white", markersize=6)
    axes.set_title(f"alone (line: the ensemble, {ensemble.value:.2f} %)", fontsize=9.5)
    axes.set_xlabel("top-1 error (%)", fontsize=9)


def _without(axes: Any, of: LabelledAnalysis) -> None:
    axes.axvline(0.0, color="black", linewidth=0.8)
    for row, member in enumerate(of.members):
        if member.without is None:
            axes.text(0.0, row, "  not in the ensemble" if len(of.members) > 1 else "", va="center", fontsize=7.5)
            continue
        top1 = member.without.top1
        axes.barh(row, top1.value, height=0.55, color="0.75", edgecolor="black", linewidth=0.7)
        axes.plot([top1.low, top1.high], [row, row], "|-", color="black", linewidth=1.0, markersize=6)
    axes.set_title("left out: the ensemble's error rises by", fontsize=9.5)
    axes.set_xlabel("points of top-1 error", fontsize=9)
