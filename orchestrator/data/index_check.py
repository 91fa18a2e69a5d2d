"""Whether an index is the one that its manifest names: read whole, beside other work where that is wished.

The index of 10^7 images is half a gigabyte: its digest takes half a second, and a start has other things to do
meanwhile. What is not checked yet must have no consequences: see ``IndexCheck.wait``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np

_SHARDS_AT_A_TIME = 64


class IndexCheck:
    """A check under way, in a thread of its own."""

    def __init__(self, check: Callable[[], None]) -> None:
        thread = ThreadPoolExecutor(1, "check-index")
        self._done: Future[None] = thread.submit(check)
        thread.shutdown(wait=False)

    def wait(self) -> None:
        """Return when it is over. Raises what it has raised."""
        self._done.result()


def file_sha256(path: Path) -> str:
    """Read, not mapped: a process that maps the file holds only what it uses of it. Raises OSError."""
    with path.open("rb", buffering=0) as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def in_order(shard: np.ndarray, counts: Sequence[int]) -> bool:
    """Whether ``shard`` [N] int32 is ``counts[0]`` times 0, ``counts[1]`` times 1 and so on. Takes little memory."""
    if len(shard) != sum(counts):
        return False
    place = 0
    for first in range(0, len(counts), _SHARDS_AT_A_TIME):
        some = counts[first : first + _SHARDS_AT_A_TIME]
        wanted = np.repeat(np.arange(first, first + len(some), dtype=shard.dtype), some)
        if not np.array_equal(shard[place : place + len(wanted)], wanted):
            return False
        place += len(wanted)
    return True
