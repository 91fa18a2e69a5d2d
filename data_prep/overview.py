"""What a data set holds, from its indexes: a table, a figure, and what a user should be warned of."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from rich.table import Table

from data_prep.progress import listed_names, printable
from orchestrator.data.shards import Manifest, Split


def images_twice(splits: Mapping[str, Split], digests: Mapping[str, np.ndarray]) -> list[str]:
    """Warnings of images whose bytes are there more than once.

    ``digests``: of the images of each split [n], S16; empty where there is none.
    """
    if not splits:
        return []
    names = list(splits)
    # A placeholder is in the place of every undecodable image.
    rows = [np.flatnonzero((digests[n] != b"") & (splits[n].decodable != 0)) for n in names]
    of_split = np.repeat(np.arange(len(names)), [len(r) for r in rows])
    row, digest = np.concatenate(rows), np.concatenate([digests[n][r] for n, r in zip(names, rows, strict=True)])
    order = np.argsort(digest, kind="stable")
    same = np.flatnonzero(digest[order][1:] == digest[order][:-1]) + 1
    across: dict[tuple[str, str], list[str]] = {}
    within: dict[str, list[str]] = {}
    first = last = -1
    for place in same.tolist():
        # Of equal images the first stands for all: one of the first split.
        first = first if place - 1 == last else place - 1
        last = place
        (one, a), (other, b) = ((names[of_split[k]], int(row[k])) for k in (order[first], order[place]))
        pair = " = ".join(printable(splits[split].names[i].as_py()) for split, i in ((one, a), (other, b)))
        if one != other:
            across.setdefault((one, other), []).append(pair)
        else:
            labels = splits[one].label
            within.setdefault(one, []).append(pair + (" under another label" if labels[a] != labels[b] else ""))
    warnings = []
    for (one, other), pairs in across.items():
        warnings.append(f"leak: images of {other} that are in {one} too: {len(pairs):,} ({listed_names(pairs)})")
    for name, pairs in within.items():
        warnings.append(f"images that are in {name} more than once: {len(pairs):,} ({listed_names(pairs)})")
    return warnings


def absent_classes(manifest: Manifest, splits: Mapping[str, Split]) -> list[str]:
    """Warnings of classes that a labelled split lacks."""
    warnings = []
    for name, split in splits.items():
        counts = _per_class(split, manifest)
        absent = [c.wnid for c in manifest.classes if counts is not None and not counts[c.label]]
        if absent:
            warnings.append(f"classes without an image in {name}: {len(absent)} ({listed_names(absent)})")
    return warnings


def _per_class(split: Split, manifest: Manifest) -> np.ndarray | None:
    """Images of each class [C] int64; None where the split has no labels, or labels of other classes."""
    if not len(split) or split.label.min() < 0 or split.label.max() >= len(manifest.classes):
        return None
    return np.bincount(split.label, minlength=len(manifest.classes))


# -- what is shown ------------------------------------------------------------------------------------------------


def table_of(manifest: Manifest, splits: Mapping[str, Split]) -> Table:
    """One column a split."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("")
    for name in splits:
        table.add_column(name, justify="right")

    def row(title: str, cells: Iterable[str]) -> None:
        table.add_row(title, *cells)

    def spread(values: np.ndarray) -> str:
        return f"{values.min():,.0f} · {np.median(values):,.0f} · {values.max():,.0f}" if len(values) else "–"

    row("images", (f"{len(s):,}" for s in splits.values()))
    row("undecodable, counted as wrong", (f"{(s.decodable == 0).sum():,}" for s in splits.values()))
    row("shards", (f"{len(s.info.shards):,}" for s in splits.values()))
    row("GB", (f"{sum(shard.nbytes for shard in s.info.shards) / 1e9:,.3f}" for s in splits.values()))
    per_class = [_per_class(s, manifest) for s in splits.values()]
    row("classes", ("–" if counts is None else f"{(counts > 0).sum():,}" for counts in per_class))
    row("images a class: min · median · max", ("–" if counts is None else spread(counts) for counts in per_class))
    row("width, pixels", (spread(s.width[s.decodable != 0]) for s in splits.values()))
    row("height, pixels", (spread(s.height[s.decodable != 0]) for s in splits.values()))
    row("bytes of an image", (spread(s.nbytes[s.decodable != 0]) for s in splits.values()))
    return table


def figure_of(manifest: Manifest, splits: Mapping[str, Split]) -> bytes:
    """A PNG: how large images are, and how many each class has. Reads in black and white."""
    # Imported here: what only reads should not pay for matplotlib.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator, ScalarFormatter

    figure = Figure(figsize=(10, 4), dpi=130, layout="constrained")
    sizes, balance = figure.subplots(1, 2)
    above: dict[str, Any] = {
        "loc": "lower right",
        "bbox_to_anchor": (1, 1),
        "ncols": 3,
        "frameon": False,
        "fontsize": 8,
    }
    figure.suptitle(f"{manifest.name}: {sum(len(s) for s in splits.values()):,} images", fontsize=11, parse_math=False)

    # -- sizes: all splits together, they rarely differ -----------------------------------------------------------
    sound = [s.decodable != 0 for s in splits.values()]
    width, height = (
        np.concatenate([getattr(s, side)[ok] for s, ok in zip(splits.values(), sound, strict=True)] or [np.zeros(0)])
        for side in ("width", "height")
    )
    if len(width):
        shorter, longer = np.minimum(width, height), np.maximum(width, height)
        low, high = max(1, shorter.min()) * 0.9, longer.max() * 1.1
        bins = np.geomspace(low, high, 48)
        share = np.full(len(width), 100 / len(width))
        sizes.hist(
            shorter, bins, weights=share, histtype="stepfilled", color="0.8", edgecolor="0.35", label="shorter side"
        )
        sizes.hist(longer, bins, weights=share, histtype="step", color="black", linewidth=1.6, label="longer side")
        if high > 8 * low:
            sizes.set_xscale("log")
            sizes.xaxis.set_major_formatter(ScalarFormatter())
        sizes.legend(**above)
    sizes.set_xlabel("pixels")
    sizes.set_ylabel("images (%)")
    sizes.set_title("image sizes", fontsize=10, loc="left")

    # -- classes --------------------------------------------------------------------------------------------------
    counted = {name: counts for name, s in splits.items() if (counts := _per_class(s, manifest)) is not None}
    styles = [("0.35", "", "-"), ("white", "////", "--"), ("0.7", "....", ":")]
    few = len(manifest.classes) <= 20
    for number, ((name, counts), (shade, hatch, line)) in enumerate(zip(counted.items(), styles, strict=False)):
        if few:
            wide = 0.8 / len(counted)
            places = np.arange(len(counts)) + (number - (len(counted) - 1) / 2) * wide
            balance.bar(places, counts, wide, color=shade, edgecolor="black", hatch=hatch, linewidth=0.8, label=name)
        else:
            ranks = np.arange(1, len(counts) + 1)
            balance.step(ranks, np.sort(counts)[::-1], color="black", linestyle=line, where="mid", label=name)
    if few:
        labels = [printable(c.wnid)[:18] for c in manifest.classes]
        turned = sum(map(len, labels)) > 50
        balance.set_xticks(range(len(labels)), labels, fontsize=8, parse_math=False)
        balance.tick_params(axis="x", rotation=45 if turned else 0)
    else:
        balance.set_xlabel("classes, the largest first")
        if any(counts.max() > 50 * max(1, counts.min()) for counts in counted.values()):
            balance.set_yscale("symlog", linthresh=1)
            balance.yaxis.set_major_formatter(ScalarFormatter())
    balance.set_ylim(bottom=0)
    balance.yaxis.set_major_locator(MaxNLocator(integer=True)) if balance.get_yscale() == "linear" else None
    balance.set_ylabel("images")
    balance.set_title("class balance", fontsize=10, loc="left")
    if counted:
        balance.legend(**above)
    for axes in (sizes, balance):
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    stream = io.BytesIO()
    FigureCanvasAgg(figure).print_png(stream)
    return stream.getvalue()
