"""The paper's figures, drawn from runs: errors as in Figures 1, 4 and 6, responses of layers as in Figure 7.

Figures are PNG, and read in black and white: thin dashed lines are training errors, bold ones test errors; networks
differ in lightness and marker. Curves of errors have their names at the right end.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import mean
from tempfile import TemporaryDirectory
from typing import Any

from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import MaxNLocator

from orchestrator.config import Family, ModelConfig, Shortcut, TrainConfig
from orchestrator.control.curves import DASHED, MARKERS, Curve, draw_curves, error_range, thinned
from orchestrator.control.description import network as words_of
from orchestrator.report import paper
from orchestrator.report.findings import Run
from orchestrator.report.matching import Group, against, groups_of, is_network, is_of_task, recipe_of, settings
from orchestrator.report.paper import Network, Panel, PaperFigure, Task

_MAX_NAMES = 3  # of runs in a legend's line
_MAX_OTHER = 12  # curves that can still be told apart
_DPI = 130
_LABEL_PT = 8
_LABEL_GAP = 0.05  # of the height of the axes


@dataclass(frozen=True)
class Figure:
    """A figure of the report. png: the file; alt: what it shows, for those who do not see it."""

    key: str
    title: str
    caption: str
    alt: str
    png: bytes
    width_px: int
    height_px: int


@dataclass(frozen=True)
class _Named:
    """A network's curve, and what stands at its end."""

    label: str
    curve: Curve


def figures(
    runs: Sequence[Run], other: Sequence[Run], recipes: Sequence[TrainConfig]
) -> tuple[list[Figure], list[str]]:
    """What can be drawn, and titles of what cannot, since nothing of it was run.

    other: what no row is about; recipes: the paper's, as of ``tables``.
    """
    drawn: list[Figure] = []
    absent: list[str] = []
    for figure in paper.ERROR_FIGURES:
        found = _error_figure(figure, runs, recipes)
        drawn += [found] if found else []
        absent += [] if found else [figure.title]
    for key, title, of in (
        (paper.FIGURE_7_KEY, paper.FIGURE_7_TITLE, [run for run in runs if _is_cifar(run)]),
        ("figure-responses", "Standard deviation of layer responses, others", [r for r in runs if not _is_cifar(r)]),
    ):
        responses = _response_figure(key, title, of, recipes)
        drawn += [responses] if responses else []
        absent += [title] if responses is None and key == paper.FIGURE_7_KEY else []
    rest = _other_figure(other)
    return drawn + ([rest] if rest else []), absent


# -- errors ---------------------------------------------------------------------------------------------------------


def shown(panel: Panel, task: Task, runs: Sequence[Run], recipes: Sequence[TrainConfig]) -> list[Group]:
    """Of each network of a panel one group of seeds: of the paper's shortcut, and as its recipe, before any other; of
    those the one that was trained longest."""
    found = []
    for network in panel.networks:
        mine = [
            run
            for run in runs
            if not run.config.model.factory
            and (run.config.model.family, run.config.model.depth) == (network.family, network.depth)
            and is_of_task(task, run.data)
            and not run.curve.is_empty()
        ]

        def departs(group: Group, network: Network = network) -> tuple[bool, bool]:
            first = group.first
            return not is_network(network, first.config.model), not _is_as_recipe(first, network, recipes)

        found += sorted(groups_of(mine), key=departs)[:1]
    return found


def _is_as_recipe(run: Run, network: Network, recipes: Sequence[TrainConfig]) -> bool:
    """Whether a run sets what the recipe does, or is only smaller: one of three times the steps is another thing."""
    recipe = recipe_of(network, recipes)
    return not settings(recipe, run) and run.config.schedule.max_steps <= recipe.schedule.max_steps


def label_of(model: ModelConfig) -> str:
    """A network's name; of a residual one on ImageNet with its shortcut."""
    name = words_of(model).removeprefix("CIFAR ")
    is_implied = model.family is Family.RESNET and model.shortcut is None and not model.factory
    return f"{name} {Shortcut.B.value}" if is_implied else name


def departures(labelled: Sequence[tuple[str, Run]], task: Task | None, recipes: Sequence[TrainConfig]) -> str:
    """What of the runs in a figure is not as in the paper: sizes and settings, networks that share them together."""
    by_text: dict[str, list[str]] = {}
    for label, run in labelled:
        model = run.config.model
        parts = [against(run, task.scale if task is not None else None)]
        if not model.factory:
            network = Network("", model.family, model.depth, model.shortcut or Shortcut.B)
            differing = settings(recipe_of(network, recipes), run)
            parts += [f"other settings: {', '.join(differing)}"] if differing else []
        if parts != ["as in the paper"]:
            by_text.setdefault("; ".join(parts), []).append(label)
    said = [f"{', '.join(dict.fromkeys(names))}: {text}." for text, names in by_text.items()]
    return f" Against the paper (in brackets: its recipe): {' '.join(said)}" if said else ""


def mean_curve(curves: Sequence[Curve]) -> Curve:
    """Over the iterations at which all curves have a value."""

    def of(series: Sequence[Mapping[int, float]]) -> dict[int, float]:
        steps = set(series[0]).intersection(*series[1:])
        return {step: mean(values[step] for values in series) for step in sorted(steps)}

    return Curve(of([curve.training for curve in curves]), of([curve.validation for curve in curves]))


def _named(group: Group) -> _Named:
    runs = group.finished or group.by_seed
    label = label_of(group.first.config.model)
    if len(runs) > 1:
        label += f" (mean of {len(runs)})"
    if not group.finished:
        label += " (unfinished)"
    return _Named(label, mean_curve([run.curve for run in runs]))


def _error_figure(figure: PaperFigure, runs: Sequence[Run], recipes: Sequence[TrainConfig]) -> Figure | None:
    groups = [shown(panel, figure.task, runs, recipes) for panel in figure.panels]
    panels = [(panel, [_named(group) for group in of]) for panel, of in zip(figure.panels, groups, strict=True)]
    curves = [named.curve for _, of in panels for named in of if not named.curve.is_empty()]
    if not curves:
        return None
    is_split = len(panels) == 1  # Figure 1: training and test errors side by side
    last_step = max(max([*curve.training, *curve.validation]) for curve in curves)
    count = 2 if is_split else len(panels)
    drawn_groups = [group for of in groups for group in of]
    is_test = all(group.first.data.validation_is_test for group in drawn_groups)
    measured = "test error" if is_test else "validation error"
    canvas = Canvas(figsize=(1.0 + 4.2 * count, 4.2), dpi=_DPI, layout="constrained")
    axes = canvas.subplots(1, count, sharey=True, squeeze=False)[0]
    low, high = error_range(curves, last_step)
    for number, ax in enumerate(axes):
        panel, of = panels[0 if is_split else number]
        parts = ("training" if number == 0 else "validation",) if is_split else ("training", "validation")
        ax.set_ylim(low, high)
        _errors(ax, of, parts, last_step)
        words = {"training": "training error", "validation": measured}
        ax.set_title(f"{panel.title}: {words[parts[0]]}" if is_split else panel.title, fontsize=10)
        if number == 0:
            ax.set_ylabel("top-1 error (%)")
    names = [named.label for _, of in panels for named in of]
    drawn = ", ".join(dict.fromkeys(names))
    empty = [panel.title for panel, of in panels if not of]
    caption = f"Thin dashed lines: training error. Bold lines: {measured} (one crop)."
    if figure.task is Task.CIFAR10 and not is_test:
        caption += " The paper's are errors on the test set, these on the validation images of each run's data set."
    if any("mean of" in name for name in names):
        caption += " Runs of several seeds are drawn as their mean."
    caption += f" Not run: {', '.join(empty)}." if empty else ""
    labelled = [(label_of(group.first.config.model), group.first) for group in drawn_groups]
    caption += departures(labelled, figure.task, recipes)
    return _png(canvas, figure.key, figure.title, caption, f"Error curves over iterations: {drawn}.")


def _errors(ax: Any, of: Sequence[_Named], parts: Sequence[str], last_step: int) -> None:
    """The curves of one panel."""
    unit = 10_000 if last_step >= 20_000 else 1
    ends: list[tuple[float, float, str, Any]] = []
    for number, named in enumerate(of):
        color, marker = _color(number, len(of)), MARKERS[number % len(MARKERS)]
        first = number / max(10, len(of) * 9)  # markers of neighbours do not fall on the same iterations
        end = None
        for part in parts:
            values = named.curve.training if part == "training" else named.curve.validation
            if not values:
                continue
            steps, errors = thinned(values)
            is_bold = part == "validation"
            ax.plot(
                [step / unit for step in steps],
                errors,
                color=color,
                linewidth=2.2 if is_bold else 0.9,
                linestyle="solid" if is_bold else DASHED,
                marker=marker,
                markersize=5 if is_bold else 3,
                markerfacecolor="white",
                markevery=(first, 0.2) if len(steps) > 6 else None,
                zorder=3 if is_bold else 2,
            )
            end = (steps[-1] / unit, errors[-1])
        if end is not None:
            ends.append((*end, named.label, color))
    ax.set_xlim(0, last_step / unit * 1.01)
    ax.xaxis.set_major_locator(MaxNLocator(integer=unit == 1, nbins=6))
    ax.set_xlabel("iterations (1e4)" if unit > 1 else "iterations")
    _style(ax)
    if not of:
        ax.text(0.5, 0.5, "not run", transform=ax.transAxes, ha="center", color="0.4")
    _label_ends(ax, ends)


def _label_ends(ax: Any, ends: Sequence[tuple[float, float, str, Any]]) -> None:
    """Names right of the axes, each led to the end (x, y in data) of its curve. The limits of the axes are set."""
    low, high = ax.get_ylim()
    heights = spread([(y - low) / (high - low) for _, y, _, _ in ends], _LABEL_GAP)
    for (x, y, label, color), height in zip(ends, heights, strict=True):
        ax.annotate(
            label,
            xy=(x, y),
            xytext=(1.03, height),
            textcoords="axes fraction",
            va="center",
            fontsize=_LABEL_PT,
            color=color,
            annotation_clip=False,
            parse_math=False,
            arrowprops={"arrowstyle": "-", "color": color, "linewidth": 0.5, "relpos": (0, 0.5), "shrinkB": 3},
        )


def spread(heights: Sequence[float], gap: float) -> list[float]:
    """``heights`` in [0, 1], moved as little as a simple sweep does it so that neighbours are ``gap`` apart."""
    order = sorted(range(len(heights)), key=lambda i: heights[i])
    placed = [min(height, 1.0) for height in heights]
    for below, above in pairwise(order):
        placed[above] = max(placed[above], placed[below] + gap)
    limit = 1.0
    for i in reversed(order):  # what was pushed out at the top pushes back
        placed[i] = min(placed[i], limit)
        limit = placed[i] - gap
    return placed


# -- responses of layers --------------------------------------------------------------------------------------------


def _is_cifar(run: Run) -> bool:
    is_family = run.config.model.family in (Family.CIFAR_RESNET, Family.CIFAR_PLAIN) and not run.config.model.factory
    return is_family and is_of_task(Task.CIFAR10, run.data)


def _response_figure(key: str, title: str, runs: Sequence[Run], recipes: Sequence[TrainConfig]) -> Figure | None:
    """Of each network one run that has them: above in the order of the layers, below sorted."""
    found = with_responses(runs, recipes)
    if not found:
        return None
    names = [label_of(run.config.model) + _state(run) for run in found]
    canvas = Canvas(figsize=(9.4, 6.4), dpi=_DPI, layout="constrained")
    above, below = canvas.subplots(2, 1, sharex=True)
    for ax, is_sorted in ((above, False), (below, True)):
        series = [[layer.response_std for layer in run.layers] for run in found]
        series = [sorted(values, reverse=True) for values in series] if is_sorted else series
        ax.set_ylim(0, 1.08 * max(map(max, series)))
        for number, (run, values) in enumerate(zip(found, series, strict=True)):
            is_plain = run.config.model.family in (Family.PLAIN, Family.CIFAR_PLAIN)
            color = _color(number, len(found))
            ax.plot(
                range(1, len(values) + 1),
                values,
                color=color,
                linewidth=1.0 if is_plain else 1.8,
                linestyle=DASHED if is_plain else "solid",
                marker=MARKERS[number % len(MARKERS)],
                markersize=4,
                markerfacecolor="white",
                markevery=max(1, len(values) // 12),
                label=names[number],
            )
        ax.set_ylabel("std of the response")
        ax.set_xlabel("layer, sorted by magnitude" if is_sorted else "layer, in the order of the network")
        ax.tick_params(labelbottom=True)
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        _style(ax)
    # Curves end at the depth of their network, one over another: names do not fit at their ends.
    handles, labels = above.get_legend_handles_labels()
    legend = canvas.legend(handles, labels, loc="outside right upper", fontsize=9, frameon=False, handlelength=3.5)
    for text in legend.get_texts():
        text.set_parse_math(False)
    caption = (
        "Standard deviation of each 3×3 layer's output after batch norm, before ReLU or addition; above in the order "
        "of the network, below by magnitude. Dashed: plain networks."
    )
    task = Task.CIFAR10 if key == paper.FIGURE_7_KEY else None
    caption += departures([(label_of(run.config.model), run) for run in found], task, recipes)
    return _png(canvas, key, title, caption, f"Responses of layers of {', '.join(names)}.")


def with_responses(runs: Sequence[Run], recipes: Sequence[TrainConfig]) -> list[Run]:
    """Plain networks first. Of each network a run as its recipe before any other, of those the one that was measured
    farthest."""
    found: dict[ModelConfig, Run] = {}

    def rank(run: Run) -> tuple[bool, int]:
        model = run.config.model
        if model.factory:
            return True, run.layers_step
        network = Network("", model.family, model.depth, model.shortcut or Shortcut.B)
        return _is_as_recipe(run, network, recipes), run.layers_step

    for run in runs:
        old = found.get(run.config.model)
        if run.layers and (old is None or rank(run) > rank(old)):
            found[run.config.model] = run
    plain = (Family.PLAIN, Family.CIFAR_PLAIN)
    return sorted(found.values(), key=lambda run: (run.config.model.family not in plain, run.config.model.depth))


def _state(run: Run) -> str:
    """At which step a run was measured, where it has gone on since, or will."""
    if run.layers_step < run.step:
        return f" (at step {run.layers_step:,} of {run.steps or run.step:,})"
    return "" if run.is_finished else f" (unfinished, step {run.layers_step:,})"


# -- other runs -----------------------------------------------------------------------------------------------------


def _other_figure(runs: Sequence[Run]) -> Figure | None:
    """Curves as ``draw_curves`` draws them beside a campaign."""
    groups = groups_of([run for run in runs if not run.curve.is_empty()])[:_MAX_OTHER]
    if not groups:
        return None
    curves = dict[str, Curve]()
    for group in groups:
        named, names = _named(group), [run.name for run in group.runs]
        name = f"{named.label}: {', '.join(names[:_MAX_NAMES])}{' …' if len(names) > _MAX_NAMES else ''}"
        curves[name if name not in curves else f"{name} ({len(curves) + 1})"] = named.curve
    with TemporaryDirectory(prefix="figures-") as folder:
        path = Path(folder) / "other.png"
        draw_curves(curves, path, title=next(iter(curves)) if len(curves) == 1 else "other runs")
        png = path.read_bytes()
    caption = "Thin dashed lines: training error. Bold lines: validation error (one crop)."
    return _figure("figure-other", "Other runs", caption, f"Error curves of {', '.join(curves)}.", png)


# -- files ----------------------------------------------------------------------------------------------------------


def _png(canvas: Canvas, key: str, title: str, caption: str, alt: str) -> Figure:
    stream = io.BytesIO()
    FigureCanvasAgg(canvas).print_png(stream)
    return _figure(key, title, caption, alt, stream.getvalue())


def _figure(key: str, title: str, caption: str, alt: str, png: bytes) -> Figure:
    width, height = (int.from_bytes(png[at : at + 4], "big") for at in (16, 20))  # of a PNG's header
    return Figure(key, title, caption, alt, png, width, height)


def _style(ax: Any) -> None:
    ax.grid(axis="y", color="0.88", linewidth=0.6)
    ax.set_axisbelow(True)
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)


def _color(number: int, count: int) -> Any:
    """In the order of lightness, dark enough for a label on white."""
    return colormaps["inferno"](0.62 * number / max(1, count - 1))
