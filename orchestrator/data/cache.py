"""Shards of a remote data set on this machine's disk: staged behind the reads, shared by all processes of the machine.

Nobody waits for it: what is not there yet is read from the store by ranges. In the folder lies, in one of our own::

    .lock                       held while room is made for a shard, and while a shard gets its name
    <data set>/<shard>          whole, of the recorded SHA-256; the time of its last use is its modification time
    <data set>/<shard>.part     being fetched, its full size taken from the budget; locked by the process that fetches

Nothing else in the folder is counted or removed.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import math
import os
import re
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

import numpy as np

from orchestrator.data.shards import ShardInfo, Split
from orchestrator.storage import Storage

_log = logging.getLogger(__name__)

_CHUNK_BYTES = 8 << 20
_IN_USE_S = 600.0  # what another run has used within this time is not evicted
_TOUCH_EVERY_S = 60.0
_RETRY_S = 5.0
_OWN_FOLDER = "resnet-orchestrator-shards"
_DATA_SET = re.compile(r"[0-9a-f]{16}")


def default_folder() -> Path:
    """In the folder for temporary files (TMPDIR), of this user alone."""
    return Path(tempfile.gettempdir()) / f"resnet-orchestrator-{os.getuid()}"


class ShardCache:
    """Copies of the shards of ``source`` in ``folder``, which may hold ``budget_bytes`` in all (None: half of what is
    free there). Raises OSError where the folder cannot be used.
    """

    def __init__(self, source: Storage, data_digest: str, folder: Path, budget_bytes: int | None) -> None:
        self._source, self._folder = source, folder / _OWN_FOLDER
        self._home = self._folder / data_digest[:16]
        self._home.mkdir(parents=True, exist_ok=True, mode=0o700)
        owner = self._folder.stat().st_uid
        if owner != os.getuid():
            raise PermissionError(f"{self._folder} belongs to another user ({owner})")
        if budget_bytes is None:
            budget_bytes = shutil.disk_usage(folder).free // 2 + self.staged_bytes()
        self.budget_bytes = budget_bytes
        self._wanted: dict[str, tuple[ShardInfo, ...]] = {}
        self._let_go: dict[Path, float] = {}  # when this process last wanted what it wants no more
        self._damaged: set[str] = set()
        self._changed, self._closing = threading.Event(), threading.Event()
        self._thread: threading.Thread | None = None

    def path(self, shard: str) -> Path:
        """Where the shard of that name lies when it is staged."""
        return self._home / shard.replace("/", "__")

    def open(self, shard: str) -> IO[bytes] | None:
        """The staged shard, unbuffered; None where it is not there (yet, or any more), or cannot be opened."""
        try:
            file = open(self.path(shard), "rb", buffering=0)  # noqa: SIM115 - the caller closes it
        except OSError:  # most often: not there
            return None
        with suppress(OSError):
            os.utime(file.fileno())
        return file

    def want(self, split: str, shards: Sequence[ShardInfo]) -> None:
        """From now on these are to be staged and kept for ``split``, the first first, as far as the budget goes.

        The splits come in the order in which they were first spoken of.
        """
        now_s, kept = time.time(), {shard.name for shard in shards}
        for shard in self._wanted.get(split, ()):
            if shard.name not in kept:
                self._let_go[self.path(shard.name)] = now_s
        self._wanted = {**self._wanted, split: tuple(shards)}
        self._changed.set()
        if self._thread is None and self.budget_bytes > 0:
            self._thread = threading.Thread(target=self._stage, name="stage-shards", daemon=True)
            self._thread.start()

    def follow(self, split: Split, upcoming: Callable[[int], np.ndarray]) -> Callable[[int], None]:
        """To be told the stream position; ``upcoming`` gives the shards [n] int64 to have at hand from there on."""
        last = np.zeros(0, np.int64)

        def follow(position: int) -> None:
            nonlocal last
            shards = upcoming(position)
            if not np.array_equal(shards, last):
                last = shards
                self.want(split.name, [split.info.shards[i] for i in shards.tolist()])

        return follow

    def staged_bytes(self) -> int:
        """Bytes that the folder holds or has promised, for all data sets."""
        return sum(size for _, size, _ in self._content())

    def close(self) -> None:
        """Stop staging; what is staged stays for the next run."""
        self._closing.set()
        self._changed.set()
        if self._thread is not None:
            self._thread.join(timeout=5)  # longer only while the store is away

    # -- the thread ---------------------------------------------------------------------------------------------

    def _stage(self) -> None:
        told = ""
        while not self._closing.is_set():
            self._changed.clear()
            try:
                is_done = self._stage_all([s for shards in self._wanted.values() for s in shards])
            except (OSError, ValueError) as error:  # a full disk, a store that is away: the reads go on without
                is_done = False
                if told != (told := f"shards are not staged on this machine for now: {error}"):
                    _log.warning(told)
            self._changed.wait(_TOUCH_EVERY_S if is_done else _RETRY_S)

    def _stage_all(self, wanted: Sequence[ShardInfo]) -> bool:
        """One pass over what is wanted; False where another process is still fetching some of it."""
        rank = {self.path(s.name): i for i, s in enumerate(wanted)}
        is_done, touched_s = True, -math.inf
        for number, shard in enumerate(wanted):
            if self._closing.is_set() or self._changed.is_set():
                return True
            if time.monotonic() > touched_s + _TOUCH_EVERY_S:
                touched_s = time.monotonic()
                for path in rank:
                    with suppress(FileNotFoundError):
                        os.utime(path)
            path = self.path(shard.name)
            if path.exists() or shard.name in self._damaged:
                continue
            part = path.with_name(path.name + ".part")
            file = self._begin(part, shard.nbytes, rank, number)
            if file is None:
                is_done = is_done and not part.exists()
                continue
            with file:
                is_whole = False
                try:
                    is_whole = self._fetch(shard, file)
                finally:
                    with self._lock():
                        if is_whole:
                            part.replace(path)
                        else:
                            part.unlink(missing_ok=True)
        return is_done

    @contextmanager
    def _lock(self) -> Iterator[None]:
        """Hold the lock of the folder: no other process makes room, begins a shard or names one."""
        self._home.mkdir(parents=True, exist_ok=True, mode=0o700)
        with open(self._folder / ".lock", "ab") as lock:  # for writing, as NFS asks for
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _begin(self, part: Path, nbytes: int, rank: Mapping[Path, int], number: int) -> IO[bytes] | None:
        """A new file of that size, locked; None where there is no room, or where another process fetches it."""
        with self._lock():
            if self._path_of(part).exists():  # staged by another process since we looked
                return None
            if part.exists():
                if not _is_abandoned(part):
                    return None
                part.unlink(missing_ok=True)
            excess = self.staged_bytes() + nbytes - self.budget_bytes
            for path, size, _ in self._evictable(rank, number) if excess > 0 else ():
                if excess > 0 and (path.suffix != ".part" or _is_abandoned(path)):
                    path.unlink(missing_ok=True)
                    excess -= size
            if excess > 0:
                return None
            file = open(part, "xb")  # noqa: SIM115 - the caller closes it
            try:
                fcntl.flock(file, fcntl.LOCK_EX)
                os.posix_fallocate(file.fileno(), 0, nbytes)
            except BaseException:
                file.close()
                part.unlink(missing_ok=True)
                raise
            return file

    @staticmethod
    def _path_of(part: Path) -> Path:
        return part.with_name(part.name.removesuffix(".part"))

    def _fetch(self, shard: ShardInfo, file: IO[bytes]) -> bool:
        """Whether the file holds the shard now: it may be damaged, or the run at its end."""
        for _ in range(2):
            digest = hashlib.sha256()
            file.seek(0)
            for start in range(0, shard.nbytes, _CHUNK_BYTES):
                if self._closing.is_set():
                    return False
                chunk = self._source.read_range(shard.name, start, min(start + _CHUNK_BYTES, shard.nbytes))
                digest.update(chunk)
                file.write(chunk)
            file.flush()
            os.fsync(file.fileno())
            if digest.hexdigest() == shard.sha256:
                return True
        self._damaged.add(shard.name)
        place = f"{self._source.url}/{shard.name}"
        _log.warning(
            "%s is damaged (its SHA-256 is not the recorded one): python -m data_prep.verify tells more", place
        )
        return False

    def _evictable(self, rank: Mapping[Path, int], number: int) -> list[tuple[Path, int, float]]:
        """What may go for the shard wanted as number ``number``: what is wanted less, then what no run uses."""
        now_s, last = time.time(), len(rank)

        def may_go(path: Path, used_s: float) -> bool:
            if path in rank:
                return rank[path] > number
            # Touched since we let go of it, it is in use by another run, or by a worker that is not as far.
            return now_s - used_s > _IN_USE_S or used_s <= self._let_go.get(path, -math.inf)

        found = [(path, size, used_s) for path, size, used_s in self._content() if may_go(path, used_s)]
        return sorted(found, key=lambda item: (-rank.get(item[0], last), item[2]))

    def _content(self) -> Iterator[tuple[Path, int, float]]:
        """Our copies, whole and begun, of all data sets: path, size in bytes, time of the last use."""
        for folder in self._folder.iterdir():
            if not _DATA_SET.fullmatch(folder.name):
                continue
            for path in folder.iterdir():
                if path.name.endswith((".tar", ".tar.part")):
                    with suppress(FileNotFoundError):
                        stat = path.stat()
                        yield path, stat.st_size, stat.st_mtime


def _is_abandoned(part: Path) -> bool:
    """Whether the process that fetched this is gone."""
    try:
        with open(part, "r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except FileNotFoundError:
        return True
    except OSError:
        return False
    return True
