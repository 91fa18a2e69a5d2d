"""The launcher that runs a job in the background of this machine. The job starts or joins Ray as it does by hand.

    log.txt       what it prints
    ended.json    its exit code, once it has ended

``python -m cluster.local FOLDER`` is the process that starts the job and stays with it.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from types import FrameType

from cluster.launch import Job, State, Status
from orchestrator.training.ownership import Process

_LOG, _ENDED = "log.txt", "ended.json"
_ROOT = Path(__file__).parents[1]
STOPPED = (128 + signal.SIGINT, 128 + signal.SIGTERM)  # exit codes of a job that was asked to end


class Local:
    """The launcher."""

    def preview(self, job: Job, folder: Path) -> str:
        return f"cd {shlex.quote(job.directory)}\npython {shlex.join(job.argv)} > {folder / _LOG} 2>&1 &\n"

    def submit(self, job: Job, folder: Path) -> dict[str, str]:
        if (folder / "process.json").exists():  # whoever submitted it was ended before it could write the handle
            return dict(json.loads((folder / "process.json").read_text()))
        path = os.pathsep.join(filter(None, [str(_ROOT), os.environ.get("PYTHONPATH")]))
        # A stop that comes before the keeper listens is kept for it.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        try:
            process = subprocess.Popen(
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
        handle = {key: str(value) for key, value in asdict(Process.of(process.pid)).items()}
        (folder / "process.json").write_text(json.dumps(handle))
        return handle

    def status(self, job: Job, folder: Path) -> Status:
        ended = self._ended(folder)
        if ended is None and _process(job).lives() is False:
            ended = self._ended(folder)  # it may have ended between the two looks
            if ended is None:
                return Status(State.LOST, "it was killed, or its machine was: the same command goes on")
        if ended is None:
            return Status(State.RUNNING, f"process {job.handle['pid']} of {job.handle['host']}")
        return status_of(ended)

    def log(self, job: Job, folder: Path) -> str:
        with suppress(FileNotFoundError):
            return (folder / _LOG).read_text(errors="replace")
        return ""

    def stop(self, job: Job, folder: Path) -> None:
        process = _process(job)
        if self._ended(folder) is not None or process.lives() is False:
            return
        if process.lives() is None:
            raise ValueError(f"job {job.name!r} runs on {process.host}: stop it there")
        os.kill(process.pid, signal.SIGTERM)

    def _ended(self, folder: Path) -> int | None:
        with suppress(FileNotFoundError):
            return int(json.loads((folder / _ENDED).read_text())["code"])
        return None


def status_of(code: int) -> Status:
    """The status that an exit code of ours tells."""
    if code == 0:
        return Status(State.FINISHED)
    if code in STOPPED:
        return Status(State.STOPPED, f"exit code {code}: the same command goes on")
    return Status(State.FAILED, f"exit code {code}")


def _process(job: Job) -> Process:
    return Process(**{**job.handle, "pid": int(job.handle["pid"])})  # type: ignore[arg-type]


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

    signal.signal(signal.SIGTERM, stop)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    code = 128 + signal.SIGTERM
    if not is_asked:
        nothing, both = subprocess.DEVNULL, subprocess.STDOUT
        with (folder / _LOG).open("ab") as log:
            child = subprocess.Popen([sys.executable, *argv], stdin=nothing, stdout=log, stderr=both)
        if is_asked:  # while it was started
            child.terminate()
        code = child.wait()
    written = folder / f"{_ENDED}.new"
    written.write_text(json.dumps({"code": code if code >= 0 else 128 - code, "time": time.time()}))
    written.replace(folder / _ENDED)
    return 0


if __name__ == "__main__":
    sys.exit(main())
