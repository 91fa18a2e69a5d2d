"""Stores that fail at a write of one's choice: an fsspec file system (``faulty:///folder``), and a local disk.

Both count the writes of this process below a folder, leases left out: they follow a clock. ``inject`` says at which one
something happens, and what; ``writes`` names those that were made, so that a test can go through all of them.
"""

from __future__ import annotations

import errno
import os
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

import fsspec
from fsspec.spec import AbstractFileSystem

from orchestrator import storage
from orchestrator.remote import Line


class Fault(Enum):
    NONE = "none"
    BEFORE = "before"  # one write is refused
    AFTER = "after"  # one write is done, and its answer is lost
    TORN = "torn"  # half of the bytes of one write are there, and an error
    DOWN = "down"  # no write succeeds any more
    FULL = "full"  # no write succeeds for some seconds; deleting does


@dataclass
class Plan:
    """What happens to the writes below ``folder``: ``fault`` at number ``at`` (from 0). on_disk: without fsspec."""

    folder: str
    on_disk: bool
    fault: Fault = Fault.NONE
    at: int = -1
    full_s: float = 1.0
    writes: list[str] = field(default_factory=list)
    since_s: float = 0.0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def next(self, path: str, *, removes: bool = False) -> Fault:
        """What is to happen to a write of ``path``."""
        if not path.startswith(self.folder) or path.endswith(".lease"):
            return Fault.NONE
        with self.lock:
            number = len(self.writes)
            self.writes.append(path)
        if number == self.at:
            self.since_s = time.monotonic()
        if self.fault is Fault.DOWN:
            return Fault.BEFORE if number >= self.at >= 0 else Fault.NONE
        if self.fault is Fault.FULL:
            is_full = number >= self.at >= 0 and time.monotonic() < self.since_s + self.full_s and not removes
            return Fault.FULL if is_full else Fault.NONE
        return self.fault if number == self.at else Fault.NONE


_plan = Plan("/nowhere", on_disk=False)


@contextmanager
def inject(url: str, fault: Fault = Fault.NONE, at: int = -1, full_s: float = 1.0) -> Iterator[Plan]:
    """While the block runs, ``fault`` at write number ``at`` below ``url``, a folder or ``faulty:///folder``."""
    global _plan
    scheme, _, folder = url.rpartition(":/")
    folder = "/" + folder.lstrip("/")
    before, _plan = _plan, Plan(folder, not scheme, fault, at, full_s)
    try:
        yield _plan
    finally:
        _plan = before


def _error(fault: Fault) -> OSError:
    number = errno.ENOSPC if fault is Fault.FULL else errno.EIO
    return OSError(number, os.strerror(number))


class FaultyFileSystem(AbstractFileSystem):
    """A folder of this machine behind fsspec's door: no rename, no sync; what is torn stays torn."""

    protocol = "faulty"

    def ls(self, path: str, detail: bool = True, **options: Any) -> list[Any]:
        here = Path(self._strip_protocol(path))
        if here.is_file():
            found = [self.info(str(here))]
        else:  # as in an object store, a folder is there as long as something is in it
            found = [self.info(str(p)) for p in sorted(here.iterdir()) if p.is_file() or any(p.rglob("*.*"))]
        return found if detail else [each["name"] for each in found]

    def info(self, path: str, **options: Any) -> dict[str, Any]:
        here = Path(self._strip_protocol(path))
        kind = "directory" if here.is_dir() else "file"
        return {"name": str(here), "size": here.stat().st_size, "type": kind}

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **options: Any) -> bytes:
        return Path(self._strip_protocol(path)).read_bytes()[start:end]

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **options: Any) -> None:
        here = Path(self._strip_protocol(path))
        fault = _plan.next(str(here))
        if fault in (Fault.BEFORE, Fault.FULL):
            raise _error(fault)
        here.parent.mkdir(parents=True, exist_ok=True)
        with here.open("xb" if mode == "create" else "wb") as stream:
            stream.write(value[: len(value) // 2] if fault is Fault.TORN else value)
        if fault in (Fault.AFTER, Fault.TORN):
            raise _error(fault)

    def put_file(self, lpath: str, rpath: str, **options: Any) -> None:
        self.pipe_file(rpath, Path(lpath).read_bytes())

    def rm(self, path: str, recursive: bool = False, maxdepth: int | None = None) -> None:
        here = Path(self._strip_protocol(path))
        for file in [here] if here.is_file() else sorted(p for p in here.rglob("*") if p.is_file()):
            fault = _plan.next(str(file), removes=True)
            if fault is Fault.BEFORE:
                raise _error(fault)
            file.unlink(missing_ok=True)
            if fault in (Fault.AFTER, Fault.TORN):
                raise _error(fault)
        shutil.rmtree(here, ignore_errors=True)


fsspec.register_implementation("faulty", FaultyFileSystem, clobber=True)
storage.EXCLUSIVE_PROTOCOLS.add("faulty")


def impatient(run: storage.Storage) -> storage.Storage:
    """``run``; calls to its store give up after a moment, from now on: tests do not wait for five minutes."""
    if not run.is_local:
        run._line = storage._LINES[run.fs] = Line(first_contact_s=0.05, patience_s=0.05)
    return run


# -- a local disk -----------------------------------------------------------------------------------------------------


def _watch_disk(event: str, arguments: tuple[Any, ...]) -> None:
    """Python's audit events come before the operation: after it is before the next one."""
    if not _plan.on_disk:
        return
    if event == "open":
        path, _, flags = arguments
        if not isinstance(path, str) or not flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            return
    elif event in ("os.rename", "os.link"):
        path = str(arguments[1])
    elif event in ("os.mkdir", "os.remove", "os.rmdir", "shutil.rmtree"):
        path = str(arguments[0])
    else:
        return
    if threading.current_thread().name == "lease":
        return
    fault = _plan.next(path, removes=event in ("os.remove", "os.rmdir", "shutil.rmtree"))
    if fault is not Fault.NONE:
        raise _error(fault)


sys.addaudithook(_watch_disk)
