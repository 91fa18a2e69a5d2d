"""Every change that one start of a run makes to its folder, seen by an audit hook, and a kill at any one of them."""

from __future__ import annotations

import json
import os
import re
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from orchestrator.config import TrainConfig
from orchestrator.control import supervisor
from tests.training.traps import cut_files, die_of_cut_files, kill, opens_for_writing

# Python's name of the event → where among its arguments the path is that it makes or removes
_CHANGES = {"open": 0, "os.mkdir": 0, "os.rename": 1, "os.link": 1, "os.remove": 0, "os.rmdir": 0}
_TORN_NBYTES = 3


@dataclass(frozen=True)
class Change:
    """The ``nth`` time (from 1 on) that ``name``, a path in the run's folder, meets ``event``."""

    event: str
    name: str
    nth: int

    def __str__(self) -> str:
        return f"{self.event.removeprefix('os.')} {self.name}" + (f" (time {self.nth})" if self.nth > 1 else "")


def start(config: TrainConfig, at: Change | None, torn: bool, told: Path) -> None:
    """One start of a run as its command makes it, with one worker. Runs in a process of its own.

    It is killed right before the change ``at``; with ``torn``, which goes with an open, within the write that
    follows. If it comes to its end, ``told`` holds the changes it made, in order.
    """
    torch.set_num_threads(1)
    hook = _Hook(f"{config.storage}/{config.name}", at, torn)
    sys.addaudithook(hook)
    supervisor.run_in_process_group(config, lambda event: None)
    told.write_text(json.dumps([[c.event, c.name, c.nth] for c in list(hook.seen)]))


class _Hook:
    def __init__(self, folder: str, at: Change | None, torn: bool) -> None:
        self._folder, self._at, self._torn = folder, at, torn
        self._times = Counter[tuple[str, str]]()
        self.seen: list[Change] = []
        die_of_cut_files()

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        place = _CHANGES.get(event)
        if place is None or (event == "open" and not opens_for_writing(event, arguments)):
            return
        if not isinstance(arguments[place], str | os.PathLike):
            return
        path = os.fspath(arguments[place])
        if not path.startswith("/"):  # rmtree holds the folder open
            path = f"{Path(f'/proc/self/fd/{arguments[-1]}').readlink()}/{path}"
        if path != self._folder and not path.startswith(f"{self._folder}/"):
            return
        if event == "os.mkdir" and (Path(path).exists() or not Path(path).parent.exists()):
            return  # it changes nothing: there already, or to be tried again when the folder above is made
        name = re.sub(r"\.tmp-(probe-)?[0-9a-f]+$", r".tmp-\1", path[len(self._folder) + 1 :]) or "."
        self._times[event, name] += 1
        change = Change(event, name, self._times[event, name])
        self.seen.append(change)
        if change == self._at:
            if self._torn:
                cut_files(_TORN_NBYTES)
            else:
                kill()
