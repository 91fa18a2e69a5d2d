"""What a campaign shows on the terminal while it goes on."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.text import Text

from orchestrator.campaign import status as campaign_status
from orchestrator.storage import Storage

_LOOK_EVERY_S, _LOOK_AFAR_EVERY_S = 5.0, 30.0  # each look reads a journal a member; afar: an object store
_LINES_EVERY_S = 30.0
_FILE_WIDTH = 200


def pause_s(folder: Storage) -> float:
    """Seconds between two looks at a campaign's folder."""
    return _LOOK_EVERY_S if folder.is_local else _LOOK_AFAR_EVERY_S


def console_of_table() -> Console:
    """A table in a file or pipe is not squeezed into 80 columns."""
    return Console(highlight=False, width=None if sys.stdout.isatty() else _FILE_WIDTH)


class Display:
    """Lines as they are told; below them the table of members, or now and then a line each where nobody looks on.

    ``seen`` is given every look at the campaign's folder, in a thread.
    """

    def __init__(self, console: Console, folder: Storage, seen: Callable[[campaign_status.Status], None]) -> None:
        self._console, self._folder, self._seen = console, folder, seen
        self._live = Live(Text(""), console=console, auto_refresh=False) if console.is_terminal else None
        self._said = ""
        self._end, self._wake = threading.Event(), threading.Event()
        self._last_lines_s = time.monotonic()
        self._thread = threading.Thread(target=self._show, name="display", daemon=True)

    def __enter__(self) -> Display:
        if self._live is not None:
            self._live.__enter__()
        self._thread.start()
        return self

    def __exit__(self, *exception: Any) -> None:
        if self._live is not None:
            self._live.update(Text(""), refresh=True)
            self._live.__exit__(*exception)

    def tell(self, text: str) -> None:
        """Show a line."""
        # A terminal that is gone (| head) must not end the campaign: rich leaves with SystemExit.
        with contextlib.suppress(OSError, SystemExit):
            self._console.print(Text(f"{time.strftime('%H:%M:%S')}  {text}"), soft_wrap=self._live is None)

    def wake(self) -> None:
        """Something has changed."""
        self._wake.set()

    def look(self) -> None:
        """The last look, in this thread."""
        self._end.set()
        self._wake.set()
        self._thread.join(timeout=10)
        with self._going_on():
            self._seen(campaign_status.read(self._folder))

    @contextlib.contextmanager
    def _going_on(self) -> Iterator[None]:
        """Whatever fails in a look, the campaign and the next look go on. What is unexpected is said once."""
        try:
            yield
        except (OSError, ValueError):
            pass
        except Exception as error:
            text = f"{type(error).__name__}: {error}"
            if text != self._said:
                self._said = text
                self.tell(f"the table cannot be shown ({text}): the campaign itself goes on")

    def _show(self) -> None:
        while not self._end.is_set():
            self._wake.wait(pause_s(self._folder))
            self._wake.clear()
            with contextlib.suppress(SystemExit), self._going_on():
                status = campaign_status.read(self._folder)
                self._seen(status)
                if self._live is not None:
                    self._live.update(campaign_status.table(status), refresh=True)
                elif time.monotonic() - self._last_lines_s > _LINES_EVERY_S:
                    self._last_lines_s = time.monotonic()
                    for row in status.rows:
                        if row.is_running:
                            self.tell(campaign_status.line(row))
