"""How far a preparation is, and what came of it."""

from __future__ import annotations

import shlex
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from types import TracebackType

from rich import progress as bars
from rich.console import Console

from orchestrator.data.shards import PASSED_OVER, RESIZED, Manifest, OddImage
from orchestrator.storage import Storage, sha256_hex

_LINE_EVERY_S = 5.0
MAX_LISTED = 50


class Progress:
    """A bar on a terminal, else a line every few seconds. Rates count only what this run did."""

    def __init__(self, *, total_bytes: int, done_bytes: int = 0, done_images: int = 0) -> None:
        self._total, self._start_bytes = total_bytes, done_bytes
        self._bytes, self._images = done_bytes, done_images
        self._started_s = self._last_line_s = time.monotonic()
        self._console = Console()
        self._bar = bars.Progress(
            bars.TextColumn("{task.fields[images]:,} images"),
            bars.BarColumn(),
            bars.DownloadColumn(),
            bars.TransferSpeedColumn(),
            bars.TimeRemainingColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task = self._bar.add_task("", total=total_bytes, completed=done_bytes, images=done_images)

    def __enter__(self) -> Progress:
        self._bar.start()
        if self._start_bytes and not self._console.is_terminal:
            print(f"going on: {self._images:,} images are done", flush=True)
        return self

    def advance(self, num_images: int, nbytes: int) -> None:
        self._images += num_images
        self._bytes += nbytes
        self._bar.update(self._task, advance=nbytes, images=self._images)
        now_s = time.monotonic()
        if not self._console.is_terminal and now_s - self._last_line_s >= _LINE_EVERY_S:
            self._last_line_s = now_s
            rate = (self._bytes - self._start_bytes) / (now_s - self._started_s)
            left_s = (self._total - self._bytes) / rate if rate else 0
            percent = 100 * self._bytes / max(1, self._total)
            print(f"{self._images:,} images, {percent:.1f} %, {rate / 1e6:.1f} MB/s, {left_s:.0f} s left", flush=True)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._bar.stop()


def print_summary(
    out: Storage,
    manifest: Manifest,
    *,
    seconds: float,
    peak_rss_bytes: int,
    already_finished: bool = False,
    notes: Sequence[str] = (),
) -> None:
    """What the data set holds, where it lies, and what was odd about its images."""
    if already_finished:
        print("already finished; nothing was done")
    for split in in_order(manifest.splits):
        info = manifest.splits[split]
        size = sum(shard.nbytes for shard in info.shards)
        print(f"{split:6} {info.count:>9,} images {len(info.shards):>5,} shards {size / 1e9:>9.3f} GB")
    print(f"{len(manifest.classes)} classes")
    for line in odd_lines(manifest):
        print(line)
    for note in notes:
        print(note)
    print(f"data set  {out.url}")
    print(f"digest    {sha256_hex(manifest.to_bytes())}")
    print(f"check     python -m data_prep.verify {shlex.quote(out.url)}")
    print(f"time      {seconds:.1f} s; largest process {peak_rss_bytes / 2**20:.0f} MiB")


def odd_lines(manifest: Manifest) -> list[str]:
    """What was odd about the files of a data set, and what was done: counts, and each by its name up to a limit."""
    counts = Counter((o.split, o.what) for o in manifest.odd)
    counts.update({(s, what): 0 for s, whats in manifest.counted.items() for what in whats})
    totals: Counter[str] = Counter()
    for split, what in counts:
        totals[what] += manifest.counted.get(split, {}).get(what, counts[split, what])
    resized, passed_over = totals.pop(RESIZED, 0), totals.pop(PASSED_OVER, 0)
    lines = []
    if totals:
        # The rare kinds first: an official set has thousands of grayscale images.
        kinds = sorted(totals, key=lambda what: totals[what])
        lines.append("odd images: " + ", ".join(f"{totals[what]:,} {what}" for what in kinds))
        listed = [o for o in manifest.odd if o.what != PASSED_OVER]
        lines += _listed(sorted(listed, key=lambda o: (kinds.index(o.what), o.split, o.name)), totals.total())
    if passed_over:
        lines.append(f"passed over: {passed_over:,} that are no images of the set")
        lines += _listed([o for o in manifest.odd if o.what == PASSED_OVER], passed_over)
    if resized:
        side = manifest.options.get("max_side")
        lines.append(f"resized: {resized:,} images, to {side} pixels at most (JPEG, quality 95, 4:4:4)")
    return lines


def _listed(odd: Sequence[OddImage], total: int) -> list[str]:
    lines = []
    for o in odd[:MAX_LISTED]:
        what = "" if o.what == PASSED_OVER else f"{o.what}, "
        # Names of a folder often begin with their split.
        split = f"{o.split} " if o.split and not o.name.startswith(f"{o.split}/") else ""
        lines.append(f"  {split}{printable(o.name)}: {what}{o.done}")
    if total > len(lines):
        lines.append(f'  and {total - len(lines):,} more: see "odd" and "counted" in manifest.json')
    return lines


def in_order(splits: Iterable[str]) -> list[str]:
    """train, val, others."""
    return sorted(splits, key=lambda name: ("train" not in name, "val" not in name, name))


def listed_names(names: Sequence[str]) -> str:
    """The first three of ``names``, for a message."""
    return ", ".join(map(printable, names[:3])) + (", …" if len(names) > 3 else "")


def size_text(nbytes: int) -> str:
    """``nbytes`` in a unit that leaves digits to compare."""
    for unit, unit_bytes in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if nbytes >= unit_bytes:
            return f"{nbytes / unit_bytes:.1f} {unit}"
    return f"{nbytes} bytes"


def printable(name: str) -> str:
    """``name`` without what would move the cursor or colour a terminal."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in name)
