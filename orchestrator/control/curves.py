"""Error curves from the journals of training runs, drawn as Figure 4 of Deep Residual Learning for Image Recognition.

A journal is a run's list of events, one JSON object a line. Its kinds are named in :class:`EventKind`; whoever reads a
journal ignores the kinds that it does not know.
"""

from __future__ import annotations

import atexit
import json
import math
import os
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

# Noise of single intervals hides the curve behind it once there are more points than pixels.
_MAX_DRAWN_POINTS = 500
MARKERS = "osD^v<>pX*"
_VALIDATION_WIDTH_PT = 2.2
_TRAINING_WIDTH_PT = 0.9
DASHED = (0, (4, 2))
_EXIT_S = 30.0


class EventKind(StrEnum):
    """The kinds of events that are tracked and drawn: a journal's, the start of a group of workers, a test's result."""

    START = "start"
    TRAIN = "train"
    VALIDATION = "validation"
    DECISION = "decision"
    CHECKPOINT = "checkpoint"
    SCORES = "scores"
    TUNED = "tuned"


def read_journal(lines: Iterable[str]) -> list[dict[str, Any]]:
    """Events of a journal given as JSON lines, in their order.

    An unfinished last line (a writer that was killed) is left out; any other line that is no JSON object raises
    ValueError with its number.
    """
    numbered = [(number, line) for number, line in enumerate(lines, start=1) if line.strip()]
    events: list[dict[str, Any]] = []
    for number, line in numbered:
        try:
            event = json.loads(line)
        except ValueError as error:
            if number == numbered[-1][0]:
                break
            raise ValueError(f"journal line {number} is not JSON ({error}): restore the file or cut it there") from None
        if not isinstance(event, dict):
            raise ValueError(f"journal line {number} is {type(event).__name__}, not an event: is this a journal?")
        events.append(event)
    return events


@dataclass
class Curve:
    """What is drawn of one run: errors in percent (0..100) by iteration, and the learning rates decided on.

    An iteration that occurs twice (a run resumed from an earlier checkpoint) keeps its later value.
    """

    training: dict[int, float] = field(default_factory=dict)
    validation: dict[int, float] = field(default_factory=dict)
    learning_rates: dict[int, float] = field(default_factory=dict)

    @classmethod
    def of(cls, events: Iterable[Mapping[str, Any]]) -> Curve:
        """The curve of a run from its journal's events; events that carry nothing to draw are passed over."""
        curve = cls()
        for event in events:
            curve.add(event)
        return curve

    def add(self, event: Mapping[str, Any]) -> None:
        """Take one event in; never raises on an event that lacks a field."""
        step = event.get("step")
        if not isinstance(step, int):
            return
        match event.get("kind"):
            case EventKind.TRAIN:
                _put(self.training, step, event.get("metrics"), "train_top1_error")
            case EventKind.VALIDATION:
                _put(self.validation, step, event.get("metrics"), "validation_top1_error")
            case EventKind.DECISION:  # of "stop" the two rates are one
                key = "learning_rate"
                decision = event.get("decision")
                if isinstance(decision, Mapping) and decision.get("learning_rate_before") != decision.get(key):
                    _put(self.learning_rates, step, decision, key)

    def copy(self) -> Curve:
        """A copy that later events do not change."""
        return Curve(dict(self.training), dict(self.validation), dict(self.learning_rates))

    def is_empty(self) -> bool:
        """True while there is no error to draw."""
        return not self.training and not self.validation


def _put(values: dict[int, float], step: int, source: Any, key: str) -> None:
    value = source.get(key) if isinstance(source, Mapping) else None
    if isinstance(value, int | float) and math.isfinite(value):
        values[step] = float(value)


def draw_errors(journal_events_by_run: Mapping[str, Sequence[Mapping[str, Any]]], path: Path, *, title: str) -> None:
    """Draw the top-1 errors (percent) of several runs over iterations into the PNG ``path``; see :func:`draw_curves`.

    Raises ValueError if no run has an error to draw, OSError if ``path`` cannot be written.
    """
    draw_curves({name: Curve.of(events) for name, events in journal_events_by_run.items()}, path, title=title)


def draw_curves(curve_by_run: Mapping[str, Curve], path: Path, *, title: str) -> None:
    """Draw ``curve_by_run`` into the PNG ``path``, which appears whole or not at all. Any thread may call this.

    Thin dashed lines are training errors (averaged over neighbouring iterations where there are more than 500 points),
    bold solid lines validation errors, thin vertical lines the policy's changes of the learning rate with its new
    value. Runs differ in marker and lightness as well as in colour, so the figure reads in black and white; the legend
    names each once, beside the figure where there are more than two.
    Raises ValueError if no run has an error to draw, OSError if ``path`` cannot be written.
    """
    curves = {name: curve for name, curve in curve_by_run.items() if not curve.is_empty()}
    if not curves:
        raise ValueError("nothing to draw: no journal has a train or validation event with a top-1 error")
    with _DRAWING:
        _draw(curves, path, title)


# A daemon thread that is inside matplotlib's C++ when Python ends aborts the process (exit code 134): the end waits
# for it, and nobody begins any more.
_DRAWING = threading.Lock()
atexit.register(_DRAWING.acquire, timeout=_EXIT_S)


def _draw(curves: Mapping[str, Curve], path: Path, title: str) -> None:
    # Imported here: a training process that never draws should not pay for matplotlib. No pyplot: its figures are
    # global state that threads would share.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.ticker import MaxNLocator

    is_one, many = len(curves) == 1, len(curves) > 2
    figure = Figure(figsize=(8.0 if many else 6.4, 4.6), dpi=130, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_subplot()

    last_step = max(max([*curve.training, *curve.validation]) for curve in curves.values())
    unit = 10_000 if last_step >= 20_000 else 1
    width_pt = 1.7 if many else _VALIDATION_WIDTH_PT
    handles: list[Any] = []
    labels: list[str] = []
    for index, (name, curve) in enumerate(curves.items()):
        color, marker = _color(index, len(curves)), None if is_one else MARKERS[index % len(MARKERS)]
        # Markers of neighbouring runs do not fall on the same iterations.
        first = index % 10 / (10 * 9)
        if curve.training:
            centres, means = thinned(curve.training)
            (line,) = axes.plot(
                [centre / unit for centre in centres],
                means,
                color=color,
                linewidth=_TRAINING_WIDTH_PT,
                linestyle=DASHED,
                marker=marker,
                markersize=3,
                markevery=(first, 1 / 9) if len(means) > 9 else None,
                zorder=2,
            )
            if is_one:
                handles.append(line)
                labels.append("training")
        if curve.validation:
            steps = sorted(curve.validation)
            errors = [curve.validation[step] for step in steps]
            (line,) = axes.plot(
                [step / unit for step in steps],
                errors,
                color=color,
                linewidth=width_pt,
                solid_joinstyle="round",
                zorder=3,
                marker=marker or ("o" if len(steps) == 1 else None),
                markerfacecolor="white",
                markersize=5,
                markevery=(first, 1 / 9) if len(steps) > 9 else None,
            )
        best = f" (best {min(curve.validation.values()):.2f} %)" if curve.validation else ""
        if not is_one or curve.validation:
            handles.append(line)
            # A legend passes over labels that begin with an underscore.
            labels.append(f"validation{best}" if is_one else f"{' ' if name.startswith('_') else ''}{name}{best}")
    if not is_one:
        handles.append(Line2D([], [], color="0.3", linewidth=width_pt))
        handles.append(Line2D([], [], color="0.3", linewidth=_TRAINING_WIDTH_PT, linestyle=DASHED))
        labels += ["validation", "training"]

    axes.set_xlim(0, max(last_step, 1) / unit * 1.01)
    if unit == 1:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylim(*error_range(list(curves.values()), last_step))
    _draw_learning_rates(axes, curves, unit, last_step)
    axes.set_xlabel("iterations (1e4)" if unit > 1 else "iterations")
    axes.set_ylabel("top-1 error (%)")
    # Names are the user's: a `$` in one is not mathematics.
    axes.set_title(title, fontsize=11, parse_math=False)
    axes.grid(axis="y", color="0.88", linewidth=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    if many:
        legend = figure.legend(
            handles, labels, loc="outside right upper", fontsize=7 if len(curves) <= 24 else 5, frameon=False
        )
    else:
        legend = axes.legend(handles, labels, loc="best", fontsize=8, framealpha=0.9, edgecolor="0.8")
    for text in legend.get_texts():
        text.set_parse_math(False)

    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.tmp")
    try:
        canvas.print_png(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _draw_learning_rates(axes: Any, curves: Mapping[str, Curve], unit: int, last_step: int) -> None:
    """A thin line at each change. Runs that go to one rate at about the same time share a label, at the last of their
    lines; a label that would cover its left neighbour goes a line lower."""
    changes = {(step, rate) for curve in curves.values() for step, rate in curve.learning_rates.items()}
    steps_by_label: list[tuple[float, list[int]]] = []
    for step, rate in sorted(changes, key=lambda change: (change[1], change[0])):
        axes.axvline(step / unit, color="0.45", linewidth=0.7, linestyle=(0, (1, 1.5)), zorder=1)
        if steps_by_label and rate == steps_by_label[-1][0] and step - steps_by_label[-1][1][-1] < 0.06 * last_step:
            steps_by_label[-1][1].append(step)
        else:
            steps_by_label.append((rate, [step]))

    free_from: list[float] = []  # by height: the iteration from which the place is free
    for rate, steps in sorted(steps_by_label, key=lambda label: label[1][-1]):
        step = steps[-1]
        level = next((i for i, free in enumerate(free_from) if step >= free), len(free_from))
        if level == len(free_from):
            free_from.append(0.0)
        free_from[level] = step + 0.13 * last_step
        axes.annotate(
            f"lr {rate:g}",
            xy=(step / unit, 1.0),
            xycoords=("data", "axes fraction"),
            xytext=(2, -3 - 10 * (level % 20)),
            textcoords="offset points",
            ha="left",
            va="top",
            fontsize=7,
            color="0.25",
            annotation_clip=False,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.6, "alpha": 0.8},
            zorder=4,
        )


def _color(index: int, count: int) -> Any:
    """Colours in the order of their lightness, so that grey prints tell them apart; one run alone is black."""
    from matplotlib import colormaps

    return "black" if count == 1 else colormaps["inferno"](0.0 + 0.72 * index / (count - 1))


def thinned(error_by_step: Mapping[int, float]) -> tuple[list[float], list[float]]:
    """At most 500 points: the means of equally many neighbours."""
    steps = sorted(error_by_step)
    size = -(-len(steps) // _MAX_DRAWN_POINTS)
    groups = [steps[start : start + size] for start in range(0, len(steps), size)]
    return (
        [sum(group) / len(group) for group in groups],
        [sum(error_by_step[step] for step in group) / len(group) for group in groups],
    )


def error_range(curves: Sequence[Curve], last_step: int) -> tuple[float, float]:
    """Lowest and highest error shown, percent: the first tenth's fall from near 100 % would flatten all the rest."""
    shown = [thinned(values) for curve in curves for values in (curve.training, curve.validation) if values]
    errors = [error for _, ys in shown for error in ys]
    settled = [error for xs, ys in shown for x, error in zip(xs, ys, strict=True) if x >= 0.1 * last_step]
    low, high = min(errors), max(settled)
    margin = max(0.06 * (high - low), 1.0)
    return max(0.0, low - margin), min(101.0, high + margin)  # 101: a curve at 100 % stays visible
