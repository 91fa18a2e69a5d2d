"""What every preparation does, whatever its images come from: look at the output, work through the units, report."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from data_prep.fan_out import fan_out, peak_rss_bytes
from data_prep.parts import MANIFEST, PREPARATION, Unit, clean_up, read_part, write_part
from data_prep.progress import Progress, print_summary
from orchestrator.data.shards import DataSet, Manifest
from orchestrator.storage import Storage

_SMALL_BYTES = 256 << 20  # starting Ray takes as long as preparing this much


@dataclass(frozen=True)
class Report:
    """``manifest`` of the data set at ``out``; how long it took and the most memory a process held."""

    out: Storage
    manifest: Manifest
    seconds: float
    peak_rss_bytes: int
    already_finished: bool = False
    notes: tuple[str, ...] = ()


class Beside(Protocol):
    """Work that runs beside the units, and leaves the file ``record`` when it is done."""

    @property
    def record(self) -> str:
        """Name of that file in the output."""

    def write(self, source: Storage, out: Storage) -> None:
        """Do it."""


class Preparation:
    """From ``source`` to a data set at ``out``.

    ``identity``: what decides over the data set, as a JSON object with at least ``name``, ``crop`` and ``sources``
    (name and nbytes of each); the rest of it is the manifest's ``options``.
    """

    def __init__(
        self,
        source: Storage,
        out: Storage,
        identity: Mapping[str, Any],
        *,
        num_tasks: int | None = None,
        ray_address: str | None = None,
    ) -> None:
        self.source, self.out, self.identity = source, out, identity
        self._num_tasks, self._ray_address = num_tasks, ray_address
        self._started_s = time.monotonic()
        self._worst_bytes = 0

    def finished(self) -> Manifest | None:
        """The manifest where all is done. Raises ValueError where something else, or damaged, is at the output."""
        if not self._is_finished():
            if self.out.exists(PREPARATION):
                self._check_same(json.loads(self.out.read(PREPARATION)), "an unfinished preparation")
            elif any(not n.startswith(".") for folder in ("", "train", "val", "test") for n in self.out.files(folder)):
                raise ValueError(
                    f"{self.out.url!r} is not empty, and what it holds is no data set: give a new folder as --out"
                )
            return None
        data_set = DataSet(self.out)
        manifest = data_set.manifest
        have = {
            "name": manifest.name,
            "crop": manifest.statistics_crop,
            "sources": [{"name": s.name, "nbytes": s.nbytes} for s in manifest.sources],
            **manifest.options,
        }
        self._check_same(have, "a finished data set")
        for split in manifest.splits:
            data_set.check_shards(split)
        clean_up(self.out, manifest.splits)
        return manifest

    def work(self, units: Sequence[Unit], *, needed_bytes: int, beside: Sequence[Beside] = ()) -> None:
        """Do all of ``units`` and ``beside`` that is not done yet. Raises ValueError and OSError.

        ``needed_bytes``: space that the whole data set will take.
        """
        self.out.check_writable()
        remaining, done_images, done_bytes = [], 0, 0
        for unit in units:
            part = read_part(unit, self.out)
            if part is None:
                remaining.append(unit)
            else:
                done_images, done_bytes = done_images + part.num_files, done_bytes + part.nbytes
        self._check_space(needed_bytes - done_bytes)
        self.out.publish(PREPARATION, (json.dumps(self.identity, indent=1, sort_keys=True) + "\n").encode())
        beside = [item for item in beside if not self.out.exists(item.record)]
        total_bytes, left_bytes = sum(unit.nbytes for unit in units), sum(unit.nbytes for unit in remaining)
        with Progress(
            total_bytes=total_bytes, done_bytes=total_bytes - left_bytes, done_images=done_images
        ) as progress:
            if not remaining and not beside:
                return
            for item, num_images, peak_bytes in fan_out(
                _Work(self.source, self.out),
                list[Unit | Beside](remaining),
                beside=beside,
                num_tasks=tasks_for(left_bytes, self._num_tasks),
                ray_address=self._ray_address,
            ):
                self._worst_bytes = max(self._worst_bytes, peak_bytes)
                if isinstance(item, Unit):
                    progress.advance(num_images, item.nbytes)

    def report(self, manifest: Manifest, *, already_finished: bool = False, notes: Sequence[str] = ()) -> Report:
        seconds = time.monotonic() - self._started_s
        worst_bytes = max(self._worst_bytes, peak_rss_bytes())
        return Report(self.out, manifest, seconds, worst_bytes, already_finished, tuple(notes))

    def _is_finished(self) -> bool:
        return bool(answered(self.out, "read", lambda: self.out.exists(MANIFEST)))

    def _check_same(self, have: Mapping[str, Any], what: str) -> None:
        for field, want in self.identity.items():
            if have.get(field) != want:
                raise ValueError(
                    f"{self.out.url!r} holds {what} with another {field} ({json.dumps(have.get(field))}, now "
                    f"{json.dumps(want)}): give another --out, or delete that folder to start over"
                )

    def _check_space(self, needed_bytes: int) -> None:
        free_bytes = self.out.free_bytes()
        if free_bytes is not None and free_bytes < needed_bytes:
            raise ValueError(
                f"{self.out.url!r} has {free_bytes / 1e9:.1f} GB free, {needed_bytes / 1e9:.1f} GB are needed: "
                "make room or give another --out"
            )


class _Work:
    """What runs on the machines of the cluster; returns the number of images seen."""

    def __init__(self, source: Storage, out: Storage) -> None:
        self.source, self.out = source, out

    def __call__(self, item: Unit | Beside) -> int:
        if isinstance(item, Unit):
            return write_part(item, self.source, self.out).num_files
        item.write(self.source, self.out)
        return 0


def check_options(*, crop: int, max_undecodable: float) -> None:
    """Raises ValueError for values that no preparation takes."""
    if crop < 1 or not 0 <= max_undecodable <= 1:
        raise ValueError("--crop is a number of pixels, --max-undecodable a fraction from 0 to 1")


def tasks_for(nbytes: int, num_tasks: int | None) -> int | None:
    """How many tasks at once read ``nbytes``: where nothing is asked for, none for little data (see ``fan_out``)."""
    return 0 if num_tasks is None and nbytes < _SMALL_BYTES else num_tasks


def answered(storage: Storage, done: str, ask: Callable[[], Any]) -> Any:
    """``ask()``, the first question to ``storage``, which is ``done`` by it. Raises ValueError where that fails."""
    try:
        return ask()
    except ValueError:
        raise  # says what to do
    except Exception as error:  # object stores raise exceptions of their own libraries
        raise ValueError(
            f"{storage.url!r} cannot be {done} ({type(error).__name__}: {error}): check the URL, its permissions and, "
            "for an object store, endpoint and credentials"
        ) from None


def command(prepare: Callable[[], Report]) -> int:
    """Run ``prepare`` as a command, print what came of it, and return the exit code."""
    try:
        report = prepare()
    except (ValueError, OSError) as error:
        message = (
            str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}: run again to go on"
        )
        print(f"error: {message}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: the same command goes on from here", file=sys.stderr)
        return 130
    print_summary(
        report.out,
        report.manifest,
        seconds=report.seconds,
        peak_rss_bytes=report.peak_rss_bytes,
        already_finished=report.already_finished,
        notes=report.notes,
    )
    return 0
