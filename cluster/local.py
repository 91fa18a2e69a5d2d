"""The launcher that runs a job in the background of this machine. The job starts or joins Ray as it does by hand.

log.txt         what it prints
process.json    its keeper, which starts the job and stays with it (``python -m cluster.local FOLDER``)
child.json      the job itself
ended.json      its exit code, once it has ended
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import Any

from cluster.launch import Job, State, Status
from orchestrator.masking import masked
from orchestrator.training.ownership import Process

_LOG, _KEEPER, _CHILD, _ENDED = "log.txt", "process.json", "child.json", "ended.json"
_START_S = 60.0
_ROOT = Path(__file__).parents[1]
STOPPED = (128 + signal.SIGINT, 128 + signal.SIGTERM)  # exit codes of a job that was asked to end


class Local:
    """The launcher."""

    def preview(self, job: Job, folder: Path) -> str:
        return f"cd {shlex.quote(job.directory)}\npython {masked(shlex.join(job.argv))} > {folder / _LOG} 2>&1 &\n"

    def submit(self, job: Job, folder: Path) -> dict[str, str]:
        path = os.pathsep.join(filter(None, [str(_ROOT), os.environ.get("PYTHONPATH")]))
        # A stop that comes before the keeper listens is kept for it.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        try:
            keeper = subprocess.Popen(
                [sys.executable, "-m", "cluster.local", str(folder), *job.argv],
                cwd=job.directory,
                env=os.environ | {"PYTHONPATH": path},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,  # it outlives this terminal
            )
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
        # The keeper says who keeps the job: one that an interrupted submission has started may have been first.
        until_s = time.monotonic() + _START_S
        while (found := _read(folder / _KEEPER)) is None:
            if keeper.poll() is not None or time.monotonic() > until_s:
                raise OSError(f"job {job.name!r} did not start: the machine is busy or short of memory")
            time.sleep(0.05)
        return {key: str(value) for key, value in found.items()}

    def status(self, job: Job, folder: Path) -> Status:
        process = _process(job.handle)
        is_gone = _is_gone(process)
        if (ended := _read(folder / _ENDED)) is not None:
            return status_of(int(ended["code"]))
        if is_gone:
            if (child := self._orphan(folder)) is not None:
                return Status(State.RUNNING, f"process {child.pid} of {child.host}, whose keeper was killed")
            return Status(State.LOST, "it was killed, or its machine was: the same command goes on")
        return Status(State.RUNNING, f"process {process.pid} of {process.host}")

    def log(self, job: Job, folder: Path) -> str:
        with suppress(FileNotFoundError):
            return (folder / _LOG).read_text(errors="replace")
        return ""

    def stop(self, job: Job, folder: Path) -> None:
        process = _process(job.handle)
        if (folder / _ENDED).exists():
            return
        if _is_gone(process):
            if (child := self._orphan(folder)) is not None:
                os.kill(child.pid, signal.SIGTERM)
        elif process.lives() is None:
            raise ValueError(f"job {job.name!r} runs on {process.host}: stop it there")
        else:
            os.kill(process.pid, signal.SIGTERM)

    def _orphan(self, folder: Path) -> Process | None:
        """The job itself, where it lives on without its keeper."""
        child = _read(folder / _CHILD)
        if child is None or not (process := _process(child)).lives():
            return None
        return process


def status_of(code: int) -> Status:
    """The status that an exit code of ours tells."""
    if code == 0:
        return Status(State.FINISHED)
    if code in STOPPED:
        return Status(State.STOPPED, f"exit code {code}: the same command goes on")
    return Status(State.FAILED, f"exit code {code}")


def _process(plain: Mapping[str, Any]) -> Process:
    return Process(**{**plain, "pid": int(plain["pid"])})


def _is_gone(process: Process) -> bool:
    """Whether it has ended; also with the machine, which was started again."""
    here = Process.of(os.getpid())
    return process.lives() is False or (process.host == here.host and process.boot != here.boot)


def _read(path: Path) -> dict[str, Any] | None:
    with suppress(FileNotFoundError):
        return dict(json.loads(path.read_text()))
    return None


def _write(path: Path, content: Mapping[str, Any]) -> bool:
    """Whole or not at all; whether it was not there before."""
    written = path.with_suffix(f".{os.getpid()}")
    written.write_text(json.dumps(content))
    try:
        path.hardlink_to(written)
        return True
    except FileExistsError:
        return False
    finally:
        written.unlink()


def main() -> int:
    """The keeper: starts the job, passes SIGTERM on, and writes down how it ended."""
    folder, argv = Path(sys.argv[1]), sys.argv[2:]
    child: subprocess.Popen[bytes] | None = None
    is_asked = False

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal is_asked
        is_asked = True
        if child is not None:
            with suppress(ProcessLookupError):
                child.send_signal(signal.SIGTERM)

    if not _write(folder / _KEEPER, asdict(Process.of(os.getpid()))):
        return 1  # another one keeps this job
    signal.signal(signal.SIGTERM, stop)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    code = 128 + signal.SIGTERM
    if not is_asked:
        nothing, both = subprocess.DEVNULL, subprocess.STDOUT
        with (folder / _LOG).open("ab") as log:
            child = subprocess.Popen([sys.executable, *argv], stdin=nothing, stdout=log, stderr=both)
        _write(folder / _CHILD, asdict(Process.of(child.pid)))
        if is_asked:  # while it was started
            child.terminate()
        code = child.wait()
    _write(folder / _ENDED, {"code": code if code >= 0 else 128 - code, "time": time.time()})
    return 0


if __name__ == "__main__":
    sys.exit(main())
