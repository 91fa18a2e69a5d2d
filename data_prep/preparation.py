"""What every preparation does, whatever its images come from: look at the output, work through the units, report."""

from __future__ import annotations

import errno
import json
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from data_prep.fan_out import fan_out, peak_rss_bytes
from data_prep.parts import MANIFEST, MANIFEST_SHA256, PREPARATION, Unit, clean_up, read_part, write_part
from data_prep.progress import Progress, listed_names, print_summary, size_text
from orchestrator.data.shards import DataSet, Manifest
from orchestrator.remote import StoreRefusedError, StoreUnreachableError, stop_waiting
from orchestrator.storage import Storage, sha256_hex

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
    (name and nbytes of each); the rest of it is the manifest's ``options``. ``modified``: when each file of the source
    was modified, in ns since 1970; 0 where that is not known.

    Names and sizes of the source's files are part of the identity, their content is not: reading it takes as long as
    preparing it. A file replaced by one of the same size shows by its time of modification alone: in an unfinished
    preparation its unit is done again, a finished one tells of files that are newer than it. The limit: after the end
    nobody notices a file that kept its size and has an older time (``cp -p``), nor ever one whose time is not known
    (archives in an object store, stores other than S3).
    """

    def __init__(
        self,
        source: Storage,
        out: Storage,
        identity: Mapping[str, Any],
        modified: Mapping[str, int],
        *,
        num_tasks: int | None = None,
        ray_address: str | None = None,
    ) -> None:
        self.source, self.out, self.identity = source, out, identity
        self._modified = modified
        claim = {**identity, "modified": self.version(list(modified))}
        self.claim = (json.dumps(claim, indent=1, sort_keys=True) + "\n").encode()
        self._num_tasks, self._ray_address = num_tasks, ray_address
        self._started_s = time.monotonic()
        self._worst_bytes = 0

    def version(self, names: Sequence[str]) -> str:
        """A digest of when the files ``names`` of the source were modified."""
        return sha256_hex(" ".join(str(self._modified[name]) for name in names).encode())[:16]

    def carry_out(self, do: Callable[[], Report]) -> Report:
        """``do()``, unless the data set is finished, now or when it fails. Raises ValueError and OSError."""
        manifest = self.finished()
        if manifest is None:
            try:
                with naming_full_disk(self.out):
                    return do()
            except StoreUnreachableError:
                raise
            except (ValueError, OSError):
                # The same command, started twice, may have finished it, and removed what this one needs.
                manifest = self.finished()
                if manifest is None:
                    raise
        report = self.report(manifest, notes=self._newer())
        return replace(report, already_finished=True)

    def finished(self) -> Manifest | None:
        """The manifest where all is done. Raises ValueError where something else, or damaged, is at the output."""
        if not self._is_finished():
            # In this order: another preparation creates the claim, files, the manifest, and removes the claim.
            has_files = any(not n.startswith(".") for f in ("", "train", "val", "test") for n in self.out.files(f))
            claim = self._claimed()
            if claim is not None:
                self._check_same(claim, "an unfinished preparation")
                return None
            if not self._is_finished():
                if has_files:
                    raise ValueError(
                        f"{self.out.url!r} is not empty, and what it holds is no data set: give a new folder as --out"
                    )
                return None
        with self._telling_damage():
            data_set = DataSet(self.out)
            if self.out.exists(MANIFEST_SHA256) and data_set.digest.encode() not in self.out.read(MANIFEST_SHA256):
                raise ValueError(f"{MANIFEST} is not the one of {MANIFEST_SHA256}")
        manifest = data_set.manifest
        have = {
            "name": manifest.name,
            "crop": manifest.statistics_crop,
            "sources": [{"name": s.name, "nbytes": s.nbytes} for s in manifest.sources],
            **manifest.options,
        }
        self._check_same(have, "a finished data set")
        with self._telling_damage():
            for split in manifest.splits:
                data_set.check_shards(split)
        clean_up(self.out, manifest.splits)
        return manifest

    def work(self, units: Sequence[Unit], *, needed_bytes: int, beside: Sequence[Beside] = ()) -> None:
        """Claim the output, and do all of ``units`` and ``beside`` that is not done yet. Raises ValueError and OSError.

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
        self._claim()
        beside = [item for item in beside if not self.out.exists(item.record)]
        total_bytes, left_bytes = sum(unit.nbytes for unit in units), sum(unit.nbytes for unit in remaining)
        with Progress(
            total_bytes=total_bytes, done_bytes=total_bytes - left_bytes, done_images=done_images
        ) as progress:
            if not remaining and not beside:
                return
            for item, num_images, peak_bytes in fan_out(
                _Work(self.source, self.out, self.claim),
                list[Unit | Beside](remaining),
                beside=beside,
                num_tasks=tasks_for(left_bytes, self._num_tasks),
                ray_address=self._ray_address,
            ):
                self._worst_bytes = max(self._worst_bytes, peak_bytes)
                if isinstance(item, Unit):
                    progress.advance(num_images, item.nbytes)
        now = self._modified_now()
        changed = [name for name, time_ns in self._modified.items() if now.get(name) != time_ns]
        if changed:
            raise ValueError(
                f"files of {self.source.url!r} were changed while they were read: {len(changed)} "
                f"({listed_names(changed)}): when nothing writes there any more, run again"
            )

    def report(self, manifest: Manifest, *, notes: Sequence[str] = ()) -> Report:
        seconds = time.monotonic() - self._started_s
        worst_bytes = max(self._worst_bytes, peak_rss_bytes())
        return Report(self.out, manifest, seconds, worst_bytes, notes=tuple(notes))

    def _is_finished(self) -> bool:
        return bool(answered(self.out, "read", lambda: self.out.exists(MANIFEST)))

    @contextmanager
    def _telling_damage(self) -> Iterator[None]:
        """What a ValueError says of the data set, with what to do about it here."""
        try:
            yield
        except StoreRefusedError:
            raise
        except ValueError as error:
            reason = str(error).removesuffix(": prepare the data set again")
            raise ValueError(
                f"{self.out.url!r} holds a damaged data set ({reason}): delete that folder and run again, or give "
                "another --out"
            ) from None

    def _modified_now(self) -> Mapping[str, int]:
        if self.source.is_local:
            return modified_ns(self.source, self._modified)
        if not any(self._modified.values()):
            return self._modified
        return {name: found.modified_ns for name, found in self.source.listing().items()}

    def _claim(self) -> None:
        """Make the output that of this preparation, and of no other one. Raises ValueError where it is another's."""
        if not self.out.create(PREPARATION, self.claim):
            there = self._claimed()
            if there is not None:
                self._check_same(there, "an unfinished preparation")
            if there != json.loads(self.claim):
                # Of other times of modification: one that is still at work must not mix its files with these.
                self.out.publish(PREPARATION, self.claim)
        if self._is_finished():  # and what was claimed, removed: by this claim it is there again
            clean_up(self.out, ())
            raise ValueError(f"another preparation has finished {self.out.url!r} meanwhile: run again")

    def _claimed(self) -> dict[str, Any] | None:
        """What is being prepared at the output."""
        try:
            claim = json.loads(self.out.read(PREPARATION))
        except (FileNotFoundError, NotADirectoryError):
            return None
        except ValueError:
            claim = None
        if not isinstance(claim, dict):
            raise ValueError(
                f"{self.out.url}/{PREPARATION} is damaged: delete {self.out.url!r} to start over, or give another --out"
            )
        return claim

    def _newer(self) -> list[str]:
        """A warning of files that were modified after the data set was published."""
        published = self.out.listing().get(MANIFEST)
        newer = [name for name, time_ns in self._modified.items() if published and time_ns > published.modified_ns > 0]
        if not newer:
            return []
        return [
            f"warning: files of {self.source.url!r} are newer than the data set: {len(newer)} ({listed_names(newer)}): "
            "if their content is another, prepare it into a new --out"
        ]

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
                f"{self.out.url!r} has {size_text(free_bytes)} free, {size_text(needed_bytes)} are needed: make room, "
                "or give another --out"
            )


class _Work:
    """What runs on the machines of the cluster; returns the number of images seen."""

    def __init__(self, source: Storage, out: Storage, claim: bytes) -> None:
        self.source, self.out, self._claim = source, out, claim

    def __call__(self, item: Unit | Beside) -> int:
        with naming_full_disk(self.out):
            if isinstance(item, Unit):
                return write_part(item, self.source, self.out, self._claim).num_files
            item.write(self.source, self.out)
            return 0


@contextmanager
def naming_full_disk(out: Storage) -> Iterator[None]:
    """Where no space is left for ``out``: raises ValueError, which says where, instead of OSError, which does not."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        # What goes to an object store is gathered on this machine first.
        place = out.url if out.is_local else tempfile.gettempdir()
        raise ValueError(
            f"no space is left in {place!r} of {platform.node()} ({error.strerror}): make room there, then the same "
            "command goes on"
        ) from None


def check_options(*, crop: int, max_undecodable: float) -> None:
    """Raises ValueError for values that no preparation takes."""
    if crop < 1 or not 0 <= max_undecodable <= 1:
        raise ValueError("--crop is a number of pixels, --max-undecodable a fraction from 0 to 1")


def check_folder(folder: Storage, name: str) -> None:
    """Raises ValueError where ``folder``, which the command line calls ``name``, is on this machine and is none."""
    if not folder.is_local or Path(folder.url).is_dir():
        return
    if Path(folder.url).exists():
        raise ValueError(f"{name} {folder.url!r} is a file: give the folder that it lies in")
    raise ValueError(f"there is no folder {folder.url!r}: check {name}")


def modified_ns(folder: Storage, names: Iterable[str]) -> dict[str, int]:
    """When each file was modified, in ns since 1970; 0 in an object store. Those that are not there are left out."""
    times: dict[str, int] = {}
    for name in names:
        path = folder.local_path(name)
        with suppress(FileNotFoundError):
            times[name] = path.stat().st_mtime_ns if path else 0
    return times


def tasks_for(nbytes: int, num_tasks: int | None) -> int | None:
    """How many tasks at once read ``nbytes``: where nothing is asked for, none for little data (see ``fan_out``)."""
    return 0 if num_tasks is None and nbytes < _SMALL_BYTES else num_tasks


def answered(storage: Storage, done: str, ask: Callable[[], Any]) -> Any:
    """``ask()``, the first question to ``storage``, which is ``done`` by it. Raises ValueError where that fails."""
    try:
        return ask()
    except (ValueError, StoreUnreachableError):
        raise  # says what to do
    except OSError as error:
        raise ValueError(
            f"{storage.url!r} cannot be {done} ({type(error).__name__}: {error}): check the URL, its permissions and, "
            "for an object store, endpoint and credentials"
        ) from None


def io_text(error: OSError) -> str:
    """``error`` for the user: those of the system, which have a number, need their type beside it."""
    return str(error) if error.errno is None else f"{type(error).__name__}: {error}"


def command(prepare: Callable[[], Report]) -> int:
    """Run ``prepare`` as a command, print what came of it, and return the exit code.

    0: finished. 1: storage failed, or a process was lost: the same command goes on. 2: something to mend first. 130:
    interrupted.
    """
    try:
        report = prepare()
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        hint = "" if isinstance(error, StoreUnreachableError) else ": run again to go on"
        print(f"error: {io_text(error)}{hint}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        stop_waiting()
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
