"""Where a worker is killed: by its own hand, at a named moment of a named step."""

from __future__ import annotations

import os
import resource
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from orchestrator.training.pulse import Phase, Pulse


class Moment(Enum):
    """What a worker does when it is killed."""

    EARLY = "before the first checkpoint"
    COMPUTE = "mid-step: batch is there, gradients are not"
    REDUCE = "mid-step: own gradients are there, not the others'"
    VALIDATE = "in a batch of a validation"
    DECISION = "after a plateau decision, before its checkpoint"
    FILE = "upload: within a file"
    FILES = "upload: between the files and the commit record"
    RECORD = "upload: right after the commit record"
    RESUME = "while a restart reads the checkpoint"


_PHASES = {
    Moment.EARLY: Phase.COMPUTE,
    Moment.COMPUTE: Phase.COMPUTE,
    Moment.REDUCE: Phase.REDUCE,
    Moment.VALIDATE: Phase.VALIDATE,
}


@dataclass(frozen=True)
class Trap:
    """Kills worker ``rank`` at ``moment`` of ``step`` (from 1 on).

    everyone: the other workers are killed with it, as when a machine is lost; else they are left to notice. nth: batch
    of the validation, from 1 on; nbytes: how much of a file is written.
    """

    moment: Moment
    step: int
    rank: int = 0
    everyone: bool = True
    nth: int = 1
    nbytes: int = 1 << 20

    def arm(self, rank: int, run: Path) -> tuple[Pulse, Callable[[dict[str, Any]], None]]:
        """Set it in this process, which is worker ``rank``: a pulse for the trainer, and a listener to its events."""
        if rank != self.rank:
            return Pulse(), lambda event: None
        if self.moment in _PHASES:
            return _TrapPulse(self), lambda event: None
        if self.moment is Moment.DECISION:
            return Pulse(), lambda event: kill(event["kind"] == "decision" and event["step"] == self.step)
        sys.addaudithook(_CheckpointHook(self, run / "checkpoints"))
        return Pulse(), lambda event: None


def kill(now: bool = True) -> None:
    """End this process as the kernel's out-of-memory killer would: nothing is flushed, nothing is said."""
    if now:
        os.kill(os.getpid(), signal.SIGKILL)


def cut_files(nbytes: int) -> None:
    """From now on this process is killed within the write that takes a file past ``nbytes``."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, nbytes))


def die_of_cut_files() -> None:
    """Python ignores the signal. To be called in the main thread."""
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def opens_for_writing(event: str, arguments: tuple[Any, ...]) -> bool:
    """Whether an audit event is an open that may change a file or make one."""
    return event == "open" and bool(arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND))


class _TrapPulse(Pulse):
    def __init__(self, trap: Trap) -> None:
        super().__init__()
        self._trap, self._left = trap, trap.nth

    def at(self, phase: Phase, step: int) -> None:
        super().at(phase, step)
        done = step if phase is Phase.VALIDATE else step + 1
        if phase is not Phase.VALIDATE:
            kill((phase, done) == (_PHASES[self._trap.moment], self._trap.step))

    def alive(self) -> None:
        """Before the first batch of a validation and in each."""
        super().alive()
        if self.phase is _PHASES[self._trap.moment] is Phase.VALIDATE and self.step == self._trap.step:
            self._left -= 1
            kill(self._left < 0)


class _CheckpointHook:
    """Sees this process read and write the files of ``checkpoints``."""

    def __init__(self, trap: Trap, checkpoints: Path) -> None:
        self._trap, self._checkpoints = trap, str(checkpoints)
        self._step, self._committed = f"{trap.step:09d}", False
        die_of_cut_files()

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        moment = self._trap.moment
        if event == "open" and isinstance(arguments[0], str | Path):
            path = os.fspath(arguments[0])
            folder, name = os.path.split(path)
            writes = opens_for_writing(event, arguments)
            if moment is Moment.RESUME:
                kill(not writes and name == "tensors.safetensors" and folder.startswith(self._checkpoints))
            elif moment is Moment.FILE and writes and folder.startswith(f"{self._checkpoints}/{self._step}"):
                cut_files(self._trap.nbytes)
            # Its folder is synced after a rename.
            kill(moment is Moment.RECORD and self._committed and path == self._checkpoints)
        elif event == "os.rename":
            folder, name = os.path.split(os.fspath(arguments[1]))
            commits = folder == self._checkpoints and name.startswith(self._step)
            kill(moment is Moment.FILES and commits)
            self._committed = self._committed or commits
