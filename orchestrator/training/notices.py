"""What a run tells while it goes on: events, and the warnings of the parts below as events."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

Event = dict[str, Any]


def notice(text: str) -> Event:
    """A line for whoever watches; it is not part of the journal."""
    return {"kind": "notice", "text": text}


@contextmanager
def warnings_told(emit: Callable[[Event], None], rank: int) -> Iterator[None]:
    """Within it, warnings of storage and input (a store that is away, a damaged shard) are notices of ``rank``."""
    handler = _Handler(emit, rank)
    loggers = [
        logging.getLogger(name) for name in ("orchestrator.remote", "orchestrator.data", "orchestrator.training")
    ]
    for logger in loggers:
        logger.addHandler(handler)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeHandler(handler)


class _Handler(logging.Handler):
    def __init__(self, emit: Callable[[Event], None], rank: int) -> None:
        super().__init__(logging.WARNING)
        self._emit, self._rank = emit, rank

    def emit(self, record: logging.LogRecord) -> None:
        self._emit(notice(f"worker {self._rank}: {record.getMessage()}"))
