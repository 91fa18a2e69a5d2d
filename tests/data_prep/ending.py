"""Runs a preparation in a process that ends at a moment given by the name of what is being published."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]

# Kills its own process, or interrupts it.
CODE = """
import contextlib, functools, importlib, json, os, signal, sys
from orchestrator.storage import Storage

module, options, arguments, where, name, nth, sent = map(json.loads, sys.argv[1:])
publishing, create, link, seen = Storage.publishing, Storage.create, os.link, []

def is_mine(published):
    return name in published and not seen.append(published) and len(seen) == nth

@contextlib.contextmanager
def ending(self, published):
    mine = is_mine(published)
    with publishing(self, published) as stream:
        yield stream
        if mine and where == "inside":
            stream.flush()
            os.kill(os.getpid(), getattr(signal, sent))
    if mine and where == "after":
        os.kill(os.getpid(), getattr(signal, sent))

def ending_create(self, published, data):
    mine = is_mine(published)
    def ending_link(*arguments):
        if mine and where == "inside":
            os.kill(os.getpid(), getattr(signal, sent))
        link(*arguments)
    os.link = ending_link
    created = create(self, published, data)
    if mine and where == "after":
        os.kill(os.getpid(), getattr(signal, sent))
    return created

Storage.publishing, Storage.create = ending, ending_create
module = importlib.import_module(module)
module.prepare = functools.partial(module.prepare, **options)
sys.exit(module.main(arguments))
"""


def run_ending(
    module: str,
    arguments: Sequence[str],
    where: str,
    name: str,
    nth: int,
    sent: str = "SIGKILL",
    options: dict[str, int] | None = None,
) -> subprocess.CompletedProcess:
    """``where``: "inside" or "after" the ``nth`` publication whose name contains ``name``, or "never".

    ``options``: keyword arguments for the module's ``prepare``.
    """
    values = (module, options or {}, list(arguments), where, name, nth, sent)
    return subprocess.run(
        [sys.executable, "-c", CODE, *map(json.dumps, values)],
        cwd=ROOT,
        check=False,
        capture_output=True,
        text=True,
        timeout=120,
    )
