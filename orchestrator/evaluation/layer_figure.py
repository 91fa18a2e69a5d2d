"""Figure 7 of the paper, of runs that were trained: layer responses in the order of the network, and sorted; and the
norms of gradients.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from orchestrator.evaluation.layer_responses import LayerNumbers

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_LONGEST_NAME = 28
_DASHED = (0, (4, 2))
_MARKERS = "os^Dv<>pX*"
_GRAYS = ("0.0", "0.35", "0.6")
_MARKERS_A_LINE = 12


@dataclass(frozen=True)
class Curve:
    """A run's line in each panel; plain networks are dashed, as in the paper."""

    name: str
    is_plain: bool
    layers: Sequence[LayerNumbers]


def png(curves: Sequence[Curve]) -> bytes:
    """A PNG file that reads in black and white. The same numbers give the same bytes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    stream = io.BytesIO()
    FigureCanvasAgg(draw(curves)).print_png(stream, metadata={"Software": None})
    return stream.getvalue()


def draw(curves: Sequence[Curve]) -> Figure:
    """Three panels, one line a run in each, in the order of ``curves``."""
    # Imported here: what never draws should not pay for matplotlib. No pyplot: its figures are global state.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 8.6), dpi=130, layout="constrained")
    original, ranked, gradients = figure.subplots(3, 1)
    for number, curve in enumerate(curves):
        stds = [layer.response_std for layer in curve.layers]
        look = _look(number, curve)
        _line(original, stds, look)
        _line(ranked, sorted(stds, reverse=True), look)
        _line(gradients, [layer.gradient_norm for layer in curve.layers], look)
    original.set_title("responses after batch norm, in the order of the network", fontsize=10)
    ranked.set_title("the same, sorted by magnitude", fontsize=10)
    gradients.set_title("gradient of the loss with respect to the weights, in the order of the network", fontsize=10)
    for axes in (original, ranked):
        axes.set_ylabel("standard deviation", fontsize=9)
        axes.set_ylim(bottom=0)
    gradients.set_ylabel("L2 norm", fontsize=9)
    gradients.set_yscale("log")
    for axes in (original, ranked, gradients):
        axes.set_xlabel("rank" if axes is ranked else "3×3 layer", fontsize=9)
        axes.grid(axis="y", color="0.88", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.tick_params(which="both", labelsize=8.5)
        axes.xaxis.get_major_locator().set_params(integer=True)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    title = "dashed: plain networks" if any(curve.is_plain for curve in curves) else None
    legend = original.legend(fontsize=8, framealpha=0.9, edgecolor="0.8", title=title, title_fontsize=8)
    for text in legend.get_texts():
        text.set_parse_math(False)  # names are the user's: a `$` in one is not mathematics
    return figure


def _look(number: int, curve: Curve) -> dict[str, Any]:
    name = curve.name if len(curve.name) <= _LONGEST_NAME else f"{curve.name[: _LONGEST_NAME - 1]}…"
    every = max(1, len(curve.layers) // _MARKERS_A_LINE)
    return {
        # matplotlib leaves out of the legend what begins with an underscore
        "label": name if not name.startswith("_") else f"\u200b{name}",
        "color": _GRAYS[number % len(_GRAYS)],
        "linestyle": _DASHED if curve.is_plain else "-",
        "linewidth": 1.1,
        "marker": _MARKERS[number % len(_MARKERS)],
        "markersize": 4.5,
        "markerfacecolor": "white",
        # Not all at the same layers: lines that lie on each other would hide one another's.
        "markevery": (number % every, every),
    }


def _line(axes: Any, values: list[float], look: dict[str, Any]) -> None:
    axes.plot(range(1, len(values) + 1), values, **look)
