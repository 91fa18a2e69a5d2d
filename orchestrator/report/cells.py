"""Tables as texts and links, for a page and for Markdown alike."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Link:
    """``href``: an address, a file's URI, or an anchor of the page; "" where nothing can be opened."""

    text: str
    href: str


@dataclass(frozen=True)
class Cell:
    """A text, and links below it. more: what unfolds under ``summary``. is_missing: there is nothing to show."""

    text: str
    links: tuple[Link, ...] = ()
    summary: str = ""
    more: tuple[str, ...] = ()
    is_missing: bool = False


@dataclass(frozen=True)
class Row:
    """As many cells as the table has columns. anchor: where links to the row lead, or ""."""

    cells: tuple[Cell, ...]
    anchor: str = ""


@dataclass(frozen=True)
class Table:
    key: str
    title: str
    columns: tuple[str, ...]
    rows: tuple[Row, ...]
    note: str = ""


def folder_uri(url: str) -> str:
    """What a browser opens; "" for a folder in an object store."""
    return Path(url).as_uri() if url.startswith("/") else ""
